"""The port over which a clone is told who it is: what is said on it, and what is believed."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Machine
from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent import identity
from supercloud.wire.lease import Lease
from supercloud.wire.reactor import Reactor

LEASE = Lease(address="10.0.2.15/24", gateway="10.0.2.2", resolvers=["10.0.2.3"])
CLONE = Machine(
    name="p", cpus=1, memory_bytes=1 << 29, accelerator="tcg", uplink_mac="02:5c:00:00:00:01",
    link_mac="02:5c:77:00:00:01", start="clone", lease=LEASE,
)  # fmt: skip


@pytest.fixture
def port() -> Iterator[tuple[Reactor, IdentityPort, socket.socket, list[str]]]:
    reactor, said = Reactor(), []
    ours, guest = socket.socketpair()
    guest.settimeout(2)
    made = IdentityPort(reactor, ours, said.append)
    yield reactor, made, guest, said
    made.close()
    guest.close()


def turn(reactor: Reactor) -> None:
    reactor._stopped = False
    reactor.after(0.02, reactor.stop)
    reactor.run()


def test_a_clone_is_told_once_and_believed_for_the_right_word_only(port: Any) -> None:
    reactor, made, guest, said = port
    guest.send(b"ready 0123456789abcdef\nwaiting\n")
    turn(reactor)
    assert said == ["waiting"]  # nothing was told yet, so nobody can be ready
    made.tell(CLONE)
    told = identity.parse(guest.recv(4096))
    assert told.macs == ["02:5c:00:00:00:01", "02:5c:77:00:00:01"]
    assert told.lease == LEASE
    guest.send(b"ready ffffffffffffffff\n")
    turn(reactor)
    assert said == ["waiting"]
    guest.send(f"ready {told.nonce}\n".encode() * 2)
    turn(reactor)
    assert said == ["waiting", "ready"]


def test_no_two_are_told_the_same_seed(port: Any) -> None:
    _, made, guest, _ = port
    seeds = set()
    for _ in range(8):
        made.tell(CLONE)
        seeds.add(identity.parse(guest.recv(4096)).seed)
    assert len(seeds) == 8


@pytest.mark.parametrize("nonsense", [b"x" * 200, b"\xff\0\n" * 40, b"waiting", b"ready \n"])
def test_nonsense_of_a_guest_is_no_word(port: Any, nonsense: bytes) -> None:
    reactor, _, guest, said = port
    guest.send(nonsense)
    turn(reactor)
    assert said == []


GIVEN = {"address": "10.0.2.15/24", "gateway": "10.0.2.2", "resolvers": ["10.0.2.3"]}
ODD: list[dict[str, object]] = [
    {"address": "10.0.2.15"}, {"address": "10.0.2.15/33"}, {"address": "10.0.2.256/24"},
    {"gateway": "10.0.2.2\n"}, {"gateway": ""}, {"resolvers": ["evil"]},
    {"resolvers": ["10.0.2.3"] * 4},
]  # fmt: skip
TOLD = {
    "version": 1, "nonce": "0" * 16, "seed": "1" * 128, "time_s": 1.5,
    "macs": ["02:5c:00:00:00:01", "02:5c:77:00:00:01"],
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2}, {"nonce": "0\n"}, {"seed": "1" * 127}, {"time_s": "soon"},
        *({"lease": {**GIVEN, **odd}} for odd in ODD),
        {"macs": ["52:54:00:00:00:01"]}, {"macs": ["02:5c:00:00:00:01"] * 5},
    ],
)  # fmt: skip
def test_an_identity_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    identity.parse(json.dumps(TOLD).encode())
    with pytest.raises(Invalid):
        identity.parse(json.dumps({**TOLD, **wrong}).encode())
    with pytest.raises(Invalid):
        identity.parse(b"{")
