"""Checkpoints of a U-Cloud: taken, kept, removed, restored, refused; on the fake provider."""

import asyncio
import time

import msgspec
import pytest

from supercloud.model.errors import (
    BadState,
    Busy,
    Invalid,
    NoResources,
    NotFound,
    Unsupported,
)
from supercloud.wire.checkpoints import BUCKET
from support.checkpointed import (
    PLAIN,
    WEB,
    cloud,
    collected,
    document,
    down,
    manifest,
    restore,
    take,
    told,
    until,
    up,
)
from support.control import World, environment

GIB = 1 << 30
OTHER = environment("other", checkpoint={})
MACHINE = environment("db", kind="vm", image="vm", checkpoint={})


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def remember(world, *words, name="web"):
    pretended = await cloud(world)
    for word in words:
        pretended.remember(name, word)


async def remembered(world, name="web"):
    return (await cloud(world)).remembered(name)


async def test_one_that_is_asked_for_is_taken_and_kept(world):
    applied = await up(world)
    changes = {change.subject: change for change in applied.plan.changes}
    (bucket,) = [change for change in applied.plan.changes if change.subject == f"bucket/{BUCKET}"]
    assert bucket.details[0] == "1GiB"
    assert "checkpoints when asked for, 3 kept" in changes["environment/web"].details
    task = await take(world)
    assert (task.sequence, task.error) == (1, None)
    kept = await document(world)
    assert (kept.state, kept.of, len(kept.kept)) == ("waiting", "environment", 1)
    assert kept.kept[0].base
    (row,) = await world.app.service.environments("test")
    assert row.checkpoint == 1
    assert abs(row.checkpoint_s - time.time()) < 600
    (event,) = told(world, "checkpoint.taken")
    assert event.details["sequence"] == 1
    view = await world.app.service.checkpoints.view("test", "web")
    assert [item.number for item in view.checkpoints] == [1]
    assert view.task.done
    assert [step.state for step in view.steps] == ["done"]


async def test_what_was_taken_comes_back_under_the_same_name_and_address(world):
    await up(world)
    await remember(world, "one")
    await take(world)
    await remember(world, "two")
    await take(world)
    await remember(world, "three")
    before = await world.app.service.environment("test", "web")
    done = await restore(world, 1)
    assert done.number == 1
    assert await remembered(world) == ["one"]
    after = await world.app.service.environment("test", "web")
    same = ("address", "mac", "platform", "urls", "network")
    assert [before[name] for name in same] == [after[name] for name in same]
    assert before["uid"] != after["uid"]
    assert [event.subject for event in told(world, "environment.restored")] == ["environment/web"]
    await restore(world)
    assert await remembered(world) == ["one", "two"]


async def test_a_machine_goes_back_too(world):
    await up(world, [MACHINE])
    await remember(world, "one", name="db")
    await take(world, "db")
    await remember(world, "two", name="db")
    await restore(world, name="db")
    assert await remembered(world, "db") == ["one"]


async def test_a_restored_one_that_loses_its_platform_starts_from_its_image(world):
    await up(world)
    await remember(world, "one")
    await take(world)
    await restore(world)
    pretended = await cloud(world)
    (name,) = pretended.platforms
    pretended.set_state(name, "failed")

    async def anew():
        platform = await world.app.plane.state.platform("test", name)
        return platform.incarnation == 2 and platform.state == "ready"

    await world.until(anew, "its platform is made anew")
    await world.ready()
    assert await remembered(world) == []


async def test_as_many_are_kept_as_is_wished_and_the_others_leave_the_store(world):
    await up(world)
    for _ in range(5):
        await take(world)
    kept = await until(world, lambda d: not d.stale and len(d.kept) == 3, "the oldest are gone")
    assert [item.sequence for item in kept.kept] == [3, 4, 5]
    await collected(world, [3, 4, 5])
    with pytest.raises(NotFound, match="checkpoint 2") as refused:
        await restore(world, 2)
    assert "3, 4, 5" in refused.value.hint
    await restore(world, 3)


async def test_they_are_taken_when_it_is_time_and_never_two_at_once(world):
    wish = environment("web", checkpoint={"every": "10s"})
    await up(world, [wish], options={"hosts": "1", "checkpoint_ms": "30"})
    assert (await document(world)).kept == []

    def long_ago(fresh):
        fresh.created_s -= 3600
        for item in fresh.kept:
            item.taken_ms -= 3600_000

    for number in (1, 2, 3):
        await world.app.plane.state.change(await document(world), long_ago)
        kept = await until(world, lambda d, n=number: len(d.kept) == n, "one more is there")
        assert kept.kept[-1].sequence == number
    (row,) = await world.app.service.checkpoints.rows()
    assert (row.every_s, row.keep, row.kept, row.last) == (10, 5, 3, 3)
    assert 8 < row.next_s - row.last_s < 12
    assert len(told(world, "checkpoint.taken")) == 3


async def test_the_schedule_goes_on_when_the_control_plane_starts_anew(world):
    wish = environment("web", checkpoint={"every": "1h"})
    await up(world, [wish])
    await take(world)
    (before,) = await world.app.service.checkpoints.rows()
    await world.stop()
    await world.start()
    await world.ready()
    (after,) = await world.app.service.checkpoints.rows()
    assert after.next_s == before.next_s
    assert 3000 < after.next_s - time.time() < 4000


async def test_another_schedule_makes_nothing_anew_but_the_wish_for_checkpoints_does(world):
    await up(world, [PLAIN])
    first = (await world.app.service.environment("test", "web"))["uid"]
    applied = await up(world, [WEB])
    (change,) = [c for c in applied.plan.changes if c.subject == "environment/web"]
    assert change.details == ["no checkpoints -> checkpoints when asked for, 3 kept"]
    second = (await world.app.service.environment("test", "web"))["uid"]
    assert first != second
    hourly = environment("web", checkpoint={"every": "1h", "keep": 9})
    applied = await up(world, [hourly])
    (change,) = applied.plan.changes
    assert change.details == ["checkpoints when asked for, 3 kept -> checkpoints every 1h, 9 kept"]
    assert (await world.app.service.environment("test", "web"))["uid"] == second
    await until(world, lambda d: d.policy.every_s == 3600, "it is taken more often")


async def test_what_fails_is_said_and_tried_again_after_the_same_head(world):
    await up(world)
    await take(world)
    pretended = await cloud(world)
    pretended.fail("checkpoint", 2)
    task = await take(world)
    assert (task.sequence, task.error) == (2, None)
    assert len(told(world, "checkpoint.failed")) == 2
    kept = await document(world)
    assert (kept.failures, kept.reason) == (0, "")
    pretended.fail("checkpoint", 9)
    task = await take(world)
    assert task.error["code"] == "temporary"
    assert "pretended failure" in task.error["message"]
    kept = await document(world)
    assert (kept.state, kept.reason) == ("failed", task.error["message"])
    pretended.fail("checkpoint", -9)
    assert (await take(world)).sequence == 3


async def test_nothing_is_taken_of_what_does_not_run(world):
    wish = environment("web", checkpoint={}, restart="never", command=["false"])
    await world.app.service.up(manifest(world, [wish]))

    async def ended():
        rows = await world.app.service.environments("test")
        return [row.state for row in rows] == ["exited"]

    await world.until(ended, "it has ended")
    with pytest.raises(BadState, match="is exited"):
        await world.app.service.checkpoints.take("test", "web")


async def test_a_second_one_is_not_asked_for_while_the_first_is_not_done(world, monkeypatch):
    await up(world)
    pretended, ends = await cloud(world), asyncio.Event()
    pretend = pretended.pretend

    async def held(operation):
        if operation == "checkpoint":
            await ends.wait()
        await pretend(operation)

    monkeypatch.setattr(pretended, "pretend", held)
    await world.app.service.checkpoints.take("test", "web")
    with pytest.raises(Busy):
        await world.app.service.checkpoints.take("test", "web")
    ends.set()
    await until(world, lambda d: d.task.done, "it is done")


async def test_one_that_was_tampered_with_is_refused_and_another_one_restored(world):
    await up(world)
    await remember(world, "one")
    await take(world)
    await remember(world, "two")
    await take(world)
    pretended = await cloud(world)
    (host,) = pretended.checkpoints.all()
    pretended.checkpoints.tamper(host, "web", 2)
    await world.app.service.restores.restore("test", "web", 2, "")

    async def failed():
        (row,) = await world.app.service.environments("test")
        return row.state == "failed" and "tampered" in row.reason

    await world.until(failed, "it is refused")
    (row,) = await world.app.service.checkpoints.rows()
    assert row.restoring == 2
    await restore(world, 1)
    assert await remembered(world) == ["one"]


async def test_it_stays_while_it_is_being_restored(world):
    await up(world)
    for _ in range(3):
        await take(world)
    pretended = await cloud(world)
    (host,) = pretended.checkpoints.all()
    pretended.checkpoints.tamper(host, "web", 1)  # so that it stays pending
    await world.app.service.restores.restore("test", "web", 1, "")

    async def failed():
        (row,) = await world.app.service.environments("test")
        return row.state == "failed"

    await world.until(failed, "it waits")
    await world.app.service.up(manifest(world, [environment("web", checkpoint={"keep": 1})]))
    kept = await until(world, lambda d: len(d.kept) == 2, "all but the newest and this go")
    assert [item.sequence for item in kept.kept] == [1, 3]


async def test_another_image_does_not_go_on_from_it(world):
    await up(world)
    await take(world)
    await up(world, [environment("web", image="oci:web2", checkpoint={})])
    with pytest.raises(BadState, match="image, command or size"):
        await world.app.service.restores.restore("test", "web", 1, "")
    view = await world.app.service.checkpoints.view("test", "web")
    assert "changed since" in view.checkpoints[0].restorable
    await up(world)
    await restore(world, 1)


async def test_a_changed_one_is_no_more_what_was_restored(world):
    await up(world)
    await remember(world, "one")
    await take(world)
    await restore(world)
    await up(world, [environment("web", image="oci:web2", checkpoint={})])
    assert (await world.app.plane.state.ucloud("test")).restores == {}
    assert await remembered(world) == []
    await up(world)
    assert await remembered(world) == []
    await restore(world)
    assert await remembered(world) == ["one"]


async def test_down_keeps_them_and_up_finds_them(world):
    await up(world)
    await remember(world, "one")
    await take(world)
    await down(world)
    kept = await document(world)
    assert (kept.state, kept.policy, len(kept.kept)) == ("kept", None, 1)
    with pytest.raises(BadState, match="not up"):
        await world.app.service.restores.restore("test", "web", 1, "")
    await up(world)
    await until(world, lambda d: d.policy is not None, "they are taken again")
    assert await remembered(world) == []
    await restore(world)
    assert await remembered(world) == ["one"]
    assert (await take(world)).sequence == 2


async def test_an_environment_that_goes_leaves_them_until_they_are_deleted(world):
    await up(world, [WEB, OTHER])
    await take(world)
    await take(world, "other")
    with pytest.raises(BadState, match="by the manifest"):
        await world.app.service.checkpoints.delete("test", "web")
    applied = await up(world, [OTHER])
    assert [c.details for c in applied.plan.changes if c.subject == "checkpoints/web"] == [
        ["are kept until supercloud checkpoints delete"]
    ]
    await until(world, lambda d: d.state == "kept", "no more are taken")
    await collected(world, [1])
    await world.app.service.checkpoints.delete("test", "web")
    await until(world, lambda d: d is None, "they are gone")
    await collected(world, [])
    await collected(world, [1], "other")


async def test_the_last_ones_take_their_bucket_with_them(world):
    await up(world)
    await take(world)
    await down(world)
    pretended_stores = world.app.plane.state
    assert (await pretended_stores.store_document("test")).buckets.keys() == {BUCKET}
    await world.app.service.checkpoints.delete_all("test")

    async def gone():
        return await document(world) is None and (
            await world.app.plane.state.store_document("test") is None
        )

    await world.until(gone, "nothing is left")


async def test_deleted_while_down_beside_buckets_the_store_serves_for_it_and_rests(world):
    buckets = [{"name": "photos", "quota": "64MiB"}]
    using = environment("plain", buckets=[{"name": "photos"}])
    await up(world, [WEB, OTHER, using], buckets=buckets)
    await take(world)
    await take(world, "other")
    await down(world)
    await world.app.service.checkpoints.delete("test", "web")

    async def gone():
        store = await world.app.plane.state.store_document("test")
        return await document(world) is None and not store.running

    await world.until(gone, "they are gone, and the store rests")
    await world.app.service.checkpoints.delete("test", "other")

    async def alone():
        store = await world.app.plane.state.store_document("test")
        return store.buckets.keys() == {"photos"} and not store.running

    await world.until(alone, "only the other bucket is left")


async def test_purge_takes_all(world):
    await up(world)
    await take(world)
    await down(world, purge=True)

    async def gone():
        return await document(world) is None and (
            await world.app.plane.state.store_document("test") is None
        )

    await world.until(gone, "nothing is kept")


async def test_refusals_come_before_any_effect_and_name_their_place(world):
    service = world.app.service
    with pytest.raises(Unsupported, match="no store") as refused:
        await service.up(manifest(world, options={"objects": "0"}))
    assert "environments[0].checkpoint" in refused.value.where
    with pytest.raises(Unsupported, match="cannot: its options"):
        await service.up(manifest(world, options={"checkpoints": "0"}))
    with pytest.raises(NoResources, match="disk quota") as refused:
        await service.up(manifest(world, checkpoint={"capacity": "1TiB"}))
    assert "checkpoint.capacity" in refused.value.where
    writing = environment("web", volumes=[{"name": "data", "path": "/d"}])
    raw = {"name": "data", "size": "1MiB", "format": "raw"}
    whole = {"volumes": [raw], "platform": {"checkpoint": {}}}
    with pytest.raises(Unsupported, match="it has no snapshots"):
        await service.up(manifest(world, [writing], **whole))
    with pytest.raises(Invalid, match="store's own"):
        await service.up(manifest(world, buckets=[{"name": BUCKET, "quota": "1MiB"}]))
    with pytest.raises(NotFound, match="no checkpoints"):
        await service.checkpoints.take("test", "web")
    assert await service.uclouds() == []


async def test_what_its_platform_cannot_checkpoint_is_refused(world):
    options = {"hosts": "1", "vm_checkpoints": "0"}
    await world.app.service.up(manifest(world, [MACHINE], options=options))

    async def refused():
        view = await world.app.service.ucloud("test")
        return view.state in ("applying", "degraded") and bool(view.error)

    await world.until(refused, "it is refused")
    view = await world.app.service.ucloud("test")
    assert "no checkpoints can be taken of db" in view.error["message"]
    assert "its options say so" in view.error["message"]
    assert all(spec["name"] != "db" for p in world.platforms().values() for spec in p["specs"])
    with pytest.raises(NoResources, match="no checkpoints can be taken there: its options say so"):
        await world.app.service.plan(manifest(world, [MACHINE], options=options))


async def test_without_a_tunnel_they_stay_where_the_store_is(world):
    options = {"hosts": "3", "tunnel": "0"}
    spread = environment("web", checkpoint={}, replicas=2, placement={"spread": "host"})
    with pytest.raises(NoResources, match="its checkpoints are kept at fake/fake-"):
        await world.app.service.plan(manifest(world, [spread], options=options))
    await up(world, [spread], options={"hosts": "3"})
    for name in ("web", "web-2"):
        await take(world, name)


async def test_its_secret_is_made_once_and_nowhere_to_be_read(world):
    await up(world)
    store = await world.app.plane.state.store_document("test")
    keys = world.app.plane.keys("test")
    secret = keys.unwrap(store.wrapped_secret)
    assert len(secret) == 32
    await take(world)
    await restore(world)
    await world.app.service.volumes.rotate_key("test")
    fresh = await world.app.plane.state.store_document("test")
    assert fresh.wrapped_secret != store.wrapped_secret
    assert world.app.plane.keys("test").unwrap(fresh.wrapped_secret) == secret
    rows, _ = await world.app.store.list("")
    service = world.app.service
    shown = [
        await service.environment("test", "web"),
        await service.ucloud("test"),
        await service.checkpoints.view("test", "web"),
        await service.buckets.bucket("test", BUCKET),
        list(service.events.since()),
    ]
    text = msgspec.json.encode(shown).decode() + "".join(row.value.decode() for row in rows)
    access = [keys.unwrap(item.wrapped_secret).decode() for item in fresh.access.values()]
    for needle in (secret.hex(), *access):
        assert needle not in text


async def test_names_of_platforms_are_not_for_environments(world):
    platform = {"checkpoint": {}}
    await up(world, [PLAIN], platform=platform)
    (name,) = (await cloud(world)).platforms
    with pytest.raises(Invalid, match="the name of a platform"):
        await world.app.service.up(manifest(world, [PLAIN, environment(name)], platform=platform))
