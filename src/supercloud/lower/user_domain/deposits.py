"""Files for a platform by way of its scratch disk: much cheaper for its processor than a network.

What comes is ciphertext under a key that the platform's agent gets over its own link; here it is
bytes, written where the agent leaves room for them (``wire.places``).
"""

import logging
import os
from collections.abc import Callable

from supercloud.lower.user_domain import parts
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.model.errors import BadState, Busy, Invalid, NoResources
from supercloud.wire.codec import encode
from supercloud.wire.host import Deposit, PlatformSpec
from supercloud.wire.messages import Empty, Implementation
from supercloud.wire.peer import Call, Stream
from supercloud.wire.places import deposit_at

log = logging.getLogger("supercloud.lower.user_domain.deposits")


class Deposits:
    """Into the disks of ``platforms``; ``is_split``: whether one writes over its disk, not to it.

    It reads there as well, and what it has discarded there hides what is laid down below.
    """

    def __init__(self, platforms: Platforms, is_split: Callable[[str], bool]) -> None:
        self._platforms, self._is_split = platforms, is_split
        self._written: set[str] = set()

    def methods(self) -> dict[str, Implementation]:
        """Of the host wire."""
        return {"platform.deposit": self.deposit}

    async def deposit(self, call: Call, asked: Deposit) -> Empty:
        """Write what comes. NotFound, BadState: it does not run; NoResources: its disk is small.

        Busy while a checkpoint of it is taken, or another file is laid down.
        """
        record = self._platforms.record(asked.platform)
        if record.state != "running":
            raise BadState(f"platform {asked.platform} is {record.state}")
        at = deposit_at(parts.whole_pages(record.spec.scratch_bytes))
        if not at:
            raise NoResources(f"the scratch disk of {asked.platform} is too small for that")
        if self._is_split(asked.platform):
            raise Busy(f"a checkpoint of {asked.platform} is being taken")
        if asked.platform in self._written:
            raise Busy(f"another file is being laid down for {asked.platform}")
        self._written.add(asked.platform)
        try:
            await self._lay_down(call, asked, record.spec, at)
        finally:
            self._written.discard(asked.platform)
        log.info("%d bytes were laid down for %s", asked.size_bytes, asked.platform)
        return Empty()

    async def _lay_down(self, call: Call, asked: Deposit, spec: PlatformSpec, at: int) -> None:
        disk = await self._platforms.assembly.make_disk(spec)
        try:
            await _write(call.accept(encode(Empty())), disk, at, asked.size_bytes)
        finally:
            os.close(disk)


async def _write(stream: Stream, disk: int, at: int, size_bytes: int) -> None:
    count = 0
    async for data in stream.chunks():
        if count + len(data) > size_bytes:
            raise Invalid(f"more than the {size_bytes} bytes that were to come")
        rest = memoryview(data)
        while rest:
            written = os.pwrite(disk, rest, at + count)
            rest, count = rest[written:], count + written
    if count < size_bytes:
        raise Invalid(f"{count} bytes came of {size_bytes}")
