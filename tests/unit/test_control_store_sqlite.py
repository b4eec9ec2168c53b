"""What the SQLite store does beyond the contract: durability, sharing, migrations, limits."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap

import pytest

from supercloud.control.store import Compacted, SqliteStore
from supercloud.control.store import sqlite as sqlite_store
from supercloud.control.store.migrations import MIGRATIONS
from supercloud.model.errors import Permanent, Temporary


async def test_rows_and_the_revision_outlive_the_process(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    first = await store.put_if_version("a", b"1", 0)
    gone = await store.put_if_version("b", b"2", 0)
    last = await store.delete_if_version("b", gone)
    await store.close()
    store = await SqliteStore.open(tmp_path / "s.db")
    assert (await store.get("a")).version == first
    assert await store.get("b") is None
    assert (await store.list(""))[1] == last
    assert await store.put_if_version("b", b"3", 0) == last + 1
    with pytest.raises(Compacted):
        store.watch("", last - 1)
    await store.close()


async def test_what_was_acknowledged_survives_sigkill(tmp_path):
    """A process writes and says so; it is killed at a random moment; every word was true."""
    script = textwrap.dedent(
        """
        import asyncio, sys, pathlib
        from supercloud.control.store import SqliteStore
        async def main():
            store = await SqliteStore.open(pathlib.Path(sys.argv[1]))
            async def caller(name):
                version = 0
                for number in range(1_000_000):
                    version = await store.put_if_version(name, str(number).encode(), version)
                    print(name, number, flush=True)
            await asyncio.gather(*(caller(f"k{n}") for n in range(8)))
        asyncio.run(main())
        """
    )
    path = tmp_path / "s.db"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    said = {}
    for count, line in enumerate(process.stdout):
        if not line.endswith("\n"):
            break  # it died in the middle of a word
        name, number = line.split()
        said[name] = int(number)
        if count == 500:
            os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    store = await SqliteStore.open(path)
    for name, number in said.items():
        assert int((await store.get(name)).value) >= number
    await store.close()
    check = sqlite3.connect(path)
    assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check.close()


async def test_every_commit_is_synced_to_the_disk(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    connection = store._writer.connection
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_the_file_is_its_owners_only(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    assert stat.S_IMODE((tmp_path / "s.db").stat().st_mode) == 0o600
    await store.close()


async def test_a_second_opener_is_refused(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    await store.put_if_version("a", b"", 0)
    with pytest.raises(Permanent, match="cannot be opened"):
        await SqliteStore.open(tmp_path / "s.db")
    await store.close()


async def test_an_old_file_is_migrated_and_a_newer_one_refused(tmp_path):
    path = tmp_path / "s.db"
    store = await SqliteStore.open(path)
    await store.put_if_version("a", b"1", 0)
    await store.close()
    newer = (*MIGRATIONS, "ALTER TABLE rows ADD COLUMN note TEXT;")
    store = await SqliteStore.open(path, newer)
    assert (await store.get("a")).value == b"1"
    await store.close()
    with pytest.raises(Permanent, match="version 2"):
        await SqliteStore.open(path)


async def test_a_migration_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "s.db"
    await (await SqliteStore.open(path)).close()
    broken = (*MIGRATIONS, "ALTER TABLE rows ADD COLUMN note TEXT; SELECT * FROM nothing;")
    with pytest.raises(Permanent):
        await SqliteStore.open(path, broken)
    store = await SqliteStore.open(path)
    await store.put_if_version("a", b"1", 0)
    await store.close()


async def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "s.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Permanent):
        await SqliteStore.open(tmp_path / "s.db")


async def test_a_commit_that_fails_fails_its_callers_and_the_store_goes_on(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    await store.put_if_version("a", b"1", 0)
    connection = store._writer.connection
    connection.execute(
        "CREATE TRIGGER full BEFORE INSERT ON rows BEGIN SELECT RAISE(FAIL, 'disk full'); END"
    )
    results = await asyncio.gather(
        *(store.put_if_version(f"k{n}", b"", 0) for n in range(5)), return_exceptions=True
    )
    assert all(isinstance(result, Temporary) for result in results)
    connection.execute("DROP TRIGGER full")
    assert await store.get("k0") is None
    assert await store.put_if_version("k0", b"", 0) > 1
    await store.close()


async def test_concurrent_callers_share_commits(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    commits = 0

    def traced(statement):
        nonlocal commits
        commits += statement == "COMMIT"

    store._writer.connection.set_trace_callback(traced)
    await asyncio.gather(*(store.put_if_version(f"k{n}", b"", 0) for n in range(256)))
    store._writer.connection.set_trace_callback(None)
    assert commits <= 4
    await store.close()


async def test_a_watch_that_falls_behind_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_store, "KEPT_CHANGES", 10)
    store = await SqliteStore.open(tmp_path / "s.db")
    watch = store.watch("", store.revision)
    for number in range(12):
        await store.put_if_version(f"k{number}", b"", 0)
    seen = 0
    with pytest.raises(Compacted):
        async for _ in watch:
            seen += 1
    assert seen == 10
    await store.close()


async def test_closing_commits_what_was_asked_for_and_refuses_more(tmp_path):
    store = await SqliteStore.open(tmp_path / "s.db")
    pending = [asyncio.ensure_future(store.put_if_version(f"k{n}", b"", 0)) for n in range(10)]
    await asyncio.sleep(0)
    await store.close()
    assert len(await asyncio.gather(*pending)) == 10
    with pytest.raises(Temporary):
        await store.put_if_version("late", b"", 0)
    store = await SqliteStore.open(tmp_path / "s.db")
    assert len((await store.list("k"))[0]) == 10
    await store.close()
