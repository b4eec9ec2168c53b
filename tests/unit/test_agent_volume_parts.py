"""Slots of disks, what counts as blank, who may share: what the agent decides before it acts."""

import asyncio
import struct
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid, Temporary
from supercloud.upper.platform.agent import filesystem, oci, paths, volumes
from supercloud.upper.platform.agent.disks import Disk, Disks, slot_number
from supercloud.upper.platform.agent.hardware import serial
from supercloud.upper.platform.agent.volumes import Absent, Broken, Claim, Volumes
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import (
    EnvironmentSpec,
    EnvironmentStatus,
    ImageRef,
    VolumeMount,
    VolumeUsage,
)

MIB = 1 << 20


def port(slot: int, *, kind: int = 4, implemented: bool = True, before: int = 1) -> bytes:
    """The configuration space of a bridge with other capabilities ahead of the one that counts."""
    config = bytearray(256)
    config[0x06], config[0x0E], config[0x34] = 0x10, 1, 0x40
    for n in range(before):
        config[0x40 + 8 * n : 0x42 + 8 * n] = bytes((5, 0x40 + 8 * (n + 1)))
    at = 0x40 + 8 * before
    flags = 2 | kind << 4 | implemented << 8
    struct.pack_into("<BBH", config, at, 0x10, 0, flags)
    struct.pack_into("<I", config, at + 0x14, slot << 19 | 0x60)
    return bytes(config)


def test_slot_is_the_number_in_the_slot_capabilities_register() -> None:
    assert [slot_number(port(n)) for n in (1, 2, 8)] == [1, 2, 8]
    assert slot_number(port(7, before=3)) == 7
    assert slot_number(port(0)) == 0


def test_what_is_no_port_with_a_slot_has_none() -> None:
    endpoint, plain, ring = (bytearray(port(3)) for _ in range(3))
    endpoint[0x0E] = 0
    plain[0x06] = 0
    ring[0x41] = 0x40
    cut = port(3)[:64]
    for config in (endpoint, plain, ring, cut, b"", port(3, implemented=False)):
        assert slot_number(bytes(config)) == 0


class System:
    """A sysfs with root ports, in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for number in (1, 2, 3):
            self.place(number).mkdir(parents=True)
            (self.place(number) / "config").write_bytes(port(number))
        (root / "block").mkdir()
        (root / "bus/pci/devices/0000:00:01.0").mkdir()  # a disk that is in no slot
        (root / "bus/pci/devices/0000:00:01.0/config").write_bytes(bytes(256))

    def place(self, slot: int) -> Path:
        return self.root / f"bus/pci/devices/0000:00:0{slot + 1}.0"

    def plug(self, slot: int, name: str, sequence: int, sectors: int = 2048) -> None:
        (self.place(slot) / f"0000:0{slot}:00.0/virtio{slot}/block/{name}").mkdir(parents=True)
        (self.root / "block" / name).mkdir()
        for attribute, value in (("diskseq", sequence), ("size", sectors), ("ro", 0)):
            (self.root / "block" / name / attribute).write_text(f"{value}\n")

    def unplug(self, slot: int, name: str) -> None:
        subprocess.run(["rm", "-r", self.place(slot) / f"0000:0{slot}:00.0"], check=True)
        subprocess.run(["rm", "-r", self.root / "block" / name], check=True)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(paths, "VOLUMES", str(tmp_path / "of-the-platform"))
    return System(tmp_path / "sys")


def test_disk_of_a_slot_is_found_and_its_name_used_again_is_another_disk(system: System) -> None:
    disks = Disks(str(system.root))
    assert disks.at_slot(2) is None
    system.plug(2, "vdd", 7, sectors=4096)
    found = disks.at_slot(2)
    assert found == Disk("vdd", 7)
    assert found.device == "/dev/vdd"
    assert (disks.at_slot(1), disks.at_slot(9)) == (None, None)
    assert (disks.is_present(found), disks.size_bytes(found)) == (True, 2 * MIB)
    system.unplug(2, "vdd")
    assert (disks.is_present(found), disks.size_bytes(found)) == (False, 0)
    system.plug(3, "vdd", 8)
    assert not disks.is_present(found)
    assert disks.at_slot(3) == Disk("vdd", 8)


@pytest.mark.parametrize("before", ["write through", "write back"])
def test_a_disk_is_told_that_flushes_are_sent(system: System, before: str) -> None:
    system.plug(2, "vdd", 7)
    switch = system.root / "block/vdd/cache_type"
    switch.write_text(f"{before}\n")
    disks = Disks(str(system.root))
    disks.send_flushes(Disk("vdd", 7))
    assert switch.read_text().endswith("write back" if before == "write through" else "back\n")
    switch.unlink()
    disks.send_flushes(Disk("vdd", 7))
    assert not switch.exists()


# -- content


def disk(directory: Path, size_bytes: int = 4 * MIB) -> Path:
    path = directory / "disk"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def put(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        file.write(data)


def make_ext4(path: Path) -> None:
    tool = ToolTree().argv("mke2fs")
    subprocess.run([*tool, "-q", "-F", "-t", "ext4", str(path)], check=True)


def test_zeros_are_blank(tmp_path: Path) -> None:
    assert filesystem.look(str(disk(tmp_path))) is None
    assert filesystem.look(str(disk(tmp_path, MIB))) is None, "the smallest volume"


@pytest.mark.parametrize("at", [0, 510, 1024 + 0x38, 4096, MIB - 1, -1, -512, -4096])
def test_one_byte_is_not_blank_and_never_formatted(tmp_path: Path, at: int) -> None:
    path = disk(tmp_path)
    put(path, at, b"\1")
    with pytest.raises(Invalid, match="no ext4 file system, and is left as it is"):
        filesystem.look(str(path))


def test_file_system_is_read_as_it_is(tmp_path: Path) -> None:
    path = disk(tmp_path, 16 * MIB)
    make_ext4(path)
    found = filesystem.look(str(path))
    assert found == filesystem.Superblock(16 * MIB, is_clean=True, was_mounted=False)
    for at, value in ((0x3A, b"\0\0"), (0x3A, b"\3\0"), (0x60, b"\xff")):
        make_ext4(path)
        put(path, 1024 + at, value)
        assert not filesystem.look(str(path)).is_clean, (at, value)


def test_making_that_was_cut_off_counts_as_blank_until_somebody_has_mounted_it(
    tmp_path: Path,
) -> None:
    path = disk(tmp_path, 16 * MIB)
    put(path, 8192, b"half")
    put(path, -4096, filesystem.MARK)
    assert filesystem.look(str(path)) is None
    make_ext4(path)
    put(path, -4096, filesystem.MARK)
    assert filesystem.look(str(path)) is None, "made, but not known to be whole"
    put(path, 1024 + 0x2C, b"\1\2\3\4")
    assert filesystem.look(str(path)).was_mounted, "the mark is somebody's data now"


@pytest.mark.parametrize("data", [b"", b"\0" * 1023, b"\0" * 1024, b"\xff" * 1024])
def test_no_superblock_is_none(data: bytes) -> None:
    assert filesystem.superblock(data) is None


# -- sharing


def spec(name: str, *mounts: VolumeMount, kind: str = "container") -> EnvironmentSpec:
    return EnvironmentSpec(
        name=name, uid=f"{name}-1", kind=kind, volumes=list(mounts),  # type: ignore[arg-type]
        image=ImageRef(format="erofs", blobs={}),
    )  # fmt: skip


def mount(volume: str, slot: int = 0, path: str = "/data", *, ro: bool = False) -> VolumeMount:
    return VolumeMount(volume=volume, slot=slot, path=path, read_only=ro)


def test_readers_may_share_and_slots_are_one_to_one() -> None:
    volumes.check([spec("a", mount("v", 1, ro=True)), spec("b", mount("v", 1, ro=True))])
    volumes.check([spec("a", mount("v", 1), mount("w")), spec("b", mount("x"), mount("y", 2))])


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ([spec("a", mount("v")), spec("b", mount("v"))], "wanted by 2"),
        ([spec("a", mount("v")), spec("b", mount("v", ro=True))], "not all only read"),
        ([spec("a", mount("v"), mount("v", path="/b"))], "twice"),
        ([spec("a", mount("v", 1)), spec("b", mount("w", 1))], "slot 1"),
        (
            [spec("a", mount("v", 1, ro=True)), spec("b", mount("v", 2, ro=True))],
            "slot 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(specs: list[EnvironmentSpec], reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        volumes.check(specs)


@pytest.mark.parametrize(
    "path", ["", "data", "/", "/data/", "//data", "/a/../etc", "/a/./b", "/proc/x", "/dev", "/a\0b"]
)
def test_path_that_cannot_be_a_mount_point_is_refused(path: str) -> None:
    with pytest.raises(Invalid, match="volume v cannot be mounted"):
        oci.volumes(spec("a", mount("v", path=path)), "/place")


def test_volumes_are_bound_outer_ones_first() -> None:
    found = oci.volumes(
        spec("a", mount("in", path="/data/in", ro=True), mount("out", path="/data")), "/place"
    )
    assert [(m["destination"], m["source"]) for m in found] == [
        ("/data", "/place/volumes/out"), ("/data/in", "/place/volumes/in"),
    ]  # fmt: skip
    assert "ro" not in found[0]["options"]
    for one in found:
        assert {"bind", "nosuid", "nodev", "noatime"} <= set(one["options"])
    assert "ro" in found[1]["options"]
    with pytest.raises(Invalid, match="two volumes at one path"):
        oci.volumes(spec("a", mount("v"), mount("w")), "/place")


def test_serial_is_what_a_virtio_disk_takes() -> None:
    assert serial("data") == "data"
    assert serial("a-library-with-a-long-name") == "a-library-with-a-lon"


def test_status_of_an_agent_that_knows_no_volumes_is_read() -> None:
    status = EnvironmentStatus(
        name="a", uid="a-1", kind="container", state="running",
        volumes=[VolumeUsage(volume="v", size_bytes=2, used_bytes=1)],
    )  # fmt: skip
    wire = encode(status)
    assert decode(EnvironmentStatus, wire, "status") == status
    del wire["volumes"]
    assert decode(EnvironmentStatus, wire, "status").volumes == []


# -- claims


class Engine:
    """Whose volumes they are."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec


async def claimed(store: Volumes, spec: EnvironmentSpec, place: Path) -> list[str]:
    told: list[str] = []
    await store.claim(Engine(spec), str(place), told.append)
    return told


async def when(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def begun(system: System) -> Volumes:
    store = Volumes(Disks(str(system.root)))
    store.start()
    return store


async def test_claim_waits_for_slot_disk_and_the_one_before_it(
    system: System, tmp_path: Path
) -> None:
    store, told = begun(system), list[str]()
    engine = Engine(spec("a", mount("v")))
    claiming = asyncio.ensure_future(store.claim(engine, str(tmp_path), told.append))
    await when(lambda: told)
    assert "volume v is not attached to the platform: it has no slot yet" in told[-1]
    engine.spec = spec("a", mount("v", 1))
    store.look_again()
    await when(lambda: "slot 1 is empty" in told[-1])
    system.plug(1, "vdd", 5)
    store.look_again()
    await claiming
    assert store.of("a-1") == [Claim("v", "a-1", "a", "container", Disk("vdd", 5), read_only=False)]
    second, told = Engine(spec("b", mount("v", 1, ro=True))), []
    waiting = asyncio.ensure_future(store.claim(second, str(tmp_path), told.append))
    await when(lambda: told)
    assert told == ["volume v is still in use by a"]
    system.unplug(1, "vdd")  # so that nothing is there to unmount
    await store.release("a-1", str(tmp_path))
    system.plug(1, "vdd", 6)
    store.look_again()
    await waiting
    assert [claim.disk.sequence for claim in store.of("b-1")] == [6]


async def test_claim_gives_up_with_the_reason(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "WAIT_S", 0.05)
    with pytest.raises(Absent, match="volume v is not attached to the platform: slot 2 is empty"):
        await claimed(begun(system), spec("a", mount("v", 2)), tmp_path)


async def test_next_agent_finds_claims_and_what_has_gone_meanwhile(
    system: System, tmp_path: Path
) -> None:
    system.plug(1, "vdd", 5)
    assert await claimed(begun(system), spec("a", mount("v", 1)), tmp_path) == []
    store, grown = begun(system), list[int]()

    async def note(_: Claim, size_bytes: int) -> None:
        grown.append(size_bytes)

    losing = asyncio.ensure_future(store.lost("a-1", note))
    await when(lambda: grown == [MIB])
    (system.root / "block/vdd/size").write_text("4096\n")
    store.look_again()
    await when(lambda: grown == [MIB, 2 * MIB])
    assert not losing.done()
    system.unplug(1, "vdd")
    system.plug(2, "vdd", 6)  # another disk of the same name is not the same disk
    store.look_again()
    with pytest.raises(Absent, match="volume v has gone"):
        await losing


async def test_file_system_that_met_an_error_is_broken_for_who_may_write(
    system: System, tmp_path: Path
) -> None:
    system.plug(1, "vdd", 5)
    system.plug(2, "vde", 6)
    for name in ("vdd", "vde"):
        (system.root / "fs/ext4" / name).mkdir(parents=True)
        (system.root / "fs/ext4" / name / "errors_count").write_text("0\n")
    store = begun(system)
    await claimed(store, spec("a", mount("v", 1), mount("w", 2, ro=True)), tmp_path)

    async def nothing(_: Claim, __: int) -> None:
        return

    losing = asyncio.ensure_future(store.lost("a-1", nothing))
    for name in ("vde", "vdd"):
        await asyncio.sleep(0.05)
        assert not losing.done(), name
        (system.root / "fs/ext4" / name / "errors_count").write_text("1\n")
        store.look_again()
    with pytest.raises(Broken, match="volume v: its file system met an error"):
        await losing


async def test_one_that_cannot_grow_goes_on(system: System, tmp_path: Path) -> None:
    system.plug(1, "vdd", 5)
    store = begun(system)
    await claimed(store, spec("a", mount("v", 1)), tmp_path)
    calls = list[int]()

    def fail(_: Claim, size_bytes: int) -> Awaitable[None]:
        async def work() -> None:
            calls.append(size_bytes)
            raise OSError(5, "I/O error")

        return work()

    losing = asyncio.ensure_future(store.lost("a-1", fail))
    await when(lambda: calls)
    assert not losing.done()
    losing.cancel()


async def test_a_disk_that_the_kernel_still_has_for_itself_is_waited_for(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.plug(1, "vdd", 5)
    store = begun(system)
    await claimed(store, spec("a", mount("v", 1)), tmp_path)
    answers, asked = iter([False, False, True]), list[str]()

    def is_free(device: str) -> bool:
        asked.append(device)
        return next(answers)

    monkeypatch.setattr(filesystem, "is_free", is_free)
    await store.settled("a-1")
    assert asked == ["/dev/vdd"] * 3


async def test_a_disk_that_is_taken_again_between_a_look_and_the_mount_is_tried_again(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.plug(1, "vdd", 5)
    store = begun(system)
    await claimed(store, spec("a", mount("v", 1)), tmp_path)
    answers = iter([filesystem.InUse("by a child"), OSError(5, "not ours to try again")])
    clean = filesystem.Superblock(size_bytes=MIB, is_clean=True, was_mounted=True)

    def mounted(*_: object) -> None:
        raise next(answers)

    monkeypatch.setattr(filesystem, "is_free", lambda _: True)
    monkeypatch.setattr(filesystem, "look", lambda _: clean)
    monkeypatch.setattr(filesystem, "mount", mounted)
    with pytest.raises(Temporary, match="not ours to try again"):
        await store.mount("a-1", str(tmp_path), (0, 0), print)
