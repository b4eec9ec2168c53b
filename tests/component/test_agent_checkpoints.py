"""Checkpoints inside a booted platform: containers and VMs that check themselves, and a real store.

A container's program adds to a hash chain in its memory and writes the newest link to its layer; a
VM's shell counts. Both show whether what comes back is the moment that was kept, whole.
"""

import asyncio
import hashlib
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from supercloud.model.errors import (
    BadState,
    Busy,
    Denied,
    NotFound,
    SupercloudError,
    Unsupported,
)
from supercloud.upper.platform.agent.filesystem import superblock
from supercloud.wire.checkpoints import (
    CheckpointSnapshot,
    CheckpointTake,
    CheckpointTaken,
    RestoreFrom,
)
from supercloud.wire.messages import EnvironmentSpec, Exec, ImageRef, Logs, Process, VolumeMount
from support.platform import FIRST_PORT, Platform, blob, booted, machine, nic, web
from support.store_way import StoreWay, store_way

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(240, func_only=True),
    pytest.mark.asyncio(loop_scope="module"),
]

TAKE_TIMEOUT_S = 120
CHAIN = """
/bin/serve &
n=0; h=begin
while :; do
  n=$((n+1)); h=$(echo $h $n | busybox sha256sum); h=${h%% *}
  echo $n $h > /tmp/chain; echo link $n; sleep 0.1
done
"""
# A boot sector that counts: reads the count back from its disk ("w" if it is the one in memory, "X"
# if not, on the serial port), adds one, writes itself to the second sector, waits for 50 ms.
DISK_WRITER = (
    bytes.fromhex(
        "31c08ed88ed0bc007cfc88165e7ce83000c706647c0080b80042e82d00a15c8039065c7cb0777402b058"
        "baf803eeff065c7ce80c00b90000ba50c3b486cd15ebd0c706647c007cb80043be607c8a165e7ccd1373"
        "06b045baf803eec30100009010000100000000000100000000000000"
    ).ljust(510, b"\0")
    + b"\x55\xaa"
)
LISTING = Process(
    argv=[
        "/bin/sh", "-c",
        "/bin/serve & n=0; : > /data/all; while :; do n=$((n+1)); echo $n >> /data/all; sleep 0.1; done",
    ]
)  # fmt: skip
SNAPSHOT = "supercloud-0123456789abcdef"
KILL = """
agent=$(ps -o pid,args | awk '/platform.agent$/ && $1 != 1 {print $1}')
until ps -o args | grep -q 'STAGE'; do :; done
kill -9 $agent
"""
COUNT = b"N=0; touch /before; while :; do N=$((N+1)); echo count-$N; sleep 1; done &\n"


def link(number: int) -> str:
    """The link of the chain with that number."""
    value = "begin"
    for n in range(1, number + 1):
        value = hashlib.sha256(f"{value} {n}\n".encode()).hexdigest()
    return value


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with booted(tmp_path_factory.mktemp("platform")) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def way(platform: Platform) -> AsyncIterator[StoreWay]:
    async with store_way(platform.link, platform.directory / "store") as made:
        yield made


def chain(platform: Platform, uid: str, **changes: object) -> EnvironmentSpec:
    process = Process(argv=["/bin/sh", "-c", CHAIN])
    values = {"name": "chain", "uid": uid, "checkpoints": True, "process": process}
    return web(platform, **{**values, **changes})


def counting(platform: Platform, uid: str, **changes: object) -> EnvironmentSpec:
    return machine(platform, uid=uid, checkpoints=True, **changes)


async def take(
    platform: Platform, way: StoreWay, spec: EnvironmentSpec, **more: object
) -> CheckpointTaken:
    asked = CheckpointTake(name=spec.name, uid=spec.uid, store=way.access, **more)  # type: ignore[arg-type]
    return await (await platform.session()).checkpoint(asked, timeout_s=TAKE_TIMEOUT_S)


def restored_from(way: StoreWay, taken: CheckpointTaken, ee: str) -> RestoreFrom:
    return RestoreFrom(ee=ee, store=way.access, head=taken.head)


async def state(platform: Platform) -> int:
    """The container's number, once its link has been checked."""
    for _ in range(50):
        _, out = await platform.execute("chain", "cat", "/tmp/chain")
        words = out.decode().split()
        if len(words) == 2:  # else it is being written
            assert words[1] == link(int(words[0])), "the chain is broken"
            return int(words[0])
        await asyncio.sleep(0.1)
    raise AssertionError(out)


async def listed(platform: Platform) -> int:
    """The last number in the container's file; none is missing before it, and none there twice."""
    _, out = await platform.execute("chain", "cat", "/data/all")
    words = out.decode().split()
    assert words == [str(n) for n in range(1, len(words) + 1)], "memory and volume differ"
    return len(words)


async def logged(platform: Platform, name: str) -> list[str]:
    out = b""
    async with (await platform.session()).logs(Logs(name=name)) as stream:
        async for piece in stream.chunks():
            out += piece
    return out.decode().split("\n")


async def confinement(platform: Platform, uid: str) -> dict[str, set[str]]:
    """What keeps a container's first process in its place."""
    status = await platform.status("chain")
    assert status is not None
    text = await platform.shell(
        f"cat /proc/{status.pid}/status /proc/{status.pid}/oom_score_adj /sys/fs/cgroup/ee/{uid}/pids.max "
        f"/sys/fs/cgroup/ee/{uid}/memory.max /sys/fs/cgroup/ee/{uid}/cpu.max"
    )
    kept = ("Cap", "Seccomp", "NoNewPrivs", "Groups")
    lines = [line for line in text.splitlines() if line.startswith(kept) or ":" not in line]
    mounts = (await platform.shell(f"cat /proc/{status.pid}/mountinfo")).splitlines()
    seen = {line.split()[4] for line in mounts}
    read_only = {line.split()[4] for line in mounts if line.split()[5].startswith("ro")}
    return {
        "status": set(lines),
        "mounts": seen,
        "read only": read_only & {"/sys", "/proc/sys", "/etc/hosts"},
    }


async def left_over(platform: Platform) -> str:
    """Files of checkpoints, and processes that take them."""
    files = await platform.shell("find /var/lib/supercloud/checkpoints -mindepth 1 2>/dev/null")
    return files + await platform.shell("ps -o args | grep -e '[p]latform.saver' -e '[c]riu swrk'")


async def gone(platform: Platform, *names: str) -> None:
    await platform.apply()
    for name in names:
        await platform.until(name, "gone")


@pytest.mark.long  # tests/system/test_checkpoints.py shows the like
async def test_a_container_goes_on_and_comes_back_as_it_was(
    platform: Platform, way: StoreWay
) -> None:
    spec = chain(platform, "chain-1")
    await platform.apply(spec)
    await platform.until("chain", "serving", uid="chain-1")
    before = await confinement(platform, "chain-1")
    first = await state(platform)
    taken = await take(platform, way, spec)
    later = await state(platform)
    assert later > first, "it went on"
    assert (taken.engine, taken.base, taken.dirty_bytes) == ("criu", True, 0)
    assert taken.pause_ms > 0
    assert taken.new_bytes > 0
    assert not await left_over(platform)
    second = await take(platform, way, spec, head=taken.head)
    assert second.head.sequence > taken.head.sequence

    other = chain(
        platform, "chain-2", restore=restored_from(way, taken, "chain"),
        process=Process(argv=["/bin/sh", "-c", "echo anew; exit 1"]), restart="never",
    )  # fmt: skip
    moved = await state(platform)
    await platform.apply(other)
    await platform.until("chain", "serving", uid="chain-2")
    back = await state(platform)
    lines = await logged(platform, "chain")
    assert "anew" not in lines
    numbers = [int(line.split()[1]) for line in lines if line.startswith("link ")]
    assert first <= numbers[0] <= later, "it went on from the moment that was kept"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[0] < moved
    assert back >= numbers[0]
    assert b"hello from container" in await platform.http(FIRST_PORT)
    after = await confinement(platform, "chain-2")
    assert not any(after[key] ^ before[key] for key in after), (before, after)
    await gone(platform, "chain")
    assert not await platform.shell("ls /var/lib/supercloud/ee")


async def test_what_is_no_good_is_refused_and_nothing_starts(
    platform: Platform, way: StoreWay
) -> None:
    spec = chain(platform, "chain-3")
    await platform.apply(spec)
    await platform.until("chain", "serving", uid="chain-3")
    session = await platform.session()
    with pytest.raises(NotFound):
        await take(platform, way, replace(spec, uid="other"))
    runs = "ps -o args | grep -qx 'sleep 1000'"
    async with session.exec(Exec(name="chain", argv=["sleep", "1000"])):
        await platform.shell(f"until {runs}; do sleep 0.1; done")
        with pytest.raises(BadState, match="started from outside"):
            await take(platform, way, spec)
    await platform.shell(f"while {runs}; do sleep 0.1; done")  # its end comes after ours
    taken = await take(platform, way, spec)

    store = way.store()
    for pack in list(store.backend.list("packs/")):
        data = bytearray(store.backend.get(pack.key))
        data[len(data) // 2] ^= 1
        store.backend.delete(pack.key)
        store.backend.put(pack.key, data)
    store.close()
    await platform.apply(chain(platform, "chain-4", restore=restored_from(way, taken, "chain")))
    status = await platform.until("chain", "failed", uid="chain-4")
    assert "was altered" in status.reason
    head = replace(taken.head, root="0" * 64)
    wrong = chain(platform, "chain-5", restore=RestoreFrom(ee="chain", store=way.access, head=head))
    await platform.apply(wrong)
    status = await platform.until("chain", "failed", uid="chain-5")
    assert "not the one that was taken" in status.reason
    assert status.pid == 0
    assert not await platform.shell("ls -A /var/lib/supercloud/ee/chain-5 | grep -v log")
    await asyncio.sleep(2)
    assert (await platform.status("chain")).restarts == 0, "said once, and not tried again"
    await gone(platform, "chain")


@pytest.mark.long
async def test_an_agent_that_is_killed_meanwhile_leaves_it_running(
    platform: Platform, way: StoreWay
) -> None:
    spec = chain(platform, "chain-6")
    await platform.apply(spec)
    status = await platform.until("chain", "serving", uid="chain-6")
    for stage in ("[p]latform.saver", "[c]riu swrk"):
        old = platform.link.hub.sessions[platform.name]
        killing = asyncio.ensure_future(platform.shell(KILL.replace("STAGE", stage)))
        taking = asyncio.ensure_future(take(platform, way, spec))
        await killing
        with pytest.raises(SupercloudError):
            await taking
        async with asyncio.timeout(60):
            while platform.link.hub.sessions.get(platform.name) in (None, old):
                await asyncio.sleep(0.1)
        now = await platform.until("chain", "serving")
        assert (now.pid, now.restarts) == (status.pid, 0)
        one = await state(platform)
        async with asyncio.timeout(60):
            while await state(platform) <= one:
                await asyncio.sleep(0.2)
        async with asyncio.timeout(60):
            while await left_over(platform):
                await asyncio.sleep(0.2)
    await take(platform, way, spec)
    await gone(platform, "chain")


@pytest.mark.long
async def test_refusals_come_before_any_effect(platform: Platform, way: StoreWay) -> None:
    plain = chain(platform, "chain-7", checkpoints=False)
    await platform.apply(plain)
    await platform.until("chain", "serving", uid="chain-7")
    with pytest.raises(Unsupported, match="not started for that"):
        await take(platform, way, plain)
    way.closed = True
    await gone(platform, "chain")
    spec = chain(platform, "chain-8")
    await platform.apply(spec)
    await platform.until("chain", "serving", uid="chain-8")
    with pytest.raises(SupercloudError, match="object service"):
        await take(platform, way, spec)
    way.closed = False
    assert await state(platform) > 0
    assert not await left_over(platform)
    both = await asyncio.gather(
        take(platform, way, spec), take(platform, way, spec), return_exceptions=True
    )
    assert {type(one) for one in both} == {Busy, CheckpointTaken}
    await gone(platform, "chain")


async def console(platform: Platform, text: bytes, until: bytes, timeout_s: float = 60) -> bytes:
    """What the VM's console says after ``text``, until it says that."""
    seen = b""
    async with (await platform.session()).console("machine") as stream, asyncio.timeout(timeout_s):
        await stream.write(text)
        while until not in seen:
            item = await stream.read()
            assert isinstance(item, bytes), seen
            seen += item
    return seen


def counts(text: bytes) -> list[int]:
    """Whole ones; the prompt may stand before one."""
    return [int(number) for number in re.findall(rb"count-(\d+)\s", text)]


@pytest.mark.long  # tests/system/test_checkpoints.py shows the like
async def test_a_vm_goes_on_and_comes_back_as_it_was(platform: Platform, way: StoreWay) -> None:
    """Its network is another platform's: address and gateway come with it."""
    far = nic(11, third=9)
    spec = counting(platform, "machine-1", nics=[far])
    await platform.apply(spec)
    await platform.until("machine", "serving", timeout_s=120)
    await console(platform, COUNT, b"count-3")
    base = await take(platform, way, spec)
    assert (base.engine, base.base, base.memory_bytes) == ("qemu", True, 128 << 20)
    await console(platform, b"\n", b"count-")
    taken = await take(platform, way, spec, head=base.head)
    assert not taken.base
    assert 0 < taken.dirty_bytes < 32 << 20
    assert taken.new_bytes < base.new_bytes / 4
    kept = counts(await console(platform, b"touch /after; echo mark-$((40+2))\n", b"mark-42"))[-1]
    await console(platform, b"\n", b"count-%d" % (kept + 3))
    other = counting(
        platform, "machine-2", nics=[far], restore=restored_from(way, taken, "machine")
    )
    near = web(platform)
    await platform.apply(other, near)
    await platform.until("machine", "serving", uid="machine-2", timeout_s=120)
    seen = await console(platform, b"ls /before /after; echo ls-$((1+1))\n", b"ls-2")
    assert b"/after: No such file" in seen
    assert b"/before" in seen
    async with asyncio.timeout(60):
        while not (numbers := counts("\n".join(await logged(platform, "machine")).encode())):
            await asyncio.sleep(0.5)
    assert 0 < numbers[0] <= kept + 1, "it went on from the moment that was kept"
    assert b"hello from vm machine" in await platform.http(FIRST_PORT + 1)
    await platform.until("web", "serving")
    status, out = await platform.execute("web", "wget", "-q", "-O", "-", "http://machine:8080/")
    assert (status, out) == (0, b"hello from vm machine\n"), "over the platform's own network"

    wrong = counting(
        platform, "machine-3", nics=[far], memory_bytes=160 << 20,
        restore=restored_from(way, taken, "machine"),
    )  # fmt: skip
    await platform.apply(wrong)
    status = await platform.until("machine", "failed", uid="machine-3")
    assert "another machine" in status.reason
    await gone(platform, "machine", "web")


@pytest.mark.long
async def test_a_vms_disk_is_kept_with_it(platform: Platform, way: StoreWay) -> None:
    """A machine that writes its disk from a boot sector: what it wrote comes back, no more."""
    path = platform.directory / "disk.raw"
    path.write_bytes(DISK_WRITER.ljust(1 << 20, b"\0"))
    image = ImageRef(format="raw", blobs={"disk": blob(platform.link.owner.paths, path)})
    spec = counting(platform, "machine-4", image=image, ports=[], memory_bytes=32 << 20)
    await platform.apply(spec)
    await platform.until("machine", "running")
    await console(platform, b"", b"wwwww")
    taken = await take(platform, way, spec)
    assert taken.disk_bytes > 0
    await console(platform, b"", b"wwwww")
    other = replace(spec, uid="machine-5", restore=restored_from(way, taken, "machine"))
    await platform.apply(other)
    await platform.until("machine", "running", uid="machine-5")
    await console(platform, b"", b"wwwww")
    assert set("".join(await logged(platform, "machine"))) <= {"w"}, "memory and disk differ"
    await gone(platform, "machine")


@pytest.mark.long  # tests/system/test_checkpoints.py shows the like
async def test_what_a_container_writes_to_a_volume_is_of_the_same_moment(
    platform: Platform, way: StoreWay, tmp_path: Path
) -> None:
    """The disk is copied while it stands still: what is there is whole, and goes with its memory."""
    volume = VolumeMount(volume="data", path="/data", slot=1)
    spec = chain(platform, "chain-9", volumes=[volume], process=LISTING)
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    await platform.plug(disk, 1)
    await platform.apply(spec)
    await platform.until("chain", "serving", uid="chain-9")
    owner, asked = platform.link.owner, []

    async def snapshot(wanted: CheckpointSnapshot) -> None:
        asked.append(wanted)
        shutil.copyfile(disk, copy)

    with pytest.raises(Unsupported, match="takes no snapshots"):
        await take(platform, way, spec)
    with pytest.raises(Denied, match="no checkpoint"):  # the control plane has its reasons
        await take(platform, way, spec, snapshot=SNAPSHOT)
    before = await listed(platform)
    async with asyncio.timeout(60):
        while await listed(platform) <= before:  # it goes on, and so does the file system
            await asyncio.sleep(0.2)
    owner.snapshotting = snapshot
    taken = await take(platform, way, spec, snapshot=SNAPSHOT)
    assert asked == [CheckpointSnapshot(name="chain", uid="chain-9", snapshot=SNAPSHOT)]
    found = superblock(copy.read_bytes()[1024:2048])
    assert found is not None
    assert found.is_clean, "its file system stood still, too"
    later = await listed(platform)
    await gone(platform, "chain")
    await platform.unplug(1)
    await platform.plug(copy, 1)
    back = chain(
        platform, "chain-12", volumes=[volume], process=LISTING,
        restore=restored_from(way, taken, "chain"),
    )  # fmt: skip
    await platform.apply(back)
    await platform.until("chain", "serving", uid="chain-12")
    assert await listed(platform) <= later
    now = await listed(platform)
    async with asyncio.timeout(60):
        while await listed(platform) <= now:
            await asyncio.sleep(0.2)

    async def hang(_: CheckpointSnapshot) -> None:
        stopped.set()
        await asyncio.Event().wait()

    stopped, owner.snapshotting = asyncio.Event(), hang
    status = await platform.status("chain")
    taking = asyncio.ensure_future(take(platform, way, back, snapshot=SNAPSHOT))
    await stopped.wait()
    old = platform.link.hub.sessions[platform.name]
    await platform.shell(
        "kill -9 $(ps -o pid,args | awk '/platform.agent$/ && $1 != 1 {print $1}')"
    )
    with pytest.raises(SupercloudError):
        await taking
    async with asyncio.timeout(60):
        while platform.link.hub.sessions.get(platform.name) in (None, old):
            await asyncio.sleep(0.1)
    after = await platform.until("chain", "serving")
    assert status is not None
    assert (after.pid, after.restarts) == (status.pid, 0)
    now = await listed(platform)
    async with asyncio.timeout(60):
        while await listed(platform) <= now:  # the next agent has thawed what this one had frozen
            await asyncio.sleep(0.2)
    await gone(platform, "chain")
    await platform.unplug(1)


@pytest.mark.long
async def test_who_asks_and_goes_away_leaves_it_running(platform: Platform, way: StoreWay) -> None:
    """The connection is cut while CRIU is at work."""
    spec = chain(platform, "chain-10")
    await platform.apply(spec)
    status = await platform.until("chain", "serving", uid="chain-10")
    old = platform.link.hub.sessions[platform.name]
    watching = asyncio.ensure_future(
        platform.shell("until ps -o args | grep -q '[c]riu swrk'; do :; done")
    )
    taking = asyncio.ensure_future(take(platform, way, spec))
    await watching
    old.abandon()
    with pytest.raises(SupercloudError):
        await taking
    async with asyncio.timeout(60):
        while platform.link.hub.sessions.get(platform.name) in (None, old):
            await asyncio.sleep(0.1)
    now = await platform.until("chain", "serving", uid="chain-10")
    assert (now.pid, now.restarts) == (status.pid, 0)
    one = await state(platform)
    async with asyncio.timeout(60):
        while await state(platform) <= one or await left_over(platform):
            await asyncio.sleep(0.2)
    await take(platform, way, spec)
    await gone(platform, "chain")
