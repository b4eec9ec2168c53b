"""What a user's domain gets that ignores its own checks: what its quota says, and nothing of others.

The program of the domain is replaced by an attacker; the core and the drivers are as they are.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.evil import EVIL_USER, BrokenIntoHost
from support.lower import ControlPlane, RunningHost, running

pytestmark = pytest.mark.root

MIB, GIB = 1 << 20, 1 << 30
AS_GIVEN = ("--dial", "elsewhere")
QUOTA = {"cpu_permille": 1000, "memory_bytes": GIB, "disk_bytes": GIB, "vms": 2}
VMM = "Limits(memory_bytes={memory}, pids=160)"


def vmm(name: str, memory_bytes: int) -> str:
    limits = VMM.format(memory=memory_bytes)
    return f"result = core.create_domain('vmm', {name!r}, {limits})"


# (attack, how it must be refused; "" for what is allowed) in the order in which they are made
ATTACKS: list[tuple[str, str]] = [
    ("core.set_limits(1, Limits(memory_bytes=1 << 40, pids=100))", "denied"),
    ("core.create_domain('user', 'user:other')", "denied"),
    ("core.create_domain('uplink-net', 'mine')", "denied"),
    ("core.create_domain('disk', 'mine')", "denied"),
    (vmm("big", 64 * GIB), "no_resources"),
    (vmm("unbounded", 0), "invalid"),
    ("core.create_memory(64 << 30, 'big')", "no_resources"),
    ("core.charge(1, -1 << 30)", "invalid"),
    ("core.charge(1, 2 << 30)", "no_resources"),
    ("core.create_channel(0, core.lookup('disk').selector, 'a', 'b')", "invalid"),
    ("core.lookup('user:victim')", "not_found"),
    ("core.lookup('domain:disk')", "not_found"),
    ("core.destroy(core.lookup('image.0.kernel').selector)", "denied"),
    ("os.pwrite(core.take(core.lookup('image.0.kernel').selector), b'x', 0)", "EPERM"),
    ("os.write(core.take(core.lookup('image.0.root').selector), b'x')", "EBADF"),
    ("os.pwrite(core.take(core.lookup('identity').selector), b'x', 0)", "EPERM"),
    # drivers
    ("disk.call('disk.create', {'name': 'd', 'size_bytes': 2 << 30})", "no_resources"),
    ("disk.call('disk.create', {'name': '../victim/x', 'size_bytes': 4096})", "invalid"),
    ("disk.call('disk.create', {'name': 'd', 'size_bytes': 4095})", "invalid"),
    ("disk.call('disk.create', {'name': 'd', 'size_bytes': -4096})", "invalid"),
    ("disk.call('disk.create', {'name': 'd', 'size_bytes': 1 << 30})", ""),
    ("disk.call('disk.create', {'name': 'd', 'size_bytes': 4096})", "exists"),
    ("disk.call('disk.create', {'name': 'e', 'size_bytes': 4096})", "no_resources"),
    ("disk.call('disk.delete', {'name': 'victims'})", ""),  # its own of that name: none
    ("disk.call('driver.status')", "not_found"),
    ("uplink.call('uplink.create', {'platform': 'a/b', 'ports': 1})", "invalid"),
    ("uplink.call('uplink.create', {'platform': 'a', 'ports': 5000})", "invalid"),
    ("uplink.call('uplink.create', {'platform': 'a', 'ports': 1024})", "no_resources"),
    ("uplink.call('uplink.create', {'platform': 'a', 'ports': 4})", ""),
    ("uplink.call('uplink.create', {'platform': 'b', 'ports': 4})", ""),
    ("uplink.call('uplink.create', {'platform': 'c', 'ports': 0})", "no_resources"),
    ("uplink.call('uplink.start', {'platform': 'victims'})", "not_found"),
    ("core.take(core.lookup('uplink-net:evil:a').selector)", "invalid"),  # CONNECT and no more
    ("core.destroy(core.lookup('uplink-net:evil:a').selector)", "denied"),
    ("core.start(core.lookup('uplink-net:evil:a').selector, 1, 80)", "denied"),
    (
        "core.create_channel(0, core.lookup('uplink-net:evil:a').selector, 'a', 'guest', 1)",
        "denied",
    ),
    ("uplink.call('uplink.dial', {'address': '127.0.0.1', 'port': 22})", "denied"),
    ("uplink.call('uplink.dial', {'address': '::ffff:127.0.0.1', 'port': 22})", "denied"),
    ("uplink.call('uplink.dial', {'address': '169.254.169.254', 'port': 80})", "denied"),
    ("uplink.call('uplink.dial', {'address': 'localhost', 'port': 80})", "invalid"),
    ("uplink.call('uplink.dial', {'address': '198.51.100.1', 'port': 0})", "invalid"),
    # what it was given may be closed by now: it connects no other way, and waits for nobody
    ("socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', 22))", "EPERM"),  # MSG_FASTOPEN
    ("socket.socket().sendmsg([b'x'], [], 0x20000000, ('127.0.0.1', 22))", "EPERM"),
    ("socket.socket().listen()", "EPERM"),
    # as much as the quota has with what is meant for services, and then no more
    (vmm("one", 384 * MIB + GIB), ""),
    (vmm("two", 384 * MIB + 2 * GIB), "no_resources"),
    ("core.create_channel(0, core.lookup('one').selector, 'a', 'control')", ""),
    ("core.delegate(core.lookup('image.0.root').selector, core.lookup('disk').selector, 1, 'x')",
     "invalid"),
    ("[core.create_channel(0, core.lookup('one').selector, f'n{n}', f'm{n}') for n in range(5000)]",
     "no_resources"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("evil-user")
    with running(BrokenIntoHost(directory, "t-user", "user", EVIL_USER), *AS_GIVEN) as host:
        plane = ControlPlane(directory, host, "evil")
        attacks = json.dumps([as_code(attack) for attack, _ in ATTACKS])
        victim = ControlPlane(directory, host, "victim")
        host.admin("user.add", user="victim", ca_pem=f"[]\n{victim.ca_pem}", quota=QUOTA)
        host.admin("user.add", user="evil", ca_pem=f"{attacks}\n{plane.ca_pem}", quota=QUOTA)
        found = read_log(host.state / "log" / "user:evil.log")
        rows = {row["name"]: row for row in host.admin("user.list")}
        yield {**found, "rows": rows, "drivers": host.admin("drivers")}
        for name in ("evil", "victim"):
            host.admin("user.remove", user=name)
        deadline = time.monotonic() + 60
        while left := stored(host):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def stored(host: RunningHost) -> list[Any]:
    disk, uplink = host.admin("drivers")
    return [*disk["disks"], *uplink["ranges"]]


def as_code(attack: str) -> str:
    return attack if attack.startswith("result") else f"result = 0; {attack}"


def read_log(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not path.exists() or "ATTACKS OVER" not in (text := path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lines = [line.removeprefix("ATTACK ") for line in text.splitlines() if "ATTACK [" in line]
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize(("attack", "refused"), ATTACKS)
def test_the_quota_holds_whatever_the_domain_does(
    outcomes: dict[str, Any], attack: str, refused: str
) -> None:
    outcome = outcomes[as_code(attack)]
    if refused:
        assert outcome.get("refused") == refused, outcome
    else:
        assert "done" in outcome, outcome


def test_what_it_did_get_is_booked_on_it_and_not_on_others(outcomes: dict[str, Any]) -> None:
    rows = outcomes["rows"]
    assert rows["evil"]["used"]["disk_bytes"] == GIB
    assert rows["evil"]["used"]["booked_domains"] == 1
    assert rows["victim"]["used"]["disk_bytes"] == 0
    assert rows["victim"]["used"]["booked_domains"] == 0
    assert rows["victim"]["used"]["vms"] == 0
    assert {row["user"] for row in outcomes["drivers"][0]["disks"]} == {"evil"}
