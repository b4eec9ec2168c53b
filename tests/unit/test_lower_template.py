"""A template's inputs, QEMU's part in saving and loading it, and the port of a clone's identity."""

import dataclasses
import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Descriptors, command_line
from supercloud.lower.vmm.template import Inputs, key_of, load, machine_of, save
from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent import identity
from supercloud.wire.reactor import Reactor

MIB = 1 << 20
INPUTS = Inputs(
    image="sha256:" + "1" * 64, runtime_sha256="2" * 64, kernel="6.18", accelerator="tcg",
    cpus=1, memory_bytes=256 * MIB, scratch_bytes=512 * MIB,
)  # fmt: skip
CHANGES = {
    "image": "sha256:" + "3" * 64, "runtime_sha256": "4" * 64, "kernel": "6.19",
    "accelerator": "kvm", "cpus": 2, "memory_bytes": 512 * MIB, "scratch_bytes": 513 * MIB,
}  # fmt: skip
FACTS = {
    "runtime_sha256": INPUTS.runtime_sha256, "kernel": INPUTS.kernel,
    "accelerator": INPUTS.accelerator, "images": [INPUTS.image],
}  # fmt: skip


# -- what a template is of


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Inputs)])
def test_another_input_is_another_template(field: str) -> None:
    changed = dataclasses.replace(INPUTS, **{field: CHANGES[field]})
    assert key_of(changed) != key_of(INPUTS)
    assert key_of(dataclasses.replace(INPUTS)) == key_of(INPUTS)


def test_another_command_line_is_another_template(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(INPUTS)
    monkeypatch.setattr("supercloud.lower.vmm.machine.FREE_ROOT_PORTS", 5)
    assert key_of(INPUTS) != before


def arguments(start: str) -> list[str]:
    machine = dataclasses.replace(machine_of(INPUTS), start=start)
    numbers = range(20, 20 + len(Descriptors.__slots__))
    return command_line(machine, Descriptors(**dict(zip(Descriptors.__slots__, numbers, strict=True))))  # fmt: skip


def test_all_starts_have_the_same_devices_in_the_same_places() -> None:
    def devices(start: str) -> list[tuple[str, str]]:
        argv = arguments(start)
        wanted = ("-M", "-cpu", "-smp", "-m", "-device", "-accel")
        return [pair for pair in itertools.pairwise(argv) if pair[0] in wanted]

    assert devices("boot") == devices("template") == devices("clone")


def test_a_clone_has_no_kernel_and_cannot_write_to_the_templates_memory() -> None:
    argv = arguments("clone")
    assert not {"-kernel", "-initrd", "-append"} & {*argv}
    backend = next(word for word in argv if word.startswith("memory-backend-file"))
    assert backend.endswith("share=off,readonly=on,rom=off")
    assert argv[argv.index("-incoming") + 1] == "defer"
    template = next(word for word in arguments("template") if word.startswith("memory-backend"))
    assert template.endswith("share=on")


# -- QEMU's part


class Commands:
    """A QMP whose answers the test gives."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.answer: Any = None

    def command(self, name: str, arguments: Any, answered: Any) -> None:
        self.sent.append((name, arguments))
        self.answer = answered


@pytest.mark.parametrize(("begin", "last"), [(save, "migrate"), (load, "migrate-incoming")])
def test_saving_and_loading_go_step_by_step(begin: Any, last: str) -> None:
    qmp, done, failed = Commands(), [], []
    sequence = begin(qmp, lambda: done.append(1), failed.append)
    sequence.migration("completed")  # of nothing of ours
    while qmp.sent[-1][0] != last:
        assert not done
        qmp.answer({"return": {}})
    capabilities = dict(qmp.sent)["migrate-set-capabilities"]["capabilities"]
    assert {"capability": "x-ignore-shared", "state": True} in capabilities
    sequence.migration("active")
    assert not done
    sequence.migration("completed")
    sequence.migration("completed")
    assert (done, failed) == ([1], [])


@pytest.mark.parametrize("begin", [save, load])
def test_what_qemu_refuses_is_said(begin: Any) -> None:
    qmp, failed = Commands(), []
    begin(qmp, lambda: failed.append("done"), failed.append)
    qmp.answer({"error": {"desc": "it does not like that"}})
    assert len(failed) == 1
    assert "it does not like that" in failed[0]


# -- the port


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
    made.tell("02:5c:00:00:00:01", "02:5c:77:00:00:01")
    told = identity.parse(guest.recv(4096))
    assert told.macs == ["02:5c:00:00:00:01", "02:5c:77:00:00:01"]
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
        made.tell("02:5c:00:00:00:01", "02:5c:77:00:00:01")
        seeds.add(identity.parse(guest.recv(4096)).seed)
    assert len(seeds) == 8


@pytest.mark.parametrize("nonsense", [b"x" * 200, b"\xff\0\n" * 40, b"waiting", b"ready \n"])
def test_nonsense_of_a_guest_is_no_word(port: Any, nonsense: bytes) -> None:
    reactor, _, guest, said = port
    guest.send(nonsense)
    turn(reactor)
    assert said == []


TOLD = {
    "version": 1, "nonce": "0" * 16, "seed": "1" * 128, "time_s": 1.5,
    "macs": ["02:5c:00:00:00:01", "02:5c:77:00:00:01"],
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 2}, {"nonce": "0\n"}, {"seed": "1" * 127}, {"time_s": "soon"},
        {"macs": ["52:54:00:00:00:01"]}, {"macs": ["02:5c:00:00:00:01"] * 5},
    ],
)  # fmt: skip
def test_an_identity_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    identity.parse(json.dumps(TOLD).encode())
    with pytest.raises(Invalid):
        identity.parse(json.dumps({**TOLD, **wrong}).encode())
    with pytest.raises(Invalid):
        identity.parse(b"{")
