"""What every provider keeps to: the same suite over each kind that can be had here."""

import asyncio
import dataclasses

import pytest

from supercloud.model.errors import Exists, NoResources, NotFound, Unsupported
from supercloud.model.states import MACHINE
from supercloud.providers.base import FEATURES
from supercloud.wire.messages import (
    Apply,
    EnvironmentSpec,
    Exec,
    ImageRef,
    Logs,
)
from supercloud.wire.tunnel import TunnelApply
from support.link import at_rendezvous
from support.providers import KINDS, PRETENDED, REAL


@pytest.fixture(params=[*PRETENDED, REAL])
async def provider(request, tmp_path, link):
    async with KINDS[request.param](request, tmp_path, link) as made:
        yield made


async def test_each_feature_is_there_or_has_a_reason(provider):
    features = await provider.features()
    assert features.keys() >= set(FEATURES)
    assert all(isinstance(reason, str) for reason in features.values())


async def test_a_host_can_be_told_of_others_and_others_of_it(provider):
    (host, *_) = await provider.hosts()
    peer = await provider.peer(host.name)
    assert peer.name
    assert not peer.address.startswith("localhost")
    for asked in (TunnelApply(objects_to=[peer.name]), TunnelApply(objects_from=peer)):
        await provider.tunnels(host.name, asked)
        await provider.tunnels(host.name, asked)
    with pytest.raises(NotFound):
        await provider.peer("nowhere")
    with pytest.raises(NotFound):
        await provider.tunnels("nowhere", TunnelApply())


async def test_hosts_have_no_more_free_than_they_have(provider):
    for host in await provider.hosts():
        assert 0 <= host.cpus_free <= host.cpus_total
        assert 0 <= host.memory_free_bytes <= host.memory_total_bytes
        assert 0 <= host.disk_free_bytes <= host.disk_total_bytes
        assert host.images


async def test_a_platform_is_made_once_however_often_it_is_asked_for(provider, ask):
    asked = ask()
    before = (await provider.hosts())[0]
    first = await provider.ensure_platform(asked)
    again = await provider.ensure_platform(asked)
    assert (again.name, again.host, again.first_port) == ("p1", asked.host, first.first_port)
    assert [seen.name for seen in await provider.platforms()] == ["p1"]
    after = (await provider.hosts())[0]
    assert before.platforms_free - after.platforms_free == 1
    assert before.memory_free_bytes - after.memory_free_bytes >= asked.memory_bytes


async def test_asked_for_at_once_it_is_made_once_too(provider, ask):
    asked = ask()
    made = await asyncio.gather(*(provider.ensure_platform(asked) for _ in range(5)))
    assert len({seen.first_port for seen in made}) == 1
    assert len(await provider.platforms()) == 1


async def test_an_observation_says_all_that_is_known(provider, ask):
    asked = ask()
    await provider.ensure_platform(asked)
    (seen,) = await provider.platforms()
    assert (seen.host, seen.image, seen.tag) == (asked.host, asked.image, asked.tag)
    assert seen.state in MACHINE
    assert seen.address
    assert seen.ports == asked.ports
    assert 1024 <= seen.first_port <= 65536 - seen.ports


async def test_another_config_disk_is_the_same_platform(provider, ask):
    asked = ask()
    await provider.ensure_platform(asked)
    await provider.ensure_platform(dataclasses.replace(asked, config_iso=ask().config_iso))
    assert len(await provider.platforms()) == 1


async def test_another_shape_under_the_same_name_is_refused(provider, ask):
    asked = ask()
    await provider.ensure_platform(asked)
    with pytest.raises(Exists):
        await provider.ensure_platform(
            dataclasses.replace(asked, memory_bytes=asked.memory_bytes + (64 << 20))
        )


async def test_what_does_not_fit_is_refused_before_any_effect(provider, ask):
    host = (await provider.hosts())[0]
    for changes in (
        {"memory_bytes": host.memory_total_bytes + (1 << 30)},
        {"scratch_bytes": host.disk_total_bytes + (1 << 30)},
    ):
        with pytest.raises(NoResources):
            await provider.ensure_platform(ask("huge", **changes))
    with pytest.raises((Unsupported, NotFound)):
        await provider.ensure_platform(ask("p2", image="sha256:" + "f" * 64))
    with pytest.raises(NotFound):
        await provider.ensure_platform(dataclasses.replace(ask("p3"), host="nowhere"))
    assert await provider.platforms() == []
    assert (await provider.hosts())[0] == host


@pytest.mark.parametrize("provider", PRETENDED, indirect=True)
async def test_ports_of_two_platforms_do_not_overlap(provider, ask):
    ranges = []
    for name in ("p1", "p2"):
        seen = await provider.ensure_platform(ask(name))
        ranges.append(set(range(seen.first_port, seen.first_port + seen.ports)))
    assert not ranges[0] & ranges[1]


async def test_deleted_is_gone_and_deleting_again_is_fine(provider, ask):
    before = (await provider.hosts())[0]
    await provider.ensure_platform(ask())
    await provider.delete_platform("p1")
    assert await provider.platforms() == []
    assert (await provider.hosts())[0] == before
    await provider.delete_platform("p1")
    await provider.delete_platform("never-was")


async def test_a_console_greets_and_an_unknown_platform_has_none(provider, ask):
    await provider.ensure_platform(ask())
    async with provider.console("p1") as console, asyncio.timeout(60):
        assert await console.read()
    with pytest.raises(NotFound):
        async with provider.console("nobody"):
            pass


ENVIRONMENT = EnvironmentSpec(
    name="web", uid="web-1", kind="container", image=ImageRef(format="erofs", blobs={})
)


async def serving(link):
    while True:
        report = await link.owner.until("report")
        if report.environments and all(e.state == "serving" for e in report.environments):
            return report


@pytest.mark.parametrize("provider", PRETENDED, indirect=True)
async def test_the_agent_comes_over_the_rendezvous_and_does_as_it_is_told(provider, ask, link):
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(ask())
        session = await link.owner.until("connected")
        assert session.hello.platform == "p1"
        await session.apply(Apply(generation=1, environments=[ENVIRONMENT]))
        report = await serving(link)
        assert [(e.name, e.uid) for e in report.environments] == [("web", "web-1")]
        async with session.exec(Exec(name="web", argv=["cat"])) as stream:
            await stream.write(b"abc")
            stream.signal(eof=True)
            assert b"".join([data async for data in stream.chunks()]) == b"abc"
            assert stream.trailer == {"exit_status": 0}
        async with session.logs(Logs(name="web")) as stream:
            async for _ in stream.chunks():
                pass
        with pytest.raises(NotFound):
            async with session.exec(Exec(name="nobody", argv=["cat"])):
                pass


@pytest.mark.parametrize("provider", PRETENDED, indirect=True)
async def test_environments_go_on_while_the_control_plane_is_away(provider, ask, link):
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(ask())
        session = await link.owner.until("connected")
        await session.apply(Apply(generation=7, environments=[ENVIRONMENT]))
        await serving(link)
    await link.owner.until("lost")
    async with at_rendezvous(provider, link.hub):
        session = await link.owner.until("connected")
        report = await session.list()
        assert (report.generation, report.environments[0].state) == (7, "serving")


async def test_an_agent_that_was_let_go_dials_again(provider, ask, link):
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(ask())
        first = await link.owner.until("connected")
        first.close()
        second = await link.owner.until("connected")
        assert (second is not first, second.hello.boot_id) == (True, first.hello.boot_id)


async def test_no_agent_comes_from_a_platform_that_is_deleted(provider, ask, link):
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(ask())
        await link.owner.until("connected")
        await provider.delete_platform("p1")
        await link.owner.until("lost")
        assert link.hub.sessions == {}
