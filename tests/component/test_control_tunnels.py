"""What the hosts of a U-Cloud are told of each other; on the fake provider."""

import pytest

from supercloud.wire.tunnel import TunnelApply
from support.control import World, environment, manifest_of

BUCKETS = [{"name": "photos", "quota": "64MiB"}]
STORE = environment("web", buckets=[{"name": "photos"}])
AWAY = environment("away", placement={"anti_affinity": ["web"]})


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def up(world, *wish):
    await world.app.service.up(manifest_of(world.directory, list(wish), buckets=BUCKETS))
    await world.ready()


async def told(world):
    """What each host was told last, and the store's host."""
    store = await world.app.plane.state.store_document("test")
    return world.app.plane.pool.get("test", store.provider).cloud.tunnels, store.host


async def until_told(world, wanted):
    async def true():
        return await wanted()

    await world.until(true, "the hosts are told")


async def test_a_host_without_the_store_is_told_where_it_is_and_that_one_lets_it_in(world):
    await up(world, STORE, AWAY)

    async def both():
        return len((await told(world))[0]) == 2

    await until_told(world, both)
    tunnels, home = await told(world)
    (other,) = tunnels.keys() - {home}
    assert tunnels[home] == TunnelApply(objects_to=[other])
    assert tunnels[other].objects_from.name == home
    assert tunnels[other].objects_to == []


async def test_on_one_host_nobody_is_told_anything(world):
    await up(world, STORE)
    tunnels, _ = await told(world)
    assert not tunnels


async def test_a_host_that_left_is_let_in_no_more(world):
    await up(world, STORE, AWAY)

    async def both():
        return len((await told(world))[0]) == 2

    await until_told(world, both)
    await up(world, STORE)

    async def alone():
        tunnels, home = await told(world)
        return tunnels[home] == TunnelApply()

    await until_told(world, alone)


async def test_a_host_that_was_made_anew_is_told_again(world):
    await up(world, STORE, AWAY)

    async def both():
        return len((await told(world))[0]) == 2

    await until_told(world, both)
    (await told(world))[0].clear()
    await until_told(world, both)
