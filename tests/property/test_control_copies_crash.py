"""Killed at any effect while volumes are copied, the control plane converges: each copy is whole,
nothing is made twice, and the source has lost nothing."""

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from support.control import Kill, World, environment, manifest_of

STRIDE = 1 if os.environ.get("SUPERCLOUD_LONG") else 6
DATA = environment("web", volumes=[{"name": "data", "path": "/data"}])
USER = environment("other", volumes=[{"name": "copy", "path": "/data"}])
BASE = {"name": "data", "size": "1MiB"}
COPIES = [
    {"name": "copy", "size": "1MiB", "clone": {"of": "data", "snapshot": "first"}},
    {"name": "safe", "size": "1MiB", "backup": {"of": "data"}},
]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def _reach(world, wish, volumes):
    asked = manifest_of(world.directory, wish, volumes=volumes)
    up = asyncio.ensure_future(world.app.service.up(asked))
    dying = asyncio.ensure_future(world.seam.dead.wait())
    await asyncio.wait({up, dying}, return_when=asyncio.FIRST_COMPLETED)
    dying.cancel()
    if not up.done():
        up.cancel()
        await asyncio.gather(up, return_exceptions=True)
        return
    up.result()
    await world.ready()
    await world.until(lambda: _copied(world), "all is copied, and the backup closed")


async def _copied(world):
    if world.seam.dead.is_set():
        return True
    documents = {item.name: item for item in await world.app.plane.state.volumes("test")}
    copies = [documents.get(name) for name in ("copy", "safe") if len(documents) > 1]
    return all(item and item.copied == item.copying == 1 for item in copies) and (
        len(documents) == 1 or documents["safe"].state == "kept"
    )


async def _story(directory, kill):
    """The effects of the life that made the copies."""
    world = World(directory)
    await world.start()
    await _reach(world, [DATA], [BASE])
    (volume,) = await world.app.plane.state.volumes("test")
    pretended = world.app.plane.pool.get("test", volume.provider).cloud.volumes
    for word in ("one", "two"):
        pretended.write("data", word)
    await world.app.service.volumes.task("test", "data", "snapshot", "first")
    pretended.write("data", "three")
    await world.stop()
    await world.start(kill)
    await _reach(world, [DATA, USER], [BASE, *COPIES])
    await world.stop()
    await world.start()
    await _reach(world, [DATA, USER], [BASE, *COPIES])
    await world.stop()
    words = {name: item["words"] for name, item in world.volumes().items()}
    data = ["one", "two", "three"]
    assert words == {"data": data, "copy": data[:2], "safe": data}
    assert Counter(world.volume_creations()) == {"data": 1, "copy": 1, "safe": 1}
    return kill.seen


@pytest.mark.parametrize("after", [False, True])
def test_every_effect_while_volumes_are_copied_may_be_the_last(after: bool, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    seen = run(_story(tmp_path / "count", Kill()))
    assert seen.count("provider.volume_copy") >= 4  # two copies, each begun and found done
    for number in range(1 + after, len(seen) + 1, STRIDE):
        directory = tmp_path / str(number)
        directory.mkdir()
        run(_story(directory, Kill(number, after=after)))
