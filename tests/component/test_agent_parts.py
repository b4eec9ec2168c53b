"""Parts of the agent on this machine: blobs over a real hub, netlink and namespaces, process 1."""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid, NoResources, NotFound, Permanent, Temporary
from supercloud.upper.platform.agent import blobs, paths, processes, syscalls
from supercloud.upper.platform.agent.fetch import Source
from supercloud.upper.platform.agent.netlink import Netlink
from supercloud.upper.platform.link import blobs as sender
from supercloud.wire.codec import encode
from supercloud.wire.messages import Blob
from supercloud.wire.peer import Detach
from support.link import Link

SOURCE = Path(__file__).parents[2] / "src"


# -- blobs


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "blobs"
    place.mkdir()
    monkeypatch.setattr(paths, "BLOBS", str(place))
    return place


@contextlib.asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[tuple[Link, Callable[[], Source]]]:
    """A hub to which an enrolled agent has said hello, and where that finds its files."""
    link = Link(directory)
    async with link.listening():
        files = await link.enroll("p1", link.owner.expect("p1"))
        async with link.dial(link.context(files)) as peer:
            await peer.call("agent.hello", link.hello("p1"))
            yield link, lambda: link.source(files)


def offer(link: Link, path: Path, data: bytes) -> Blob:
    path.write_bytes(data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    link.owner.paths[digest] = path
    return Blob(digest=digest, size_bytes=len(data))


async def test_a_blob_is_pulled_once_for_all_who_want_it(tmp_path: Path, store: Path) -> None:
    async with connected(tmp_path) as (link, source):
        blob = offer(link, tmp_path / "file", os.urandom(3_000_000))
        pulling = blobs.Blobs(source)
        found = await asyncio.gather(*(pulling.get(blob) for _ in range(5)))
        assert len(set(found)) == 1
        assert Path(found[0]).read_bytes() == (tmp_path / "file").read_bytes()
        (tmp_path / "file").unlink()
        assert await pulling.get(blob) == found[0]
        assert [p.name for p in store.iterdir()] == [blob.digest.removeprefix("sha256:")]


async def test_an_interrupted_pull_goes_on_where_it_was(tmp_path: Path, store: Path) -> None:
    async with connected(tmp_path) as (link, source):
        data = os.urandom(2_000_000)
        blob = offer(link, tmp_path / "file", data)
        part = store / (blob.digest.removeprefix("sha256:") + ".part")
        part.write_bytes(data[:1_500_000])
        link.owner.paths[blob.digest].write_bytes(bytes(1_500_000) + data[1_500_000:])
        path = await blobs.Blobs(source).get(blob)
        assert Path(path).read_bytes() == data


async def test_what_has_another_hash_is_never_used_and_pulled_anew(
    tmp_path: Path, store: Path
) -> None:
    async with connected(tmp_path) as (link, source):
        blob = offer(link, tmp_path / "file", b"x" * 100_000)
        part = store / (blob.digest.removeprefix("sha256:") + ".part")
        part.write_bytes(b"y" * 50_000)  # a part that was damaged
        pulling = blobs.Blobs(source)
        with pytest.raises(Invalid, match="another hash"):
            await pulling.get(blob)
        assert not list(store.iterdir())
        assert Path(await pulling.get(blob)).read_bytes() == b"x" * 100_000


async def test_a_lost_connection_is_temporary_and_keeps_the_part(
    tmp_path: Path, store: Path
) -> None:
    async with connected(tmp_path) as (link, source):
        blob = offer(link, tmp_path / "file", os.urandom(30_000_000))
        pulling = asyncio.ensure_future(blobs.Blobs(source).get(blob))
        part = store / (blob.digest.removeprefix("sha256:") + ".part")
        async with asyncio.timeout(10):
            while not part.exists() or not part.stat().st_size:
                await asyncio.sleep(0.001)
        await link.hub.close()
        with pytest.raises(Temporary):
            await pulling
        assert part.exists()


async def test_a_pull_that_nobody_waits_for_any_more_ends_and_its_thread_with_it(
    tmp_path: Path, store: Path
) -> None:
    async with connected(tmp_path) as (link, source):
        blob = offer(link, tmp_path / "file", os.urandom(30_000_000))
        pulling = blobs.Blobs(source)
        pull = asyncio.ensure_future(pulling._pull(blob, blobs.path_of(blob.digest)))
        part = store / (blob.digest.removeprefix("sha256:") + ".part")
        async with asyncio.timeout(10):
            while not part.exists() or not part.stat().st_size:
                await asyncio.sleep(0.001)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        size = part.stat().st_size
        assert size < 30_000_000
        await asyncio.sleep(0.2)
        assert part.stat().st_size == size
        assert Path(await pulling.get(blob)).read_bytes() == (tmp_path / "file").read_bytes()


async def test_what_the_control_plane_refuses_is_said(tmp_path: Path, store: Path) -> None:
    async with connected(tmp_path) as (_, source):
        with pytest.raises(NotFound, match="no blob"):
            await blobs.Blobs(source).get(Blob(digest="sha256:" + "1" * 64, size_bytes=10))


async def test_more_than_was_announced_is_refused(tmp_path: Path, store: Path) -> None:
    """By a control plane that does not keep to its own answer."""
    async with connected(tmp_path) as (link, source):
        blob = offer(link, tmp_path / "file", b"x" * 100)

        async def send(asked: Blob, path: str) -> Detach:
            async def then(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"x" * 101)
                await writer.drain()
                writer.close()

            return Detach({}, then)

        original, sender.send = sender.send, send
        try:
            with pytest.raises(Invalid, match="more than 100 bytes"):
                await blobs.Blobs(source).get(blob)
        finally:
            sender.send = original
        assert not list(store.iterdir())


async def test_a_blob_larger_than_the_disk_is_refused_before_it_is_pulled(
    tmp_path: Path, store: Path
) -> None:
    async with connected(tmp_path) as (_, source):
        blob = Blob(digest="sha256:" + "0" * 64, size_bytes=1 << 49)
        with pytest.raises(NoResources, match="scratch disk"):
            await blobs.Blobs(source).get(blob)


async def test_unused_blobs_go_after_a_while_and_used_ones_stay(
    tmp_path: Path, store: Path
) -> None:
    async with connected(tmp_path) as (link, source):
        pulling = blobs.Blobs(source)
        used, old, fresh = [offer(link, tmp_path / f"{n}", b"%d" % n) for n in range(3)]
        found = [Path(await pulling.get(blob)) for blob in (used, old, fresh)]
        for path in found[:2]:
            os.utime(path, (0, 0))
        assert pulling.collect([used.digest]) == [found[1].name]
        assert sorted(store.iterdir()) == sorted([found[0], found[2]])
        assert encode(used)["digest"] == used.digest


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:0", ""])
def test_a_path_is_made_of_digests_only(digest: str) -> None:
    with pytest.raises(Invalid):
        blobs.path_of(digest)


# -- namespaces and netlink


def in_private_namespaces(program: str) -> str:
    """Run a program in a network and mount namespace of its own."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.root
def test_a_container_network_is_made_without_a_program(tmp_path: Path) -> None:
    out = in_private_namespaces(f"""
import socket, threading, subprocess, os
from supercloud.upper.platform.agent import namespaces, networks, paths
from supercloud.upper.platform.agent.fetch import Source
from supercloud.upper.platform.agent.netlink import Netlink
from supercloud.upper.platform.link import blobs as sender
from supercloud.wire.messages import EnvironmentSpec, ImageRef, Nic
paths.NETWORKS = {str(tmp_path / "networks.json")!r}
nic = Nic(network="n", address="10.64.0.10/24", gateway="10.64.0.1", mac="02:00:00:00:00:0a")
spec = EnvironmentSpec(name="a", uid="a-1", kind="container", nics=[nic],
                       image=ImageRef(format="erofs", blobs={{}}))
place = {str(tmp_path / "ns")!r}
namespaces.create(1 << 20, place)
namespaces.create(1 << 20, place)
made = networks.Networks()
made.ensure([spec])
for _ in range(2):  # idempotent
    made.attach("a-1", spec.nics, place)
with namespaces.open_netlink(place) as inside:
    link = inside.find("eth0")
    assert link.mac == "02:00:00:00:00:0a" and link.up, link
    assert inside._addresses(link.index) == ["10.64.0.10/24"]
assert open(f"{{place}}/user"), "a file that can be joined"
# traffic goes through
server = socket.create_server(("10.64.0.1", 0))
port = server.getsockname()[1]
out = subprocess.run(["nsenter", "--user=" + place + "/user", "--net=" + place + "/net",
    "python3", "-c", f"import socket; s = socket.create_connection(('10.64.0.1', {{port}}), 5);"
    "print(open('/proc/self/uid_map').read().split()[1])"], capture_output=True, text=True)
assert out.stdout.strip() == str(1 << 20), out
networks.Networks.detach("a-1", 1)
made.ensure([])
with Netlink() as netlink:
    assert [l.name for l in netlink.links() if l.name not in ("lo", "sit0", "tunl0")] == []
namespaces.remove(place)
assert os.listdir(place) == []
print("fine")
""")
    assert out == "fine\n"


@pytest.mark.root
def test_leftover_devices_are_swept_and_others_stay() -> None:
    out = in_private_namespaces("""
import subprocess
from supercloud.upper.platform.agent import networks
keep, gone = networks.device_name("ve", "keep", 0), networks.device_name("ve", "gone", 0)
for name in (keep, gone, "other0"):
    subprocess.run(["ip", "link", "add", name, "type", "veth"], check=True)
assert networks.sweep_devices([("keep", 1)]) == [gone]
left = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
assert keep in left and "other0" in left and gone not in left
print("fine")
""")
    assert out == "fine\n"


def test_netlink_errors_are_oserrors() -> None:
    with Netlink() as netlink:
        assert netlink.find("lo") is not None
        netlink.delete("no-such-device")
        if os.getuid():
            with pytest.raises(OSError, match="not permitted"):
                netlink.add_bridge("x")


def test_resolve_in_root_never_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    (tmp_path / "up").symlink_to("../../../../../etc/hostname")
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        for name in ("link", "up", "/etc/hostname"):
            with pytest.raises(FileNotFoundError):
                syscalls.open_in_root(root, name)
    finally:
        os.close(root)


@pytest.mark.root
def test_unmounting_what_is_no_mount_is_no_error(tmp_path: Path) -> None:
    assert syscalls.unmount(str(tmp_path)) is False
    assert syscalls.unmount(str(tmp_path / "nothing")) is False


# -- processes


async def test_a_program_that_fails_says_why() -> None:
    assert await processes.run("sh", "-c", "cat", given=b"in") == b"in"
    with pytest.raises(Permanent, match="failed with 3: because"):
        await processes.run("sh", "-c", "echo because >&2; exit 3")


async def test_a_program_that_hangs_is_killed() -> None:
    with pytest.raises(Temporary, match="did not end"):
        await processes.run("sleep", "4711", timeout_s=0.2)
    children = Path("/proc/thread-self/children").read_text().split()
    assert not [pid for pid in children if b"4711" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_a_watched_child_tells_its_exit_to_all_who_wait() -> None:
    process = subprocess.Popen(["sh", "-c", "read x; exit 5"], stdin=subprocess.PIPE)
    process.returncode = 0
    watched = processes.Watched(process.pid, time.monotonic())
    assert not await watched.ended_within(0.01)
    assert process.stdin is not None
    process.stdin.close()
    waited, ended = await asyncio.gather(watched.wait(), watched.ended_within(60))
    assert (waited, ended) == (5, True)
    watched.close()


async def test_a_signal_ends_a_watched_process_as_a_shell_says_it() -> None:
    process = subprocess.Popen(["sleep", "60"])
    process.returncode = 0
    watched = processes.Watched(process.pid, time.monotonic())
    watched.send(signal.SIGTERM)
    assert await watched.wait() == 143
    watched.send(signal.SIGTERM)  # gone: no error
    watched.close()
    assert processes.adopt(process.pid, watched.start_ticks, 0.0) is None


def test_whether_a_process_handles_a_signal() -> None:
    program = "import signal, sys; signal.signal(15, lambda *_: 0); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.handles(process.pid, signal.SIGTERM)
        assert not processes.handles(process.pid, signal.SIGUSR1)
        process.communicate()
    assert not processes.handles(process.pid, signal.SIGTERM)


@pytest.mark.root
def test_process_1_restarts_the_agent_and_keeps_what_orphans_said(tmp_path: Path) -> None:
    """In a pid namespace of its own, with an agent that dies and leaves an orphan behind."""
    program = f"""
import os, sys, time
from supercloud.upper.platform.agent import init
init.EXITS = {str(tmp_path / "exits")!r}
count = {str(tmp_path / "count")!r}
def agent():
    with open(count, "a") as file:
        file.write("x")
    if os.fork() == 0:
        pid = os.fork()
        if pid:
            with open(count + ".orphan", "w") as file: file.write(str(pid))
            os._exit(0)
        time.sleep(0.2)
        os._exit(42)
    os.kill(os.getpid(), 9)
init._agent = agent
init.main()
"""
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 20
        found: dict[str, str] = {}
        while not any(text.startswith("42 ") for text in found.values()):
            assert time.monotonic() < limit, found
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):
                found = {p.name: p.read_text() for p in (tmp_path / "exits").iterdir()}
        while len((tmp_path / "count").read_text()) < 2:
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
