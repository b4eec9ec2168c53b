"""What the world does to a U-Cloud, and how the control plane mends it; on the fake provider."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from supercloud.control.documents import PlatformDocument
from supercloud.model.errors import Denied, NotFound, Temporary
from supercloud.providers.base import PlatformRequest
from supercloud.providers.fake.agent import FakeAgent
from support import oci
from support.control import QUICK, World, environment, manifest_of

TWO = [environment("web"), environment("db", kind="vm", image="vm", ports=[])]


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def up(world, wish=TWO, **more):
    await world.app.service.up(manifest_of(world.directory, wish, **more))
    await world.ready()


async def provider(world):
    document = (await world.app.plane.state.uclouds())[0]
    return world.app.plane.pool.get(document.name, next(iter(document.providers.values())))


async def cloud(world):
    return (await provider(world)).cloud


async def only_platform(world) -> PlatformDocument:
    (platform,) = await world.app.plane.state.platforms("test")
    return platform


async def rows(world):
    return {row.name: row for row in await world.app.service.environments()}


async def codes(world):
    return [event.code for event in world.app.plane.events.since()]


async def test_a_platform_that_vanished_is_made_again_with_a_new_token(world):
    await up(world)
    before = await only_platform(world)
    pretended = await cloud(world)
    pretended.delete(before.name)

    async def again():
        return (await only_platform(world)).incarnation == 2

    await world.until(again, "the next incarnation")
    await world.ready()
    after = await only_platform(world)
    assert (after.name, after.state, after.failures) == (before.name, "ready", 0)
    assert after.token_sha256 != before.token_sha256
    assert Counter(world.creations())[before.name] == 2
    assert {row.state for row in (await rows(world)).values()} == {"serving"}


async def test_a_platform_that_failed_is_deleted_and_made_again(world):
    await up(world)
    platform, pretended = await only_platform(world), await cloud(world)
    pretended.set_state(platform.name, "failed", "the host's memory broke")

    async def again():
        return (await only_platform(world)).incarnation == 2

    await world.until(again, "the next incarnation")
    await world.ready()
    assert pretended.platforms[platform.name].state == "running"
    failed = [e for e in world.app.plane.events.since() if e.code == "control.platform.failed"]
    assert "memory broke" in failed[0].message


async def test_a_platform_that_started_anew_without_its_key_is_made_again(world):
    """It shows the used token with another key: it has lost its disk's key, too."""
    await up(world)
    platform, pretended = await only_platform(world), await cloud(world)
    for suffix in (".key", ".pem"):
        import os

        os.unlink(pretended.path(platform.name, suffix))
    world.app.plane.agents.session("test", platform.name).close()

    async def again():
        return (await only_platform(world)).incarnation == 2

    await world.until(again, "the next incarnation")
    await world.ready()
    assert "control.platform.refused" in await codes(world)


async def test_a_platform_that_runs_but_can_never_be_reached_again_is_made_again(world):
    """Its link died: nothing else would ever bring it back."""
    await up(world, options={"hosts": "3", "reconnect_ms": "60000"})
    platform, pretended = await only_platform(world), await cloud(world)
    pretended.platforms[platform.name].cut_off = True
    world.app.plane.agents.session("test", platform.name).close()

    async def again():
        return (await only_platform(world)).incarnation == 2

    await world.until(again, "the next incarnation")
    await world.ready()
    assert {row.state for row in (await rows(world)).values()} == {"serving"}


async def test_a_short_absence_of_an_agent_changes_nothing(world):
    await world.stop()
    world.pace = replace(QUICK, lost_grace_s=60)
    await world.start()
    await up(world)
    platform = await only_platform(world)
    old = world.app.plane.agents.session("test", platform.name)
    old.close()

    async def back():
        assert (await only_platform(world)).state == "ready"
        assert {row.state for row in (await rows(world)).values()} == {"serving"}
        return world.app.plane.agents.session("test", platform.name) not in (None, old)

    await world.until(back, "the agent is back")
    await world.ready()
    assert "control.platform.lost" not in await codes(world)


async def test_a_long_absence_is_said_and_mended_without_making_anything_anew(world, monkeypatch):
    await up(world)
    platform = await only_platform(world)
    returns, connect = asyncio.Event(), FakeAgent.connect

    async def later(agent, sock):
        await returns.wait()
        await connect(agent, sock)

    monkeypatch.setattr(FakeAgent, "connect", later)
    world.app.plane.agents.session("test", platform.name).close()

    async def lost():
        view = await world.app.service.ucloud("test")
        states = {row.state for row in (*view.environments, *view.platforms)}
        return states == {"lost"} and view.state == "degraded"

    await world.until(lost, "all are lost and the U-Cloud is degraded")
    returns.set()
    await world.ready()
    assert set(Counter(world.creations()).values()) == {1}


async def test_an_orphan_at_the_provider_is_swept_away(world):
    await up(world)
    wish = (await only_platform(world)).wish
    orphan = PlatformRequest(
        name="orphan-1", host=wish.host, image=wish.image, cpus=1, memory_bytes=1 << 30,
        scratch_bytes=1 << 30, ports=1, config_iso=b"", tag="supercloud:test",
    )  # fmt: skip
    pretended = await cloud(world)
    pretended.create(orphan)
    pretended.create(replace(orphan, name="someone-elses", tag="other"))

    async def swept():
        return "orphan-1" not in pretended.platforms

    await world.until(swept, "the orphan is gone")
    assert "someone-elses" in pretended.platforms
    await world.ready()


async def test_a_leftover_of_the_same_name_and_another_shape_gives_way(world):
    await up(world)
    platform = await only_platform(world)
    await world.app.service.down("test")
    await world.gone()
    document = manifest_of(world.directory, TWO)
    await world.app.service.up(document)
    pretended = await cloud(world)
    await world.ready()
    assert pretended.platforms.keys() == {platform.name}
    pretended.platforms[platform.name].shape = "another"
    pretended.delete(platform.name)
    request = PlatformRequest(
        name=platform.name, host=platform.wish.host, image=platform.wish.image, cpus=1,
        memory_bytes=1 << 28, scratch_bytes=1 << 28, ports=1, config_iso=b"", tag="supercloud:test",
    )  # fmt: skip
    pretended.create(request)

    async def right():
        there = pretended.platforms.get(platform.name)
        return there is not None and there.memory_bytes == platform.wish.size.memory_bytes

    await world.until(right, "the right platform is there")
    await world.ready()


async def test_a_larger_platform_takes_the_place_of_the_smaller_one(world):
    await up(world, options={"hosts": "1", "platforms": "1"})
    small = await only_platform(world)
    await up(world, options={"hosts": "1", "platforms": "1"}, platform={"memory": "2GiB"})

    async def replaced():
        names = [item.name for item in await world.app.plane.state.platforms("test")]
        return len(names) == 1 and names != [small.name]

    await world.until(replaced, "the larger platform is there alone")
    await world.ready()
    assert (await only_platform(world)).wish.size.memory_bytes == 2 << 30


async def test_a_provider_that_leaves_the_manifest_is_cleared_before_it_is_forgotten(world):
    await up(world)
    old = await cloud(world)
    others = [{"name": "second", "kind": "fake", "options": {"hosts": "1"}}]
    await up(world, providers=others)

    async def forgotten():
        document = await world.app.plane.state.ucloud("test")
        return [item.name for item in document.providers.values()] == ["second"]

    await world.until(forgotten, "the first provider is forgotten")
    assert old.platforms == {}
    assert {row.provider for row in (await rows(world)).values()} == {"second"}


async def test_up_while_going_down_makes_everything_anew(world):
    await up(world)
    await world.app.service.down("test")
    await world.app.service.up(manifest_of(world.directory, TWO))
    await world.ready()
    view = await world.app.service.ucloud("test")
    assert len(view.platforms) == 1
    assert {item.state for item in view.environments} == {"serving"}


async def test_down_twice_is_down_and_down_of_nothing_is_not_found(world):
    await up(world)
    await world.app.service.down("test")
    with_error = None
    try:
        await world.app.service.down("test")
    except NotFound as error:  # it may be gone by now
        with_error = error
    await world.gone()
    assert with_error is None or "test" in str(with_error)
    with pytest.raises(NotFound):
        await world.app.service.down("test")


async def test_an_image_that_cannot_be_converted_is_said_and_the_rest_runs(world):
    oci.Layout(world.directory / "web", [oci.layer(oci.file("other"))]).write()
    broken = world.app.plane.images

    def refuse(reference):
        if reference.endswith("/web"):
            raise Denied("the registry says no")
        raise Temporary("later")

    broken._convert = refuse
    await world.app.service.up(manifest_of(world.directory, TWO))

    async def said():
        view = await world.app.service.ucloud("test")
        return view.error is not None

    await world.until(said, "the error is shown")
    view = await world.app.service.ucloud("test")
    assert view.error["code"] == "denied"
    assert "registry says no" in view.error["message"]

    async def db():
        return (await rows(world))["db"].state == "serving"

    await world.until(db, "the other EE serves")
    assert (await world.app.service.ucloud("test")).state == "degraded"


async def test_the_same_image_for_many_environments_is_converted_once(world):
    calls = Counter()
    convert = world.app.plane.images._convert

    def counted(reference):
        calls[reference] += 1
        return convert(reference)

    world.app.plane.images._convert = counted
    await up(world, [environment("web", replicas=10)])
    assert list(calls.values()) == [1]


async def test_a_local_image_that_changed_is_run_anew_by_the_next_up(world):
    await up(world)
    before = await world.app.service.environment("test", "web")
    db = await world.app.service.environment("test", "db")
    layer = oci.layer(oci.file("serve", b"something else"))
    oci.Layout(world.directory / "web", [layer]).write()
    plan = await world.app.service.plan(manifest_of(world.directory, TWO))
    assert [(c.action, c.subject) for c in plan.changes] == [("change", "environment/web")]
    assert "content of image" in plan.changes[0].details[0]
    await up(world)

    async def anew():
        return (await world.app.service.environment("test", "web"))["uid"] != before["uid"]

    await world.until(anew, "the changed image runs")
    await world.ready()
    assert (await world.app.service.environment("test", "db"))["uid"] == db["uid"]
    again = await world.app.service.up(manifest_of(world.directory, TWO))
    assert again.plan.changes == []


async def test_a_purged_cache_is_filled_again(world):
    await up(world)
    await world.stop()
    for path in (world.directory / "cache" / "blobs" / "sha256").iterdir():
        path.unlink()
    await world.start()
    await world.ready()

    async def filled():
        return any((world.directory / "cache" / "blobs" / "sha256").iterdir())

    await world.until(filled, "the blobs are there again")
    assert set(Counter(world.creations()).values()) == {1}


async def test_addresses_and_ports_stay_over_changes_and_restarts(world):
    await up(world, [environment("web", replicas=3), TWO[1]])
    before = {name: (row.address, row.urls) for name, row in (await rows(world)).items()}
    await up(world, [environment("new"), environment("web", replicas=2), TWO[1]])
    after = {name: (row.address, row.urls) for name, row in (await rows(world)).items()}
    for name in ("web", "web-2", "db"):
        assert after[name] == before[name]
    assert len({address for address, _ in after.values()}) == 4
    await world.stop()
    await world.start()
    await world.ready()
    again = {name: (row.address, row.urls) for name, row in (await rows(world)).items()}
    assert again == after


async def test_two_uclouds_never_share_a_range(world):
    names = [f"cloud{n}" for n in range(6)]
    manifests = [manifest_of(world.directory, [environment("web")], name=name) for name in names]
    await asyncio.gather(*(world.app.service.up(item) for item in manifests))
    for name in names:
        await world.ready(name)
    documents = await world.app.plane.state.uclouds()
    ranges = [item.networks["default"] for item in documents]
    assert len(set(ranges)) == 6


async def test_two_ups_at_once_end_in_one_of_the_wishes(world):
    one = manifest_of(world.directory, [environment("web")])
    two = manifest_of(world.directory, [environment("web"), environment("other")])
    await asyncio.gather(*(world.app.service.up(item) for item in (one, two, one, two)))
    await world.ready()
    assert (await rows(world)).keys() in ({"web"}, {"web", "other"})


async def test_a_container_is_told_what_the_manifest_says(world):
    wish = environment(
        "web", command=["/run", "it"], env={"A": "1"}, memory="64MiB", cpus=0.5,
        restart="never", ports=[80, {"port": 53, "protocol": "udp", "publish": False}],
    )  # fmt: skip
    await up(world, [wish])
    platform = (await cloud(world)).platforms[(await only_platform(world)).name]
    (spec,) = platform.specs
    assert (spec.name, spec.kind, spec.restart) == ("web", "container", "never")
    assert (spec.process.argv, spec.process.env) == (["/run", "it"], {"A": "1"})
    assert (spec.memory_bytes, spec.cpus) == (64 << 20, 0.5)
    published = {(port.port, port.protocol): port.host_port for port in spec.ports}
    assert published == {(80, "tcp"): platform.first_port, (53, "udp"): 0}
    assert spec.image.format == "erofs"
    assert spec.nics[0].address.endswith("/24")
    assert spec.nics[0].mac.startswith("02:5c:0a:40:")


async def test_a_certificate_that_is_due_is_renewed_and_agents_come_back(world):
    await up(world)
    authority = world.app.authority
    before = authority("test").chain_pem
    path = world.directory / "state" / "trust" / "test" / "intermediate.pem"
    path.unlink()  # as good as due: the next look makes a new one
    authority._look_again_s = 0.0

    async def renewed():
        return authority("test").chain_pem != before

    await world.until(renewed, "a new certificate")
    authority._look_again_s = 1e9

    async def back():
        return world.app.plane.agents.session("test", (await only_platform(world)).name) is not None

    await world.until(back, "the agent is back")
    await world.ready()
    assert set(Counter(world.creations()).values()) == {1}
