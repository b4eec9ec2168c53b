"""A VM's serial console: QEMU's socket on one side, the log and its viewers on the other."""

import asyncio
import contextlib

from supercloud.model.errors import BadState
from supercloud.upper.platform.agent.logs import Log

READ_BYTES = 1 << 16
RECONNECT_S = 0.5


class Console:
    """Reads for as long as it is open, so that the guest is never held up by its output."""

    def __init__(self, path: str, log: Log) -> None:
        self._path, self._log = path, log
        self._writer: asyncio.StreamWriter | None = None
        self._there = asyncio.Event()
        self._task = asyncio.ensure_future(self._pump())

    async def _pump(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
                self._there.set()
                while data := await reader.read(READ_BYTES):
                    self._log.append(data)
            except OSError:
                pass  # QEMU is not there yet, or no more
            self._writer = None
            self._there.clear()
            await asyncio.sleep(RECONNECT_S)

    async def connected(self) -> None:
        """Return when what a VM says is read: QEMU keeps nothing for whoever comes later."""
        await self._there.wait()

    async def write(self, data: bytes) -> None:
        """What somebody types; BadState when no VM listens."""
        if self._writer is None:
            raise BadState("the machine is not running")
        self._writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def close(self) -> None:
        """Stop reading."""
        self._task.cancel()
        if self._writer:
            self._writer.close()
