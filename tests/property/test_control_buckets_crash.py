"""Killed at any effect and started again, the control plane makes a store once and loses nothing."""

import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.wire.objects import ObjectsSecret
from support.control import World, environment, manifest_of
from support.crashes import PURGE, each_effect, kills, lives, purge, run, stories, unless_dead

BUCKETS = [{"name": "photos", "quota": "64MiB"}, {"name": "notes", "quota": "8MiB"}]
USING = [environment("web", buckets=[{"name": "photos"}])]
OTHER = [environment("web", buckets=[{"name": "photos"}, {"name": "notes", "access": "read"}])]


async def _reach(world, wish):
    """Ask for the wish, and wait until it is so or the control plane is dead."""
    if wish is PURGE:
        await unless_dead(world, purge(world))
        await world.gone()
        await world.until(lambda: _no_store(world), "no store is left")
    elif wish is None:
        if await world.app.service.uclouds():
            await unless_dead(world, world.app.service.down("test"))
        await world.gone()
    else:
        asked = manifest_of(world.directory, wish, buckets=BUCKETS)
        await unless_dead(world, world.app.service.up(asked))
        await world.ready()
        await world.until(lambda: _granted(world, wish), "who uses buckets is known")


async def _no_store(world):
    return await world.app.plane.state.store_document("test") is None


async def _granted(world, wish):
    store = await world.app.plane.state.store_document("test")
    wanted = {item["name"]: {use["name"] for use in item["buckets"]} for item in wish}
    return store is not None and wanted == {
        name: set(access.buckets) for name, access in store.access.items()
    }


async def _chapter(world, wish, points):
    return await lives(world, points, lambda: _reach(world, wish))


def _stores(directory):
    found = {}
    for path in directory.glob("state/providers/*/*/objects/*.json"):
        found[path.stem] = msgspec.json.decode(path.read_bytes())
    return found


def _creations(directory):
    paths = directory.glob("state/providers/*/*/objects/creations.jsonl")
    return sum(len(path.read_bytes().splitlines()) for path in paths)


class Words:
    """What an EE put into its bucket, one word after each chapter: none may ever be lost."""

    def __init__(self):
        self.written = []

    async def settle(self, world, wish):
        """Check what should be there; write with the keys that the EE was given."""
        stores, document = _stores(world.directory), None
        document = await world.app.plane.state.store_document("test")
        if wish is PURGE:
            assert (stores, document) == ({}, None)
            self.written = []
            return
        if self.written:
            (store,) = stores.values()
            assert store["words"]["photos"] == self.written
        if wish is None:
            assert not any(store["running"] for store in stores.values())
            return
        objects = [spec["objects"] for p in world.platforms().values() for spec in p["specs"]]
        (given,) = [item for item in objects if item]
        secret = ObjectsSecret(
            access_key=given["access_key"], secret_key=given["secret_key"], region="fake"
        )
        provider = world.app.plane.pool.get("test", document.provider)
        word = f"word {len(self.written)}"
        provider.cloud.objects.put(document.host, secret, "photos", word)
        self.written.append(word)


async def _story(directory, chapters):
    world, words = World(directory), Words()
    for wish, points in chapters:
        await _chapter(world, wish, points)
        await words.settle(world, wish)
        await world.stop()
    await _chapter(world, PURGE, [])
    await words.settle(world, PURGE)
    rows, _ = await world.store.list("objects/")
    assert rows == []
    await world.stop()


@stories(10, 100)
@given(
    st.lists(
        st.tuples(st.sampled_from([USING, OTHER, None, PURGE]), kills(50)),
        min_size=2,
        max_size=4,
    )
)
def test_any_story_of_wishes_and_kills_ends_as_wished(chapters):
    with tempfile.TemporaryDirectory() as directory:
        run(_story(Path(directory), chapters))
        ends = Counter(wish is PURGE for wish, _ in chapters)
        assert _creations(Path(directory)) <= ends[True] + 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("end", [None, PURGE])
def test_every_single_effect_on_stores_may_be_the_last(after, end, tmp_path):
    async def count():
        world = World(tmp_path / "count")
        up = await _chapter(world, USING, [])
        await world.stop()
        down = await _chapter(world, end, [])
        await world.stop()
        return up, down

    (tmp_path / "count").mkdir()
    up, down = run(count())
    assert {what for what in up if "provider.objects" in what} == {
        "provider.objects_apply", "provider.objects_credentials",
    }  # fmt: skip
    for effect, directory, at_up, at_down in each_effect(
        tmp_path, up, down, after=after, of="objects"
    ):
        run(_story(directory, [(USING, at_up), (end, at_down), (USING, [])]))
        assert _creations(directory) == (2 if end is PURGE else 1), effect
