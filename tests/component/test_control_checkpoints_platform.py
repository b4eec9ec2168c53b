"""Checkpoints of whole platforms, and restores at other providers; on the fake provider."""

import pytest

from supercloud.model.errors import BadState, Invalid, NoResources, NotFound
from support.checkpointed import cloud, manifest, restore, take, told, until, up
from support.control import World, environment

WEB = environment("web")
OTHER = environment("other")
KEPT = environment("web", checkpoint={})
WHOLE = {"checkpoint": {"keep": 2}}
TWO = [
    {"name": "here", "kind": "fake", "options": {"hosts": "1"}},
    {"name": "there", "kind": "fake", "options": {"hosts": "1"}},
]


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def only_platform(world):
    (platform,) = await world.app.plane.state.platforms("test")
    return platform


async def test_a_platform_goes_back_with_all_that_runs_in_it(world):
    applied = await up(world, [WEB, OTHER], platform=WHOLE, options={"hosts": "1"})
    platform = await only_platform(world)
    changes = {change.subject: change.details for change in applied.plan.changes}
    assert changes[f"checkpoints/{platform.name}"] == [
        "no checkpoints -> checkpoints when asked for, 2 kept"
    ]
    pretended = await cloud(world)
    pretended.remember("web", "one")
    await take(world, platform.name)
    pretended.remember("web", "two")
    pretended.remember("other", "more")
    uids = {row["name"]: row["uid"] for p in world.platforms().values() for row in p["statuses"]}
    await restore(world, name=platform.name)
    assert pretended.remembered("web") == ["one"]
    assert pretended.remembered("other") == []
    after = await only_platform(world)
    assert (after.name, after.incarnation, after.restored) == (platform.name, 2, 1)
    assert after.enrolled_pin == platform.enrolled_pin, "it has its key with it"
    now = {row["name"]: row["uid"] for p in world.platforms().values() for row in p["statuses"]}
    assert now == uids, "what runs in it is the same"
    assert pretended.creations[platform.name] == 2


async def test_a_platform_that_fails_after_a_restore_boots(world):
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    platform = await only_platform(world)
    pretended = await cloud(world)
    pretended.remember("web", "one")
    await take(world, platform.name)
    await restore(world, name=platform.name)
    assert pretended.remembered("web") == ["one"]
    pretended.set_state(platform.name, "failed")

    async def anew():
        now = await only_platform(world)
        return now.incarnation == 3 and now.state == "ready"

    await world.until(anew, "it is made anew")
    await world.ready()
    assert pretended.remembered("web") == []
    assert (await only_platform(world)).enrolled_pin != platform.enrolled_pin


async def test_a_platforms_checkpoint_that_is_refused_is_told_and_another_one_taken(world):
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    platform = await only_platform(world)
    pretended = await cloud(world)
    for word in ("one", "two"):
        pretended.remember("web", word)
        await take(world, platform.name)
    pretended.checkpoints.tamper("fake-0", platform.name, 2)
    await world.app.service.restores.restore("test", platform.name, 2, "")

    async def refused():
        now = await only_platform(world)
        return now.error is not None and "tampered" in now.error["message"]

    await world.until(refused, "it is refused")
    await restore(world, 1, platform.name)
    assert pretended.remembered("web") == ["one"]


async def test_another_size_is_another_platform_and_the_old_ones_are_kept(world):
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    platform = await only_platform(world)
    await take(world, platform.name)
    await up(world, [WEB], platform={**WHOLE, "memory": "2GiB"}, options={"hosts": "1"})
    await until(world, lambda d: d.state == "kept", "no more are taken", platform.name)
    with pytest.raises(BadState, match="no checkpoints any more"):
        await world.app.service.restores.restore("test", platform.name, 1, "")
    await world.app.service.checkpoints.delete("test", platform.name)
    await until(world, lambda d: d is None, "they are gone", platform.name)


async def test_a_schedule_of_platforms_changes_nothing_else(world):
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    name = (await only_platform(world)).name
    applied = await up(
        world, [WEB], platform={"checkpoint": {"every": "1h"}}, options={"hosts": "1"}
    )
    assert [change.subject for change in applied.plan.changes] == [f"checkpoints/{name}"]
    platform = await only_platform(world)
    assert (platform.name, platform.incarnation) == (name, 1)
    applied = await up(world, [WEB], options={"hosts": "1"})
    assert {change.subject for change in applied.plan.changes} == {f"checkpoints/{name}"}
    await until(world, lambda d: d is None, "none were taken, none are kept", name)


async def test_a_platform_does_not_go_on_with_the_checkpoints_of_an_environment(world):
    await up(world, [WEB], options={"hosts": "1"})
    name = (await only_platform(world)).name
    await up(world, [WEB, environment(name, checkpoint={})], options={"hosts": "1"})
    await take(world, name)
    await up(world, [WEB], options={"hosts": "1"})  # they are kept
    with pytest.raises(Invalid, match="of an environment"):
        await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    await world.app.service.checkpoints.delete("test", name)
    await until(world, lambda d: d is None, "they are gone", name=name)
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    await take(world, name)


async def test_whole_platforms_are_where_the_store_is(world):
    spread = environment("web", replicas=2, placement={"spread": "host"})
    with pytest.raises(NoResources, match="its checkpoints are kept at"):
        options = {"hosts": "2", "tunnel": "0"}
        await world.app.service.plan(manifest(world, [spread], platform=WHOLE, options=options))


async def test_platforms_do_not_move(world):
    await up(world, [WEB], platform=WHOLE, options={"hosts": "1"})
    name = (await only_platform(world)).name
    await take(world, name)
    with pytest.raises(Invalid, match="restored where it was"):
        await world.app.service.restores.restore("test", name, 0, "elsewhere")


async def test_an_environment_is_restored_at_another_provider_under_its_address(world):
    await up(world, [KEPT, OTHER], providers=TWO)
    before = await world.app.service.environment("test", "web")
    here = before["provider"]
    there = ({"here", "there"} - {here}).pop()
    (await cloud(world, here)).remember("web", "one")
    await take(world)
    done = await restore(world, to=there)
    after = await world.app.service.environment("test", "web")
    assert after["provider"] == there
    assert done.platform == after["platform"] != before["platform"]
    same = ("address", "mac", "network")
    assert [before[name] for name in same] == [after[name] for name in same]
    assert (await cloud(world, there)).remembered("web") == ["one"]
    assert (await cloud(world, here)).remembered("web") == []
    (row, *_) = [r for r in await world.app.service.environments("test") if r.name == "other"]
    assert row.provider == here, "nothing else moves"
    # It stays there, and keeps its address, whatever is asked for later.
    applied = await up(world, [KEPT, OTHER], providers=TWO)
    assert applied.plan.changes == []
    assert (await take(world)).sequence == 2
    await restore(world, 1)
    await restore(world, to=here)
    back = await world.app.service.environment("test", "web")
    assert [before[name] for name in (*same, "platform")] == [
        back[name] for name in (*same, "platform")
    ]
    assert (await cloud(world, here)).remembered("web") == ["one"]


async def test_a_restore_elsewhere_is_refused_with_the_reason(world):
    alone = [{**entry, "options": {"hosts": "1", "tunnel": "0"}} for entry in TWO]
    await up(world, [KEPT], providers=alone)
    await take(world)
    (row,) = await world.app.service.environments("test")
    there = ({"here", "there"} - {row.provider}).pop()
    service = world.app.service.restores
    with pytest.raises(NoResources, match="its checkpoints are kept at") as refused:
        await service.restore("test", "web", 0, there)
    assert "its options say so" in str(refused.value)
    with pytest.raises(NotFound, match="no provider nowhere"):
        await service.restore("test", "web", 0, "nowhere")
    assert (await world.app.plane.state.ucloud("test")).restores == {}
    assert told(world, "ucloud.restore") == []


async def test_an_address_that_somebody_else_has_by_now_is_not_taken_away(world):
    await up(world, [KEPT, OTHER], options={"hosts": "1"})
    await take(world)
    owner = await world.app.plane.state.ucloud("test")
    mine, others = owner.assignments["web"], owner.assignments["other"]

    def was_elsewhere(fresh):
        fresh.kept[-1].place.address = others.address

    await world.app.plane.state.change(
        await world.app.plane.state.checkpoints_of("test", "web"), was_elsewhere
    )
    await restore(world)
    owner = await world.app.plane.state.ucloud("test")
    assert owner.assignments["web"].address == mine.address
