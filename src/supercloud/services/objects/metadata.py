"""The metadata store as weed meets it: a few commands of the Redis protocol over a unix socket.

What weed was told is done is on the disk: many callers share one flush of the journal. An entry is
made by SET of a new key and ZADD of its name, so only the second waits (the first lies before it
in the journal); likewise DEL and ZREM. Any other SET waits itself.
Commands as weed 4.48's ``redis2`` store gives them (https://redis.io/docs/latest/commands/).
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from supercloud.model.errors import Invalid
from supercloud.services.objects.journal import SEGMENT_BYTES, Journal
from supercloud.services.objects.tables import (
    ADD,
    DELETE,
    REMOVE,
    SET,
    Change,
    Tables,
    from_bytes,
)

_MAX_REQUEST_BYTES: Final = 16 << 20
_MAX_ARGUMENTS: Final = 4096
_AT_ONCE: Final = 512  # records cleaned between two turns for others
_OK: Final = b"+OK\r\n"
_NIL: Final = b"$-1\r\n"

log = logging.getLogger("supercloud.services.objects.metadata")


class Metadata:
    """Tables and journal together; all methods on the loop that ``serve`` is called on.

    ``failed`` is told when the journal cannot be written: from then on nothing is acknowledged.
    """

    def __init__(self, journal: Journal, failed: Callable[[OSError], None]) -> None:
        self.journal, self.tables = journal, Tables()
        self._failed = failed
        self._pending: list[bytes] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._flushing = self._cleaning = False
        self._disk = ThreadPoolExecutor(1, "objects-journal")
        self._tasks: set[asyncio.Task[None]] = set()
        journal.replay(self._replayed)

    def _replayed(self, record: bytes) -> None:
        self.tables.apply(from_bytes(record))

    async def serve(self, path: str) -> asyncio.Server:
        """Listen at ``path``."""
        return await asyncio.start_unix_server(self._connected, path, limit=_MAX_REQUEST_BYTES)

    def make(self, change: Change) -> None:
        """Make a change; it is safe when ``flushed`` says so."""
        if self.tables.apply(change):
            self._pending.append(change.to_bytes())

    def forget(self, directory: bytes) -> None:
        """The entries right in a directory; weed must not run."""
        for name in self.tables.between(directory + b"\0", b"-", b"+", -1):
            self.make(Change(DELETE, directory + b"/" + name))
            self.make(Change(REMOVE, directory + b"\0", name))

    async def flushed(self) -> None:
        """Return when all that was made before is on the disk."""
        if not self._pending and not self._flushing:
            return
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        if not self._flushing:
            self._flushing = True
            self._spawn(self._flush())
        await done

    async def close(self) -> None:
        """Flush and end."""
        await self.flushed()
        self._disk.shutdown()
        self.journal.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            records, self._pending = self._pending, []
            waiting, self._waiting = self._waiting, []
            try:
                await loop.run_in_executor(self._disk, self._write, records)
            except OSError as error:  # nobody who waits gets an answer
                self._failed(error)
                return
            for done in waiting:
                if not done.cancelled():
                    done.set_result(None)
        self._flushing = False
        if not self._cleaning and self._worn():
            self._cleaning = True
            self._spawn(self._clean())

    def _write(self, records: list[bytes]) -> None:
        for record in records:
            self.journal.append(record)
        self.journal.flush()

    def _worn(self) -> bool:
        """Whether the journal is more than twice what it could be."""
        spare = self.journal.size_bytes - 2 * self.tables.live_bytes
        return spare > 2 * SEGMENT_BYTES and self.journal.oldest < self.journal.segment

    async def _clean(self) -> None:
        """Append again what still holds of the oldest segment, and drop it."""
        loop, seen = asyncio.get_running_loop(), set[tuple[bytes, bytes]]()
        number = self.journal.oldest
        records = await loop.run_in_executor(self._disk, lambda: list(self.journal.read(number)))
        for index, record in enumerate(records):
            change = from_bytes(record)
            place = (change.key, change.value if change.operation == ADD else b"")
            current = None if place in seen else self.tables.current(change)
            if current is not None:
                seen.add(place)
                self._pending.append(current.to_bytes())
            if index % _AT_ONCE == 0:
                await self.flushed()
        await self.flushed()
        await loop.run_in_executor(self._disk, self.journal.drop_oldest)
        self._cleaning = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _request(reader):
                writer.write(await self._answer(request))
                await writer.drain()
        except (OSError, EOFError, ValueError, Invalid) as error:
            log.info("a connection ended: %s", error)
        finally:
            writer.close()

    async def _answer(self, request: list[bytes]) -> bytes:
        command = _COMMANDS.get(request[0].upper())
        if command is None:
            return b"-ERR unknown command\r\n"
        try:
            return await command(self, request[1:])
        except (IndexError, ValueError, Invalid) as error:
            log.warning("%s: %s", request[0].decode(errors="replace"), error)
            return b"-ERR malformed\r\n"

    async def _get(self, arguments: list[bytes]) -> bytes:
        value = self.tables.values.get(arguments[0])
        return _NIL if value is None else _bulk(value)

    async def _set(self, arguments: list[bytes]) -> bytes:
        key, value = arguments[:2]
        waits = key in self.tables.values or not key.startswith(b"/")
        self.make(Change(SET, key, value))
        if waits:
            await self.flushed()
        return _OK

    async def _del(self, arguments: list[bytes]) -> bytes:
        for key in arguments:
            self.make(Change(DELETE, key))
            if not key.startswith(b"/"):
                await self.flushed()
        return b":%d\r\n" % len(arguments)

    async def _zadd(self, arguments: list[bytes]) -> bytes:
        key, names = arguments[0], arguments[3::2]
        if arguments[1].upper() != b"NX" or not names:
            raise Invalid("only ZADD key NX score member")
        for name in names:
            self.make(Change(ADD, key, name))
        await self.flushed()
        return b":%d\r\n" % len(names)

    async def _zrem(self, arguments: list[bytes]) -> bytes:
        for name in arguments[1:]:
            self.make(Change(REMOVE, arguments[0], name))
        await self.flushed()
        return b":%d\r\n" % (len(arguments) - 1)

    async def _zrangebylex(self, arguments: list[bytes]) -> bytes:
        key, low, high, *limit = arguments
        if limit and (limit[0].upper(), int(limit[1])) != (b"LIMIT", 0):
            raise Invalid("only LIMIT 0 count")
        found = self.tables.between(key, low, high, int(limit[2]) if limit else -1)
        return b"*%d\r\n" % len(found) + b"".join(map(_bulk, found))

    async def _ping(self, _arguments: list[bytes]) -> bytes:
        return b"+PONG\r\n"


_Command = Callable[[Metadata, list[bytes]], Coroutine[Any, Any, bytes]]
_COMMANDS: Final[dict[bytes, _Command]] = {
    b"GET": Metadata._get,  # noqa: SLF001  the table of its own methods
    b"SET": Metadata._set,  # noqa: SLF001
    b"DEL": Metadata._del,  # noqa: SLF001
    b"ZADD": Metadata._zadd,  # noqa: SLF001
    b"ZREM": Metadata._zrem,  # noqa: SLF001
    b"ZRANGEBYLEX": Metadata._zrangebylex,  # noqa: SLF001
    b"PING": Metadata._ping,  # noqa: SLF001
}


async def _request(reader: asyncio.StreamReader) -> list[bytes]:
    """The next command with its arguments; empty at the end."""
    head = await reader.readline()
    if not head:
        return []
    if head[:1] != b"*" or not 1 <= (count := int(head[1:])) <= _MAX_ARGUMENTS:
        raise Invalid("not a command")
    arguments, left = [], _MAX_REQUEST_BYTES
    for _ in range(count):
        head = await reader.readline()
        if head[:1] != b"$" or not 0 <= (size := int(head[1:])) <= left:
            raise Invalid("not an argument")
        left -= size
        arguments.append((await reader.readexactly(size + 2))[:-2])
    return arguments


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)
