"""A provider's disk that is full, in what a host tells: events, reasons, and refusals."""

from pathlib import Path
from typing import Any

import pytest
from test_lower_volume_layers import FIGURES, SEALED, SPEC, World

from supercloud.lower.user_domain.volume_news import event_of
from supercloud.lower.vmm import room
from supercloud.lower.vmm.room import Room
from supercloud.model.errors import NoResources
from supercloud.services.protection.engine import EVIDENCE
from supercloud.services.protection.service import TOLD
from supercloud.wire.reactor import Reactor
from supercloud.wire.volumes import VolumeSnapshot

FOUND = {"device": "data", "kind": "block", "index": 7}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def told(world: World) -> list[tuple[str, str, str]]:
    return [(e.code.removeprefix("host.volume."), e.severity, e.message)
            for e in world.volumes._feed._kept if e.subject == "volume/data"]  # fmt: skip


def test_all_that_the_engine_finds_is_told_and_has_words() -> None:
    assert set(TOLD) == set(EVIDENCE) - {""}
    for kind in TOLD.values():
        assert event_of(f"device.{kind}", dict(FOUND)) is not None
    assert event_of("device.seal", {}) is None


@pytest.mark.parametrize(
    ("method", "severity", "word"),
    [
        ("device.full", "error", "the provider's disk is full"),
        ("device.room", "info", "nothing waits"),
        ("device.discarded", "info", "a crash"),
        ("device.dead", "error", "failed to keep"),
    ],
)
async def test_only_what_was_tampered_with_is_evidence(
    world: World, method: str, severity: str, word: str
) -> None:
    await world.serve()
    world.volumes._told(method, dict(FOUND), [])
    (code, said, message) = told(world)[-1]
    assert (code, said) == (method.removeprefix("device."), severity)
    assert word in message
    assert "wrong" not in message
    world.volumes._told("device.evidence", dict(FOUND), [])
    (code, said, message) = told(world)[-1]
    assert (code, said, "gave back a wrong block 7" in message) == ("evidence", "error", True)


async def test_writes_wait_while_a_machine_has_it(world: World) -> None:
    holds: list[bool] = []
    world.protection.answers["device.hold"] = lambda asked: holds.append(asked["hold"]) or {}
    await world.serve()
    assert holds in ([], [False])  # what was left of an earlier opening
    await world.attach()
    assert holds[-1] is True
    await world.volumes.detach("data")
    assert holds[-1] is False
    heard = world.protection.heard
    await world.volumes.close("data")
    assert heard[-2:] == ["device.hold", "device.close"]


async def test_one_that_its_guest_does_not_let_go_of_waits_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supercloud.lower.user_domain.layers.UNPLUG_TRIES", 0)
    holds: list[bool] = []
    world.protection.answers["device.hold"] = lambda asked: holds.append(asked["hold"]) or {}
    await world.serve()
    await world.attach()
    with pytest.raises(Exception, match="does not let go"):
        await world.volumes.detach("data")
    assert holds[-2:] == [False, True]


async def test_what_would_wait_too_is_refused_and_the_reason_is_shown(world: World) -> None:
    await world.serve()
    await world.attach()
    world.protection.answers["device.list"] = {"data": "open"}
    world.block.answers["volume.list"] = {"volumes": {"data": {}}}
    world.block.answers["volume.stats"] = {"copying": ""}
    world.protection.answers["device.state"] = {**SEALED, **FIGURES, "full": 1}
    (status,) = await world.volumes.statuses()
    assert "disk is full" in status.reason
    heard = world.block.heard
    heard.clear()
    asked = VolumeSnapshot(name="data", snapshot="one")
    for refused in (
        lambda: world.volumes.snapshot(asked),
        lambda: world.volumes.forget(asked),
        lambda: world.volumes.change(SPEC.__class__(name="data", size_bytes=2 * SPEC.size_bytes)),
        lambda: world.volumes.check_room("p"),
    ):
        with pytest.raises(NoResources, match="disk is full"):
            await refused()
    assert set(heard) <= {"volume.list", "volume.stats"}  # they wait for nothing
    world.protection.answers["device.state"] = {**SEALED, **FIGURES}
    (status,) = await world.volumes.statuses()
    assert status.reason == ""
    await world.volumes.check_room("p")


class Machine:
    """QEMU that is told to go on."""

    def __init__(self) -> None:
        self.reactor, self.heard, self.told = Reactor(), list[str](), list[str]()
        qmp: Any = self
        self.room = Room(self.reactor, qmp, lambda method, _: self.told.append(method))
        self.still_full = 2

    def command(self, name: str) -> None:
        self.heard.append(name)
        self.still_full -= 1
        if self.still_full:
            self.fails()

    def fails(self) -> None:
        for _ in range(3):
            self.room.on_qmp("BLOCK_IO_ERROR", {"nospace": True, "action": "stop"})


def test_a_machine_whose_scratch_disk_has_no_room_stands_still_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "RETRY_S", 0.05)
    machine = Machine()
    machine.room.on_qmp("BLOCK_IO_ERROR", {"nospace": False, "action": "report"})
    assert machine.told == []
    machine.fails()
    assert machine.told == ["machine.full"]

    def look() -> None:
        if "machine.room" in machine.told:
            machine.reactor.stop()
        else:
            machine.reactor.after(0.01, look)

    machine.reactor.after(0, look)
    machine.reactor.run()
    assert machine.told == ["machine.full", "machine.room"]
    assert machine.heard == ["cont", "cont"]
