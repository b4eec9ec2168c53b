"""Volumes of a U-Cloud: made, used, kept, refused, reverted, deleted; on the fake provider."""

import asyncio
import json

import pytest

from supercloud.model.errors import (
    BadState,
    Invalid,
    NoResources,
    NotFound,
    Unsupported,
)
from support.control import World, environment, manifest_of
from support.volumes import (
    DATA,
    PLAIN,
    document,
    down,
    host,
    manifest,
    reaches,
    sealed,
    spec_of,
    told,
    up,
    vanishes,
)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def test_up_makes_a_volume_where_its_user_is_and_gives_it_a_slot(world):
    applied = await up(world)
    changes = {change.subject: change for change in applied.plan.changes}
    volume = await document(world)
    assert changes["volume/data"].action == "create"
    assert changes["volume/data"].details == ["64MiB", "qcow2", f"at fake/{volume.host}"]
    (row,) = await world.app.service.environments("test")
    assert (volume.state, volume.host) == ("attached", row.host)
    (mount,) = (await spec_of(world)).volumes
    assert (mount.volume, mount.path, mount.slot) == ("data", "/data", volume.slot)
    assert 1 <= volume.slot <= 8
    assert world.volume_creations() == ["data"]
    view = await world.app.service.ucloud("test")
    assert {step.subject for step in view.steps} >= {"volume/data"}
    assert all(step.state == "done" for step in view.steps)


async def test_its_epoch_is_kept_before_it_is_used(world):
    seen = {}
    volumes_of = type((await _provider(world)).volumes)
    serve = volumes_of.serve

    async def watched(self, at, name, epoch):
        seen[name] = (epoch, (await document(world)).seal.epoch)
        return await serve(self, at, name, epoch)

    volumes_of.serve = watched
    try:
        await up(world)
    finally:
        volumes_of.serve = serve
    assert seen == {"data": (1, 1)}


async def _provider(world):
    from supercloud.model.resources import Provider

    entry = Provider(name="other", kind="fake")
    return world.app.plane.pool.get("test", entry)


async def test_the_same_up_again_changes_nothing(world):
    await up(world)
    before = await document(world)
    again = await world.app.service.up(manifest(world))
    assert again.plan.changes == []
    await world.ready()
    assert (await document(world)).seal == before.seal


async def test_an_environment_without_it_serves_and_lets_it_go(world):
    await up(world)
    uid = (await spec_of(world)).uid
    applied = await up(world, [PLAIN])
    assert [(c.action, c.subject) for c in applied.plan.changes] == [
        ("change", "environment/web"),
    ]  # fmt: skip
    volume = await reaches(world, "kept")
    assert (volume.platform, volume.slot, volume.opened) == ("", 0, False)
    assert (await spec_of(world)).uid != uid
    await up(world)
    assert (await reaches(world, "attached")).seal.epoch == 2
    assert world.volume_creations() == ["data"]


async def test_it_is_not_taken_from_a_platform_before_its_user_is_gone(world):
    """The agent's word counts, not the wish."""
    await up(world)
    (platform,) = await world.app.plane.state.platforms("test")
    pretended = await host(world)
    agents, key = world.app.plane.agents, ("test", platform.name)
    take, old = agents.take, agents.reports[key]

    def stubborn(ucloud, name, report):
        """The old one is stopping, and takes its time."""
        gone = [s for s in old.environments if s.uid not in {e.uid for e in report.environments}]
        statuses = [*report.environments, *gone]
        from dataclasses import replace

        take(ucloud, name, replace(report, environments=statuses))

    agents.take = stubborn
    await world.app.service.up(manifest(world, [PLAIN]))

    async def told_so():
        return not (await spec_of(world)).volumes

    await world.until(told_so, "the agent is told")
    await asyncio.sleep(0.3)
    assert pretended.volumes["data"].state == "attached"
    agents.take = take
    take("test", platform.name, await agents.session("test", platform.name).list())
    await reaches(world, "kept")


async def test_down_keeps_the_data_and_up_finds_it(world):
    await up(world)
    pretended = await host(world)
    pretended.write("data", "precious")
    home = (await document(world)).host
    await down(world)
    kept = await document(world)
    assert (kept.state, kept.opened, kept.host) == ("kept", False, home)
    assert kept.seal == pretended.volumes["data"].seal
    (row,) = await world.app.service.volumes.rows()
    assert (row.ucloud, row.name, row.state) == ("test", "data", "kept")
    assert row.seal_age_s == -1
    applied = await up(world)
    change = next(c for c in applied.plan.changes if c.subject == "volume/data")
    assert (change.action, change.details[0]) == ("change", "the kept one, with its data")
    assert (await host(world)).volumes["data"].words == ["precious"]
    assert (await document(world)).host == home
    assert world.volume_creations() == ["data"]


async def test_what_uses_it_is_placed_where_it_is_whatever_taste_says(world):
    wish = environment("web", volumes=DATA["volumes"], placement={"anti_affinity": ["big"]})
    await up(world)
    home = (await document(world)).host
    await down(world)
    await up(world, [environment("big"), wish])
    rows = {row.name: row for row in await world.app.service.environments("test")}
    assert rows["web"].host == home != rows["big"].host


async def test_a_place_that_its_volume_is_not_at_is_refused_with_the_reason(world):
    two = [
        {"name": "fake", "kind": "fake", "region": "a", "options": {"hosts": "1"}},
        {"name": "other", "kind": "fake", "region": "b", "options": {"hosts": "1"}},
    ]
    there = environment("web", volumes=DATA["volumes"], placement={"region": "a"})
    await up(world, [there], providers=two)
    moved = environment("web", volumes=DATA["volumes"], placement={"region": "b"})
    with pytest.raises(NoResources, match="its volume data is at fake/fake-0") as caught:
        await world.app.service.plan(manifest(world, [moved], providers=two))
    assert "volume" in caught.value.hint
    with pytest.raises(NoResources, match="the manifest has no such provider"):
        await world.app.service.plan(manifest(world, [DATA], providers=two[1:]))


async def test_a_provider_without_volumes_is_refused_at_plan(world):
    with pytest.raises(Unsupported, match="provider fake has none: its options say so") as caught:
        await world.app.service.plan(manifest(world, options={"hosts": "1", "volumes": "0"}))
    assert caught.value.where.startswith("test.yaml:1:")
    assert caught.value.where.endswith("environments[0].volumes")
    plan = await world.app.service.plan(
        manifest(world, [PLAIN], options={"hosts": "1", "volumes": "0"})
    )
    assert any("is used by no environment" in warning for warning in plan.warnings)


async def test_growing_is_done_shrinking_and_another_format_are_refused(world):
    await up(world)
    applied = await world.app.service.up(manifest(world, volumes=[
        {"name": "data", "size": "128MiB", "iops": 50, "bandwidth": "1MiB"}
    ]))  # fmt: skip
    (change,) = applied.plan.changes
    assert change.details == ["size 64MiB -> 128MiB", "iops 0 -> 50", "bytes_per_s 0 -> 1048576"]
    pretended = await host(world)

    async def grown():
        now = await document(world)
        return now.given == now.spec and now.spec.size_bytes == 128 << 20

    await world.until(grown, "it is larger")
    spec = pretended.volumes["data"].spec
    assert (spec.size_bytes, spec.iops, spec.bytes_per_s) == (128 << 20, 50, 1 << 20)
    assert (await document(world)).state == "attached"
    for field, wish in (("size", {"size": "64MiB"}), ("format", {"size": "1GiB", "format": "raw"})):
        with pytest.raises(Invalid) as caught:
            await world.app.service.plan(manifest(world, volumes=[{"name": "data", **wish}]))
        assert caught.value.where.endswith(f" volumes[0].{field}")
    await down(world)
    with pytest.raises(Invalid, match="none is made smaller"):
        await world.app.service.plan(manifest(world))


async def test_one_that_cannot_grow_under_its_user_waits_until_that_is_gone(world):
    def sized(size):
        return [{"name": "data", "size": size, "format": "raw"}]

    await up(world, volumes=sized("64MiB"))
    await world.app.service.up(manifest(world, volumes=sized("128MiB")))

    async def waits():
        return bool((await document(world)).waits)

    await world.until(waits, "it waits")
    view = await world.app.service.volumes.volume("test", "data")
    assert (view.state, "raw, and in use" in view.reason) == ("attached", True)
    assert len(told(world, "waits")) == 1
    await world.app.service.up(manifest(world, (PLAIN,), volumes=sized("128MiB")))

    async def grown():
        return (await document(world)).given.size_bytes == 128 << 20

    await reaches(world, "kept")
    await world.app.service.up(manifest(world, volumes=sized("128MiB")))
    await world.until(grown, "it has grown")
    assert not (await document(world)).waits
    assert (await host(world)).volumes["data"].spec.size_bytes == 128 << 20


async def test_what_goes_through_it_is_told_while_it_is_used(world):
    await up(world)
    pretended = await host(world)

    async def row():
        (found,) = await world.app.service.volumes.rows()
        return found

    async def written():
        pretended.write("data", "word")
        rates = (await row()).rates
        return rates is not None and rates.writes_per_s > 0 and rates.write_bytes_per_s > 0

    await world.until(written, "its rates are known")
    assert (await row()).rates.reads_per_s == 0
    await down(world)
    assert (await row()).rates is None


async def test_readers_share_one_and_are_together(world):
    use = [{"name": "data", "path": "/d", "read_only": True}]
    wish = [environment(name, volumes=use) for name in ("a", "b", "c")]
    await up(world, wish)
    rows = await world.app.service.environments("test")
    assert len({row.host for row in rows}) == 1
    slots = [(await spec_of(world, name)).volumes[0].slot for name in ("a", "b", "c")]
    assert set(slots) == {(await document(world)).slot}
    assert all([(await spec_of(world, name)).volumes[0].read_only for name in ("a", "b", "c")])


async def test_more_volumes_than_a_platform_takes_go_to_another(world):
    volumes = [{"name": f"v{n}", "size": "1MiB"} for n in range(10)]
    wish = [
        environment(name, volumes=[{"name": f"v{n}", "path": f"/{n}"} for n in numbers])
        for name, numbers in (("a", range(5)), ("b", range(5, 10)))
    ]
    await up(world, wish, volumes)
    rows = await world.app.service.environments("test")
    assert len({row.host for row in rows}) == 2
    with pytest.raises(NoResources, match="a platform takes 8 volumes, 5 are in use"):
        await world.app.service.plan(
            manifest_of(
                world.directory, wish, name="small", volumes=volumes, options={"hosts": "1"}
            )
        )


async def test_a_platform_that_is_made_anew_gets_its_volumes_again(world):
    await up(world)
    (platform,) = await world.app.plane.state.platforms("test")
    pretended = await host(world)
    pretended.write("data", "x")
    pretended._cloud.delete(platform.name)

    async def again():
        (now,) = await world.app.plane.state.platforms("test")
        return now.incarnation == 2

    await world.until(again, "the next incarnation")
    await world.ready()
    volume = await reaches(world, "attached")
    assert volume.incarnation == 2
    assert pretended.volumes["data"].words == ["x"]


async def test_a_larger_platform_takes_its_volumes_over(world):
    await up(world, options={"hosts": "1", "platforms": "1"})
    await up(world, options={"hosts": "1", "platforms": "1"}, platform={"memory": "2GiB"})

    async def moved():
        platforms = await world.app.plane.state.platforms("test")
        volume = await document(world)
        return [p.name for p in platforms] == [volume.platform] and volume.slot > 0

    await world.until(moved, "the larger platform has it")
    await world.ready()
    assert world.volume_creations() == ["data"]


async def test_a_host_that_forgot_what_was_open_opens_it_again(world):
    """A user domain that started anew knows its volumes as closed ones."""
    await up(world)
    pretended = await host(world)
    volume = pretended.volumes["data"]
    volume.state, volume.platform, volume.slot = "closed", "", 0

    async def again():
        return pretended.volumes["data"].state == "attached"

    await world.until(again, "it is attached again")
    await world.ready()
    assert (await document(world)).seal.epoch == 2


async def test_delete_is_for_what_no_manifest_has(world):
    await up(world)
    volumes = world.app.service.volumes
    with pytest.raises(BadState, match="is in the manifest"):
        await volumes.delete("test", "data")
    await down(world)
    await volumes.delete("test", "data")
    await vanishes(world)
    assert world.volumes() == {}
    with pytest.raises(NotFound):
        await volumes.delete("test", "data")


async def test_down_with_volumes_leaves_nothing_and_up_makes_a_new_one(world):
    await up(world)
    await down(world, purge=True)
    assert (world.volumes(), await document(world)) == ({}, None)
    await up(world)
    assert world.volume_creations() == ["data", "data"]
    await down(world)
    assert await world.app.service.purge("test") is None
    await vanishes(world)
    with pytest.raises(NotFound):
        await world.app.service.purge("test")


async def test_up_while_it_goes_down_with_its_volumes_ends_with_a_volume_that_works(world):
    await up(world)
    await world.app.service.purge("test")
    await world.app.service.up(manifest(world))
    await world.ready()
    assert (await reaches(world, "attached")).slot
    assert world.volumes().keys() == {"data"}


async def test_one_that_was_never_used_goes_with_its_ucloud(world):
    idle = environment("web", replicas=0, volumes=DATA["volumes"])
    await world.app.service.up(manifest(world, [idle, environment("other")]))
    await world.ready()
    assert world.volume_creations() == []
    await down(world)
    assert await world.app.service.volumes.rows() == []


async def test_snapshots_are_made_reverted_to_and_forgotten(world):
    await up(world)
    volumes = world.app.service.volumes
    pretended = await host(world)
    pretended.write("data", "one")
    view = await volumes.task("test", "data", "snapshot", "first")
    assert view.snapshots == ["first"]
    pretended.write("data", "two")
    with pytest.raises(BadState, match="in use"):
        await volumes.task("test", "data", "revert", "first")
    await down(world)
    with pytest.raises(NotFound, match="no snapshot second"):
        await volumes.task("test", "data", "revert", "second")
    view = await volumes.task("test", "data", "revert", "first")
    assert (await host(world)).volumes["data"].words == ["one"]
    await reaches(world, "kept")
    assert (await volumes.task("test", "data", "forget", "first")).snapshots == []
    await up(world)  # going back to a snapshot is no rollback
    assert (await document(world)).state == "attached"
    assert told(world, "evidence") == []


async def test_raw_volumes_have_no_snapshots(world):
    await up(world, volumes=[{"name": "data", "size": "1MiB", "format": "raw"}])
    with pytest.raises(BadState, match="only qcow2"):
        await world.app.service.volumes.task("test", "data", "snapshot", "first")


async def test_the_wrapping_key_is_rotated_while_the_volume_is_used(world):
    await up(world)
    before = await document(world)
    key = world.app.plane.keys("test").unwrap(before.wrapped_key)
    rotated = await world.app.service.volumes.rotate_key("test")
    after = await document(world)
    assert (rotated.volumes, after.state) == (1, "attached")
    assert after.wrapped_key != before.wrapped_key
    assert world.app.plane.keys("test").unwrap(after.wrapped_key) == key
    with pytest.raises(NotFound):
        world.app.plane.keys("test").unwrap(before.wrapped_key)
    await down(world)
    await up(world)
    with pytest.raises(NotFound):
        await world.app.service.volumes.rotate_key("nobody")


async def test_inspect_tells_of_the_volumes_of_an_environment(world):
    await up(world)
    shown = await world.app.service.environment("test", "web")
    (mount,) = shown["volumes"]
    assert (mount.name, mount.path, mount.state) == ("data", "/data", "attached")
    assert (mount.mode, mount.slot) == ("vhost-user-blk", 1)
    assert 0 <= mount.seal_age_s < 5
    assert mount.undetected_rollback == "at most 5 s"
    view = await world.app.service.volumes.volume("test", "data")
    assert view.used_by == ["web"]
    assert view.seal.epoch == 1


async def test_keys_are_in_no_row_event_or_answer(world, caplog):
    await up(world)
    await world.app.service.volumes.rotate_key("test")
    await rolled_back_in(world)
    volume = await document(world)
    import base64

    key = world.app.plane.keys("test").unwrap(volume.wrapped_key)
    wrapping = (world.directory / "state" / "trust" / "test" / "volumes.keys").read_text().split()
    secrets = [key.hex(), base64.b64encode(key).decode(), *wrapping]
    rows, _ = await world.store.list("")
    text = b"\n".join(row.value for row in rows).decode()
    text += json.dumps([repr(e) for e in world.app.plane.events.since()])
    text += repr(await world.app.service.volumes.volume("test", "data"))
    text += repr(await world.app.service.environment("test", "web")) + repr(volume) + caplog.text
    assert not [secret for secret in secrets if secret in text]


async def rolled_back_in(world):
    pretended = await host(world)
    old = pretended.copy("data")
    pretended.write("data", "newer")
    await sealed(world)
    pretended.put_back(old)
    await reaches(world, "failed")


async def test_a_volume_that_failed_at_its_host_is_opened_and_attached_again(world):
    await up(world)
    pretended = await host(world)
    pretended.write("data", "x")
    volume = pretended.volumes["data"]
    volume.state, volume.reason, volume.platform, volume.slot = "failed", "its disk broke", "", 0

    async def said():
        return bool(told(world, "failed"))

    await world.until(said, "an event tells of it")
    assert told(world, "failed")[0].message == "its disk broke"
    assert (await reaches(world, "attached")).seal.epoch == 2
    await world.ready()
    assert volume.words == ["x"]


async def test_a_purge_is_not_undone_by_an_up_that_comes_at_once(world):
    """What was asked for first is done first: the new wish gets a new volume, and is told so."""
    await up(world)
    (await host(world)).write("data", "old")
    service = world.app.service
    _, applied = await asyncio.gather(service.purge("test"), service.up(manifest(world)))
    change = next(c for c in applied.plan.changes if c.subject == "volume/data")
    assert change.action == "create"
    await world.ready()
    await reaches(world, "attached")
    assert world.volumes()["data"]["words"] == []
    assert world.volume_creations() == ["data", "data"]
