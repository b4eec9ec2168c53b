"""What every store keeps to. There is one implementation so far; the next one joins ``STORES``."""

import asyncio
import io
import json

import pytest

from supercloud.control.store import Compacted, Conflict, Leases, SqliteStore
from supercloud.control.store.archive import adopt, export
from supercloud.control.store.base import MAX_KEY_CHARS, MAX_VALUE_BYTES
from supercloud.model.errors import Busy, Exists, Invalid

STORES = {"sqlite": lambda path: SqliteStore.open(path / "state.db")}


@pytest.fixture(params=sorted(STORES))
async def store(request, tmp_path):
    made = await STORES[request.param](tmp_path)
    yield made
    await made.close()


async def test_a_row_is_what_was_put_with_the_version_of_that_change(store):
    version = await store.put_if_version("a/b", b"one", 0)
    row = await store.get("a/b")
    assert (row.key, row.value, row.version) == ("a/b", b"one", version)
    assert await store.get("a") is None


async def test_a_put_of_another_version_is_refused_and_says_which_is_there(store):
    version = await store.put_if_version("k", b"1", 0)
    for wrong in (0, version + 1):
        with pytest.raises(Conflict) as caught:
            await store.put_if_version("k", b"2", wrong)
        assert caught.value.found == version
    assert (await store.get("k")).value == b"1"


async def test_of_concurrent_puts_with_one_version_exactly_one_wins(store):
    version = await store.put_if_version("k", b"0", 0)
    puts = [store.put_if_version("k", str(n).encode(), version) for n in range(50)]
    results = await asyncio.gather(*puts, return_exceptions=True)
    winners = [n for n, result in enumerate(results) if not isinstance(result, Exception)]
    assert len(winners) == 1
    assert all(isinstance(r, int | Conflict) for r in results)
    assert (await store.get("k")).value == str(winners[0]).encode()


async def test_delete_takes_the_version_too_and_the_row_may_come_again(store):
    version = await store.put_if_version("k", b"1", 0)
    with pytest.raises(Conflict):
        await store.delete_if_version("k", version + 1)
    await store.delete_if_version("k", version)
    assert await store.get("k") is None
    with pytest.raises(Conflict):
        await store.delete_if_version("k", version)
    assert await store.put_if_version("k", b"2", 0) > version


async def test_versions_grow_over_the_whole_store(store):
    versions = [await store.put_if_version(f"k{n}", b"", 0) for n in range(5)]
    assert versions == sorted(set(versions))


async def test_list_gives_the_prefix_in_order_and_nothing_else(store):
    for key in ("b/2", "a/1", "b/10", "b", "c/1", "b/1"):
        await store.put_if_version(key, key.encode(), 0)
    rows, revision = await store.list("b/")
    assert [row.key for row in rows] == ["b/1", "b/10", "b/2"]
    assert revision == max(row.version for row in (await store.list(""))[0])
    assert [row.key for row in (await store.list("nothing"))[0]] == []


async def test_a_watch_tells_all_changes_after_its_revision_in_order(store):
    first = await store.put_if_version("w/a", b"1", 0)
    watch = store.watch("w/", first)
    second = await store.put_if_version("w/b", b"2", 0)
    await store.put_if_version("other", b"x", 0)
    third = await store.put_if_version("w/a", b"3", first)
    await store.delete_if_version("w/b", second)
    changes = [await anext(watch) for _ in range(3)]
    assert [(c.key, c.row.value if c.row else None) for c in changes] == [
        ("w/b", b"2"),
        ("w/a", b"3"),
        ("w/b", None),
    ]
    assert changes[0].revision == second < changes[1].revision == third < changes[2].revision
    watch.close()


async def test_a_watch_from_an_earlier_revision_catches_up_first(store):
    start = await store.put_if_version("k0", b"", 0)
    for number in range(1, 4):
        await store.put_if_version(f"k{number}", b"", 0)
    watch = store.watch("", start)
    assert [(await anext(watch)).key for _ in range(3)] == ["k1", "k2", "k3"]
    watch.close()


async def test_a_watch_from_a_forgotten_or_unknown_revision_is_compacted(store):
    revision = await store.put_if_version("k", b"", 0)
    with pytest.raises(Compacted):
        store.watch("", revision + 1)


async def test_a_closed_watch_ends(store):
    watch = store.watch("", (await store.list(""))[1])
    waiting = asyncio.ensure_future(anext(watch, None))
    await asyncio.sleep(0)
    watch.close()
    assert await waiting is None


async def test_a_watcher_never_sees_what_a_reader_does_not(store):
    watch = store.watch("", (await store.list(""))[1])
    writing = asyncio.gather(*(store.put_if_version(f"k{n}", b"", 0) for n in range(100)))
    for _ in range(100):
        change = await anext(watch)
        assert (await store.get(change.key)) is not None
    await writing
    watch.close()


@pytest.mark.parametrize("key", ["", "k" * (MAX_KEY_CHARS + 1), "with\nnewline", "nul\0"])
async def test_bad_keys_are_refused(store, key):
    with pytest.raises(Invalid):
        await store.put_if_version(key, b"", 0)


async def test_too_large_a_value_is_refused(store):
    await store.put_if_version("largest", b"x" * MAX_VALUE_BYTES, 0)
    with pytest.raises(Invalid):
        await store.put_if_version("larger", b"x" * (MAX_VALUE_BYTES + 1), 0)


async def test_an_export_is_adopted_whole_by_an_empty_store(store, tmp_path):
    rows = {f"k/{n}": bytes([n]) * n for n in range(20)}
    for key, value in rows.items():
        await store.put_if_version(key, value, 0)
    await Leases(store).acquire("x", "me", 60)
    out = io.StringIO()
    assert await export(store, out) == 20
    (tmp_path / "other").mkdir()
    other = await STORES["sqlite"](tmp_path / "other")
    assert await adopt(other, out.getvalue().splitlines()) == 20
    assert {row.key: row.value for row in (await other.list(""))[0]} == rows
    with pytest.raises(Exists):
        await adopt(other, out.getvalue().splitlines())
    await other.close()


async def test_half_an_export_is_refused_before_anything_is_written(store):
    lines = [
        json.dumps({"format": 1, "revision": 3, "rows": 2}),
        json.dumps({"key": "a", "value": "eA=="}),
    ]
    for bad in (lines, [*lines, "rubbish"], [], ["{}"], [lines[0], '{"key": 1}']):
        with pytest.raises(Invalid):
            await adopt(store, bad)
    assert (await store.list(""))[0] == []


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


async def test_a_lease_is_one_holders_until_it_expires_or_is_released(store):
    clock = Clock()
    leases = Leases(store, clock)
    lease = await leases.acquire("control", "one", 10)
    assert (lease.holder, lease.expires_s) == ("one", 1010.0)
    with pytest.raises(Busy, match="held by one"):
        await leases.acquire("control", "two", 10)
    clock.now_s = 1009.0
    lease = await leases.renew(lease, 10)
    clock.now_s = 1018.0
    with pytest.raises(Busy):
        await leases.acquire("control", "two", 10)
    clock.now_s = 1020.0
    taken = await leases.acquire("control", "two", 10)
    with pytest.raises(Busy):
        await leases.renew(lease, 10)
    await leases.release(lease)  # no longer ours: nothing happens
    with pytest.raises(Busy):
        await leases.acquire("control", "one", 10)
    await leases.release(taken)
    assert (await leases.acquire("control", "one", 10)).holder == "one"


async def test_the_holder_may_acquire_again_after_it_was_restarted(store):
    leases = Leases(store)
    await leases.acquire("control", "one", 10)
    assert (await leases.acquire("control", "one", 10)).holder == "one"
