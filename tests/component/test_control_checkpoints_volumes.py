"""Checkpoints of EEs that write to volumes: of one instant, kept together, gone back to together."""

import pytest

from supercloud.control import held
from supercloud.model.errors import (
    BadState,
    Denied,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.providers.fake.agent import FakeAgent
from supercloud.wire.checkpoints import CheckpointSnapshot
from support import checkpointed
from support.checkpointed import cloud, document, restore, take, told, until
from support.control import World, environment

VOLUMES = [{"name": "data", "size": "64MiB"}, {"name": "more", "size": "64MiB"}]
USES = [{"name": "data", "path": "/data"}, {"name": "more", "path": "/more"}]
WEB = environment("web", checkpoint={"keep": 2}, volumes=USES)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def up(world, wish=(WEB,), **more):
    await checkpointed.up(world, wish, **{"volumes": VOLUMES, **more})


async def note(world, word):
    """Into its memory and onto both of its volumes."""
    pretended = await cloud(world)
    pretended.remember("web", word)
    for volume in ("data", "more"):
        pretended.volumes.write(volume, word)


async def noted(world):
    """What it has in mind, which is also what is on its volumes."""
    pretended = await cloud(world)
    words = pretended.remembered("web")
    for volume in ("data", "more"):
        assert pretended.volumes.volumes[volume].words == words, volume
    return words


def snapshots(world, name="data"):
    return sorted(world.volumes()[name]["snapshots"])


async def has_snapshots(world, names):
    async def there():
        return snapshots(world) == sorted(names) == snapshots(world, "more")

    await world.until(there, f"the volumes have {len(names)} snapshots")


async def claimed(world):
    kept = await document(world)
    for item in kept.kept:
        assert set(item.snapshots) == {"data", "more"}
    return [item.snapshots["data"] for item in kept.kept]


async def test_its_volumes_go_back_with_it(world):
    await up(world)
    await note(world, "first")
    assert (await take(world)).sequence == 1
    await note(world, "second")
    assert (await take(world)).sequence == 2
    await note(world, "third")
    done = await restore(world, 1)
    assert done.volumes == ["data", "more"]
    assert await noted(world) == ["first"]
    assert len(told(world, "volume.reverted")) == 2
    await note(world, "other")
    await restore(world, 2)  # a later one stays
    assert await noted(world) == ["first", "second"]
    await restore(world, 2)  # also twice
    assert await noted(world) == ["first", "second"]


async def test_a_platform_that_dies_before_it_said_that_its_environment_is_back(world, monkeypatch):
    """What ran for that moment is on the volumes, and in the memory of nobody."""
    await up(world)
    await note(world, "first")
    await take(world)
    pretended, real, deaths = await cloud(world), FakeAgent._begun, []

    def begun(agent, spec):
        status = real(agent, spec)
        if spec.restore is not None and not deaths:
            deaths.append(agent.platform.name)
            for volume in ("data", "more"):
                pretended.volumes.write(volume, "unheard")
            pretended.set_state(agent.platform.name, "failed", "it died")
            raise Temporary("it died")
        return status

    monkeypatch.setattr(FakeAgent, "_begun", begun)
    await restore(world)
    assert deaths
    assert await noted(world) == ["first"]


async def test_a_word_of_another_life_is_not_taken_for_this_restore(world):
    """Numbers of restores begin anew with each life of a U-Cloud."""
    await up(world)
    await note(world, "first")
    await take(world)
    await restore(world)
    await checkpointed.down(world)
    await up(world)
    for volume in ("data", "more"):
        (await cloud(world)).volumes.write(volume, "later")
    await restore(world)
    assert await noted(world) == ["first"]


async def test_snapshots_go_with_their_checkpoints(world):
    await up(world)
    for number in range(4):
        await note(world, f"word {number}")
        await take(world)
    kept = await until(world, lambda d: len(d.kept) == 2 and not d.stale, "two are kept")
    assert [item.sequence for item in kept.kept] == [3, 4]
    await has_snapshots(world, await claimed(world))
    view = await world.app.service.volumes.volume("test", "data")
    assert sorted(view.purposes.values()) == ["checkpoint 3 of web", "checkpoint 4 of web"]
    shown = await world.app.service.checkpoints.view("test", "web")
    assert [set(row.snapshots) for row in shown.checkpoints] == [{"data", "more"}] * 2
    await checkpointed.down(world)
    await world.app.service.checkpoints.delete("test", "web")
    await has_snapshots(world, [])

    async def closed():
        volumes = await world.app.plane.state.volumes("test")
        return {volume.state for volume in volumes} == {"kept"}

    await world.until(closed, "they are closed again")


async def test_users_snapshots_stay_and_those_of_checkpoints_are_not_theirs(world):
    await up(world)
    await take(world)
    volumes = world.app.service.volumes
    await volumes.task("test", "data", "snapshot", "mine")
    (name,) = await claimed(world)
    for what in ("snapshot", "revert", "forget"):
        with pytest.raises(Denied, match="belong to checkpoints") as refused:
            await volumes.task("test", "data", what, name)
        assert "supercloud restore" in refused.value.hint
    for _ in range(2):
        await take(world)
    await until(world, lambda d: len(d.kept) == 2 and not d.stale, "two are kept")

    async def there():
        return snapshots(world) == sorted([*await claimed(world), "mine"])

    await world.until(there, "what is the user's is still there")


async def test_without_room_for_a_snapshot_there_is_no_checkpoint(world, monkeypatch):
    await up(world)
    await note(world, "first")
    pretended = await cloud(world)
    whole = pretended.volumes.snapshot

    async def full(host, name, snapshot):
        if name == "more":
            message, hint = "another snapshot of volume more needs more room", "make it larger"
            raise NoResources(message, hint=hint)
        return await whole(host, name, snapshot)

    monkeypatch.setattr(pretended.volumes, "snapshot", full)
    task = await take(world)
    assert "another snapshot of volume more" in task.error["message"]
    assert task.error["hint"] == "make it larger"
    (row,) = await world.app.service.checkpoints.rows("test")
    assert (row.state, row.hint) == ("failed", "make it larger")
    assert told(world, "checkpoint.failed")[-1].message.endswith("; what to do: make it larger")
    await has_snapshots(world, [])  # the one that was made is gone again
    assert pretended.remembered("web") == ["first"], "it goes on"
    monkeypatch.undo()
    assert (await take(world)).sequence
    (row,) = await world.app.service.checkpoints.rows("test")
    assert (row.reason, row.hint) == ("", "")
    await has_snapshots(world, await claimed(world))


async def test_an_agent_that_does_not_ask_has_taken_none(world, monkeypatch):
    await up(world)
    pretended = await cloud(world)
    real = pretended.checkpoints.take_environment

    async def silent(platform, asked, _snapshot):
        async def nothing():
            return

        return await real(platform, asked, nothing)

    monkeypatch.setattr(pretended.checkpoints, "take_environment", silent)
    task = await take(world)
    assert "has not asked for snapshots" in task.error["message"]
    assert (await document(world)).kept == []


async def test_only_what_is_expected_is_snapshotted_and_once(world, monkeypatch):
    await up(world)
    pretended, refused = await cloud(world), []
    (platform,) = await world.app.plane.state.platforms("test")
    owner = world.app.plane.agents
    real = pretended.checkpoints.take_environment
    session = owner.session("test", platform.name)

    async def ask(**wrong):
        asked = {"name": "web", "uid": "e", "snapshot": held.new_name(), **wrong}
        try:
            link = owner.hub("test").owner
            await link.snapshot(session, CheckpointSnapshot(**asked))
        except SupercloudError as error:
            refused.append(type(error))

    async def greedy(platform, asked, snapshot):
        await ask(uid=asked.uid)
        await ask(snapshot=asked.snapshot)
        await snapshot()
        await ask(uid=asked.uid, snapshot=asked.snapshot)
        return await real(platform, asked, _done)

    async def _done():
        return

    monkeypatch.setattr(pretended.checkpoints, "take_environment", greedy)
    await take(world)
    await ask()
    assert refused == [Denied] * 4
    await has_snapshots(world, await claimed(world))


async def test_a_restore_that_its_volumes_cannot_follow_is_refused_before_it_begins(world):
    other = {"name": "far", "kind": "fake", "options": {"hosts": "1"}}
    near = {"name": "fake", "kind": "fake", "options": {"hosts": "1"}}
    placed = {**WEB, "placement": {"provider": "fake"}}
    await up(world, [placed], providers=[near, other])
    await take(world)
    with pytest.raises(Unsupported, match="volume data, whose snapshot is on host fake-"):
        await world.app.service.restores.restore("test", "web", 0, "far")
    (name,) = await claimed(world)
    there = (await cloud(world)).volumes
    await there.forget(there.volumes["more"].host, "more", name)

    async def known():
        return not (await world.app.plane.state.volume("test", "more")).snapshots

    await world.until(known, "the control plane knows that it is gone")
    with pytest.raises(BadState, match="its snapshot of volume more"):
        await restore(world)


async def test_one_that_cannot_be_read_is_refused_and_costs_nothing(world):
    await up(world)
    await note(world, "first")
    await take(world)
    await note(world, "second")
    await take(world)
    await note(world, "third")
    pretended = await cloud(world)
    (host,) = pretended.checkpoints.all()
    pretended.checkpoints.tamper(host, "web", 1)
    for _ in range(2):
        with pytest.raises(Denied, match="tampered"):
            await restore(world, 1)
    (one, _) = told(world, "checkpoint.refused")
    assert one.subject == "checkpoints/web"
    assert one.message.startswith("checkpoint 1: ")
    pretended.fail("verify")
    with pytest.raises(Temporary):  # it may be whole, and is not taken for that
        await restore(world)
    assert (await world.app.plane.state.ucloud("test")).restores == {}
    assert not told(world, "volume.reverted")
    assert await noted(world) == ["first", "second", "third"]
    await restore(world)
    assert await noted(world) == ["first", "second"]


async def test_one_that_is_taken_while_another_is_read_is_not_restored_in_its_place(
    world, monkeypatch
):
    await up(world)
    await note(world, "first")
    await take(world)
    await note(world, "second")
    checkpoints = (await cloud(world)).checkpoints
    real = checkpoints.verify

    async def slow(host, asked):
        await take(world)
        return await real(host, asked)

    monkeypatch.setattr(checkpoints, "verify", slow)
    assert (await restore(world)).number == 1
    assert await noted(world) == ["first"]


async def test_a_host_that_cannot_read_one_to_nowhere_is_not_in_the_way(world, monkeypatch):
    await up(world)
    await note(world, "first")
    await take(world)

    async def older(_host, _asked):
        raise NotFound("no method 'checkpoint.verify'")

    monkeypatch.setattr((await cloud(world)).checkpoints, "verify", older)
    await restore(world)
    assert await noted(world) == ["first"]


async def test_readers_and_raw_volumes(world):
    raw = [{"name": "data", "size": "64MiB", "format": "raw"}, VOLUMES[1]]
    with pytest.raises(Unsupported, match="which is raw") as refused:
        await up(world, volumes=raw)
    assert "environments[0].checkpoint" in refused.value.where
    reads = [{**use, "read_only": True} for use in USES]
    await up(world, [{**WEB, "volumes": reads}], volumes=raw)
    await take(world)
    assert (await document(world)).kept[0].snapshots == {}
    assert snapshots(world, "more") == []
