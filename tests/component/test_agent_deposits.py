"""Blobs by way of the disk: the control plane's ciphertext, the agent's reading, a file between."""

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.control import deposits as control
from supercloud.model.errors import (
    BadState,
    Busy,
    Invalid,
    NotFound,
    Permanent,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.upper.platform.agent import blobs, deposits, devicemapper, paths
from supercloud.upper.platform.agent.fetch import Source
from supercloud.wire.messages import Blob, Deposited
from supercloud.wire.peer import ConnectionLost
from supercloud.wire.places import DEPOSIT_BYTES, deposit_at
from support.link import Link

DISK_BYTES = 8 * DEPOSIT_BYTES


class Host:
    """A provider that lays bytes down in a file; ``damage`` is done to them first."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.asked = disk, list[Blob]()
        self.refusal: SupercloudError | None = None
        self.damage: Callable[[bytes], bytes] = lambda data: data

    def get(self, *_: object) -> "Host":
        return self

    async def deposit(self, _name: str, size_bytes: int, content: AsyncIterator[bytes]) -> None:
        data = self.damage(b"".join([piece async for piece in content]))
        assert len(data) == size_bytes
        with self.disk.open("r+b") as file:
            os.pwrite(file.fileno(), data, deposit_at(DISK_BYTES))
            os.fsync(file.fileno())  # what is read past the cache is on the disk

    def ask(self, link: Link) -> Callable[[Blob], Awaitable[Deposited]]:
        async def seam(_name: str, act: Callable[[], Awaitable[Any]]) -> Any:
            return await act()

        async def ask(blob: Blob) -> Deposited:
            self.asked.append(blob)
            if self.refusal:
                raise self.refusal
            platform: Any = SimpleNamespace(
                name="p1", ucloud="demo", wish=SimpleNamespace(provider="here")
            )
            plane: Any = SimpleNamespace(pool=self, seam=seam)
            return await control.deposit(plane, platform, blob, link.owner.paths[blob.digest])

        return ask


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    (tmp_path / "blobs").mkdir()
    monkeypatch.setattr(paths, "BLOBS", str(tmp_path / "blobs"))
    disk = Path(__file__).parents[2] / "build" / f"deposit-{os.getpid()}"  # O_DIRECT, so no tmpfs
    disk.parent.mkdir(exist_ok=True)
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    monkeypatch.setattr(deposits, "disk", lambda _serial: str(disk))
    monkeypatch.setattr(devicemapper, "size_bytes", lambda path: os.stat(path).st_size)
    yield Host(disk)
    disk.unlink()


@contextlib.asynccontextmanager
async def store(directory: Path, host: Host) -> AsyncIterator[tuple[Link, blobs.Blobs]]:
    """A hub that an agent is connected to, and the agent's blobs."""
    link = Link(directory)
    async with link.listening():
        files = await link.enroll("p1", link.owner.expect("p1"))
        async with link.dial(link.context(files)) as peer:
            await peer.call("agent.hello", link.hello("p1"))

            def source() -> Source:
                return link.source(files)

            yield link, blobs.Blobs(source, deposits.Deposits(host.ask(link)))


class Clock:
    """The agent's, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deposits, "time", clock)
    return clock


async def came_whole(
    link: Link, found: blobs.Blobs, path: Path, size_bytes: int = 1_000_000
) -> None:
    blob = offer(link, path, os.urandom(size_bytes))
    assert Path(await found.get(blob)).read_bytes() == path.read_bytes()


def offer(link: Link, path: Path, data: bytes) -> Blob:
    path.write_bytes(data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    link.owner.paths[digest] = path
    return Blob(digest=digest, size_bytes=len(data))


@pytest.mark.parametrize("size", [300_001, DEPOSIT_BYTES, DEPOSIT_BYTES + 5_000_000])
async def test_a_blob_comes_whole_in_as_many_rounds_as_it_takes(
    tmp_path: Path, host: Host, size: int
) -> None:
    async with store(tmp_path, host) as (link, found):
        blob = offer(link, tmp_path / "file", os.urandom(size))
        data = (tmp_path / "file").read_bytes()
        assert Path(await found.get(blob)).read_bytes() == data
        assert [asked.offset_bytes for asked in host.asked] == list(range(0, size, DEPOSIT_BYTES))


async def test_what_lies_on_the_disk_is_ciphertext_and_another_one_each_time(
    tmp_path: Path, host: Host
) -> None:
    async with store(tmp_path, host) as (link, found):
        blob, kept = offer(link, tmp_path / "file", b"plain text " * 100_000), []
        for _ in range(2):
            os.unlink(await found.get(blob))
            with host.disk.open("rb") as file:
                file.seek(deposit_at(DISK_BYTES))
                kept.append(file.read(blob.size_bytes))
        assert all(b"plain text" not in data for data in kept)
        assert kept[0][:64] != kept[1][:64]


async def test_what_was_changed_on_the_disk_is_never_used_and_the_next_try_pulls(
    tmp_path: Path, host: Host
) -> None:
    host.damage = lambda data: data[:-1] + bytes([data[-1] ^ 1])
    async with store(tmp_path, host) as (link, found):
        blob = offer(link, tmp_path / "file", os.urandom(1_000_000))
        with pytest.raises(Invalid, match="another hash"):
            await found.get(blob)
        assert not list((tmp_path / "blobs").iterdir())
        assert found._deposits
        found._deposits.connected()
        assert Path(await found.get(blob)).read_bytes() == (tmp_path / "file").read_bytes()
        assert len(host.asked) == 1


@pytest.mark.parametrize("refusal", [Unsupported("no such host"), NotFound("no method")])
async def test_where_it_cannot_be_had_everything_is_pulled_and_only_a_new_connection_asks_again(
    tmp_path: Path, host: Host, clock: Clock, refusal: SupercloudError
) -> None:
    host.refusal = refusal
    async with store(tmp_path, host) as (link, found):
        for name in ("one", "two"):
            await came_whole(link, found, tmp_path / name)
            clock.now_s += 10 * deposits.AGAIN_S[1]
        assert len(host.asked) == 1
        host.refusal = None
        assert found._deposits
        found._deposits.connected()
        await came_whole(link, found, tmp_path / "three")
        assert len(host.asked) == 2


@pytest.mark.parametrize(
    "refusal", [Temporary("no answer"), BadState("it is starting"), Permanent("internal error 1")]
)
async def test_one_that_fails_is_pulled_and_after_a_while_others_come_by_the_disk_again(
    tmp_path: Path, host: Host, clock: Clock, refusal: SupercloudError
) -> None:
    host.refusal = refusal
    async with store(tmp_path, host) as (link, found):
        await came_whole(link, found, tmp_path / "one")
        host.refusal = None
        await came_whole(link, found, tmp_path / "two")
        assert len(host.asked) == 1, "nothing was asked for before the pause was over"
        clock.now_s += deposits.AGAIN_S[0]
        await came_whole(link, found, tmp_path / "three")
        assert len(host.asked) == 2


async def test_the_pauses_between_failures_grow_up_to_a_bound_and_a_success_ends_that(
    tmp_path: Path, host: Host, clock: Clock
) -> None:
    async with store(tmp_path, host) as (link, found):
        asked_s, name = list[float](), 0
        for _ in range(100):
            host.refusal = Temporary("no answer") if len(host.asked) < 5 else None
            before = len(host.asked)
            await came_whole(link, found, tmp_path / str(name := name + 1), 300_000)
            asked_s += [clock.now_s] * (len(host.asked) - before)
            if len(asked_s) == 6:
                break
            clock.now_s += 30
        assert [b - a for a, b in itertools.pairwise(asked_s)] == [30, 120, 480, 600, 600]
        host.refusal = Temporary("no answer")
        await came_whole(link, found, tmp_path / "failed", 300_000)
        clock.now_s += deposits.AGAIN_S[0]
        await came_whole(link, found, tmp_path / "again", 300_000)
        assert len(host.asked) == 8


@pytest.mark.parametrize("refusal", [Busy("a checkpoint is being taken"), ConnectionLost("gone")])
async def test_where_it_cannot_be_had_now_it_is_asked_for_again_the_next_time(
    tmp_path: Path, host: Host, refusal: SupercloudError
) -> None:
    host.refusal = refusal
    async with store(tmp_path, host) as (link, found):
        for name in ("one", "two"):
            blob = offer(link, tmp_path / name, os.urandom(1_000_000))
            assert Path(await found.get(blob)).read_bytes() == (tmp_path / name).read_bytes()
            host.refusal = None
        assert len(host.asked) == 2


async def test_what_was_read_is_discarded_in_whole_blocks_as_the_kernel_wants_it(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    discarded = list[tuple[int, int]]()

    def ioctl(_file: int, _request: int, span: bytes) -> None:
        discarded.append(struct.unpack("=QQ", span))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    async with store(tmp_path, host) as (link, found):
        await found.get(offer(link, tmp_path / "file", os.urandom(1_000_001)))
    assert discarded == [(deposit_at(DISK_BYTES), 245 * 4096)]


async def test_a_part_is_gone_on_with_and_small_things_are_not_worth_it(
    tmp_path: Path, host: Host
) -> None:
    async with store(tmp_path, host) as (link, found):
        small = offer(link, tmp_path / "small", os.urandom(10_000))
        await found.get(small)
        assert not host.asked
        blob = offer(link, tmp_path / "file", os.urandom(2_000_000))
        data = (tmp_path / "file").read_bytes()
        part = tmp_path / "blobs" / (blob.digest.removeprefix("sha256:") + ".part")
        part.write_bytes(data[:1_234_567])
        assert Path(await found.get(blob)).read_bytes() == data
        assert [asked.offset_bytes for asked in host.asked] == [1_234_567]


async def test_a_pull_that_nobody_waits_for_ends_with_its_thread(
    tmp_path: Path, host: Host
) -> None:
    async with store(tmp_path, host) as (link, found):
        blob = offer(link, tmp_path / "file", os.urandom(20_000_000))
        pulling = asyncio.ensure_future(found._pull(blob, blobs.path_of(blob.digest)))
        while not host.asked:
            await asyncio.sleep(0.001)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert Path(await found.get(blob)).read_bytes() == (tmp_path / "file").read_bytes()


async def test_offsets_and_sizes_that_cannot_be_are_refused(tmp_path: Path, host: Host) -> None:
    link: Any = SimpleNamespace(owner=SimpleNamespace(paths={}))
    blob = offer(link, tmp_path / "file", b"x" * 1000)
    ask = host.ask(link)
    with pytest.raises(Invalid, match="past the end"):
        await ask(Blob(digest=blob.digest, size_bytes=1000, offset_bytes=1001))
    with pytest.raises(Permanent, match="1000 bytes"):
        await ask(Blob(digest=blob.digest, size_bytes=999))
