"""Platforms on a really running host: the L1 image under QEMU, from create to delete."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.control import bootdata
from supercloud.lower.user_domain.assembly import mac
from supercloud.model.errors import Exists, Invalid, NoResources, NotFound
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from supercloud.providers.lower_layer.templates import send
from supercloud.wire.places import DEPOSIT_BYTES, deposit_at
from support.link import Link
from support.lower import (
    ControlPlane,
    RunningHost,
    children,
    images,
    patient,
    pids_of_session,
    running_host,
)

pytestmark = [pytest.mark.root, pytest.mark.vm]

GIB = 1 << 30


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("host"), "t-vm") as host:
        yield host


@pytest.fixture
def user(host: RunningHost, tmp_path: Path, vm_lock: None) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path, host, "demo")
    plane.enrol(cpu_permille=2000, memory_bytes=GIB, disk_bytes=2 * GIB, vms=1)
    yield plane
    host.admin("user.remove", user="demo")


@pytest.fixture
async def booted(user: ControlPlane) -> ControlPlane:
    await user.create("p1")
    assert b"l1init: up" in await console_until(user, b"l1init: up")
    return user


async def console_until(plane: ControlPlane, wanted: bytes, timeout_s: float = 60) -> bytes:
    """What a newly opened console says up to ``wanted``."""
    said = b""
    async with plane.connected() as connection:
        stream = connection.peer.open("platform.console", {"name": "p1"})
        async with asyncio.timeout(timeout_s), stream as console:
            async for data in console.chunks():
                said += data
                if wanted in said:
                    return said
    return said


def said_of(pid: int, what: str) -> str:
    """A file of ``/proc/PID``; nothing of a process that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/{what}").read_text()
    return ""


def qemu_of(host: RunningHost) -> int:
    monitor = host.pid_of("vmm:demo:p1")
    found = [pid for pid in pids_of_session(monitor) if said_of(pid, "comm").startswith("qemu")]
    assert len(found) == 1
    return found[0]


def booked(host: RunningHost) -> dict[str, Any]:
    """What is held for the user."""
    used = host.admin("user.list")[0]["used"]
    drivers = host.admin("drivers")
    return {
        **{name: used[name] for name in ("memory_bytes", "disk_bytes", "vms")},
        "disks": drivers[0]["disks"],
        "ranges": drivers[1]["ranges"],
        "processes": len(pids_of_session(host.pid)),
        "domains": host.admin("status")["usage"]["booked_domains"],
        "inside": host.admin("host.domains")[0]["domains_inside"],
        "groups": sum(host.instance in d for d, _, _ in os.walk("/sys/fs/cgroup")),
        "files": sorted(str(p) for p in host.state.glob("domains/disk/*/*")),
    }


async def test_a_platform_is_made_shows_its_console_and_is_given_back(
    host: RunningHost, user: ControlPlane
) -> None:
    await user.image()
    before = booked(host)
    made = await user.create("p1", tag="whose")
    assert made["state"] in ("starting", "running")
    assert (made["ports"], made["address"], made["tag"]) == (4, "127.0.0.1", "whose")
    await console_until(user, b"l1init: up")
    await user.wait_for("p1", "running")
    held = booked(host)
    assert (held["memory_bytes"], held["disk_bytes"], held["vms"]) == (512 << 20, GIB, 1)
    assert held["ranges"][0]["holder"] == "demo/p1"
    again = await user.create("p1", tag="whose")  # the same once more is the same platform
    assert again["created_s"] == made["created_s"]
    assert again["first_port"] == made["first_port"]
    with pytest.raises(Exists):
        await user.create("p1", tag="whose", memory_bytes=256 << 20)
    with pytest.raises(NoResources):
        await user.create("p2", memory_bytes=256 << 20)  # one VM is the quota
    await user.call("platform.delete", {"name": "p1"})
    assert await user.state("p1") == "absent"
    assert booked(host) == before


async def test_a_machine_is_confined_and_has_nothing_but_descriptors(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu = qemu_of(host)
    status = Path(f"/proc/{qemu}/status").read_text()
    emulated = (await booted.call("host.info"))["accelerator"] == "tcg"
    huge_pages = f"THP_enabled:\t{int(not emulated)}"
    for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", huge_pages):
        assert line in status
    assert os.stat(f"/proc/{qemu}").st_uid not in (0, os.stat(f"/proc/{host.pid}").st_uid)
    interfaces = Path(f"/proc/{qemu}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    listening = Path(f"/proc/{qemu}/net/tcp").read_text().splitlines()[1:]
    assert listening == []
    open_files = set()
    for number in Path(f"/proc/{qemu}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed
            open_files.add(os.readlink(number))
    files = {name for name in open_files if name.startswith("/") and "memfd" not in name}
    root = json.loads((images() / "manifest.json").read_text())["files"]["root.erofs"]["sha256"]
    assert {Path(name).name.split(".")[0] for name in files} - {"null", "urandom"} == {
        "scratch:p1",
        root,
        "vmm:demo:p1",  # the domain's log
    }
    environment = Path(f"/proc/{qemu}/environ").read_bytes()
    assert b"SECRET" not in environment
    command = Path(f"/proc/{qemu}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert mac("02:5c:00", "demo", "p1") in command
    assert mac("02:5c:77", "demo", "p1") in command


async def test_bytes_for_an_agent_lie_at_the_end_of_its_disk_and_nowhere_else(
    host: RunningHost, booted: ControlPlane
) -> None:
    async def lay_down(platform: str, size_bytes: int, *pieces: bytes) -> None:
        async def content() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        asked = {"platform": platform, "size_bytes": size_bytes}
        async with booted.connected() as connection:
            await send(connection.peer.open("platform.deposit", asked), content())

    (disk,) = host.state.glob("domains/disk/*-demo/scratch:p1.*")
    data = os.urandom(300_000)
    await lay_down("p1", len(data), data[:100_000], data[100_000:])
    at = deposit_at(GIB)
    with disk.open("rb") as file:
        file.seek(at)
        assert file.read(len(data)) == data
        assert os.lseek(file.fileno(), at - (1 << 20), os.SEEK_DATA) == at
    with pytest.raises(Invalid, match="more than the 10 bytes"):
        await lay_down("p1", 10, bytes(11))
    with pytest.raises(Invalid, match="10 bytes came of 11"):
        await lay_down("p1", 11, bytes(10))
    with pytest.raises(Invalid, match="size_bytes"):
        await lay_down("p1", DEPOSIT_BYTES + 1)
    with pytest.raises(NotFound):
        await lay_down("p2", 1, b"x")
    assert disk.stat().st_size == GIB


async def test_a_killed_user_domain_comes_back_and_adopts_the_running_machine(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu, domain = qemu_of(host), host.pid_of("user:demo")
    before = booked(host)
    os.kill(domain, signal.SIGKILL)
    await booted.wait_for("p1", "running")
    assert host.pid_of("user:demo") != domain
    assert qemu_of(host) == qemu
    assert b"l1init: up" in await console_until(booted, b"l1init: up")  # the ring is the monitor's
    assert booked(host) == before
    await event(booted, "host.platform.adopted")
    await booted.call("platform.delete", {"name": "p1"})
    assert booked(host)["vms"] == 0


async def event(plane: ControlPlane, code: str) -> None:
    """When ``events.watch`` tells of it; what has been is kept."""
    said = b""
    async with plane.connected() as connection, asyncio.timeout(60):
        async with connection.peer.open("events.watch", {}) as stream:
            async for data in stream.chunks():
                said += data
                if code.encode() in said:
                    return
    raise AssertionError(f"no {code} in {said!r}")


async def test_a_killed_core_leaves_machines_running(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu, before = qemu_of(host), booked(host)
    os.kill(core_of(host), signal.SIGKILL)
    await booted.wait_for("p1", "running")
    assert qemu_of(host) == qemu
    assert booked(host) == before
    await booted.call("platform.delete", {"name": "p1"})
    assert booked(host)["processes"] < before["processes"]


def core_of(host: RunningHost) -> int:
    """The keeper's child that has uid 0; 0 while there is none."""
    roots = (p for p in children(host.pid) if "\nUid:\t0\t0\t0\t0\n" in said_of(p, "status"))
    return next(roots, 0)


async def test_planned_new_cores_leave_machines_running_and_leak_nothing(
    host: RunningHost, user: ControlPlane
) -> None:
    async with with_agent(user) as link:
        session = link.hub.sessions["p1"]
        qemu, before, held = qemu_of(host), booked(host), None
        for _ in range(4):
            core = core_of(host)
            os.kill(host.pid, signal.SIGHUP)
            await until(lambda core=core: core_of(host) not in (0, core))
            await user.wait_for("p1", "running")
            assert (await session.list()).environments == []  # by the link that it had
            assert (qemu_of(host), booked(host)) == (qemu, before)
            held = held or descriptors(host)  # of a core that took over, as all that follow
            await until(lambda held=held: descriptors(host) == held)
        await user.call("platform.delete", {"name": "p1"})
        assert booked(host)["processes"] < before["processes"]


def descriptors(host: RunningHost) -> list[int]:
    """How many the keeper has, and the core."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (host.pid, core_of(host))]


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("victim", ["monitor", "qemu"])
async def test_a_machine_that_dies_is_failed_and_can_be_created_anew(
    host: RunningHost, booted: ControlPlane, victim: str
) -> None:
    pid = host.pid_of("vmm:demo:p1") if victim == "monitor" else qemu_of(host)
    os.kill(pid, signal.SIGKILL)
    await booted.wait_for("p1", "failed")
    listed = (await booted.call("platform.list"))["platforms"][0]
    assert ("VMM died" if victim == "monitor" else "SIGKILL") in listed["reason"]
    made = await booted.create("p1")
    assert made["state"] in ("starting", "running")
    await console_until(booted, b"l1init: up")
    assert booked(host)["vms"] == 1


async def test_drivers_may_die_while_a_machine_runs(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu = qemu_of(host)
    for driver in ("disk", "uplink", "multiplexing", "front_door"):
        os.kill(host.pid_of(driver), signal.SIGKILL)
    await booted.wait_for("p1", "running")
    assert qemu_of(host) == qemu
    host.pid_of("uplink-net:demo:p1")
    # one of them may not be back yet: that is a passing reason
    await patient(lambda: booted.call("platform.delete", {"name": "p1"}), 60)

    async def all_answer() -> dict[str, Any]:
        return booked(host)

    held = await patient(all_answer, 60)
    assert (held["disk_bytes"], held["disks"], held["ranges"]) == (0, [], [])


async def test_a_network_that_dies_is_told_and_the_machine_goes_on(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu = qemu_of(host)
    os.kill(host.pid_of("uplink-net:demo:p1"), signal.SIGKILL)
    async with asyncio.timeout(60):
        while not (found := (await booted.call("platform.list"))["platforms"][0])["reason"]:
            await asyncio.sleep(0.1)
    assert (found["state"], found["reason"]) == ("running", "its uplink died")
    await event(booted, "host.platform.uplink_lost")
    assert qemu_of(host) == qemu
    assert not found["cut_off"]
    os.kill(host.pid_of("link:demo:p1"), signal.SIGKILL)
    async with asyncio.timeout(60):
        while not (found := (await booted.call("platform.list"))["platforms"][0])["cut_off"]:
            await asyncio.sleep(0.1)
    assert (found["state"], found["reason"]) == ("running", "its link died")


async def test_as_many_ports_as_asked_for_are_published(
    host: RunningHost, user: ControlPlane
) -> None:
    made = await user.create("p1", ports=300)
    first = made["first_port"]
    wanted = {f"0100007F:{port:04X}" for port in (first, first + 150, first + 299)}
    deadline = time.monotonic() + 60
    for protocol in ("tcp", "udp"):  # passt has begun when the platform is made, no more
        bound: set[str] = set()
        while not wanted <= bound and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            lines = Path(f"/proc/{host.pid}/net/{protocol}").read_text().splitlines()[1:]
            bound = {line.split()[1] for line in lines}
        assert wanted <= bound, protocol


async def test_a_wedged_machine_is_noticed_and_may_recover(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu = qemu_of(host)
    os.kill(qemu, signal.SIGSTOP)
    await booted.wait_for("p1", "wedged", timeout_s=60)
    os.kill(qemu, signal.SIGCONT)
    await booted.wait_for("p1", "running", timeout_s=60)
    os.kill(qemu, signal.SIGSTOP)
    await booted.call("platform.delete", {"name": "p1"})  # a stopped QEMU does not hold it up
    assert not os.path.exists(f"/proc/{qemu}")


async def test_a_user_that_is_removed_takes_its_machines_along(
    host: RunningHost, booted: ControlPlane
) -> None:
    qemu = qemu_of(host)
    host.admin("user.remove", user="demo")
    assert not os.path.exists(f"/proc/{qemu}")
    deadline = time.monotonic() + 60  # a driver that had no time is asked again
    while left := stored(host):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.1)
    booted.enrol()


def stored(host: RunningHost) -> list[Any]:
    disk, uplink = host.admin("drivers")
    return [*disk["disks"], *uplink["ranges"], *host.state.glob("domains/disk/*-demo")]


async def test_the_real_agent_reaches_the_control_plane_through_the_rendezvous(
    host: RunningHost, user: ControlPlane
) -> None:
    async with with_agent(user) as link:
        # the user domain may die under it: the agent dials again, over the same link domain
        os.kill(host.pid_of("user:demo"), signal.SIGKILL)
        await link.owner.until("connected", "p1")


@contextlib.asynccontextmanager
async def with_agent(user: ControlPlane) -> AsyncIterator[Link]:
    """``p1`` with a real agent, connected to a hub of ours."""
    link = Link(user.directory, "demo")
    token = link.owner.expect("p1")
    data = bootdata.user_data("demo", "p1", token, user.ca_pem, ["169.254.77.1:7444"])
    parking = asyncio.ensure_future(Rendezvous(user.dialer, link.hub.serve_relayed).run())
    try:
        await user.create("p1", config=bootdata.config_iso("demo", "p1", data))
        await link.owner.until("connected", "p1")
        yield link
    finally:
        parking.cancel()
        await asyncio.gather(parking, return_exceptions=True)
        await link.hub.close()


async def test_after_a_restart_of_the_host_platforms_are_failed_and_hold_nothing(
    tmp_path: Path, vm_lock: None
) -> None:
    with running_host(tmp_path, "t-anew") as host:
        plane = ControlPlane(tmp_path, host, "demo")
        plane.enrol(vms=1)
        await plane.create("p1")
        await plane.wait_for("p1", "running")
        host.stop()
        host.start()
        assert await plane.state("p1") == "failed"
        listed = (await plane.call("platform.list"))["platforms"][0]
        assert listed["reason"] == "the host was started anew"
        used = host.admin("user.list")[0]["used"]
        assert (used["disk_bytes"], used["memory_bytes"], used["vms"]) == (0, 0, 0)
        made = await plane.create("p1")
        assert made["state"] in ("starting", "running")
