"""A machine's slots against a pretended QEMU that answers every command."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from supercloud.lower.vmm import disks
from supercloud.lower.vmm.disks import Disks
from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    Unsupported,
)
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor


class Qemu(threading.Thread):
    """Answers; what is in ``refuses`` with an error. ``passed`` counts descriptors that came."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(daemon=True)
        self.end, self.refuses = end, set[str]()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.passed, self.status = 0, "running"

    def run(self) -> None:
        data = b""
        while True:
            more, descriptors, _, _ = socket.recv_fds(self.end, 1 << 16, 8)
            self.passed += len(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            if not more:
                return
            *lines, data = (data + more).split(b"\n")
            for line in lines:
                self._answer(json.loads(line))

    def _answer(self, command: dict[str, Any]) -> None:
        name = command["execute"]
        self.heard.append((name, command["arguments"]))
        answer: dict[str, Any] = {"return": {"status": self.status}}
        if name in self.refuses:
            answer = {"error": {"desc": "no"}}
        with contextlib.suppress(OSError):
            self.end.send(json.dumps({"id": command["id"], **answer}).encode() + b"\n")

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


class Machine:
    def __init__(self, *, ram_shared: bool) -> None:
        self.reactor = Reactor()
        ours, theirs = socket.socketpair()
        self.qemu = Qemu(theirs)
        self.qemu.start()
        self.qmp = Qmp(self.reactor, ours, lambda *_: None, lambda: None)
        self.told: list[Mapping[str, Any]] = []
        tell = lambda _method, status: self.told.append(dict(status))  # noqa: E731
        self.disks = Disks(self.reactor, self.qmp, tell, ram_shared=ram_shared)

    def attach(self, volume: str, mode: str = "nbd", **more: Any) -> dict[str, Any]:
        reading, writing = os.pipe()
        wish = {"volume": volume, "mode": mode, **more}
        try:
            return self.disks.attach(Request("t", "machine.attach", wish, [reading]))
        finally:
            os.close(reading)
            os.close(writing)

    def detach(self, volume: str) -> dict[str, Any]:
        return self.disks.detach(Request("t", "machine.detach", {"volume": volume}))

    def listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.disks.list(Request("t", "machine.disks", {}))["disks"]
        return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine(ram_shared=True)
    yield made
    made.qmp.close()


def test_vhost_user_onto_private_ram_is_refused_before_qemu_hears_of_it() -> None:
    machine = Machine(ram_shared=False)
    with pytest.raises(Unsupported, match="private"):
        machine.attach("data", "vhost-user-blk")
    assert machine.qemu.heard == []
    assert machine.attach("data", "nbd")["slot"] == 1
    machine.qmp.close()


def test_every_slot_is_filled_once_and_free_again_when_the_guest_has_let_go(
    machine: Machine,
) -> None:
    slots = [machine.attach(f"v{n}")["slot"] for n in range(VOLUME_SLOTS)]
    assert slots == list(range(1, VOLUME_SLOTS + 1))
    with pytest.raises(NoResources):
        machine.attach("more")
    with pytest.raises(Exists):
        machine.attach("v0")
    with pytest.raises(BadState):
        machine.attach("more", slot=3)
    assert machine.detach("v2")["state"] == "detaching"
    with pytest.raises(NoResources):
        machine.attach("more")  # it still has it
    machine.disks.on_qmp("DEVICE_DELETED", {"path": "/machine/peripheral/x"})
    machine.disks.on_qmp("DEVICE_DELETED", {"device": "disk3"})
    assert machine.told == [{"volume": "v2", "slot": 3, "mode": "nbd", "state": "detached"}]
    with pytest.raises(NotFound):
        machine.detach("v2")
    assert machine.attach("more", "vhost-user-blk")["slot"] == 3
    assert machine.qemu.passed == VOLUME_SLOTS + 1


def test_a_guest_that_refuses_keeps_its_disk(machine: Machine) -> None:
    machine.attach("data")
    machine.detach("data")
    machine.disks.on_qmp("DEVICE_UNPLUG_GUEST_ERROR", {"device": "disk1"})
    assert machine.told[0]["reason"]
    assert [disk["state"] for disk in machine.listed()] == ["attached"]


@pytest.mark.parametrize(
    ("mode", "fails", "undone"),
    [
        ("nbd", "blockdev-add", "closefd"),
        ("nbd", "device_add", "blockdev-del"),
        ("vhost-user-blk", "chardev-add", "closefd"),
        ("vhost-user-blk", "device_add", "chardev-remove"),
    ],
)
def test_what_failed_half_way_is_undone(
    machine: Machine, mode: str, fails: str, undone: str
) -> None:
    machine.qemu.refuses = {fails}
    with pytest.raises(SupercloudError):
        machine.attach("data", mode)
    assert machine.listed() == []
    machine.qemu.refuses = set()
    assert machine.attach("data", mode)["slot"] == 1
    assert undone in machine.qemu.names()


def asked(volume: str = "data", descriptors: Sequence[int] = (), **more: Any) -> Request:
    return Request("t", "machine.renew", {"volume": volume, **more}, list(descriptors))


def renew(machine: Machine) -> None:
    reading, writing = os.pipe()
    try:
        machine.disks.renew(asked(descriptors=[reading], size_bytes=1 << 30, export="data"))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_disk_by_nbd_gets_another_connection_while_its_machine_stands_still(
    machine: Machine,
) -> None:
    machine.attach("data")
    with pytest.raises(BadState, match="not held"):
        renew(machine)
    for number in (1, 2):
        machine.disks.hold(asked())
        machine.disks.hold(asked())  # whoever held it first has died
        del machine.qemu.heard[:]
        renew(machine)
        machine.qmp.ask("query-status")
        assert machine.qemu.names() == [
            *("getfd", "blockdev-add", "qom-set", "blockdev-del", "block_resize", "cont"),
            "query-status",
        ]
        assert machine.qemu.heard[1][1]["node-name"] == f"volume1-{number}"
        assert machine.qemu.heard[3][1] == {"node-name": f"volume1-{number - 1}"}
    assert machine.listed()[0]["state"] == "attached"


def test_a_machine_that_is_held_and_forgotten_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "HOLD_S", 0.05)
    machine.attach("data")
    machine.disks.hold(asked())
    machine.reactor.after(0.5, machine.reactor.stop)
    machine.reactor.run()
    machine.qmp.ask("query-status")
    assert machine.qemu.names().count("cont") == 1
    with pytest.raises(BadState, match="not held"):
        renew(machine)


@pytest.mark.parametrize("fails", ["blockdev-add", "qom-set"])
def test_a_new_connection_that_is_of_no_use_leaves_the_old_one(
    machine: Machine, fails: str
) -> None:
    machine.attach("data")
    machine.disks.hold(asked())
    machine.qemu.refuses = {fails}
    with pytest.raises(SupercloudError):
        renew(machine)
    machine.qemu.refuses = set()
    machine.qmp.ask("query-status")
    assert machine.qemu.names().count("cont") == 1
    machine.detach("data")
    machine.disks.on_qmp("DEVICE_DELETED", {"device": "disk1"})
    machine.qmp.ask("query-status")
    assert ("blockdev-del", {"node-name": "volume1-0"}) in machine.qemu.heard


def test_what_cannot_be_held(machine: Machine) -> None:
    machine.attach("shared", "vhost-user-blk")
    with pytest.raises(BadState, match="by itself"):
        machine.disks.hold(asked("shared"))
    with pytest.raises(NotFound):
        machine.disks.hold(asked("other"))
    for name in ("data", "more"):
        machine.attach(name)
    machine.disks.hold(asked())
    with pytest.raises(Busy, match="for volume data"):
        machine.disks.hold(asked("more"))
    renew(machine)
    del machine.qemu.heard[:]
    machine.qemu.status = "io-error"
    with pytest.raises(BadState, match="stands still"):
        machine.disks.hold(asked())
    assert "stop" not in machine.qemu.names()


def test_garbage_is_refused(machine: Machine) -> None:
    for garbage in (None, "", "../x", 3, True, [], "a" * 64, -1, 99):
        fields = {"volume": "v", "mode": "nbd", "slot": 0, "read_only": False, "export": ""}
        for name in ("volume", "mode", "slot"):
            with pytest.raises(Invalid):
                machine.attach(**{**fields, name: garbage if garbage != 3 else 3.5})  # type: ignore[arg-type]
    with pytest.raises(Invalid):
        machine.disks.attach(Request("t", "machine.attach", {"volume": "v", "mode": "nbd"}))
    assert machine.qemu.heard == []
