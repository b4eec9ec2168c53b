"""Stillness for a checkpoint of the platform, asked for by the host over the identity port.

``pause``: all EEs are frozen, by their control group; so no nested VM's processor is inside its
guest when the platform is stopped a moment later, and a restored platform runs none of them before
it is itself again. ``resume``: they go on. With a seed it is said to a platform that was restored,
which then makes anew what must not be as it was: random numbers, the time, MACs, connections.

The host takes no checkpoint without our ``paused``. When it forgets us they go on by themselves.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, Literal

from supercloud.model.errors import Invalid, SupercloudError
from supercloud.model.records import dataclass, field
from supercloud.upper.platform.agent import cgroups, identity
from supercloud.upper.platform.agent.processes import run
from supercloud.wire.codec import Limit, decode

LONGEST_S: Final = 60.0
SYNC_S: Final = 5.0
FREEZE_S: Final = 10.0
_LOOK_S: Final = 0.001
_REOPEN_S: Final = 1.0
_MAX_BYTES: Final = 4096

log = logging.getLogger("supercloud.agent.quiet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A line of the host's. ``seed`` and what follows: for a platform that was restored."""

    version: Annotated[int, Limit(ge=1, le=1)]
    do: Literal["pause", "resume"]
    nonce: Annotated[str, Limit(pattern=r"[0-9a-f]{16}")]
    seed: Annotated[str, Limit(pattern=r"([0-9a-f]{128})?")] = ""
    time_s: float = 0.0
    macs: Annotated[list[Annotated[str, Limit(pattern=identity.MAC)]], Limit(max_length=4)] = field(
        default_factory=list
    )


class Quiet:
    """Listens at ``port`` (a descriptor; -1: it is opened here). ``settled`` is awaited first.

    ``restored`` is called in a platform that was restored, once it is itself again.
    """

    def __init__(
        self, settled: Callable[[], Awaitable[Any]], restored: Callable[[], None], port: int = -1
    ) -> None:
        self._settled, self._restored, self._port = settled, restored, port
        self._data = b""
        self._forgotten: asyncio.TimerHandle | None = None
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(16)

    async def run(self) -> None:
        """Never returns, where there is such a port."""
        self._thaw()  # an agent before us may have ended in between
        try:
            self._listen()
        except (Invalid, OSError) as error:
            log.info("no checkpoints of this platform: %s", error)
            return
        while True:
            line = await self._queue.get()
            try:
                await self._do(_parse(line))
            except (SupercloudError, OSError) as error:
                log.warning("not understood at the identity port: %s", error)

    def _listen(self) -> None:
        if self._port < 0:
            self._port = os.open(identity.port(), os.O_RDWR | os.O_CLOEXEC)
        os.set_blocking(self._port, False)
        asyncio.get_running_loop().add_reader(self._port, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._port, _MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        loop = asyncio.get_running_loop()
        if not data:  # nobody is at the other end now
            loop.remove_reader(self._port)
            loop.call_later(_REOPEN_S, self._listen)
            return
        *lines, self._data = (self._data + data)[-2 * _MAX_BYTES :].split(b"\n")
        for line in lines:
            with contextlib.suppress(asyncio.QueueFull):
                self._queue.put_nowait(line)

    async def _do(self, asked: Asked) -> None:
        if asked.do == "pause":
            await self._pause(asked)
        elif asked.seed:
            await self._become(asked)
        else:
            self._thaw()

    def _thaw(self) -> None:
        if self._forgotten is not None:
            self._forgotten.cancel()
        with contextlib.suppress(OSError):
            cgroups.freeze_all(False)

    async def _pause(self, asked: Asked) -> None:
        """Acknowledge, and be sure that it ends."""
        if self._forgotten is not None:  # of an earlier one, which would cut this one short
            self._forgotten.cancel()
        try:
            await self._settled()
            with contextlib.suppress(TimeoutError):  # so that little is left to write in the pause
                await asyncio.wait_for(asyncio.to_thread(os.sync), SYNC_S)
            cgroups.freeze_all(True)
            async with asyncio.timeout(FREEZE_S):
                while not cgroups.all_are_frozen():  # noqa: ASYNC110 -- the kernel does not call
                    await asyncio.sleep(_LOOK_S)
        except (SupercloudError, OSError, TimeoutError) as error:
            log.warning("no pause: %s", error)
            self._thaw()
            self._say(f"refused {asked.nonce}")
            return
        self._forgotten = asyncio.get_running_loop().call_later(LONGEST_S, self._thaw)
        self._say(f"paused {asked.nonce}")

    async def _become(self, asked: Asked) -> None:
        """What ``identity.Waiting.become`` does for a clone, in one that goes on."""
        identity.reseed(bytes.fromhex(asked.seed))
        time.clock_settime(time.CLOCK_REALTIME, asked.time_s)
        identity.set_macs(asked.macs)
        self._thaw()
        self._say(f"ready {asked.nonce}")
        with contextlib.suppress(SupercloudError, OSError):  # who was there may be another now
            await run("ip", "neigh", "flush", "all")
        self._restored()

    def _say(self, line: str) -> None:
        os.write(self._port, f"{line}\n".encode())


def _parse(untrusted: bytes) -> Asked:
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid("no JSON") from error
    return decode(Asked, value, "identity port", ignore_unknown=True)
