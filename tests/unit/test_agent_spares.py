"""Which spares there is room for, which go, and what is copied into one."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from supercloud.upper.platform.agent import cgroups
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
            place = Path(spares.new(key))
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


def test_before_anybody_has_said_what_may_be_used_there_is_no_room(tmp_path: Path) -> None:
    assert not Spares(str(tmp_path / "none")).has_room(1)


def test_one_without_its_state_is_none_and_is_swept(made: Callable[..., Spares]) -> None:
    spares = made("a")
    place = Path(spares.new("b"))
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
