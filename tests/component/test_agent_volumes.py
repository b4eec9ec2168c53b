"""Volumes in a booted platform: disks are plugged into its slots, EEs have them and lose them."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent import filesystem
from supercloud.wire.messages import EnvironmentSpec, Process, VolumeMount
from support.platform import Platform, booted, machine, web

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300, func_only=True),
    pytest.mark.asyncio(loop_scope="module"),
]

MIB = 1 << 20
SUPERBLOCK = slice(1024, 2048)
FOREVER = "while :; do sleep 1; done"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with booted(tmp_path_factory.mktemp("platform")) as made:
        yield made


def disk(directory: Path, name: str = "disk", size_bytes: int = 64 * MIB) -> Path:
    path = directory / name
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def user(
    platform: Platform, uid: str, *mounts: VolumeMount, text: str = FOREVER, **changes: object
) -> EnvironmentSpec:
    """A container, by default root's, with these volumes; its name is the first part of ``uid``."""
    values = {
        "name": uid.partition("-")[0], "uid": uid, "ports": [], "nics": [],
        "process": Process(argv=["/bin/sh", "-c", text], user="0"), "volumes": list(mounts),
    }  # fmt: skip
    return web(platform, **{**values, **changes})


def data(slot: int, *, read_only: bool = False) -> VolumeMount:
    return VolumeMount(volume="data", path="/data", slot=slot, read_only=read_only)


async def sh(platform: Platform, name: str, text: str) -> str:
    status, out = await platform.execute(name, "sh", "-c", text, user="0")
    assert status == 0, (text, out)
    return out.decode().strip()


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.2)


async def said(platform: Platform, text: str) -> None:
    """Until the platform's console has it, which comes a little after what it tells of."""

    async def is_said() -> bool:
        return text in platform.console

    await eventually(is_said)


async def clear(platform: Platform, *slots: int) -> None:
    """No EE, nothing mounted, nothing in the slots."""
    await platform.apply()

    async def is_empty() -> bool:
        return not (await (await platform.session()).list()).environments

    await eventually(is_empty)
    assert await mounts(platform) == ""
    assert await platform.shell("ls /run/supercloud/volumes/*/*.json 2>/dev/null") == ""
    for slot in slots:
        await platform.unplug(slot)


async def mounts(platform: Platform) -> str:
    return await platform.shell("grep -e /volumes/ -e /vd /proc/mounts | grep -v /lower")


async def kill_agent(platform: Platform) -> None:
    pid = await platform.agent_pid()
    old = platform.link.hub.sessions.get(platform.name)
    await platform.shell(f"kill -9 {pid}")

    async def is_back() -> bool:
        return platform.link.hub.sessions.get(platform.name) not in (None, old)

    await eventually(is_back)


async def base_id(platform: Platform, uid: str) -> int:
    text = await platform.shell(f"cat /run/supercloud/ee/{uid}/state.json")
    return int(json.loads(text)["base_id"])


def superblock(path: Path) -> filesystem.Superblock | None:
    return filesystem.superblock(path.read_bytes()[SUPERBLOCK])


async def test_blank_volume_is_formatted_and_outlives_its_ee(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 3)
    text = f"echo mine > /data/own && {FOREVER}"
    nobody = Process(argv=["/bin/sh", "-c", text], user="65534:65534")
    await platform.apply(user(platform, "first-1", data(3), process=nobody))
    await platform.until("first", "running")
    seen = await sh(
        platform, "first",
        "cd /data; mkdir sub; echo kept > sub/file; busybox chown 1000:1001 sub/file;"
        "busybox chmod 4750 sub/file; busybox stat -c '%u:%g:%a' . own sub/file;"
        "grep ' /data ' /proc/mounts",
    )  # fmt: skip
    owners, _, mounted = seen.rpartition("\n")
    assert owners.split() == ["65534:65534:755", "65534:65534:644", "1000:1001:4750"]
    for option in ("ext4", "nosuid", "nodev", "noatime"):
        assert option in mounted
    first_base = await base_id(platform, "first-1")
    (usage,) = (await platform.status("first")).volumes
    assert usage.volume == "data"
    assert 0 < usage.used_bytes < usage.size_bytes <= 64 * MIB
    inside = "/run/supercloud/volumes/data/fs"
    assert "1000:1001" in await platform.shell(f"stat -c %u:%g {inside}/sub/file")
    await platform.shell(f"mknod -m 666 {inside}/disk b 254 0")
    status, _ = await platform.execute("first", "sh", "-c", "cat /data/disk", user="0")
    assert status != 0, "no device of the platform by way of a volume"

    filler = user(platform, "filler-1")  # in the range of ids that the first one had
    await platform.apply()
    await platform.until("first", "gone")
    assert await mounts(platform) == ""
    assert superblock(file).is_clean, "all of it is on the disk before the EE is said to be gone"
    assert b"kept\n" in file.read_bytes()
    await platform.apply(filler)
    await platform.until("filler", "running")
    await platform.apply(filler, user(platform, "second-1", data(3)))
    await platform.until("second", "running")
    assert await base_id(platform, "filler-1") == first_base
    assert await base_id(platform, "second-1") != first_base
    again = await sh(
        platform, "second",
        "cd /data; busybox stat -c '%u:%g:%a' . own sub/file; cat own sub/file; busybox rm own",
    )  # fmt: skip
    assert again.split() == [*owners.split(), "mine", "kept"]
    await clear(platform, 3)


async def test_readers_share_a_volume_and_none_can_write(
    platform: Platform, tmp_path: Path
) -> None:
    await platform.plug(disk(tmp_path), 1)
    await platform.apply(user(platform, "writer-1", data(1), text=f"echo x > /data/x; {FOREVER}"))
    await platform.until("writer", "running")
    reader = data(1, read_only=True)
    one, two = user(platform, "one-1", reader), user(platform, "two-1", reader)
    with pytest.raises(Invalid, match="volume data is wanted by 2"):
        await platform.apply(one, user(platform, "writer-1", data(1)))
    await platform.apply(one, two)  # they wait for the writer's end, which comes with this too
    for name in ("one", "two"):
        await platform.until(name, "running")
        assert await sh(platform, name, "cat /data/x") == "x"
        status, _ = await platform.execute(name, "sh", "-c", "echo y > /data/y", user="0")
        assert status != 0
        assert (await sh(platform, name, "ls /data")).split() == ["lost+found", "x"]
    await platform.apply(two)
    await platform.until("one", "gone")
    assert await sh(platform, "two", "cat /data/x") == "x", "what one gave up the other still has"
    await clear(platform, 1)


async def test_ee_waits_for_its_volume_fails_and_starts_when_the_slot_arrives(
    platform: Platform, tmp_path: Path
) -> None:
    await platform.apply(user(platform, "late-1", data(0)))

    async def waits() -> bool:
        status = await platform.status("late")
        text = "volume data is not attached to the platform"
        return status is not None and status.state == "starting" and text in status.reason

    await eventually(waits)
    failed = await platform.until("late", "failed")
    assert "it has no slot yet" in failed.reason
    await platform.plug(disk(tmp_path), 8)
    await platform.apply(user(platform, "late-1", data(8)))
    running = await platform.until("late", "running")
    assert (running.uid, running.restarts, running.reason) == ("late-1", 0, "")
    await platform.apply(user(platform, "late-1", data(0)))
    await asyncio.sleep(1)
    assert (await platform.status("late")).pid == running.pid, "another slot alone changes nothing"
    await clear(platform, 8)


@pytest.mark.parametrize("where", ["head", "tail"])
async def test_disk_with_something_else_on_it_is_refused_and_untouched(
    platform: Platform, tmp_path: Path, where: str
) -> None:
    file = disk(tmp_path, "foreign", 32 * MIB)
    with file.open("r+b") as out:
        out.seek(512 if where == "head" else 32 * MIB - 512)
        out.write(b"EFI PART")
    before = hashlib.sha256(file.read_bytes()).digest()
    await platform.plug(file, 2)
    await platform.apply(user(platform, f"strange-{where}", data(2)))
    failed = await platform.until("strange", "failed", uid=f"strange-{where}")
    assert "volume data: the disk has something on it that is no ext4" in failed.reason
    await clear(platform, 2)
    assert hashlib.sha256(file.read_bytes()).digest() == before


async def test_unplugged_volume_fails_its_ee_which_starts_again_when_it_is_back(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 4)
    spec = user(platform, "loser-1", data(4))
    other = user(platform, "other-1")
    await platform.apply(spec, other)
    first = await platform.until("loser", "running")
    untouched = await platform.until("other", "running")
    await sh(platform, "loser", "echo kept > /data/file; busybox sync")
    await kill_agent(platform)
    adopted = await platform.until("loser", "running")
    assert (adopted.pid, adopted.restarts) == (first.pid, 0), "the next agent finds its claim"
    await platform.unplug(4)
    failed = await platform.until("loser", "failed")
    assert "volume data has gone" in failed.reason
    assert await mounts(platform) == ""
    assert (await platform.status("other")).pid == untouched.pid
    await kill_agent(platform)  # and it is so for the next agent too
    assert not superblock(file).is_clean
    await platform.plug(file, 6)
    await platform.apply(user(platform, "loser-1", data(6)), other)
    await platform.until("loser", "running")
    assert await sh(platform, "loser", "cat /data/file") == "kept"
    await said(platform, "loser: starting (volume data: its file system was left open")
    assert superblock(file).was_mounted
    await clear(platform, 6)


async def test_unplugged_while_no_agent_looks(platform: Platform, tmp_path: Path) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 4)
    await platform.apply(user(platform, "loser-2", data(4), restart="never"))
    await platform.until("loser", "running")
    await platform.shell(f"kill -STOP {await platform.agent_pid()}")
    await platform.unplug(4)
    await kill_agent(platform)
    failed = await platform.until("loser", "failed")
    assert "volume data has gone" in failed.reason
    await platform.plug(file, 4)
    await kill_agent(platform)
    await asyncio.sleep(1)
    again = await platform.status("loser")
    assert (again.state, again.reason) == ("failed", failed.reason), "its policy is never"
    await (await platform.session()).restart("loser")
    assert (await platform.until("loser", "running")).restarts == 1
    await clear(platform, 4)


async def test_volume_goes_from_one_ee_to_another_in_one_step(
    platform: Platform, tmp_path: Path
) -> None:
    await platform.plug(disk(tmp_path), 5)
    slow = f"trap 'sleep 1; echo last > /data/last; exit' TERM; {FOREVER}"
    await platform.apply(user(platform, "from-1", data(5), text=slow))
    await platform.until("from", "running")
    await platform.apply(user(platform, "to-1", data(5)))
    await platform.until("to", "running")
    assert await sh(platform, "to", "cat /data/last") == "last"
    await clear(platform, 5)


async def test_file_system_whose_making_was_cut_off_is_made_anew(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    with file.open("r+b") as out:  # as mke2fs leaves it when the power goes
        out.seek(64 << 10)
        out.write(os.urandom(64 << 10))
        out.seek(-4096, os.SEEK_END)
        out.write(filesystem.MARK)
    await platform.plug(file, 7)
    await platform.apply(user(platform, "half-1", data(7), text=f"echo x > /data/x; {FOREVER}"))
    await platform.until("half", "running")
    await clear(platform, 7)
    assert superblock(file).is_clean
    assert file.read_bytes()[-4096:] == bytes(4096)


async def test_file_system_grows_with_its_disk_under_a_running_ee(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 1)
    await platform.apply(user(platform, "grows-1", data(1)))
    pid = (await platform.until("grows", "running")).pid
    await platform.resize(1, 160 * MIB)

    async def has_grown() -> bool:
        (usage,) = (await platform.status("grows")).volumes
        return usage.size_bytes > 130 * MIB

    await eventually(has_grown)
    assert (await platform.status("grows")).pid == pid
    await clear(platform, 1)
    with file.open("r+b") as out:  # and when it grew while it was away
        out.truncate(256 * MIB)
    await platform.plug(file, 2)
    await platform.apply(user(platform, "grows-1", data(2)))
    await platform.until("grows", "running")

    async def has_grown_again() -> bool:
        (usage,) = (await platform.status("grows")).volumes
        return usage.size_bytes > 220 * MIB

    await eventually(has_grown_again)
    await clear(platform, 2)


async def test_file_system_that_broke_is_mended_and_its_ee_started_again(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 3)
    await platform.apply(user(platform, "breaks-1", data(3)))
    await platform.until("breaks", "running")
    await sh(platform, "breaks", "echo kept > /data/file; busybox sync")
    await platform.shell("for f in /sys/fs/ext4/vd*/trigger_fs_error; do echo by-hand > $f; done")
    await platform.until("breaks", "running", restarts=1)
    await said(platform, "volume data: its file system met an error and is read-only")
    assert await sh(platform, "breaks", "echo again >> /data/file; cat /data/file") == "kept\nagain"
    await clear(platform, 3)
    assert superblock(file).is_clean


async def test_agent_killed_at_any_step_leaves_no_mount_and_loses_nothing(
    platform: Platform, tmp_path: Path
) -> None:
    file = disk(tmp_path)
    await platform.plug(file, 3)
    for number, delay_s in enumerate((0.0, 0.15, 0.3)):
        text = f"echo {number} >> /data/runs; {FOREVER}"
        await platform.apply(user(platform, f"hard-{number}", data(3), text=text))
        await asyncio.sleep(delay_s)
        await kill_agent(platform)
        await platform.until("hard", "running", uid=f"hard-{number}")

        async def has_written(number: int = number) -> bool:
            return str(number) in (await sh(platform, "hard", "cat /data/runs")).split()

        await eventually(has_written)
    await platform.apply()
    await kill_agent(platform)
    await clear(platform, 3)
    assert superblock(file).is_clean


async def test_vm_has_volumes_as_disks_with_their_names(platform: Platform, tmp_path: Path) -> None:
    data_file, library = disk(tmp_path, "data"), disk(tmp_path, "library")
    library.write_bytes(b"to be read".ljust(MIB, b"\0"))
    await platform.plug(data_file, 1)
    await platform.plug(library, 2)
    mounts_of_vm = [
        VolumeMount(volume="data", slot=1),
        VolumeMount(volume="a-library-with-a-long-name", slot=2, read_only=True),
    ]
    await platform.apply(machine(platform, volumes=mounts_of_vm))
    await platform.until("machine", "serving")
    script = (
        "for d in /sys/block/vd*; do echo $(cat $d/serial) $(cat $d/ro) ${d##*/}; done; "
        "echo written-by-vm > /dev/vda; busybox head -c 10 /dev/vdb; echo z > /dev/vdb; echo said=$?.\n"
    )
    async with (await platform.session()).console("machine") as stream, asyncio.timeout(60):
        seen = b""
        await stream.write(b"\n" + script.encode())
        while b"said=1." not in seen.replace(b"said=$?", b""):
            item = await stream.read()
            assert item is not None, seen
            seen += item if isinstance(item, bytes) else b""
    assert b"data 0 vda" in seen
    assert b"a-library-with-a-lon 1 vdb" in seen
    assert b"to be read" in seen

    async def is_written() -> bool:
        return data_file.read_bytes().startswith(b"written-by-vm")

    await eventually(is_written)
    await platform.unplug(1)
    failed = await platform.until("machine", "failed")
    assert "volume data has gone" in failed.reason
    await platform.plug(data_file, 1)
    assert (await platform.until("machine", "running", "serving")).restarts == 1
    await clear(platform, 1, 2)
    assert library.read_bytes() == b"to be read".ljust(MIB, b"\0")
