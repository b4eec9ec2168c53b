"""An EE's output: read from a FIFO, kept in two files of bounded size, followed live.

The FIFO is opened for reading *and* writing at both ends, so neither end ever sees the other gone:
an EE whose agent is restarting waits when the FIFO is full, and loses nothing.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator

MAX_FILE_BYTES = 2 << 20
READ_BYTES = 1 << 16
FIFO_BYTES = 1 << 18
FOLLOW_QUEUE = 256
MAX_TAIL_BYTES = 1 << 20  # of a request for so many lines
_F_SETPIPE_SZ = 1031


class Log:
    """``path`` and ``path.1`` hold at most twice ``max_bytes``; the newest is in ``path``."""

    def __init__(self, path: str, max_bytes: int = MAX_FILE_BYTES) -> None:
        self.path, self._max_bytes = path, max_bytes
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- closed by ``close``
        self._followers: set[asyncio.Queue[bytes | None]] = set()

    def append(self, data: bytes) -> None:
        """Store and hand to the followers; one that is too slow is cut off, not waited for."""
        self._file.write(data)
        for queue in list(self._followers):
            if queue.full():
                self._followers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(data)
        if self._file.tell() > self._max_bytes:
            self._rotate()

    def _rotate(self) -> None:
        self._file.close()
        os.replace(self.path, f"{self.path}.1")
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def tail(self, lines: int) -> Iterator[bytes]:
        """The last lines (-1: all that is kept), in pieces."""
        paths = [path for path in (f"{self.path}.1", self.path) if os.path.exists(path)]
        if lines >= 0:
            data = b"".join(_end_of(path, MAX_TAIL_BYTES) for path in paths)
            yield last_lines(data[-MAX_TAIL_BYTES:], lines)
            return
        for path in paths:
            with open(path, "rb") as file:
                while data := file.read(READ_BYTES):
                    yield data

    async def follow(self, lines: int) -> AsyncIterator[bytes]:
        """What is kept, then what comes, until the log is closed."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(FOLLOW_QUEUE)
        self._followers.add(queue)
        try:
            for data in list(self.tail(lines)):
                yield data
            while (new := await queue.get()) is not None:
                yield new
        finally:
            self._followers.discard(queue)

    def close(self) -> None:
        """End the followers."""
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)
        self._followers.clear()
        self._file.close()


def _end_of(path: str, limit_bytes: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(-min(limit_bytes, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read()


def last_lines(data: bytes, lines: int) -> bytes:
    """The end of ``data`` with at most that many lines; all of it when negative."""
    if lines < 0:
        return data
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept)


class Fifo:
    """Pumps a FIFO into a log, in the event loop."""

    def __init__(self, path: str, log: Log, owner: int) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        os.chown(path, owner, owner)  # so that a program may open /dev/stderr anew
        self._log = log
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(self.descriptor, _F_SETPIPE_SZ, FIFO_BYTES)
        self._path = path
        asyncio.get_running_loop().add_reader(self.descriptor, self._pump)

    def writer(self) -> int:
        """A descriptor of its own, blocking, for the EE."""
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def _pump(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._log.append(os.read(self.descriptor, READ_BYTES))

    def close(self) -> None:
        """Take what is left and stop."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._log.append(os.read(self.descriptor, READ_BYTES))
        asyncio.get_running_loop().remove_reader(self.descriptor)
        os.close(self.descriptor)
