"""The store on SQLite: one writer thread that commits concurrent callers' changes together.

Every commit is durable (WAL, ``synchronous=FULL``) and costs one fsync, whatever is in it; so all
changes that are waiting when a commit ends go into the next one (group commit). The rows are few
and small and are mirrored in memory as of the last commit: reading costs no query. The mirror is
touched by the event loop's thread only, the connection and ``_Writer`` by the writer thread only.
"""

import asyncio
import bisect
import contextlib
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from supercloud.control.store.base import Change, Compacted, Conflict, Row, check
from supercloud.control.store.migrations import MIGRATIONS, migrate
from supercloud.model.errors import Permanent, Temporary

KEPT_CHANGES = 8192
"""Changes that a new watch may still ask for; also how far a watch may fall behind."""
MAX_BATCH = 1024
LOCKED_S = 0.5
"""How long to wait for another process to let the file go."""
IDLE_S = 0.5
"""After so long without a change the log is written back: its flushes then delay nobody."""
_PRAGMAS = (
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "cache_size=-2048",
    "wal_autocheckpoint=8192",  # pages: under load, seldom enough not to be seen in a p99
)
_CHUNKS = (64, 8, 1)  # rows to a statement: few, long statements give up the GIL seldom


@dataclass(slots=True, eq=False)
class _Operation:
    key: str
    value: bytes | None  # None deletes
    version: int
    future: "asyncio.Future[int]"
    outcome: int | Exception = 0


_Batch = list[_Operation]
_Changes = list[Change]


class _Writer:
    """What the writer thread owns: the connection and each row's version."""

    def __init__(self, connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
        self.connection = connection
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        migrate(connection, migrations)
        self.versions: dict[str, int] = dict(connection.execute("SELECT key, version FROM rows"))
        self.unwritten = True
        self.revision: int = connection.execute("SELECT revision FROM counter").fetchone()[0]

    def write_back(self) -> None:
        """Bring the log into the database file; its file stays, for writing over it is cheaper."""
        self.unwritten = False
        with contextlib.suppress(sqlite3.Error):  # what is in the log is durable all the same
            self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def rows(self) -> list[Row]:
        found = self.connection.execute("SELECT key, value, version FROM rows ORDER BY key")
        return [Row(*columns) for columns in found]

    def commit(self, batch: _Batch) -> _Changes:
        """Decide every operation, write all that are allowed in one transaction."""
        changes: _Changes = []
        staged: dict[str, Row | None] = {}
        for operation in batch:
            change = self._decide(operation, staged, self.revision + len(changes) + 1)
            if change is not None:
                changes.append(change)
                staged[change.key] = change.row
        if changes:
            self._write(staged, self.revision + len(changes))
        return changes

    def _decide(
        self, operation: _Operation, staged: dict[str, Row | None], revision: int
    ) -> Change | None:
        key = operation.key
        if key in staged:
            row = staged[key]
            found = row.version if row else 0
        else:
            found = self.versions.get(key, 0)
        if found != operation.version:
            operation.outcome = Conflict(key, operation.version, found)
            return None
        operation.outcome = revision
        new = None if operation.value is None else Row(key, operation.value, revision)
        return Change(revision, key, new)

    def _write(self, staged: dict[str, Row | None], revision: int) -> None:
        puts = [row for row in staged.values() if row is not None]
        gone = [key for key, row in staged.items() if row is None]
        connection = self.connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            _insert(connection, puts)
            connection.executemany("DELETE FROM rows WHERE key = ?", [(key,) for key in gone])
            connection.execute("UPDATE counter SET revision = ?", (revision,))
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # the first error is the one to tell
                connection.execute("ROLLBACK")
            raise
        self.revision, self.unwritten = revision, True
        self.versions.update((row.key, row.version) for row in puts)
        for key in gone:
            self.versions.pop(key, None)


def _open(path: Path, migrations: Sequence[str]) -> _Writer:
    path.touch(mode=0o600, exist_ok=True)
    connection = sqlite3.connect(
        path, timeout=LOCKED_S, isolation_level=None, check_same_thread=False
    )
    try:
        return _Writer(connection, migrations)
    except BaseException:
        connection.close()
        raise


def _insert(connection: sqlite3.Connection, rows: list[Row]) -> None:
    start = 0
    for size in _CHUNKS:
        places = ", ".join(["(?, ?, ?)"] * size)
        statement = f"INSERT OR REPLACE INTO rows (key, value, version) VALUES {places}"  # noqa: S608 - places only
        while len(rows) - start >= size:
            part = rows[start : start + size]
            connection.execute(
                statement, [item for row in part for item in (row.key, row.value, row.version)]
            )
            start += size


class SqliteWatch:
    """A reader's queue of changes."""

    def __init__(self, prefix: str, forget: "set[SqliteWatch]") -> None:
        """``forget`` is the set of watches to leave when this one is closed."""
        self._prefix, self._forget = prefix, forget
        self._queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._compacted = self._closed = False

    def offer(self, change: Change) -> None:
        """Take the change if it is under the prefix."""
        if not change.key.startswith(self._prefix):
            return
        if self._queue.qsize() >= KEPT_CHANGES:
            self._compacted = True
            self.close()
            return
        self._queue.put_nowait(change)

    def close(self) -> None:
        """Stop watching."""
        if not self._closed:
            self._closed = True
            self._forget.discard(self)
            self._queue.put_nowait(None)

    def __aiter__(self) -> Self:
        """Iterate over the changes."""
        return self

    async def __anext__(self) -> Change:
        """The next change."""
        change = None if self._closed and self._queue.empty() else await self._queue.get()
        if change is not None:
            return change
        if self._compacted:
            raise Compacted(f"the watch of {self._prefix!r} fell {KEPT_CHANGES} changes behind")
        raise StopAsyncIteration


class SqliteStore:
    """A :class:`supercloud.control.store.base.Store` in one file. Open it with :meth:`open`."""

    def __init__(self, writer: _Writer) -> None:
        """Use :meth:`open`."""
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._rows = {row.key: row for row in writer.rows()}
        self._keys = sorted(self._rows)
        self._revision = writer.revision
        self._ring: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self._oldest = self._revision  # watches may start from here on
        self._watches: set[SqliteWatch] = set()
        self._pending: _Batch = []
        self._inbox: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()
        self._closed = False

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[str] = MIGRATIONS) -> Self:
        """The store in the file ``path``, made if missing (mode 0600), migrated if old.

        Raises Permanent when another process has it open, or a newer release wrote it.
        """
        try:
            writer = await asyncio.to_thread(_open, path, migrations)
        except sqlite3.Error as error:
            raise Permanent(f"the store {path} cannot be opened: {error}") from error
        return cls(writer)

    @property
    def revision(self) -> int:
        """The revision of the last change."""
        return self._revision

    async def get(self, key: str) -> Row | None:
        """The row, or None."""
        return self._rows.get(key)

    async def list(self, prefix: str) -> tuple[list[Row], int]:
        """The rows under ``prefix`` by key, and the revision that they are of."""
        start = bisect.bisect_left(self._keys, prefix)
        found = []
        for key in self._keys[start:]:
            if not key.startswith(prefix):
                break
            found.append(self._rows[key])
        return found, self._revision

    async def put_if_version(self, key: str, value: bytes, version: int) -> int:
        """Write the row if it is of ``version``; its new version, once that is on the disk."""
        check(key, value)
        return await self._submit(key, value, version)

    async def delete_if_version(self, key: str, version: int) -> int:
        """Delete the row if it is of ``version``; the revision, once that is on the disk."""
        check(key)
        return await self._submit(key, None, version)

    def watch(self, prefix: str, from_revision: int) -> SqliteWatch:
        """Changes under ``prefix`` after ``from_revision``; Compacted when they are forgotten."""
        if not self._oldest <= from_revision <= self._revision:
            raise Compacted(f"changes are known from revision {self._oldest}, not {from_revision}")
        watch = SqliteWatch(prefix, self._watches)
        for change in self._ring:
            if change.revision > from_revision:
                watch.offer(change)
        self._watches.add(watch)
        return watch

    async def close(self) -> None:
        """Commit what is pending, stop the writer, close the file and all watches."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.sleep(0)  # lets the last outcomes reach their callers
        for watch in list(self._watches):
            watch.close()
        self._writer.connection.close()

    async def _submit(self, key: str, value: bytes | None, version: int) -> int:
        if self._closed:
            raise Temporary("the store is closed")
        future: asyncio.Future[int] = self._loop.create_future()
        if not self._pending:
            # Whoever else runs in this round of the loop gets into the same commit.
            self._loop.call_soon(self._flush)
        self._pending.append(_Operation(key, value, version, future))
        return await future

    def _flush(self) -> None:
        if self._pending:
            self._inbox.put(self._pending)
            self._pending = []

    # -- the writer thread

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            stop = self._fill(batch)
            try:
                changes = self._writer.commit(batch)
            except sqlite3.Error as error:
                changes = []
                for operation in batch:
                    operation.outcome = Temporary(f"the store cannot be written: {error}")
            self._tell(batch, changes)
            if stop:
                return

    def _next_batch(self) -> _Batch | None:
        try:
            return self._inbox.get(timeout=IDLE_S if self._writer.unwritten else None)
        except queue.Empty:
            self._writer.write_back()
            return self._inbox.get()

    def _fill(self, batch: _Batch) -> bool:
        while len(batch) < MAX_BATCH:
            try:
                more = self._inbox.get_nowait()
            except queue.Empty:
                return False
            if more is None:
                return True
            batch += more
        return False

    def _tell(self, batch: _Batch, changes: _Changes) -> None:
        # A loop that was closed under us (a killed test) has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, batch, changes)

    # -- back in the loop's thread

    def _settle(self, batch: _Batch, changes: _Changes) -> None:
        for change in changes:
            self._mirror(change)
        for operation in batch:
            if operation.future.done():
                continue
            if isinstance(operation.outcome, Exception):
                operation.future.set_exception(operation.outcome)
            else:
                operation.future.set_result(operation.outcome)

    def _mirror(self, change: Change) -> None:
        key, known = change.key, change.key in self._rows
        if change.row is not None:
            self._rows[key] = change.row
            if not known:
                bisect.insort(self._keys, key)
        elif known:
            del self._rows[key]
            del self._keys[bisect.bisect_left(self._keys, key)]
        self._revision = change.revision
        if len(self._ring) == KEPT_CHANGES:
            self._oldest = self._ring[0].revision
        self._ring.append(change)
        for watch in list(self._watches):
            watch.offer(change)
