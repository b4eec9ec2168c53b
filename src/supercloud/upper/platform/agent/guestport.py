"""The port ``supercloud.identity`` of a nested VM: where it waits to be told who it is.

An image says of itself (``ImageRef.identity``) that its guest opens this port before its kernel's
random generator has been seeded and before it has looked at its networks, says ``waiting``, and
reads one line::

    1 SEED TIME        64 bytes in hexadecimal to mix in; seconds since the epoch

Then it loads its virtio-rng driver, which takes what its generator starts from out of ours. So a
guest that is stopped there can go on in many copies, each of which is another. Nothing is asked of
it in return: a guest that says it waits and does not harms itself only.

Later it may go on reading: such a line comes again whenever it was stopped for longer than a moment
(it was restored from a checkpoint, or its platform was), and whenever another agent takes it up.
"""

import asyncio
import os
import socket
import time
from typing import Final

from supercloud.model.errors import Temporary

NAME: Final = "supercloud.identity"
VERSION: Final = 1
_WAITING: Final = b"waiting\n"
_SEED_BYTES: Final = 64

DEVICES: Final = (
    "-device", "virtio-serial-pci", "-device", f"virtserialport,chardev=identity,name={NAME}",
)  # fmt: skip


class GuestPort:
    """Our end of it, at ``path``; one connection at a time, which ``close`` ends."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has been told, or is being."""
        return self._socket is not None

    async def until_waiting(self, timeout_s: float) -> None:
        """Return when the guest waits; Temporary when it does not come to that in time."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(self._path)
                try:
                    await reader.readuntil(_WAITING)
                finally:
                    writer.close()
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
            raise Temporary("the guest does not wait for an identity") from error

    def tell(self) -> None:
        """Say it; the guest reads it when it comes to that. Does not wait."""
        line = f"{VERSION} {os.urandom(_SEED_BYTES).hex()} {int(time.time())}\n"
        self.close()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(self._path)
            self._socket.send(line.encode())
        except OSError as error:
            raise Temporary(f"no way to the guest's identity port: {error}") from error

    def close(self) -> None:
        """Let go of it."""
        if self._socket:
            self._socket.close()
            self._socket = None
