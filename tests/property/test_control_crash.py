"""Killed at any effect and started again, the control plane converges: nothing is made twice,
nothing is left over."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.control import World, environment, manifest_of
from support.crashes import PURGE, each_effect, kills, lives, purge, run, stories, unless_dead

SMALL = [environment("web"), environment("db", kind="vm", image="vm")]
LARGER = [
    environment("web", replicas=3, placement={"spread": "host"}),
    environment("db", kind="vm", image="vm", ports=[]),
]
OTHER = [environment("web", image="oci:web2", ports=[80, 443])]

VOLUMES = [{"name": "data", "size": "1MiB"}, {"name": "shared", "size": "2MiB"}]
STORED = [
    environment("web", volumes=[{"name": "data", "path": "/data"}]),
    environment("db", kind="vm", image="vm", volumes=[{"name": "shared"}]),
]
SWAPPED = [
    environment("web", volumes=[{"name": "shared", "path": "/s"}]),
    environment("other", volumes=[{"name": "data", "path": "/d"}]),
]


async def _reach(world, wish):
    """Ask for the wish, and wait until it is so or the control plane is dead."""
    if wish is PURGE:
        await unless_dead(world, purge(world))
        await world.gone()
        await world.until(lambda: _no_volumes(world), "no volume is left")
    elif wish is None:
        views = await world.app.service.uclouds()
        if views:
            await unless_dead(world, world.app.service.down("test"))
        await world.gone()
    else:
        asked = manifest_of(world.directory, wish, volumes=VOLUMES)
        await unless_dead(world, world.app.service.up(asked))
        await world.ready()


async def _no_volumes(world):
    return not await world.app.service.volumes.rows()


async def _with_kills(world, wish, points):
    return await lives(world, points, lambda: _reach(world, wish))


def _expected(world, wish):
    """What must be in the pretended world, and what must not."""
    platforms = world.platforms()
    if wish is None or wish is PURGE:
        assert platforms == {}
        return
    names = Counter(s["name"] for p in platforms.values() for s in p["statuses"])
    wanted = Counter()
    for item in wish:
        for number in range(1, item.get("replicas", 1) + 1):
            wanted[item["name"] if number == 1 else f"{item['name']}-{number}"] += 1
    assert names == wanted


class Words:
    """What was written to volumes, one word after each chapter: none of it may ever be lost."""

    def __init__(self):
        self.written = {}

    async def settle(self, world, wish):
        """Check what should be there; write to what is in use."""
        if isinstance(wish, list):
            wanted = {use["name"] for item in wish for use in item.get("volumes", ())}
            await world.until(lambda: _unused_are_closed(world, wanted), "the others are closed")
        documents = {item.name: item for item in await world.app.plane.state.volumes("test")}
        there = world.volumes()
        # Nothing is there that our records do not know, and nothing of theirs has been lost.
        assert {name for name, item in documents.items() if item.seal.root} == there.keys()
        if wish is PURGE:
            assert documents == {}
            self.written = {}
        assert self.written.keys() <= there.keys()
        for name, words in self.written.items():
            assert there[name]["words"] == words
        for name, item in documents.items():
            assert not item.halted
            assert item.seal.epoch == there[name]["epoch"]
        if isinstance(wish, list):
            self._write(world, documents, wanted)
        else:
            assert {item["state"] for item in there.values()} <= {"closed"}

    def _write(self, world, documents, wanted):
        for name in wanted:
            provider = world.app.plane.pool.get("test", documents[name].provider)
            word = f"word {len(self.written.get(name, []))}"
            provider.cloud.volumes.write(name, word)
            self.written.setdefault(name, []).append(word)


async def _unused_are_closed(world, wanted):
    volumes = await world.app.plane.state.volumes("test")
    return all(item.opened == (item.name in wanted) for item in volumes)


async def _story(directory, chapters):
    world, words = World(directory), Words()
    for wish, points in chapters:
        await _with_kills(world, wish, points)
        _expected(world, wish)
        await words.settle(world, wish)
        await world.stop()
    made = Counter(world.volume_creations())
    await _with_kills(world, PURGE, [])
    _expected(world, PURGE)
    rows, _ = await world.store.list("")
    kinds = ("ucloud", "platform", "environment", "volume")
    assert [row.key for row in rows if row.key.split("/")[0] in kinds] == []
    assert world.volumes() == {}
    await world.stop()
    assert Counter(world.volume_creations()) == made
    return Counter(world.creations())


@stories(12, 150)
@given(kills(60, 3), kills(60, 3))
def test_a_kill_at_any_effect_of_up_and_down_leaves_nothing_behind(up_kills, down_kills):
    with tempfile.TemporaryDirectory() as directory:
        creations = run(_story(Path(directory), [(SMALL, up_kills), (None, down_kills)]))
    assert set(creations.values()) == {1}, creations


@stories(8, 100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([SMALL, LARGER, OTHER, STORED, SWAPPED, None, PURGE]),
            kills(60),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_any_story_of_wishes_and_kills_ends_as_wished(chapters):
    with tempfile.TemporaryDirectory() as directory:
        run(_story(Path(directory), chapters))


@stories(10, 100)
@given(
    kills(60), kills(60), kills(60),
    st.sampled_from([None, SMALL, SWAPPED]),
)  # fmt: skip
def test_volumes_are_made_once_and_lose_nothing_by_kills(first, second, third, between):
    chapters = [(STORED, first), (between, second), (STORED, third)]
    with tempfile.TemporaryDirectory() as directory:
        run(_story(Path(directory), chapters))
        assert Counter(World(Path(directory)).volume_creations()) == {"data": 1, "shared": 1}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("end", [None, PURGE])
def test_every_single_effect_on_volumes_may_be_the_last(after, end, tmp_path):
    wish = STORED[:1]

    async def count():
        world = World(tmp_path / "count")
        up = await _with_kills(world, wish, [])
        await world.stop()
        down = await _with_kills(world, end, [])
        await world.stop()
        return up, down

    (tmp_path / "count").mkdir()
    up, down = run(count())
    assert [what for what in up if "provider.volume_" in what] == [
        "provider.volume_open", "provider.volume_serve", "provider.volume_attach",
    ]  # fmt: skip
    # the test below walks through the others
    for effect, directory, at_up, at_down in each_effect(
        tmp_path, up, down, after=after, of="volume"
    ):
        run(_story(directory, [(wish, at_up), (end, at_down), (wish, [])]))
        made = Counter(World(directory).volume_creations())
        assert made == {"data": 2 if end is PURGE else 1}, effect


@pytest.mark.parametrize("after", [False, True])
def test_every_single_effect_of_up_and_down_may_be_the_last(after, tmp_path):
    async def count():
        world = World(tmp_path / "count")
        up = await _with_kills(world, SMALL, [])
        await world.stop()
        down = await _with_kills(world, None, [])
        await world.stop()
        return up, down

    (tmp_path / "count").mkdir()
    up, down = run(count())
    for effect, directory, at_up, at_down in each_effect(tmp_path, up, down, after=after):
        creations = run(_story(directory, [(SMALL, at_up), (None, at_down)]))
        assert set(creations.values()) == {1}, (effect, creations)
