"""Guests that listen are told the time again when their platform was restored."""

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.guestport import GuestPort
from supercloud.upper.platform.agent.machine import Machine
from supercloud.upper.platform.agent.manager import Manager
from supercloud.upper.platform.agent.namespaces import IDS_PER_ENVIRONMENT
from supercloud.wire.messages import EnvironmentSpec, ImageRef


def machine(directory: Path, name: str, *, listens: bool) -> Machine:
    image = ImageRef(format="kernel", blobs={}, identity=listens)
    spec = EnvironmentSpec(name=name, uid=name, kind="vm", image=image)
    made = Machine(spec, cast("Any", SimpleNamespace()), IDS_PER_ENVIRONMENT)
    made._qmp = cast("Any", SimpleNamespace())  # it runs
    (directory / name).mkdir()
    return made


def guest(directory: Path, name: str) -> socket.socket:
    """QEMU's end of the port."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/{name}/identity")
    listener.listen(4)
    listener.settimeout(10)
    return listener


def line_of(listener: socket.socket) -> list[str]:
    connection, _ = listener.accept()
    with connection, connection.makefile() as file:
        return file.readline().split()


def test_whoever_listens_is_told_whatever_becomes_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "ENVIRONMENTS", str(tmp_path))
    names = {"gone": True, "deaf": False, "listens": True, "too": True}
    machines = [machine(tmp_path, name, listens=listens) for name, listens in names.items()]
    guests = [guest(tmp_path, name) for name in ("deaf", "listens", "too")]
    manager = Manager.__new__(Manager)
    manager._workers = {
        made.spec.uid: cast("Any", SimpleNamespace(engine=made, spec=made.spec))
        for made in machines
    }
    manager.restored()
    deaf, *others = guests
    for listener in others:
        version, seed, told_s = line_of(listener)
        assert (version, len(seed)) == ("1", 128)
        assert abs(int(told_s) - time.time()) < 60
    deaf.settimeout(0)
    with pytest.raises(BlockingIOError):
        deaf.accept()
    for made in machines:
        made._port.close()
    for listener in guests:
        listener.close()


def test_a_guest_may_be_told_more_than_once_and_gets_another_seed(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    with guest(tmp_path, "vm") as listener:
        port, seeds = GuestPort(f"{tmp_path}/vm/identity"), set()
        for _ in range(3):
            port.tell()
            seeds.add(line_of(listener)[1])
        port.close()
    assert len(seeds) == 3
