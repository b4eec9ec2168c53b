"""Checkpoints of whole platforms that have volumes: of one moment, gone back to together."""

import pytest

from supercloud.model.errors import BadState, NoResources, Temporary, Unsupported
from supercloud.upper.platform.link.session import AgentSession
from support import checkpointed
from support.checkpointed import cloud, document, restore, take, told, until
from support.control import World, environment

VOLUMES = [{"name": "data", "size": "64MiB"}, {"name": "more", "size": "64MiB"}]
WEB = environment("web", volumes=[{"name": "data", "path": "/data"}])
OTHER = environment("other", volumes=[{"name": "more", "path": "/more"}])
WHOLE = {"checkpoint": {"keep": 2}}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def up(world, wish=(WEB, OTHER), **more):
    given = {"volumes": VOLUMES, "platform": WHOLE, "options": {"hosts": "1"}, **more}
    await checkpointed.up(world, wish, **given)
    return await platform_of(world)


async def warnings(world, **more):
    given = {"volumes": VOLUMES, "platform": WHOLE, "options": {"hosts": "1"}, **more}
    wish = checkpointed.manifest(world, (WEB, OTHER), **given)
    found = (await world.app.service.plan(wish)).warnings
    return [warning for warning in found if "checkpoint" in warning]


async def platform_of(world):
    (platform,) = await world.app.plane.state.platforms("test")
    return platform


async def note(world, word):
    """Into the memory of both, and onto the volume of each."""
    pretended = await cloud(world)
    for name, volume in (("web", "data"), ("other", "more")):
        pretended.remember(name, word)
        pretended.volumes.write(volume, word)


async def noted(world):
    """What both have in mind, which is also what is on their volumes."""
    pretended = await cloud(world)
    words = pretended.remembered("web")
    assert pretended.remembered("other") == words
    for volume in ("data", "more"):
        assert pretended.volumes.volumes[volume].words == words, volume
    return words


def slots(world):
    return {name: row["slot"] for name, row in world.volumes().items()}


async def has_snapshots(world, names):
    async def there():
        found = [sorted(row["snapshots"]) for row in world.volumes().values()]
        return all(one == sorted(names) for one in found)

    await world.until(there, f"the volumes have {len(names)} snapshots")


async def test_its_volumes_go_back_with_it_into_their_slots(world):
    platform = await up(world)
    assert {row["mode"] for row in world.volumes().values()} == {"nbd"}
    before = slots(world)
    await note(world, "first")
    assert (await take(world, platform.name)).sequence == 1
    (kept,) = (await document(world, platform.name)).kept
    assert kept.slots == before
    await note(world, "second")
    assert (await take(world, platform.name)).sequence == 2
    await note(world, "third")
    uids = {row["name"]: row["uid"] for p in world.platforms().values() for row in p["statuses"]}
    done = await restore(world, 1, platform.name)
    assert done.volumes == ["data", "more"]
    assert await noted(world) == ["first"]
    assert slots(world) == before
    now = {row["name"]: row["uid"] for p in world.platforms().values() for row in p["statuses"]}
    assert now == uids, "what runs in it is the same"
    await note(world, "other")
    for _ in range(2):
        await restore(world, 2, platform.name)
        assert await noted(world) == ["first", "second"]
    await note(world, "third")  # it still has them
    for volume in await world.app.plane.state.volumes("test"):
        assert (volume.platform, volume.halted) == (platform.name, "")
        assert volume.incarnation == (await platform_of(world)).incarnation


async def test_its_agent_is_told_nothing_before_it_is_known_where_its_volumes_are(
    world, monkeypatch
):
    platform = await up(world)
    await take(world, platform.name)
    pretended, given, told_of = await cloud(world), [], []
    attach, apply = pretended.volumes.attach, AgentSession.apply

    async def unknown():
        raise Temporary("not yet", delay_s=0.01)

    async def late(host, name, of, **more):
        given.append(name)
        if len(given) < 4:
            await unknown()
        return await attach(host, name, of, **more)

    async def told_to(session, asked, **more):
        told_of.extend(mount.slot for spec in asked.environments for mount in spec.volumes)
        return await apply(session, asked, **more)

    monkeypatch.setattr(AgentSession, "apply", told_to)
    monkeypatch.setattr(pretended.volumes, "attach", late)
    monkeypatch.setattr(pretended.volumes, "list", unknown)
    await restore(world, name=platform.name)
    assert len(given) >= 4
    assert told_of
    assert all(told_of)


async def test_a_restored_platform_that_fails_before_it_is_ready_gets_its_volumes_back_again(world):
    platform = await up(world)
    await note(world, "first")
    await take(world, platform.name)
    pretended, failed = await cloud(world), []
    real = pretended.volumes.go_back

    def fails(host, name, wanted):
        real(host, name, wanted)
        if not failed:
            failed.append(name)
            for item in wanted:  # what ran for a moment has written
                pretended.volumes.volumes[item.volume].words.append("lost")
            pretended.volumes.released(name)
            raise Temporary("the machine did not come to life", delay_s=0.01)

    pretended.volumes.go_back = fails
    await restore(world, name=platform.name)
    assert failed == [platform.name]
    assert await noted(world) == ["first"]


async def test_snapshots_go_with_a_platforms_checkpoints(world):
    platform = await up(world)
    for number in range(4):
        await note(world, f"word {number}")
        await take(world, platform.name)
    kept = await until(
        world, lambda d: len(d.kept) == 2 and not d.stale, "two are kept", platform.name
    )
    await has_snapshots(world, [item.snapshots["data"] for item in kept.kept])
    view = await world.app.service.volumes.volume("test", "data")
    assert sorted(view.purposes.values()) == [
        f"checkpoint {number} of {platform.name}" for number in (3, 4)
    ]


async def test_a_checkpoint_that_fails_leaves_no_snapshot(world, monkeypatch):
    platform = await up(world)
    pretended = await cloud(world)

    async def full(*_):
        raise NoResources("the store is full")

    monkeypatch.setattr(pretended.checkpoints, "_take", full)
    task = await take(world, platform.name)
    assert "the store is full" in task.error["message"]
    monkeypatch.undo()
    await has_snapshots(world, [])
    await take(world, platform.name)
    (kept,) = (await document(world, platform.name)).kept
    await has_snapshots(world, [kept.snapshots["data"]])


async def test_a_volume_that_is_not_used_any_more_goes_back_with_it_all_the_same(world):
    platform = await up(world)
    await note(world, "first")
    await take(world, platform.name)
    await note(world, "second")
    await up(world, [WEB])

    async def kept():
        return (await world.app.plane.state.volume("test", "more")).state == "kept"

    await world.until(kept, "it is closed")
    await restore(world, name=platform.name)
    pretended = await cloud(world)
    assert pretended.volumes.volumes["more"].words == ["first"]
    assert pretended.remembered("web") == ["first"]
    await world.until(kept, "it is closed again")


async def test_volumes_that_were_attached_before_checkpoints_were_wished_for(world):
    platform = await up(world, platform={})
    assert {row["mode"] for row in world.volumes().values()} == {"vhost-user-blk"}
    assert await warnings(world, platform={}) == []
    for volume, warning in zip(("data", "more"), await warnings(world), strict=True):
        assert warning.startswith(f"platform {platform.name}: no checkpoint of it can be taken yet")
        assert f"volume {volume} was attached before" in warning
        assert warning.endswith("supercloud down test, then up again")
    await up(world)
    task = await take(world, platform.name)
    assert "could not be restored with it" in task.error["message"]
    await checkpointed.down(world)
    assert await warnings(world) == []
    await up(world)
    assert await warnings(world) == []
    assert (await take(world, platform.name)).error is None


async def test_what_its_volumes_cannot_follow_is_refused_before_it_begins(world):
    platform = await up(world)
    await take(world, platform.name)
    (kept,) = (await document(world, platform.name)).kept
    there = (await cloud(world)).volumes
    await there.forget(there.volumes["more"].host, "more", kept.snapshots["more"])

    async def known():
        return not (await world.app.plane.state.volume("test", "more")).snapshots

    await world.until(known, "the control plane knows that it is gone")
    with pytest.raises(BadState, match="its snapshot of volume more"):
        await restore(world, name=platform.name)
    assert told(world, "platform.restoring") == []


async def test_raw_volumes_are_refused(world):
    raw = [{**VOLUMES[0], "format": "raw"}, VOLUMES[1]]
    with pytest.raises(Unsupported, match="which is raw") as refused:
        await up(world, volumes=raw)
    assert "platform.checkpoint" in refused.value.where
