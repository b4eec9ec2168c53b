"""What the provider's admin console could do to a user if it were broken into: nothing.

The program of the console is replaced by an attacker; what confines it stays as it is.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.evil import BrokenIntoHost
from support.lower import ControlPlane, pids_of_session, running

pytestmark = pytest.mark.root

REFUSED_ERRNO = {"EPERM", "EACCES", "ENOENT", "ESRCH", "ENOSYS", "ECONNREFUSED", "ENETUNREACH",
                 "EAFNOSUPPORT", "EINVAL", "EROFS", "ENOTDIR"}  # fmt: skip
CALL_MULTIPLEXING = """
from supercloud.wire.portal import Portal
portal = Portal(core.take_socket("multiplexing"), "multiplexing")
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenIntoHost]:
    directory = tmp_path_factory.mktemp("evil")
    with running(BrokenIntoHost(directory, "t-evil")) as host:
        plane = ControlPlane(directory, host, "victim")
        add = {"user": "victim", "ca_pem": plane.ca_pem, "quota": {"vms": 1}}
        made = host.attempt(f"{CALL_MULTIPLEXING}\nresult = portal.call('user.add', {add!r})")
        assert "done" in made
        asyncio.run(plane.call("host.info"))
        yield host


@pytest.mark.parametrize(
    "attack",
    [
        "result = os.listdir('/proc/self')",
        "result = open('/proc/1/mem', 'rb').read(1)",
        "result = open('/run/state/key.pem').read()",
        "result = os.listdir('/var/lib/supercloud-host')",
        "result = os.listdir('/sys/fs/cgroup/memory')",
        "result = open('/dev/mem', 'rb').read(1)",
        "result = open('/dev/kvm', 'rb')",
        "result = os.kill(2, 0)",
        "os.setuid(0); result = os.getuid()",
        "os.setresuid(1, 1, 1); result = os.getuid()",
        "os.setgroups([0]); result = 1",
        "result = os.mknod('/run/node', 0o60600, os.makedev(254, 0))",
        "result = os.chroot('/run')",
        "result = syscall(101, 16, 1, 0, 0)",  # ptrace attach
        "result = syscall(310, 1, 0, 0, 0, 0, 0)",  # process_vm_readv
        "result = syscall(438, 0, 0, 0)",  # pidfd_getfd
        "result = syscall(272, 0x10000000)",  # unshare user
        "result = syscall(308, 0, 0)",  # setns
        "result = syscall(165, b'none', b'/run', b'tmpfs', 0, 0)",  # mount
        "result = syscall(321, 0, 0, 0)",  # bpf
        "result = syscall(323, 1)",  # userfaultfd
        "result = syscall(425, 8, 0)",  # io_uring_setup
        "result = syscall(250, 0, 0, 0)",  # keyctl
        "result = syscall(298, 0, 0, 0, 0, 0)",  # perf_event_open
        "result = syscall(304, 0, 0, 0)",  # open_by_handle_at
        "result = socket.create_connection(('127.0.0.1', 7443), 1)",
        "result = socket.create_server(('127.0.0.1', 0))",
        "result = socket.create_connection(('10.255.255.53', 53), 1)",
        "result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "result = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "result = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        "s = socket.socket(socket.AF_UNIX); result = s.connect('/run/supercloud-host/x/admin.sock')",
        "result = os.open('/usr/bin/python3.13', os.O_WRONLY)",
        "result = open('/opt/evil', 'w')",
    ],
)
def test_no_way_out_by_the_system_calls(host: BrokenIntoHost, attack: str) -> None:
    outcome = host.attempt(attack)
    assert outcome == {"killed": 31} or outcome.get("refused") in REFUSED_ERRNO, outcome


def test_its_table_has_its_own_channels_and_nothing_of_users(host: BrokenIntoHost) -> None:
    outcome = host.attempt("result = sorted(e.name for e in core.entries())")
    names = outcome["done"]
    assert names == repr(
        ["disk", "listener", "multiplexing", "ready", "sched", "self", "uplink"]
    ), names


@pytest.mark.parametrize(
    "attack",
    [
        "result = core.lookup('user:victim')",
        "result = core.create_domain('user', 'user:victim')",
        "result = core.create_domain('vmm', 'mine', Limits(memory_bytes=1 << 20, pids=1))",
        "result = core.create_channel(0, 0, 'a', 'b')",
        "result = core.create_channel(0, core.lookup('multiplexing').selector, 'a', 'b')",
        "result = core.delegate(core.lookup('listener').selector, 0, Rights.USE, 'x')",
        "result = core.delegate(0, core.lookup('disk').selector, Rights.CONNECT, 'x')",
        "result = core.set_limits(1, Limits(memory_bytes=1 << 40, pids=10))",
        "result = core.charge(1, -4096)",
        "result = core.destroy(0)",
        "result = core.destroy(core.lookup('multiplexing').selector)",
    ],
)
def test_the_core_refuses_what_it_has_no_capability_for(host: BrokenIntoHost, attack: str) -> None:
    outcome = host.attempt(attack)
    assert outcome.get("refused") in ("denied", "not_found", "invalid", "no_resources"), outcome


def test_guessing_selectors_finds_nothing_of_others(host: BrokenIntoHost) -> None:
    outcome = host.attempt(
        """
mine = {e.selector for e in core.entries()}
found = []
for selector in set(range(4200)) - mine:
    for call in (core.take, core.state, core.usage, core.revoke, core.start, core.destroy):
        try:
            found.append((call.__name__, selector, call(selector)))
        except UserError:
            pass
result = found
"""
    )
    assert outcome == {"done": "[]"}


def test_it_may_share_out_and_end_but_it_learns_no_secret(host: BrokenIntoHost) -> None:
    """What the multiplexing and the drivers answer holds no key, no token, no memory."""
    said = host.attempt(
        CALL_MULTIPLEXING
        + """
answers = {}
for method in ("user.list", "host.usage", "host.domains"):
    answers[method] = portal.call(method)
for driver in ("disk", "uplink"):
    answers[driver] = Portal(core.take_socket(driver), driver).call("driver.status")
result = json.dumps(answers)
"""
    )
    text = said["done"]
    assert "PRIVATE" not in text
    assert "BEGIN" not in text
    key = next(host.state.glob("domains/user:victim/key.pem")).read_text()
    assert base64.b64encode(key.encode()[:60]).decode() not in text


@pytest.mark.parametrize(
    "method", ["disk.create", "disk.delete", "uplink.create", "uplink.start", "machine.start"]
)
def test_drivers_do_for_it_nothing_that_they_do_for_users(
    host: BrokenIntoHost, method: str
) -> None:
    for driver in ("disk", "uplink", "multiplexing"):
        outcome = host.attempt(
            f"""
from supercloud.wire.portal import Portal
portal = Portal(core.take_socket({driver!r}), {driver!r})
result = portal.call({method!r}, {{"name": "p1", "size_bytes": 4096, "platform": "p1", "ports": 1}})
"""
        )
        assert outcome == {"refused": "not_found"}


def test_descriptors_sent_to_components_are_closed_and_do_no_harm(host: BrokenIntoHost) -> None:
    outcome = host.attempt(
        CALL_MULTIPLEXING
        + """
for n in range(200):
    portal.call("user.list", {}, [0] * 16)
result = len(portal.call("user.list"))
"""
    )
    assert outcome == {"done": "1"}
    pid = host.pid_of("multiplexing")
    assert len(os.listdir(f"/proc/{pid}/fd")) < 20


def test_flooding_components_does_not_stop_them(host: BrokenIntoHost) -> None:
    outcome = host.attempt(
        """
for name in ("multiplexing", "disk", "uplink"):
    sock = core.take_socket(name)
    sock.setblocking(False)
    for n in range(5000):
        try:
            sock.send(os.urandom(n % 3000))
        except BlockingIOError:
            select.select([], [sock], [], 1)
result = "sent"
"""
    )
    assert outcome == {"done": "'sent'"}
    outcome = host.attempt(f"{CALL_MULTIPLEXING}\nresult = portal.call('user.list')[0]['state']")
    assert outcome == {"done": "'running'"}


def test_a_process_of_the_admins_uid_reaches_no_other_domain(host: BrokenIntoHost) -> None:
    """Outside of any sandbox, but without capabilities: as an administrator's shell would be."""
    uid = os.stat(f"/proc/{host.pid_of('admin')}").st_uid
    victims = [p for p in pids_of_session(host.pid) if os.stat(f"/proc/{p}").st_uid != uid]
    attack = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
reached = []
for pid in json.loads(sys.argv[1]):
    for name in ("mem", "environ", "maps", "fd", "root", "cwd", "ns/net", "map_files"):
        path = f"/proc/{pid}/{name}"
        try:
            if name in ("fd", "root", "cwd", "map_files"):
                os.listdir(path)
            elif name == "ns/net":
                os.readlink(path)
            else:
                os.open(path, os.O_RDONLY)
            reached.append((pid, name))
        except OSError:
            pass
    if libc.ptrace(16, pid, 0, 0) == 0:
        reached.append((pid, "ptrace"))
    buffer = ctypes.create_string_buffer(8)
    for number in (9, 15, 0):
        try:
            os.kill(pid, number)
            reached.append((pid, "kill"))
        except OSError:
            pass
print(json.dumps(reached))
"""
    done = subprocess.run(
        [sys.executable, "-c", attack, json.dumps(victims)],
        user=uid, group=uid, extra_groups=[], capture_output=True, check=True, cwd="/",
    )  # fmt: skip
    assert json.loads(done.stdout) == []
    for path in (host.state / "domains").iterdir():
        shown = subprocess.run(
            ["ls", str(path)],
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        assert shown.returncode != 0 or path.name == "admin"


def test_the_user_is_still_there_after_all_this(host: BrokenIntoHost) -> None:
    plane = ControlPlane(host.directory, host, "victim")
    assert asyncio.run(plane.call("host.info"))["instance"] == host.instance
    assert Path(f"/proc/{host.pid_of('user:victim')}").exists()
