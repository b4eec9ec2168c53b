"""Volumes that are kept on several hosts, by the control plane; on fake providers."""

import asyncio
import time
from dataclasses import replace

import pytest

from supercloud.cli.volumes import _replicas as replicas_cell
from supercloud.control.controllers.failover import FailoverController
from supercloud.control.documents import volume_key
from supercloud.model.errors import BadState, Invalid, NoResources, Temporary
from supercloud.wire.codec import encode
from support.control import World, environment, manifest_of

VOLUME = {"name": "data", "size": "64MiB", "replicas": 2}
USER = environment("db", volumes=[{"name": "data", "path": "/data"}])


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


def providers(*names):
    return [{"name": name, "kind": "fake", "options": {"hosts": "1"}} for name in names]


def manifest(world, names=("east", "west"), volume=VOLUME, wish=(USER,)):
    body = {"providers": providers(*names), "volumes": [volume]}
    return manifest_of(world.directory, list(wish), **body)


async def up(world, *, ready=True, **more):
    applied = await world.app.service.up(manifest(world, **more))
    if ready:
        await world.ready()
    return applied


async def document(world):
    return await world.app.plane.state.volume("test", "data")


def cloud(world, entry):
    return world.app.plane.pool.get("test", entry).cloud


async def clouds(world):
    """By host: the one where it is used first."""
    volume = await document(world)
    return {replica.host: cloud(world, replica.provider) for replica in volume.replicas}


def words(made, host):
    return made.volumes.volumes[made.volumes.key_of(host, "data")].words


async def until(world, true, what):
    async def there():
        return true(await document(world))

    await world.until(there, what)
    return await document(world)


def all_in_sync(volume):
    return volume.mirroring and all(replica.in_sync for replica in volume.replicas)


async def write(world, word):
    """As its user: what is not answered is tried again."""
    async with asyncio.timeout(15):
        while True:
            try:
                volume = await document(world)
                cloud(world, volume.provider).volumes.write("data", word)
            except (Temporary, BadState, KeyError):
                await asyncio.sleep(0.01)
            else:
                return


async def test_it_is_kept_on_two_hosts_each_with_a_key_of_its_own(world):
    applied = await up(world)
    (change,) = [c for c in applied.plan.changes if c.subject == "volume/data"]
    assert change.details[2:] == ["at east/east-0", "and at west/west-0"]
    volume = await until(world, all_in_sync, "it is in sync")
    assert {replica.host for replica in volume.replicas} == {"east-0", "west-0"}
    assert len({replica.wrapped_key for replica in volume.replicas}) == 2
    await write(world, "one")
    assert [words(made, host) for host, made in (await clouds(world)).items()] == [["one"]] * 2


async def test_of_three_hosts_one_may_be_lost_and_gets_all_when_it_is_back(world):
    names = ("east", "west", "north")
    applied = await up(world, names=names, volume={**VOLUME, "replicas": 3})
    (change,) = [c for c in applied.plan.changes if c.subject == "volume/data"]
    assert len([line for line in change.details if "at " in line]) == 3
    volume = await until(world, all_in_sync, "it is in sync")
    assert {replica.host for replica in volume.replicas} == {f"{name}-0" for name in names}
    await write(world, "one")
    made = await clouds(world)
    assert [words(one, host) for host, one in made.items()] == [["one"]] * 3
    await shows(world, "3/3 in sync")
    lost, stays = volume.others
    cloud(world, lost.provider).kill()
    volume = await until(world, lambda v: not v.others[0].in_sync, "it is stale")
    assert (volume.in_sync, volume.others[1].in_sync) == (True, True)
    await write(world, "two")
    await shows(world, f"2/3 in sync, {lost.host} stale")
    assert [words(made[host], host) for host in (volume.host, stays.host)] == [["one", "two"]] * 2
    assert words(made[lost.host], lost.host) == ["one"]
    cloud(world, lost.provider).come_back()
    await until(world, all_in_sync, "it is in sync again")
    await shows(world, "3/3 in sync")
    assert [words(one, host) for host, one in made.items()] == [["one", "two"]] * 3


async def shows(world, text):
    """The column of ``volumes`` that tells of its replicas comes to begin like this."""

    async def there():
        (row,) = await world.app.service.volumes.rows()
        (cell,) = replicas_cell(encode(row))
        return cell.startswith(text)

    await world.until(there, f"it shows {text}")


async def test_too_few_hosts_are_refused_before_anything_is_made(world):
    with pytest.raises(NoResources, match="1 hosts") as caught:
        await up(world, names=("east",), ready=False)
    assert "volumes" in caught.value.where
    assert await document(world) is None
    with pytest.raises(Invalid, match="replicas"):
        await up(world, volume={**VOLUME, "replicas": 4}, ready=False)


async def test_the_number_of_its_hosts_stays_and_it_does_not_shrink(world):
    await up(world)
    for change in ({"replicas": 1}, {"size": "32MiB"}):
        with pytest.raises(Invalid):
            await up(world, volume={**VOLUME, **change}, ready=False)


async def test_it_grows_on_all_hosts_once_nothing_uses_it(world):
    await up(world)
    await until(world, all_in_sync, "it is in sync")
    await write(world, "one")
    larger = {**VOLUME, "size": "128MiB"}
    await up(world, volume=larger, ready=False)
    waiting = await until(world, lambda volume: bool(volume.waits), "it waits")
    assert (waiting.state, "once nothing uses it" in waiting.waits) == ("attached", True)
    await world.app.service.down("test")
    await world.gone()
    await up(world, volume=larger)
    volume = await until(world, all_in_sync, "it is in sync again")
    assert (volume.given.size_bytes, volume.waits) == (128 << 20, "")


async def test_down_and_up_again_copies_nothing(world):
    await up(world)
    await until(world, all_in_sync, "it is in sync")
    await write(world, "one")
    await world.app.service.down("test")
    await world.gone()
    volume = await document(world)
    assert (volume.state, volume.clean, volume.mirroring) == ("kept", True, False)
    assert all(replica.kept and not replica.opened for replica in volume.replicas)
    await up(world)
    volume = await until(world, all_in_sync, "it is in sync again")
    assert volume.turns == {}
    assert volume.generation == 2


async def test_a_replica_that_is_cut_off_is_stale_and_comes_back(world):
    await up(world)
    volume = await until(world, all_in_sync, "it is in sync")
    other = cloud(world, volume.others[0].provider)
    other.cut_off()
    volume = await until(world, lambda v: not v.others[0].in_sync, "it is stale")
    assert volume.in_sync
    await write(world, "alone")
    assert words(other, volume.others[0].host) == []
    other.come_back()
    volume = await until(world, all_in_sync, "it is in sync again")
    assert words(other, volume.others[0].host) == ["alone"]


async def test_a_host_that_is_lost_is_left_and_nothing_that_was_answered_is(world):
    await up(world, names=("east", "west"))
    volume = await until(world, all_in_sync, "it is in sync")
    for n in range(5):
        await write(world, f"w{n}")
    lost = cloud(world, volume.provider)
    before, home = volume.host, volume.others[0].host
    lost.kill()
    volume = await until(world, lambda v: v.host == home and v.state == "attached", "it moved")
    await world.until(lambda: serving_on(world, home), "its user serves there")
    await write(world, "later")
    made = await clouds(world)
    assert words(made[home], home) == [*(f"w{n}" for n in range(5)), "later"]
    lost.come_back()
    volume = await until(world, all_in_sync, "the lost one is there again")
    assert volume.host == home
    assert words(made[before], before) == words(made[home], home)


async def serving_on(world, host):
    (row,) = await world.app.service.environments("test")
    return row.state == "serving" and row.host == host


async def test_a_host_that_was_merely_cut_off_answers_nothing_after_its_lease(world):
    await up(world)
    volume = await until(world, all_in_sync, "it is in sync")
    old, home = cloud(world, volume.provider), volume.others[0].host
    old.cut_off()
    volume = await until(world, lambda v: v.host == home and v.state == "attached", "it moved")
    there = old.volumes.volumes["data"]
    assert there.mirror.closed_by()
    await write(world, "new")
    assert "new" not in there.words
    old.come_back()
    await until(world, all_in_sync, "the old one is there again")
    assert "new" in old.volumes.volumes["data"].words


@pytest.mark.parametrize("how", ["lost just now", "comes back while it is asked", "lost long ago"])
async def test_only_a_host_that_is_away_for_long_enough_is_left(world, monkeypatch, how):
    """Whatever became of another one; ``how`` it is with its home, whose provider is silent."""
    user = {**USER, "placement": {"anti_affinity": ["web"]}}
    web = environment("web", placement={"provider": "west"})
    await up(world, names=("east", "west", "north"), wish=(user, web))
    home = (await until(world, all_in_sync, "it is in sync")).host
    assert {replica.host for replica in (await document(world)).replicas} == {"east-0", "north-0"}
    state, controller = world.app.plane.state, FailoverController(world.app.plane)
    there, offered, is_back = state.platforms, controller._offer, False

    async def platforms(ucloud):
        found = []
        for one in await there(ucloud):
            at_home = one.wish.host == home
            since_s = time.time() if at_home and how == "lost just now" else 0.0
            standing = "ready" if at_home and is_back else "lost"
            found.append(replace(one, state=standing, since_s=since_s))
        return found

    async def offer(ucloud, entry):
        nonlocal is_back
        is_back = how == "comes back while it is asked"
        found = await offered(ucloud, entry)
        is_home = any(host.name == home for host in found.hosts)
        return replace(found, hosts=(), unreachable="no answer") if is_home else found

    monkeypatch.setattr(controller, "_offer", offer)
    with monkeypatch.context() as during:
        during.setattr(state, "platforms", platforms)
        await controller.reconcile("test")
    wish = (await state.ucloud("test")).volumes["data"]
    assert (wish.host == home) is (how != "lost long ago")


async def test_a_move_that_was_decided_against_meanwhile_leaves_it_in_use(world, monkeypatch):
    """While it waits for the lease to end it is decided that the volume stays where it is."""
    await up(world)
    volume = await until(world, all_in_sync, "it is in sync")
    replication = world.app._volumes.replication

    async def waiting(_volume):
        return 60.0

    with monkeypatch.context() as during:
        during.setattr(replication, "_let_go", waiting)
        other = volume.others[0]
        assert await replication.move(volume, (other.provider.name, other.host)) == 60.0
    world.app.plane.look(volume_key("test", "data"), 0.0)
    there = cloud(world, volume.provider).volumes.volumes["data"]
    await asyncio.sleep(3 * world.app.plane.pace.lease_valid_s)
    await write(world, "still")
    assert "still" in there.words


async def test_up_finds_it_elsewhere_when_its_host_was_lost_meanwhile(world):
    await up(world)
    await until(world, all_in_sync, "it is in sync")
    await write(world, "one")
    await world.app.service.down("test")
    await world.gone()
    volume = await document(world)
    cloud(world, volume.provider).kill()
    other = volume.others[0].host
    await up(world, ready=False)
    await until(world, lambda v: v.host == other and v.state == "attached", "it is elsewhere")
    assert words((await clouds(world))[other], other) == ["one"]


async def test_it_goes_from_all_hosts_when_it_is_deleted(world):
    await up(world)
    await until(world, all_in_sync, "it is in sync")
    made = await clouds(world)
    await world.app.service.purge("test")
    await world.gone()

    async def gone():
        return await document(world) is None

    await world.until(gone, "it is gone")
    assert not any(one.volumes.volumes for one in made.values())
