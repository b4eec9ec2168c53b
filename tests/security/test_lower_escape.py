"""What a guest that broke out of QEMU can do: use its own machine's descriptors, nothing else.

The monitor's program is replaced by an attacker that runs in the machine's domain as it is, beside
the real passt processes of its two networks.
"""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.evil import ESCAPED_GUEST, BrokenIntoHost
from support.lower import ControlPlane, running

pytestmark = pytest.mark.root

REFUSED_ERRNO = {"EPERM", "EACCES", "ENOENT", "ESRCH", "ENOSYS", "ECONNREFUSED", "ENETUNREACH",
                 "EAFNOSUPPORT", "EINVAL", "EROFS", "ENODEV"}  # fmt: skip

FRAMES = r'''
def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

def syn(source, target, port, source_port):
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    tcp = tcp[:16] + struct.pack("!H", checksum(ends + struct.pack("!HH", 6, 20) + tcp)) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + ends
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    return b"\x9a\x55" * 3 + b"\x02\x5c\0\0\0\x01" + b"\x08\0" + ip + tcp

def arp(source, target):
    me = b"\x02\x5c\0\0\0\x01"
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + me + socket.inet_aton(source)
    return b"\xff" * 6 + me + b"\x08\x06" + body + bytes(6) + socket.inet_aton(target)

def exchange(name, frame, wanted, wait_s):
    """What comes back: the first frame of which ``wanted`` has something to say."""
    stream = core.take_socket(name)
    stream.sendall(struct.pack("!I", len(frame)) + frame)
    end, data = time.monotonic() + wait_s, b""
    while (left := end - time.monotonic()) > 0 and select.select([stream], [], [], left)[0]:
        data += stream.recv(65536)
        while len(data) > 4 and len(data) >= 4 + (length := struct.unpack("!I", data[:4])[0]):
            if (said := wanted(data[4 : 4 + length])) is not None:
                return said
            data = data[4 + length :]

def answered_arp(frame):
    return "arp" if frame[12:14] == b"\x08\x06" else None

def tcp_flags(port):
    def flags(frame):
        if frame[12:14] == b"\x08\0" and frame[23] == 6 and frame[36:38] == struct.pack("!H", port):
            return {0x12: "connected", 0x14: "refused", 0x04: "refused"}.get(frame[47], frame[47])
    return flags

def dial(name, source, target, port, wait_s, source_port=40000):
    frame = syn(source, target, port, source_port)
    return exchange(name, frame, tcp_flags(source_port), wait_s)
'''
GUEST = {"uplink": "10.0.2.15", "link": "169.254.77.2"}
RENDEZVOUS = "169.254.77.1"


@pytest.fixture(scope="module")
def loopback() -> Iterator[socket.socket]:
    """A service on the host's loopback that no guest may reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, loopback: socket.socket
) -> Iterator[dict[str, Any]]:
    """Every attack of this file, run once; how it went."""
    directory = tmp_path_factory.mktemp("escape")
    host = BrokenIntoHost(directory, "t-escape", "vmm", ESCAPED_GUEST)
    with running(host):
        plane = ControlPlane(directory, host, "demo")
        plane.enrol(vms=2)
        attacks = [GROW, *SYSTEM, *CORE, *(code for code, _ in network(loopback.getsockname()[1]))]
        asyncio.run(plane.create("p1", config=json.dumps(attacks).encode()))
        found = read_log(host.state / "log" / "vmm:demo:p1.log")
        yield {**found, "disk": next(host.state.glob("domains/disk/*-demo/scratch:p1.*"))}


def read_log(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 240
    while "ATTACKS OVER" not in (text := path.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    lines = [line.removeprefix("ATTACK ") for line in text.splitlines() if "ATTACK [" in line]
    return dict(json.loads(line) for line in lines)


GROW = "result = os.ftruncate(message.descriptors[0], 1 << 40) or os.fstat(4).st_mode"

SYSTEM = [
    "result = os.listdir('/run/state')",
    "result = os.listdir('/run/supercloud-host')",
    "result = open('/dev/kvm')",
    "result = open('/dev/mem')",
    "os.setuid(0); result = 1",
    "result = os.chroot('/run')",
    "result = syscall(101, 16, 2, 0, 0)",  # ptrace
    "result = syscall(310, 2, 0, 0, 0, 0, 0)",  # process_vm_readv
    "result = syscall(272, 0x10000000)",  # unshare
    "result = syscall(165, b'none', b'/run', b'tmpfs', 0, 0)",
    "result = syscall(321, 0, 0, 0)",  # bpf
    "result = syscall(323, 1)",  # userfaultfd
    "result = syscall(425, 8, 0)",  # io_uring
    "result = syscall(175, 0, 0, 0)",  # init_module
    "result = socket.create_connection(('10.255.255.53', 53), 1)",
    "result = socket.create_connection(('127.0.0.1', 7444), 1)",  # the link's network is another
    "result = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "result = socket.socket(socket.AF_VSOCK)",
    "result = os.kill(2, 9)",
]

CORE = [
    "result = core.create_domain('vmm', 'mine', Limits(memory_bytes=1 << 20, pids=1))",
    "result = core.create_memory(1 << 30, 'more')",
    "result = core.take(core.lookup('identity').selector)",
    "result = core.take(core.lookup('front_door').selector)",
    "result = core.delegate(core.lookup('ram').selector, 0, Rights.READ, 'x')",
    "result = core.charge(1, 1 << 30)",
    "result = core.seal(core.lookup('kernel').selector)",
    "result = os.pwrite(core.take(core.lookup('kernel').selector), b'evil', 0)",
    "result = os.pwrite(core.take(core.lookup('config').selector), b'evil', 0)",
    "result = os.ftruncate(core.take(core.lookup('ram').selector), 1 << 40)",
    "result = os.write(core.take(core.lookup('root').selector), b'evil')",
]


def network(loopback_port: int) -> list[tuple[str, Any]]:
    """(attack, what is to come of it)."""

    def dial(net: str, target: str, port: int, wait_s: float = 2) -> str:
        return f"{FRAMES}\nresult = dial({net!r}, {GUEST[net]!r}, {target!r}, {port}, {wait_s})"

    def ask(net: str, target: str) -> str:
        frame = f"arp({GUEST[net]!r}, {target!r})"
        return f"{FRAMES}\nresult = exchange({net!r}, {frame}, answered_arp, 60)"

    silent = ("None", "'refused'")
    return [
        (ask("uplink", "10.0.2.2"), ("'arp'",)),  # the frames are good
        (dial("link", RENDEZVOUS, 7444, 60), ("'connected'",)),
        (dial("link", RENDEZVOUS, 22), silent),
        (dial("link", RENDEZVOUS, loopback_port), silent),
        (dial("link", "127.0.0.1", loopback_port), silent),
        (dial("link", "10.255.255.53", 53), silent),
        (dial("uplink", "10.0.2.2", loopback_port), silent),
        (dial("uplink", "127.0.0.1", loopback_port), silent),
        (dial("uplink", "127.0.0.2", loopback_port), silent),
        (dial("uplink", "0.0.0.0", loopback_port), silent),
        (dial("uplink", "10.0.2.15", loopback_port), silent),
        (dial("uplink", "10.0.2.3", loopback_port), silent),
    ]


@pytest.mark.parametrize("attack", SYSTEM)
def test_the_machines_domain_is_a_dead_end(outcomes: dict[str, Any], attack: str) -> None:
    outcome = outcomes[attack]
    assert outcome == {"killed": 31} or outcome.get("refused") in REFUSED_ERRNO, outcome


@pytest.mark.parametrize("attack", CORE)
def test_its_capabilities_cannot_be_widened(outcomes: dict[str, Any], attack: str) -> None:
    outcome = outcomes[attack]
    allowed = {"denied", "not_found", "no_resources", "busy", "invalid", "EPERM", "EBADF"}
    assert outcome.get("refused") in allowed, outcome


def test_a_disk_that_is_made_longer_than_it_was_paid_for_is_cut_back(
    outcomes: dict[str, Any],
) -> None:
    assert "done" in outcomes[GROW]  # its holder may do that ...
    path: Path = outcomes["disk"]
    deadline = time.monotonic() + 60
    while path.stat().st_size != 1 << 30:
        assert time.monotonic() < deadline  # ... but not for long
        time.sleep(0.2)


@pytest.mark.parametrize("number", range(12))
def test_its_networks_lead_to_the_rendezvous_and_outwards_only(
    outcomes: dict[str, Any], loopback: socket.socket, number: int
) -> None:
    attack, wanted = network(loopback.getsockname()[1])[number]
    assert outcomes[attack].get("done") in wanted, outcomes[attack]
    with pytest.raises(BlockingIOError):
        loopback.accept()
