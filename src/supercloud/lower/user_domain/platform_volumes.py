"""Volumes of a platform that are of one moment with its memory: snapshots taken, gone back to.

Its machine stands still meanwhile (``vmm.moment``) and says which disks it has: those, and no
others, are in the state that is saved. A restored one finds them again before it goes on, in the
same slots, each as its snapshot has it. They are taken back whenever it is made, so what an attempt
that failed wrote to them is in none that follows.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

from supercloud.lower.user_domain.volumes import Volumes
from supercloud.model.errors import Permanent, SupercloudError
from supercloud.model.records import dataclass
from supercloud.wire.checkpoints import GoesBack, Slot
from supercloud.wire.codec import Limit, Name, decode
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.volumes import VolumeSnapshot

TAKEN: Final = b"1"
"""What its monitor is sent when all have their snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Disk:
    volume: Name
    slot: Slot


@dataclass(frozen=True, slots=True, kw_only=True)
class _Still:
    disks: Annotated[list[_Disk], Limit(max_length=VOLUME_SLOTS)]


class Moment:
    """Of one checkpoint. ``theirs`` is the monitor's end; ``slots`` are known when it has gone on.

    ``error`` is why not all volumes have their snapshot.
    """

    def __init__(self, volumes: Volumes, platform: str, snapshot: str) -> None:
        self._volumes, self._platform, self._snapshot = volumes, platform, snapshot
        self._ours, self.theirs = socket.socketpair()
        self._is_told = False
        self.slots: dict[str, int] = {}
        self.error: SupercloudError | None = None

    async def take(self, untrusted: dict[str, Any]) -> None:
        """Its machine stands still: let it go on when all of its volumes have the snapshot.

        Its monitor says so once; whatever more it says is no moment.
        """
        if self._is_told:
            return
        self._is_told = True
        try:
            told = decode(_Still, untrusted, "still", ignore_unknown=True)
            slots = {disk.volume: disk.slot for disk in told.disks}
            for name, slot in slots.items():
                self._volumes.check_in(name, self._platform, slot)
            await self._snapshots(sorted(slots))
        except SupercloudError as error:
            self.error = error
            self.close()
            return
        self.slots = slots
        with contextlib.suppress(OSError):  # it has not waited, and says so
            self._ours.send(TAKEN, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    async def _snapshots(self, names: Sequence[str]) -> None:
        asked = [VolumeSnapshot(name=name, snapshot=self._snapshot) for name in names]
        done = await asyncio.gather(*map(self._volumes.snapshot, asked), return_exceptions=True)
        for name, status in zip(names, done, strict=True):
            if isinstance(status, BaseException):
                raise status
            if self._snapshot not in status.snapshots:
                raise Permanent(f"volume {name} was not given the snapshot {self._snapshot}")

    def close(self) -> None:
        """Over: what has not been said by now never will be."""
        self._ours.close()
        self.theirs.close()


async def go_back(
    volumes: Volumes, platform: str, wanted: Sequence[GoesBack]
) -> list[tuple[dict[str, Any], int]]:
    """A plug and a socket for each, the caller's: they are the platform's from here on.

    BadState when one is not free, NotFound without its snapshot; then none is the platform's.
    """
    await volumes.platform_ended(platform)  # an earlier machine of that name
    given: list[tuple[dict[str, Any], int]] = []
    async with AsyncExitStack() as undo:
        undo.push_async_callback(volumes.platform_ended, platform)
        for item in wanted:
            descriptor = await volumes.go_back(item, platform)
            given.append((_plug(item), descriptor))
            undo.callback(os.close, descriptor)
        undo.pop_all()
    return given


def _plug(item: GoesBack) -> dict[str, Any]:
    name = item.volume
    return {"volume": name, "mode": "nbd", "export": name, "slot": item.slot}
