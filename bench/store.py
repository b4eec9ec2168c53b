"""The store with 256 callers against raw sqlite3 in transactions of 100 rows, both fully durable.

Figures: at least 0.25x the raw rows/s, and a p99 of at most three single-row commits. The second
one is about disks whose flush takes milliseconds: 256 rows alone take raw sqlite3 about 2 ms of
work, so where a flush is nearly free (a virtual disk with a write-back cache) three single commits
are less than the work itself, whoever does it. Hence each figure is measured twice: on the disk as
it is, and with every flush lasting ``--flush-ms`` longer, for both sides alike (sqlite's own sync
method is wrapped).
"""

import argparse
import asyncio
import ctypes
import sqlite3
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import ab

from supercloud.control.store import SqliteStore

CALLERS, EACH = 256, 150
ROWS_PER_TRANSACTION, RAW_TRANSACTIONS = 100, 60
SINGLE_COMMITS = 100
VALUE = b"x" * 400
AT_LEAST_RATE, AT_MOST_COMMITS = 0.25, 3.0

_FILE_POINTER = 7  # SQLITE_FCNTL_FILE_POINTER
_JOURNAL_POINTER = 28  # SQLITE_FCNTL_JOURNAL_POINTER: the WAL's file in WAL mode
_SYNC_OF_METHODS = 5  # iVersion, xClose, xRead, xWrite, xTruncate, xSync, ...
_METHODS = 19  # of iVersion 3
_Sync = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class SlowDisk:
    """Makes every flush of a connection's files last longer."""

    def __init__(self, flush_s: float) -> None:
        self._flush_s = flush_s
        self._library = ctypes.CDLL(_library())
        self._kept: list[object] = []

    def under(self, connection: sqlite3.Connection) -> None:
        if not self._flush_s:
            return
        connection.execute("PRAGMA user_version").fetchone()  # the files are open from here on
        handle = ctypes.c_void_p.from_address(id(connection) + 16)
        for what in (_FILE_POINTER, _JOURNAL_POINTER):
            file = ctypes.c_void_p()
            got = self._library.sqlite3_file_control(handle, b"main", what, ctypes.byref(file))
            if got == 0 and file.value:
                self._wrap(file.value)

    def _wrap(self, file: int) -> None:
        methods = ctypes.c_void_p.from_address(file)
        if not methods.value:
            return
        table = (ctypes.c_void_p * _METHODS).from_address(methods.value)
        copy = (ctypes.c_void_p * _METHODS)(*table)
        original = _Sync(table[_SYNC_OF_METHODS])

        def sync(this: int, flags: int) -> int:
            time.sleep(self._flush_s)
            return int(original(this, flags))

        wrapped = _Sync(sync)
        copy[_SYNC_OF_METHODS] = ctypes.cast(wrapped, ctypes.c_void_p)
        self._kept += [copy, wrapped, original]
        methods.value = ctypes.addressof(copy)


def _library() -> str:
    import _sqlite3

    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            if "libsqlite3" in line:
                return line.split()[-1]
    return _sqlite3.__file__


@dataclass
class Raw:
    """sqlite3 as it comes."""

    path: Path
    disk: SlowDisk
    number: int = 0
    single_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = sqlite3.connect(self.path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute(
            "CREATE TABLE rows (key TEXT PRIMARY KEY, value BLOB, version INT) WITHOUT ROWID"
        )
        self.disk.under(self.connection)

    def _commit(self, rows: int) -> None:
        self.connection.execute("BEGIN")
        self.connection.executemany(
            "INSERT OR REPLACE INTO rows VALUES (?, ?, ?)",
            [(f"environment/u/{(self.number + n) % CALLERS}", VALUE, n) for n in range(rows)],
        )
        self.connection.execute("COMMIT")
        self.number += rows

    def measure(self) -> float:
        """Seconds a row, in transactions of 100; and single commits beside it."""
        for _ in range(SINGLE_COMMITS):
            begin = time.perf_counter()
            self._commit(1)
            self.single_s.append(time.perf_counter() - begin)
        transactions = RAW_TRANSACTIONS
        begin = time.perf_counter()
        for _ in range(transactions):
            self._commit(ROWS_PER_TRANSACTION)
        return (time.perf_counter() - begin) / transactions / ROWS_PER_TRANSACTION * 1e6


@dataclass
class Ours:
    """The store, with callers that each wait for their change."""

    path: Path
    disk: SlowDisk
    latencies_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runner = asyncio.Runner()
        self.store = self.runner.run(SqliteStore.open(self.path))
        self.disk.under(self.store._writer.connection)

    def measure(self) -> float:
        return self.runner.run(self._run())

    async def _run(self) -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(self._caller(self.store, n) for n in range(CALLERS)))
        return (time.perf_counter() - begin) / (CALLERS * EACH) * 1e6

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()

    async def _caller(self, store: SqliteStore, number: int) -> None:
        key = f"environment/u/{number}"
        row = await store.get(key)
        version = row.version if row else 0
        for _ in range(EACH):
            begin = time.perf_counter()
            version = await store.put_if_version(key, VALUE, version)
            self.latencies_s.append(time.perf_counter() - begin)


def once(directory: Path, flush_ms: float, options: argparse.Namespace) -> int:
    disk = SlowDisk(flush_ms / 1000)
    raw, ours = Raw(directory / "raw.db", disk), Ours(directory / "ours.db", disk)
    sides = [
        ab.Side("raw sqlite3, transactions of 100 rows", raw.measure),
        ab.Side(f"store, {CALLERS} callers", ours.measure, at_most=1 / AT_LEAST_RATE),
    ]
    name = f"a durable row, flush {flush_ms:g} ms longer" if flush_ms else "a durable row"
    status = ab.run(name, "us", sides, options)
    ours.close()
    single_ms = statistics.median(raw.single_s) * 1000
    p50, p99 = (_quantile(ours.latencies_s, q) * 1000 for q in (0.50, 0.99))
    commits = p99 / single_ms
    rows_ms = sides[0].median * CALLERS / 1000
    print(
        f"single commit {single_ms:.2f} ms; a caller waits p50 {p50:.2f} ms, p99 {p99:.2f} ms = "
        f"{commits:.1f} single commits (at most {AT_MOST_COMMITS:g}); "
        f"{CALLERS} rows alone take raw sqlite3 {rows_ms / single_ms:.1f}"
    )
    return status or int(bool(flush_ms) and commits > AT_MOST_COMMITS)


def _quantile(figures: list[float], part: float) -> float:
    return sorted(figures)[int(len(figures) * part)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--flush-ms", type=float, default=2.8)
    parser.add_argument("--directory", default="/var/tmp")
    options = parser.parse_args()
    status = 0
    for flush_ms in (0.0, options.flush_ms):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            status = max(status, once(Path(directory), flush_ms, options))
    return status


if __name__ == "__main__":
    sys.exit(main())
