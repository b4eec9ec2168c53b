"""A volume whose provider's disk is full, on the fake provider."""

import pytest

from support.control import World
from support.volumes import PLAIN, document, host, manifest, reaches, told, up


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def test_one_that_waits_for_room_is_taken_from_what_would_never_let_it_go(world):
    """But only once nobody is to have it any more."""
    await up(world)
    (platform,) = await world.app.plane.state.platforms("test")
    pretended = await host(world)
    world.app.plane.agents.take = lambda *_: None  # nothing that it says comes any more
    pretended.volumes["data"].full = True

    async def full():
        return (await document(world)).full

    await world.until(full, "it is full")
    (event,) = told(world, "full")
    assert (event.severity, "disk is full" in event.message) == ("error", True)
    assert (await document(world)).platform == platform.name
    await world.app.service.up(manifest(world, [PLAIN]))
    await reaches(world, "kept")
