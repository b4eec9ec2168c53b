"""A really running host without machines: users, quotas, identity, the front door, its end."""

import asyncio
import contextlib
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.lower.quota import SIZES
from supercloud.model.errors import (
    Denied,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    Temporary,
)
from supercloud.trust import tls
from supercloud.wire import admin
from supercloud.wire.codec import decode, encode
from supercloud.wire.host import HostInfo
from support.lower import ControlPlane, RunningHost, children, pids_of_session, running_host

pytestmark = pytest.mark.root

GIB = 1 << 30


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("host"), "t-lower") as host:
        yield host


@pytest.fixture
async def user(host: RunningHost, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(tmp_path, host, "demo")
    plane.enrol(cpu_permille=1000, memory_bytes=GIB, disk_bytes=2 * GIB, vms=1)
    await plane.image()  # its domain answers once it has made those of its services
    yield plane
    host.admin("user.remove", user="demo")


def status_of(pid: int) -> str:
    """Nothing of a process that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/status").read_text()
    return ""


def is_uid0(pid: int) -> bool:
    return "\nUid:\t0\t0\t0\t0\n" in status_of(pid)


async def test_info_says_what_is_allowed_and_nothing_is_used(
    host: RunningHost, user: ControlPlane
) -> None:
    info = decode(HostInfo, await user.call("host.info"))
    assert (info.instance, info.region, info.jurisdiction) == (host.instance, "local", "local")
    assert info.quota.memory_bytes == GIB
    assert info.quota.disk_bytes == 2 * GIB
    assert (info.quota.cpu_permille, info.quota.vms) == (1000, 1)
    assert (info.used.memory_bytes, info.used.disk_bytes, info.used.vms) == (0, 0, 0)
    assert info.accelerator in ("kvm", "tcg")
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", image) for image in info.images)


async def test_keeper_and_core_alone_are_uid_0_and_nobody_else_has_capabilities(
    host: RunningHost, user: ControlPlane
) -> None:
    await user.call("host.info")
    pids = pids_of_session(host.pid)
    privileged = [pid for pid in pids if is_uid0(pid)]
    assert set(privileged) == {host.pid, *(p for p in children(host.pid) if p in privileged)}
    assert len(privileged) == 2
    others = set(pids) - set(privileged)
    assert len(others) == 6  # five components and one user's domain
    uids = set()
    for pid in others:
        status = status_of(pid)
        assert "CapEff:\t0000000000000000" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        uids.add(status.split("Uid:")[1].split()[0])
    assert len(uids) == len(others)  # each has a uid of its own


def test_enrolling_again_alike_is_nothing_and_differently_is_refused(
    host: RunningHost, user: ControlPlane, tmp_path: Path
) -> None:
    same = {"cpu_permille": 1000, "memory_bytes": GIB, "disk_bytes": 2 * GIB, "vms": 1}
    before = host.admin("host.domains")[0]["starts"]
    assert user.enrol(**same)["name"] == "demo"
    assert host.admin("host.domains")[0]["starts"] == before
    with pytest.raises(Exists, match="another quota"):
        user.enrol(**{**same, "vms": 2})
    other = ControlPlane(tmp_path / "other", host, "demo")
    with pytest.raises(Exists, match="another CA"):
        other.enrol(**same)


def test_a_quota_that_nobody_gave_fits_the_host_and_stays(
    host: RunningHost, user: ControlPlane, tmp_path: Path
) -> None:
    plane = ControlPlane(tmp_path / "any", host, "any")
    given = plane.enrol()["quota"]
    assert given in [encode(size) for size in SIZES]
    some = ControlPlane(tmp_path / "some", host, "some")
    assert some.enrol(vms=3)["quota"]["vms"] == 3
    assert plane.enrol()["quota"] == given, "though less is left now"
    for name in ("any", "some"):
        host.admin("user.remove", user=name)


@pytest.mark.parametrize(
    ("name", "pem", "quota", "wrong"),
    [
        ("UPPER", None, {}, "user"),
        ("a" * 49, None, {}, "user"),
        ("../etc", None, {}, "user"),
        ("fine", "no certificate", {}, "ca"),
        ("fine", "-----BEGIN PRIVATE KEY-----\n", {}, "ca"),
        ("fine", "-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n", {}, "ca"),
        ("fine", None, {"memory_bytes": -1}, "quota.memory_bytes"),
        ("fine", None, {"memory_bytes": True}, "quota.memory_bytes"),
        ("fine", None, {"gpus": 1}, "quota"),
    ],
)
def test_a_malformed_enrolment_is_refused_without_effect(
    host: RunningHost,
    user: ControlPlane,
    name: str,
    pem: str | None,
    quota: dict[str, Any],
    wrong: str,
) -> None:
    log = host.state / "grants.log"
    before = log.read_bytes()
    with pytest.raises(Invalid) as refused:
        host.admin("user.add", user=name, ca_pem=pem or user.ca_pem, quota=quota)
    assert refused.value.where == wrong
    assert [row["name"] for row in host.admin("user.list")] == ["demo"]
    assert log.read_bytes() == before


def test_a_quota_that_the_host_does_not_have_is_refused_before_any_effect(
    host: RunningHost, user: ControlPlane
) -> None:
    log = host.state / "grants.log"
    before = log.read_bytes()
    with pytest.raises(NoResources):
        host.admin("user.add", user="greedy", ca_pem=user.ca_pem, quota={"memory_bytes": 1 << 50})
    with pytest.raises(NoResources):
        host.admin("user.quota", user="demo", quota={"memory_bytes": 1 << 50})
    assert [row["name"] for row in host.admin("user.list")] == ["demo"]
    assert log.read_bytes() == before


async def test_a_quota_changes_while_the_domain_runs(host: RunningHost, user: ControlPlane) -> None:
    host.admin("user.quota", user="demo", quota={"memory_bytes": GIB // 2, "vms": 3})
    info = decode(HostInfo, await user.call("host.info"))
    assert (info.quota.memory_bytes, info.quota.vms) == (GIB // 2, 3)
    assert info.quota.disk_bytes == 2 * GIB  # what was not given stays
    with pytest.raises(NotFound):
        host.admin("user.quota", user="nobody", quota={"vms": 1})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"memory_bytes": GIB + (1 << 20)}, "memory_bytes"),
        ({"scratch_bytes": 2 * GIB + 4096}, "disk_bytes"),
        ({"cpus": 2}, "cpu"),
    ],
)
async def test_a_platform_beyond_the_quota_is_refused_before_any_effect(
    host: RunningHost, user: ControlPlane, changes: dict[str, int], what: str
) -> None:
    await user.image()
    log = host.state / "grants.log"
    before = log.read_bytes()
    with pytest.raises(NoResources) as refused:
        await user.create("p1", **changes)
    assert refused.value.details["what"] == what
    assert log.read_bytes() == before  # the core was not even asked
    assert (await user.call("platform.list"))["platforms"] == []
    assert host.admin("drivers")[0]["disks"] == []


async def test_a_host_without_the_image_says_which_it_has(user: ControlPlane) -> None:
    with pytest.raises(NotFound) as refused:
        await user.create("p1", image="sha256:" + "0" * 64)
    assert refused.value.details["images"] == [await user.image()]


async def test_malformed_calls_are_refused_with_the_field(user: ControlPlane) -> None:
    async with user.connected() as connection:
        peer = connection.peer
        for wrong, where in (
            ({"name": "p1"}, "platform.create.image"),
            ({"name": "../x", "image": "sha256:" + "0" * 64}, "platform.create.name"),
            ({"name": "p", "image": "sha256:" + "0" * 64, "cpus": 0}, "platform.create.cpus"),
        ):
            with pytest.raises(Invalid) as refused:
                await peer.call("platform.create", wrong)
            assert refused.value.where == where
        with pytest.raises(NotFound):
            await peer.call("no.such.method")
        with pytest.raises(NotFound):
            await peer.call("platform.console", {"name": "nobody"})
        await peer.call("platform.delete", {"name": "nobody"})  # idempotent


async def test_the_key_never_changes_and_the_certificate_is_the_installed_one(
    host: RunningHost, user: ControlPlane
) -> None:
    async with user.connected() as first:
        pin = tls.pin_of_peer(first.writer.get_extra_info("ssl_object"))
    os.kill(host.pid_of("user:demo"), 9)
    async with user.connected() as second:
        shown = second.writer.get_extra_info("ssl_object")
        assert tls.pin_of_peer(shown) == pin
        assert str(tls.peer_identity(shown)) == f"supercloud://demo/host/{host.instance}"


async def test_a_certificate_that_does_not_fit_is_not_installed(
    user: ControlPlane, tmp_path: Path, host: RunningHost
) -> None:
    stranger = ControlPlane(tmp_path / "stranger", host, "demo")
    async with user.connected() as connection:
        request = await connection.peer.call("identity.request")
        signed = stranger.authority.issue(request["csr_pem"], user.dialer._identity)
        with pytest.raises(Invalid, match="does not fit"):
            await connection.peer.call(
                "identity.install", {"cert_pem": signed.cert_pem, "chain_pem": signed.chain_pem}
            )
    async with user.connected() as connection:  # still the old one
        assert await connection.peer.call("host.info")


async def test_another_root_or_u_cloud_or_role_does_not_get_in(
    user: ControlPlane, tmp_path: Path, host: RunningHost
) -> None:
    await user.call("host.info")  # binds the domain to this U-Cloud
    stranger = ControlPlane(tmp_path / "stranger", host, "demo")
    with pytest.raises((Denied, Temporary)):
        await stranger.dialer.connect()
    from supercloud.trust.authority import Authority

    sibling = Authority.ensure(str(user.directory), "sibling")  # same root, another U-Cloud
    assert not await talks(host, tls.client_context(
        user.ca_pem, *sibling.own_files(str(user.directory)), check_hostname=False
    ))  # fmt: skip
    assert not await talks(host, tls.client_context(user.ca_pem, check_hostname=False))


async def talks(host: RunningHost, context: ssl.SSLContext) -> bool:
    """Whether the user domain goes on with us after the handshake."""
    from supercloud.wire.peer import Peer

    try:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", host.port, ssl=context, server_hostname="demo.user.supercloud.internal"
        )
        peer = Peer(reader, writer, accepted=False)
        running = asyncio.ensure_future(peer.run())
        try:
            await peer.call("host.info", timeout_s=60)
        finally:
            running.cancel()
            writer.close()
    except (OSError, ssl.SSLError, Temporary, Denied):
        return False
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"\x16\x03\x01\xff\xff" + bytes(100),
        os.urandom(4096),
    ],
)
def test_the_front_door_closes_on_what_is_no_client_hello(host: RunningHost, sent: bytes) -> None:
    before = turned_away(host)
    with socket.create_connection(("127.0.0.1", host.port)) as sock:
        sock.settimeout(60)
        sock.sendall(sent)
        assert is_closed(sock)
    assert turned_away(host) == before + 1


def turned_away(host: RunningHost) -> int:
    """How many the front door has closed on with a reason, and not because their time was over."""
    return (host.state / "log/front_door.log").read_text().count("front_door: 127.0.0.1: ")


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def hello_for(name: str | None) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.check_hostname = False
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("name", ["nobody.user.supercloud.internal", "demo", None, "demo.example"])
def test_the_front_door_closes_on_the_name_of_nobody(
    host: RunningHost, user: ControlPlane, name: str | None
) -> None:
    before = turned_away(host)
    with socket.create_connection(("127.0.0.1", host.port)) as sock:
        sock.settimeout(60)
        sock.sendall(hello_for(name))
        assert is_closed(sock)
    assert turned_away(host) == before + 1


def test_the_front_door_waits_for_a_slow_hello_but_not_for_ever(
    host: RunningHost, user: ControlPlane
) -> None:
    hello = hello_for("demo.user.supercloud.internal")
    with socket.create_connection(("127.0.0.1", host.port)) as sock:
        sock.settimeout(60)
        for at in range(0, len(hello), 100):
            sock.sendall(hello[at : at + 100])
            time.sleep(0.01)
        assert sock.recv(5)[:1] == b"\x16"  # the user domain's answer
    before, began = turned_away(host), time.monotonic()
    with socket.create_connection(("127.0.0.1", host.port)) as sock:
        sock.settimeout(60)
        sock.sendall(hello[:100])
        assert is_closed(sock)
    assert time.monotonic() - began > 3
    assert turned_away(host) == before


async def test_many_idle_connections_do_not_keep_others_out(
    host: RunningHost, user: ControlPlane
) -> None:
    idle = [socket.create_connection(("127.0.0.1", host.port)) for _ in range(60)]
    try:
        assert await user.call("host.info")
    finally:
        for sock in idle:
            sock.close()


@pytest.mark.parametrize("domain", ["disk", "uplink", "multiplexing", "front_door", "admin"])
async def test_a_killed_component_comes_back_and_works(
    host: RunningHost, user: ControlPlane, domain: str
) -> None:
    await user.call("host.info")
    before = host.pid_of(domain)
    os.kill(before, 9)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if host.pid_of(domain) != before and host.admin("status"):
                break
        except (Temporary, LookupError):
            await asyncio.sleep(0.1)
    assert host.pid_of(domain) != before
    assert [row["name"] for row in host.admin("user.list")] == ["demo"]
    assert await user.call("host.info")
    assert len(host.admin("drivers")) == 2


async def test_a_killed_core_is_replaced_and_nobody_notices(
    host: RunningHost, user: ControlPlane
) -> None:
    async with user.connected() as connection:
        core = next(p for p in children(host.pid) if is_uid0(p))
        os.kill(core, 9)
        assert await connection.peer.call("host.info")  # same connection, same domains
        assert host.admin("status")["users"] == 1
        assert host.admin("host.domains")[0]["state"] == "running"


def test_admin_socket_is_for_root_only_and_refuses_garbage(host: RunningHost) -> None:
    path = admin.socket_path(host.instance)
    assert os.stat(path).st_mode & 0o777 == 0o600
    for sent in (b"\xff\xff\xff\xff", b"\0\0\0\x02no", b"\0\0\0\x02[]"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)  # half of what an idle client is given
            sock.connect(path)
            sock.sendall(sent)
            assert sock.recv(1) == b""
    with pytest.raises(NotFound):
        host.admin("user.shell")
    with pytest.raises(Invalid):
        host.admin("status", verbose=True)


def test_users_come_back_after_a_restart_and_nothing_is_left_in_between(tmp_path: Path) -> None:
    instance = f"t-restart-{os.getpid()}"
    before = leftovers(instance)
    with running_host(tmp_path, "t-restart") as host:
        plane = ControlPlane(tmp_path, host, "demo")
        plane.enrol(vms=1, memory_bytes=GIB)
        asyncio.run(plane.call("host.info"))
        below = pids_of_session(host.pid)
        assert host.stop() == 0
        assert not [pid for pid in below if os.path.exists(f"/proc/{pid}")]
        assert leftovers(instance) == before
        host.start()
        row = host.admin("user.list")[0]
        assert (row["name"], row["state"], row["quota"]["vms"]) == ("demo", "running", 1)
        assert asyncio.run(plane.call("host.info"))["quota"]["memory_bytes"] == GIB
        host.admin("user.remove", user="demo")
        assert not list(host.state.glob("domains/user:*"))  # its key is gone with it
    assert leftovers(instance) == before


def leftovers(instance: str) -> dict[str, Any]:
    """What a host could leave on the machine."""
    groups = [d for d, _, _ in os.walk("/sys/fs/cgroup") if f"/supercloud/{instance}" in d]
    mounts = [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if instance in m]
    devices = Path("/proc/net/dev").read_text().count(":")
    return {"groups": groups, "mounts": mounts, "devices": devices}


def test_instances_share_a_machine_without_sharing_anything_else(
    host: RunningHost, tmp_path: Path
) -> None:
    with running_host(tmp_path, "t-second", "--region", "elsewhere") as second:
        assert second.admin("status")["region"] == "elsewhere"
        assert host.admin("status")["region"] == "local"
        uids = [
            set(re.findall(r"Uid:\t(\d+)", "".join(map(status_of, pids_of_session(one.pid)))))
            - {"0"}
            for one in (host, second)
        ]
        assert uids[0].isdisjoint(uids[1])
        drivers = [one.admin("status")["listen"] for one in (host, second)]
        assert drivers[0] != drivers[1]
        import json

        manifests = [
            json.loads((h.state / "grant-manifest.json").read_text()) for h in (host, second)
        ]
        ranges = [
            json.loads(m["kinds"]["uplink"]["environment"]["SUPERCLOUD_UPLINK"]) for m in manifests
        ]
        ends = sorted((r["first_port"], r["last_port"]) for r in ranges)
        assert ends[0][1] < ends[1][0]


def test_a_second_host_on_the_same_state_is_refused(host: RunningHost) -> None:
    other = RunningHost(host.directory, "t-other")
    with pytest.raises(AssertionError, match=r"runs on .* already"):
        other.start()


def test_a_second_host_of_the_same_name_is_refused(host: RunningHost, tmp_path: Path) -> None:
    other = RunningHost(tmp_path, "t-lower")
    with pytest.raises(AssertionError, match=r"runs on .* already"):
        other.start()
    assert host.admin("status")["instance"] == host.instance
