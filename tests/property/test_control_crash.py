"""Killed at any effect and started again, the control plane converges: nothing is made twice,
nothing is left over."""

import asyncio
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.control import Kill, World, environment, manifest_of

LONG = bool(os.environ.get("SUPERCLOUD_LONG"))
SMALL = [environment("web"), environment("db", kind="vm", image="vm")]
LARGER = [
    environment("web", replicas=3, placement={"spread": "host"}),
    environment("db", kind="vm", image="vm", ports=[]),
]
OTHER = [environment("web", image="oci:web2", ports=[80, 443])]

kills = st.builds(lambda at, after: (at, after), st.integers(1, 60), st.booleans())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def _reach(world, wish):
    """Ask for the wish, and wait until it is so or the control plane is dead."""
    if wish is None:
        views = await world.app.service.uclouds()
        if views:
            await _unless_dead(world, world.app.service.down("test"))
        await world.gone()
    else:
        await _unless_dead(world, world.app.service.up(manifest_of(world.directory, wish)))
        await world.ready()


async def _unless_dead(world, work):
    task = asyncio.ensure_future(work)
    dying = asyncio.ensure_future(world.seam.dead.wait())
    await asyncio.wait({task, dying}, return_when=asyncio.FIRST_COMPLETED)
    dying.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _with_kills(world, wish, points):
    """Pursue a wish through all these deaths, and then in peace. The effects of the last life."""
    for at, after in points:
        await world.start(Kill(at, after=after))
        await _reach(world, wish)
        await world.stop()
    await world.start()
    await _reach(world, wish)
    return world.seam


def _expected(world, wish):
    """What must be in the pretended world, and what must not."""
    platforms = world.platforms()
    if wish is None:
        assert platforms == {}
        return
    names = Counter(s["name"] for p in platforms.values() for s in p["statuses"])
    wanted = Counter()
    for item in wish:
        for number in range(1, item.get("replicas", 1) + 1):
            wanted[item["name"] if number == 1 else f"{item['name']}-{number}"] += 1
    assert names == wanted


async def _story(directory, chapters):
    world = World(directory)
    for wish, points in chapters:
        await _with_kills(world, wish, points)
        _expected(world, wish)
        await world.stop()
    await _with_kills(world, None, [])
    _expected(world, None)
    rows, _ = await world.store.list("")
    left = [
        row.key for row in rows if row.key.split("/")[0] in ("ucloud", "platform", "environment")
    ]
    assert left == []
    await world.stop()
    return Counter(world.creations())


@settings(
    max_examples=150 if LONG else 12,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
@given(st.lists(kills, max_size=3), st.lists(kills, max_size=3))
def test_a_kill_at_any_effect_of_up_and_down_leaves_nothing_behind(up_kills, down_kills):
    with tempfile.TemporaryDirectory() as directory:
        creations = run(_story(Path(directory), [(SMALL, up_kills), (None, down_kills)]))
    assert set(creations.values()) == {1}, creations


@settings(
    max_examples=100 if LONG else 8,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
@given(
    st.lists(
        st.tuples(st.sampled_from([SMALL, LARGER, OTHER, None]), st.lists(kills, max_size=2)),
        min_size=2,
        max_size=4,
    )
)
def test_any_story_of_wishes_and_kills_ends_as_wished(chapters):
    with tempfile.TemporaryDirectory() as directory:
        run(_story(Path(directory), chapters))


@pytest.mark.parametrize("after", [False, True])
def test_every_single_effect_of_up_and_down_may_be_the_last(after, tmp_path):
    async def count():
        world = World(tmp_path / "count")
        up = await _with_kills(world, SMALL, [])
        await world.stop()
        down = await _with_kills(world, None, [])
        await world.stop()
        return len(up.seen), len(down.seen)

    (tmp_path / "count").mkdir()
    up, down = run(count())
    for number in range(1, up + down + 1):
        directory = tmp_path / str(number)
        directory.mkdir()
        point = [(number if number <= up else number - up, after)]
        story = [(SMALL, point), (None, [])] if number <= up else [(SMALL, []), (None, point)]
        creations = run(_story(directory, story))
        assert set(creations.values()) == {1}, (number, creations)
