"""The frame of tests that kill a pretended world's control plane at effects of its own.

A kill is a point in a life: (the number of the effect from 1, whether after it or before).
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from supercloud.model.errors import NotFound
from support.control import Kill, World

LONG = bool(os.environ.get("SUPERCLOUD_LONG"))
PURGE = "purge"  # as a wish: also what would outlive the U-Cloud
Point = tuple[int, bool]


def kills(latest: int, most: int = 2) -> st.SearchStrategy[list[Point]]:
    """So many kills one after the other, each at one of the first ``latest`` effects."""
    return st.lists(st.tuples(st.integers(1, latest), st.booleans()), max_size=most)


def stories(few: int, many: int) -> settings:
    """For a property over whole stories: ``few`` of them, the same each time, or ``--long``."""
    return settings(
        max_examples=many if LONG else few,
        deadline=None,
        derandomize=not LONG,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )


def run(story: Coroutine[Any, Any, Any], limit_s: float = 120) -> Any:
    return asyncio.run(asyncio.wait_for(story, limit_s))


async def unless_dead(world: World, work: Awaitable[Any]) -> None:
    """Do it, unless the control plane dies of it; raises what it raises."""
    task = asyncio.ensure_future(work)
    dying = asyncio.ensure_future(world.seam.dead.wait())
    await asyncio.wait({task, dying}, return_when=asyncio.FIRST_COMPLETED)
    dying.cancel()
    if task.done():
        task.result()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def lives(
    world: World, points: Sequence[Point], live: Callable[[], Awaitable[Any]]
) -> list[str]:
    """Live through all these deaths, and then in peace; the effects of the last life, which is on."""
    for at, after in points:
        await world.start(Kill(at, after=after))
        await live()
        await world.stop()
    await world.start()
    await live()
    return world.seam.seen


async def purge(world: World) -> None:
    """Ask for the end of all that is kept, too."""
    with contextlib.suppress(NotFound):
        await world.app.service.purge("test")


Effect = tuple[str, Path, list[Point], list[Point]]


def each_effect(
    place: Path, up: list[str], down: list[str], *, after: bool, of: str = ""
) -> Iterator[Effect]:
    """The effects with ``of`` in their names, of a life that goes up and of one that goes down.

    Of each: what to call it, a directory of its own, and the kills on the way up and down.
    """
    for way, life in (("up", up), ("down", down)):
        for number, name in enumerate(life, start=1):
            if of in name:
                kill, directory = [(number, after)], place / f"{way}-{number}"
                directory.mkdir()
                ways = (kill, []) if way == "up" else ([], kill)
                yield f"{way}: {number} of {life}", directory, *ways
