"""Which spares there is room for, which go, and what is copied into one."""

import asyncio
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.model.errors import Temporary
from supercloud.upper.platform.agent import cgroups, spare_machine
from supercloud.upper.platform.agent.machine import ENGINE_BYTES
from supercloud.upper.platform.agent.manager import taken_bytes
from supercloud.upper.platform.agent.spare_machine import copy, is_possible
from supercloud.upper.platform.agent.spares import KEEP_S, RAM, STATE, Spares
from supercloud.wire.messages import Blob, EnvironmentSpec, ImageRef, ObjectAccess, VolumeMount

MIB = 1 << 20
TOTAL = 1024 * MIB


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spares]:
    monkeypatch.setattr(cgroups, "total_memory_bytes", lambda: TOTAL + cgroups.RESERVED_BYTES)
    spares = Spares(str(tmp_path / "spares"))

    def make(*keys: str, age_s: float = 0) -> Spares:
        for number, key in enumerate(keys):
            place = Path(spares.new(key, 0))
            (place / RAM).write_bytes(b"x" * MIB)
            (place / STATE).write_bytes(b"state")
            then = place.stat().st_mtime - age_s - 10 * (len(keys) - number)
            os.utime(place, (then, then))
        return spares

    return make


def kept(spares: Spares) -> list[str]:
    return sorted(key for key in ("a", "b", "c") if spares.has(key))


def test_what_environments_may_use_is_no_room_and_the_oldest_go_first(
    made: Callable[..., Spares],
) -> None:
    spares = made("a", "b", "c")
    spares.limit(TOTAL - 4 * MIB)
    assert kept(spares) == ["a", "b", "c"]
    spares.limit(TOTAL - 3 * MIB)  # each has its state as well
    assert kept(spares) == ["b", "c"]
    assert spares.has_room(MIB // 2)
    assert kept(spares) == ["b", "c"]
    assert spares.has_room(2 * MIB)
    assert kept(spares) == []
    assert not spares.has_room(4 * MIB)
    made("a")
    spares.limit(2 * TOTAL)
    assert kept(spares) == []


def test_one_that_is_just_being_made_has_its_room_already(made: Callable[..., Spares]) -> None:
    spares = made()
    spares.limit(TOTAL - 4 * MIB)
    assert spares.has_room(3 * MIB)
    place = spares.new("a", 3 * MIB)
    assert spares.has_room(2 * MIB), "the one that was there first makes room"
    assert not Path(place).exists()
    spares.new("b", 2 * MIB)
    assert spares.has_room(MIB)
    assert Path(spares.new("c", MIB)).exists()
    assert len(list(Path(place).parent.iterdir())) == 2


def test_before_anybody_has_said_what_may_be_used_there_is_no_room(tmp_path: Path) -> None:
    assert not Spares(str(tmp_path / "none")).has_room(1)


def test_one_without_its_state_is_none_and_is_swept(made: Callable[..., Spares]) -> None:
    spares = made("a")
    place = Path(spares.new("b", 0))
    (place / RAM).write_bytes(b"half")
    (place / f"{STATE}.part").write_bytes(b"half")
    assert not spares.has("b")
    spares.sweep()
    assert not place.exists()
    assert kept(spares) == ["a"]


def test_what_no_wanted_machine_uses_goes_after_a_while(made: Callable[..., Spares]) -> None:
    spares = made("a", "b", age_s=KEEP_S)
    made("c")
    spares.tidy({"a"})
    assert kept(spares) == ["a", "c"]
    spares.drop("c")
    spares.drop("c")
    assert kept(spares) == ["a"]


def test_only_what_a_memory_has_is_copied() -> None:
    source, into = os.memfd_create("source"), os.memfd_create("into")
    for file in (source, into):
        os.ftruncate(file, 64 * MIB)
    for at, data in ((0, b"first"), (40 * MIB, b"middle"), (64 * MIB - 4, b"last")):
        os.pwrite(source, data, at)
    copy(source, into)
    assert os.pread(into, 64 * MIB, 0) == os.pread(source, 64 * MIB, 0)
    assert os.fstat(into).st_blocks * 512 < MIB
    for file in (source, into):
        os.close(file)


def spec(**changes: object) -> EnvironmentSpec:
    root = Blob(digest="sha256:" + "0" * 64, size_bytes=1)
    values: dict[str, object] = {
        "name": "m", "uid": "m-1", "kind": "vm", "cpus": 1.0, "memory_bytes": 64 * MIB,
        "image": ImageRef(format="kernel", blobs={"root": root}, identity=True),
    }  # fmt: skip
    return EnvironmentSpec(**{**values, **changes})  # type: ignore[arg-type]


def test_a_machine_that_sees_what_may_change_meanwhile_cannot_go_on_from_one() -> None:
    one = spec()
    root = one.image.blobs["root"]
    assert is_possible(one)
    assert not is_possible(spec(image=replace(one.image, identity=False)))
    assert not is_possible(spec(image=replace(one.image, blobs={"disk": root}, format="raw")))
    mount = VolumeMount(volume="data", path="")
    assert not is_possible(spec(volumes=[mount]))
    store = ObjectAccess(server_name="store", ca_pem="", access_key="a", secret_key="s")
    assert not is_possible(spec(objects=store))


def test_an_engines_memory_counts_as_its_machines() -> None:
    container = spec(kind="container")
    assert taken_bytes([spec(), container]) == 128 * MIB + ENGINE_BYTES
    assert taken_bytes([]) == 0


async def test_a_copy_that_is_given_up_has_ended_before_its_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a thread would write a guest's memory into whatever has that number next."""
    begun, go_on, written = threading.Event(), threading.Event(), list[int]()

    def copy_out(_pid: int, _start: int, _size_bytes: int, into: int) -> None:
        begun.set()
        assert go_on.wait(30)
        written.append(os.pwrite(into, b"memory", 0))

    async def call(*_: object, **__: object) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(spare_machine, "key_of", lambda _: "a")
    monkeypatch.setattr(spare_machine, "_copy_out", copy_out)
    monkeypatch.setattr(cgroups, "total_memory_bytes", lambda: TOTAL + cgroups.RESERVED_BYTES)
    spares, machine = Spares(str(tmp_path)), SimpleNamespace(qmp=SimpleNamespace(call=call))
    spares.limit(0)
    size_bytes = 5 * MIB + mmap.PAGESIZE * 7  # no other mapping is as large
    file = os.memfd_create("ram")
    os.ftruncate(file, size_bytes)
    with mmap.mmap(file, size_bytes):
        work: Any = spare_machine.keep(machine, spares, os.getpid(), size_bytes)  # type: ignore[arg-type]
        keeping = asyncio.ensure_future(work)
        assert await asyncio.to_thread(begun.wait, 30)
        keeping.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait({keeping})
    os.close(file)
    assert keeping.cancelled()
    assert written == [6]
    assert not spares.has("a")


async def test_a_filling_that_is_given_up_leaves_no_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children, real = list[int](), spare_machine.fork

    def fork(*arguments: Any) -> int:
        children.append(real(*arguments))
        return children[0]

    def sleep(*_: object) -> int:
        time.sleep(60)
        return 0

    monkeypatch.setattr(spare_machine, "fork", fork)
    monkeypatch.setattr(spare_machine, "_copy_charged", sleep)
    filling = asyncio.ensure_future(spare_machine._in_its_group("uid", 3, 4))
    while not children:
        await asyncio.sleep(0.01)
    filling.cancel()
    await asyncio.wait({filling})
    assert filling.cancelled()
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


async def test_a_memory_that_could_not_be_filled_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spare_machine, "_copy_charged", lambda *_: 1)
    with pytest.raises(Temporary, match="could not be filled"):
        await spare_machine._in_its_group("uid", 3, 4)
    monkeypatch.setattr(spare_machine, "_copy_charged", lambda *_: 0)
    await spare_machine._in_its_group("uid", 3, 4)
