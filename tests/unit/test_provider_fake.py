"""What only the fake provider has: regions, failures, counts, and a world that survives."""

import asyncio
import json
import time

import pytest

from supercloud.model.errors import BadState, Invalid, Temporary, Unsupported
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import MemoryPins
from supercloud.providers.fake.cloud import FakeCloud
from supercloud.providers.fake.options import IMAGE, Options, options_of
from supercloud.providers.fake.provider import FakeProvider
from supercloud.providers.registry import Context, make
from supercloud.wire.messages import Apply, EnvironmentSpec, ImageRef, Process
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeSpec
from support.link import Link, at_rendezvous, request


@pytest.fixture
def link(tmp_path):
    return Link(tmp_path / "trust")


def world(tmp_path, **options):
    return FakeCloud("fake", Options(**options), str(tmp_path / "world"))


def test_hosts_are_spread_over_the_regions():
    entry = Entry(name="f", kind="fake", options={"hosts": "5", "regions": "eu, us", "cpus": "8"})
    hosts = FakeCloud("f", options_of(entry)).hosts()
    assert [(h.name, h.region) for h in hosts] == [
        ("f-0", "eu"),
        ("f-1", "us"),
        ("f-2", "eu"),
        ("f-3", "us"),
        ("f-4", "eu"),
    ]
    assert {host.cpus_total for host in hosts} == {8}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hosts", "0"),
        ("hosts", "many"),
        ("cpus", "-1"),
        ("latency_ms", "1e3"),
        ("regions", " ,"),
        ("colour", "red"),
        ("hosts", "\uff19"),
    ],
)
def test_a_bad_option_is_named(key, value):
    with pytest.raises(Invalid) as caught:
        options_of(Entry(name="f", kind="fake", options={key: value}))
    assert caught.value.where == f"options.{key}"


def test_the_registry_makes_it_from_a_manifest_entry(tmp_path, link):
    context = Context(
        ucloud="demo",
        entry=Entry(name="f", kind="fake", options={"hosts": "2"}),
        authority=link.authority,
        trust_directory=str(link.directory),
        state_directory=str(tmp_path / "f"),
        pins=MemoryPins(),
    )
    assert len(make(context).cloud.hosts()) == 2
    with pytest.raises(Unsupported, match="no provider of kind 'ec2'"):
        make(
            Context(
                **{f: getattr(context, f) for f in context.__slots__}
                | {"entry": Entry(name="f", kind="ec2")}
            )
        )


async def test_pretended_failures_come_as_often_as_told_and_have_no_effect(tmp_path, link):
    cloud = world(tmp_path, fail_create=2)
    provider = FakeProvider(cloud)
    asked = request(link, "fake-0", image=IMAGE)
    for _ in range(2):
        with pytest.raises(Temporary):
            await provider.ensure_platform(asked)
    assert cloud.creations == {}
    await provider.ensure_platform(asked)
    cloud.fail("delete")
    with pytest.raises(Temporary):
        await provider.delete_platform("p1")
    assert cloud.creations == {"p1": 1}


async def test_latency_is_what_was_configured(tmp_path):
    provider = FakeProvider(world(tmp_path, latency_ms=40))
    begin = time.perf_counter()
    await provider.hosts()
    assert time.perf_counter() - begin >= 0.04


async def test_creations_are_counted_across_processes(tmp_path, link):
    asked = request(link, "fake-0", image=IMAGE)
    for _ in range(3):
        provider = FakeProvider(world(tmp_path))  # as a new process would
        await provider.ensure_platform(asked)
    assert provider.cloud.creations == {"p1": 1}
    await provider.delete_platform("p1")
    await provider.ensure_platform(asked)
    assert FakeProvider(world(tmp_path)).cloud.creations == {"p1": 2}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_a_crash_beside_an_effect_leaves_all_or_nothing(tmp_path, link, when, operation):
    cloud = world(tmp_path)
    provider = FakeProvider(cloud)
    asked = request(link, "fake-0", image=IMAGE)
    if operation == "delete":
        await provider.ensure_platform(asked)

    class Crash(BaseException):
        pass

    def crash(*moment):
        if moment == (when, operation, "p1"):
            raise Crash

    cloud.hook = crash
    with pytest.raises(Crash):
        await (
            provider.ensure_platform(asked)
            if operation == "create"
            else provider.delete_platform("p1")
        )
    there = (operation == "create") == (when == "after")
    again = world(tmp_path)
    assert list(again.platforms) == list(cloud.platforms) == (["p1"] if there else [])
    assert again.creations == ({"p1": 1} if there or operation == "delete" else {})


async def test_agents_and_environments_survive_the_process(tmp_path, link):
    """The second world reads what the first one kept: key, certificate, and what was applied."""
    environments = [
        EnvironmentSpec(
            name=f"e{n}", uid=f"e{n}", kind="vm", image=ImageRef(format="raw", blobs={})
        )
        for n in range(3)
    ]
    first = FakeProvider(world(tmp_path, start_ms=60_000))
    async with at_rendezvous(first, link.hub):
        await first.ensure_platform(request(link, "fake-0", image=IMAGE))
        session = await link.owner.until("connected")
        report = await session.apply(Apply(generation=3, environments=environments))
        assert {e.state for e in report.environments} == {"starting"}
    link.owner.token_hashes.clear()  # no token is good for anything any more
    second = FakeProvider(world(tmp_path))
    async with at_rendezvous(second, link.hub):
        session = await link.owner.until("connected")
        async with asyncio.timeout(60):
            while {e.state for e in (await session.list()).environments} != {"serving"}:
                await asyncio.sleep(0.01)
        assert (await session.list()).generation == 3


async def test_five_hundred_environments_are_cheap(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    begin_s = time.process_time()
    async with at_rendezvous(provider, link.hub):
        for n in range(10):
            await provider.ensure_platform(request(link, f"fake-{n % 3}", f"p{n}", image=IMAGE))
        for _ in range(10):
            session = await link.owner.until("connected")
            await session.apply(
                Apply(
                    generation=1,
                    environments=[
                        EnvironmentSpec(
                            name=f"e{n}",
                            uid=f"e{n}",
                            kind="container",
                            image=ImageRef(format="erofs", blobs={}),
                        )
                        for n in range(50)
                    ],
                )
            )
        done = set()
        while len(done) < 10:
            async with asyncio.timeout(60):
                kind, name, report = await link.owner.seen.get()
            if kind == "report" and [e.state for e in report.environments] == ["serving"] * 50:
                done.add(name)
    assert time.process_time() - begin_s < 10


async def test_what_never_restarts_ends_as_its_program_does(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(request(link, "fake-0", image=IMAGE))
        session = await link.owner.until("connected")
        await session.apply(
            Apply(
                generation=1,
                environments=[
                    EnvironmentSpec(
                        name=program,
                        uid=program,
                        kind="container",
                        restart="never",
                        image=ImageRef(format="erofs", blobs={}),
                        process=Process(argv=[program]),
                    )
                    for program in ("true", "false")
                ],
            )
        )
        async with asyncio.timeout(60):
            while {e.state for e in (await session.list()).environments} != {"exited"}:
                await asyncio.sleep(0.01)
        ended = {e.name: e.exit_status for e in (await session.list()).environments}
        assert ended == {"true": 0, "false": 1}


async def test_a_late_apply_changes_nothing_and_a_newer_one_removes_what_it_does_not_name(
    tmp_path, link
):
    provider = FakeProvider(world(tmp_path))
    specs = [
        EnvironmentSpec(name=n, uid=n, kind="vm", image=ImageRef(format="raw", blobs={}))
        for n in ("a", "b")
    ]
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(request(link, "fake-0", image=IMAGE))
        session = await link.owner.until("connected")
        await session.apply(Apply(generation=5, environments=specs))
        report = await session.apply(Apply(generation=4, environments=[]))
        assert (report.generation, len(report.environments)) == (5, 2)
        report = await session.apply(Apply(generation=6, environments=specs[:1]))
        assert [e.name for e in report.environments] == ["a"]


async def test_a_platform_goes_through_the_states_of_a_machine_only(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    await provider.ensure_platform(request(link, "fake-0", image=IMAGE))
    with pytest.raises(BadState):
        provider.cloud.set_state("p1", "creating")
    provider.cloud.set_state("p1", "failed", "pretended")
    (seen,) = await provider.platforms()
    assert (seen.state, seen.reason) == ("failed", "pretended")


async def test_a_config_disk_without_boot_data_fails_the_platform_not_the_call(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    seen = await provider.ensure_platform(
        request(link, "fake-0", image=IMAGE, config_iso=b"\0" * 4096)
    )
    assert seen.state == "failed"
    assert "boot data" in seen.reason


async def test_shut_down_it_is_stopped_and_dials_no_more(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    async with at_rendezvous(provider, link.hub):
        await provider.ensure_platform(request(link, "fake-0", image=IMAGE))
        session = await link.owner.until("connected")
        await session.shutdown()
        await link.owner.until("lost")
        assert (await provider.platforms())[0].state == "stopped"
        await asyncio.sleep(0.15)
        assert link.hub.sessions == {}


async def test_a_token_is_kept_where_only_its_owner_reads_it(tmp_path, link):
    provider = FakeProvider(world(tmp_path))
    await provider.ensure_platform(request(link, "fake-0", image=IMAGE))
    path = tmp_path / "world" / "p1.json"
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(path.read_text())["boot"]["token"]


async def test_volumes_survive_the_process_and_are_counted(tmp_path):
    key = "A" * 43 + "="
    spec = VolumeSpec(name="data", size_bytes=1 << 20, tag="t")
    first = world(tmp_path).volumes
    opened = await first.open("fake-0", VolumeOpen(spec=spec, key_base64=key, seal=Seal()))
    made = await first.serve("fake-0", "data", opened.seal.epoch)
    second = world(tmp_path).volumes
    ((host, status),) = await second.list()
    assert (host, status.state, status.seal) == ("fake-0", "served", made.seal)
    assert second.creations == {"data": 1}
    text = "".join(path.read_text() for path in (tmp_path / "world" / "volumes").iterdir())
    assert key not in text
    await second.delete("fake-0", "data")
    assert await world(tmp_path).volumes.list() == []
    assert world(tmp_path).volumes.creations == {"data": 1}


async def test_its_options_may_take_its_volumes_away(tmp_path):
    provider = FakeProvider(world(tmp_path, volumes=0))
    assert provider.volumes is None
    assert (await provider.features())["volumes"] == "its options say so"
