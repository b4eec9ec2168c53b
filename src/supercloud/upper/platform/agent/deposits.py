"""Files that the host laid down at the end of the scratch disk, at the agent's own asking.

A pull over the network costs the platform's processor ten times as much. What lies there is
ciphertext: the disk is the provider's. Whether it is what was asked for, its hash says.
"""

import asyncio
import base64
import contextlib
import fcntl
import logging
import math
import mmap
import os
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from supercloud.model.errors import Busy, NotFound, Permanent, SupercloudError, Unsupported
from supercloud.trust.libcrypto import Deciphering
from supercloud.upper.platform.agent import devicemapper
from supercloud.upper.platform.agent.bootdata import disk
from supercloud.upper.platform.agent.scratch import SERIAL
from supercloud.wire.messages import Blob, Deposited
from supercloud.wire.peer import ConnectionLost
from supercloud.wire.places import deposit_at

WORTH_BYTES = 256 << 10  # what is smaller comes as quickly by itself
AGAIN_S = (30.0, 600.0)  # the first and the longest pause after one that failed
_PAUSE_FACTOR = 4
_PIECE_BYTES = 1 << 20
_ALIGNMENT = 4096
_BLKDISCARD = 0x1277

log = logging.getLogger("supercloud.agent.deposits")

Ask = Callable[[Blob], Awaitable[Deposited]]
Take = Callable[[memoryview], None]


class Deposits:
    """``ask`` has the host lay down a file, as much as there is room for."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._forgone = False
        self._not_before_s, self._pause_s = 0.0, AGAIN_S[0]

    async def get(self, blob: Blob, take: Take, taken: Callable[[], int]) -> None:
        """Give ``take`` what of the blob comes so, from where ``taken`` says that it is.

        Whatever goes wrong, the rest is to be had in another way.
        """
        async with self._lock:
            while blob.size_bytes - taken() > WORTH_BYTES and self._may_ask():
                try:
                    await self._round(replace(blob, offset_bytes=taken()), take)
                    self._pause_s = AGAIN_S[0]
                except (Busy, ConnectionLost) as error:  # not now, but the next time
                    log.info("%s does not come by the disk now: %s", blob.digest, error)
                    return
                except (SupercloudError, OSError) as error:
                    log.info("%s does not come by the disk: %s", blob.digest, error)
                    self._failed(error)

    def connected(self) -> None:
        """There is a new connection: who is asked now may have what was missing until now."""
        self._not_before_s, self._pause_s = 0.0, AGAIN_S[0]

    def forgo(self) -> None:
        """Ask for no more, ever: what came was not what was asked for."""
        self._forgone = True

    def _may_ask(self) -> bool:
        return not self._forgone and time.monotonic() >= self._not_before_s

    def _failed(self, error: SupercloudError | OSError) -> None:
        """Not again over this connection where there is no such thing; else after a while.

        An older control plane or host answers NotFound, for it knows no such method.
        """
        if isinstance(error, NotFound | Unsupported):
            self._not_before_s = math.inf
            return
        self._not_before_s = time.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * _PAUSE_FACTOR, AGAIN_S[1])

    async def _round(self, wanted: Blob, take: Take) -> None:
        device = disk(SERIAL)
        at = deposit_at(devicemapper.size_bytes(device))
        if not at:
            raise NotFound("the scratch disk is too small")
        there = await self._ask(wanted)
        if not 0 < there.size_bytes <= wanted.size_bytes - wanted.offset_bytes:
            raise Permanent(f"{there.size_bytes} bytes were laid down")
        key = base64.b64decode(there.key_base64)
        reading = asyncio.ensure_future(
            asyncio.to_thread(_read, device, at, there.size_bytes, key, take)
        )
        try:
            await asyncio.shield(reading)
        except asyncio.CancelledError:
            await asyncio.wait({reading})  # it writes to the caller's file
            raise


def _read(device: str, at: int, size_bytes: int, key: bytes, take: Take) -> None:
    """Past the kernel's cache, which knows nothing of what the host writes."""
    descriptor = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, _PIECE_BYTES) as buffer, Deciphering(key) as cipher:
            done = 0
            while done < size_bytes:
                wanted = min(_PIECE_BYTES, size_bytes - done)
                whole = -(-wanted // _ALIGNMENT) * _ALIGNMENT
                with memoryview(buffer) as view, view[:whole] as part:
                    if os.preadv(descriptor, [part], at + done) != whole:
                        raise Permanent("the scratch disk ended early")
                cipher.apply(buffer, wanted)
                with memoryview(buffer) as view, view[:wanted] as part:
                    take(part)
                done += wanted
        # so that it takes no room, there and in checkpoints
        whole = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _BLKDISCARD, struct.pack("=QQ", at, whole))
    finally:
        os.close(descriptor)
