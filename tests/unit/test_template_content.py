"""What a template is given to prepare: without secrets, laid out, held for a while, and checked."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from supercloud.lower.user_domain import contents as module
from supercloud.lower.user_domain.contents import Contents
from supercloud.model.errors import Busy, Invalid
from supercloud.upper.platform.agent.guestport import GuestPort
from supercloud.wire.content import (
    HEADER_BYTES,
    MAX_CONTENT_BYTES,
    Content,
    can_be_prepared,
    digest_of,
    from_header,
    lay_out,
    to_header,
    without_secrets,
)
from supercloud.wire.messages import (
    Blob,
    EnvironmentSpec,
    ImageRef,
    ObjectAccess,
    PortMap,
    Process,
    VolumeMount,
)

DATA = {name: os.urandom(size) for name, size in (("small", 100), ("large", 3 << 20))}
BLOBS = {
    name: Blob(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size_bytes=len(data))
    for name, data in DATA.items()
}
SECRET = "5f2e-very-secret"
WEB = EnvironmentSpec(
    name="web", uid="e1", kind="container",
    image=ImageRef(format="erofs", blobs={"root": BLOBS["small"]}),
    process=Process(argv=["serve", SECRET], env={"TOKEN": SECRET}),
    ports=[PortMap(port=80, host_port=20_001)],
    volumes=[VolumeMount(volume="data", path="/data", slot=3)],
    objects=ObjectAccess(server_name="s3", ca_pem="pem", access_key="a", secret_key=SECRET),
)  # fmt: skip
MACHINE = EnvironmentSpec(
    name="machine", uid="e2", kind="vm",
    image=ImageRef(format="kernel", blobs={"root": BLOBS["large"]}, identity=True),
)  # fmt: skip


def test_what_is_prepared_has_no_secret_and_is_the_same_ee() -> None:
    prepared = without_secrets(WEB)
    assert SECRET not in repr(prepared)
    assert SECRET not in to_header(lay_out([prepared])).decode()
    assert (prepared.uid, prepared.image, prepared.nics) == (WEB.uid, WEB.image, WEB.nics)
    assert prepared.ports[0].host_port == 0


def test_only_what_goes_on_as_another_is_prepared() -> None:
    assert can_be_prepared(WEB)
    assert can_be_prepared(MACHINE)
    assert not can_be_prepared(replace(MACHINE, image=replace(MACHINE.image, identity=False)))
    assert not can_be_prepared(replace(MACHINE, volumes=[VolumeMount(volume="data")]))
    assert not can_be_prepared(replace(MACHINE, objects=WEB.objects))  # its keys are there at once
    assert not can_be_prepared(replace(WEB, checkpoints=True))


def test_a_header_says_what_was_laid_out_and_a_blank_disk_nothing() -> None:
    content = lay_out([WEB, MACHINE])
    assert from_header(to_header(content).ljust(HEADER_BYTES, b"\0")) == content
    assert from_header(bytes(HEADER_BYTES)) == Content()
    offsets = [(blob.offset_bytes, blob.size_bytes) for blob in content.blobs]
    assert all(offset % 4096 == 0 and offset >= HEADER_BYTES for offset, _ in offsets)
    for bad in (b"{", b"[]", b'{"version":2}', b'{"environments":[{}]}', b"\xff" * 40):
        with pytest.raises(Invalid):
            from_header(bad)


def test_what_is_too_large_is_refused_and_what_differs_has_another_digest() -> None:
    huge = replace(BLOBS["large"], size_bytes=MAX_CONTENT_BYTES + 1)
    image = replace(MACHINE.image, blobs={"root": huge})
    with pytest.raises(Invalid):
        lay_out([replace(MACHINE, image=image)])
    assert digest_of([]) == ""
    assert digest_of([WEB]) != digest_of([replace(WEB, uid="e9")])


class Sent:
    """A stream that brings these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


async def send(contents: Contents, name: str, *pieces: bytes) -> None:
    stream: Any = Sent(*(pieces or (DATA[name][:50], DATA[name][50:])))
    await contents.take(BLOBS[name], stream)


def descriptors() -> int:
    """Of memory that holds blobs."""
    places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.readlink(p).startswith("/memfd:blob") for p in places if os.path.islink(p))


async def test_blobs_come_are_put_on_the_disk_and_are_given_up() -> None:
    contents, before = Contents(), descriptors()
    both = [WEB, MACHINE]
    assert contents.missing(both) == sorted(blob.digest for blob in BLOBS.values())
    await send(contents, "small")
    with pytest.raises(Invalid):
        contents.disk(both, 64 << 20)
    await send(contents, "large")
    assert contents.missing(both) == []
    disk = contents.disk(both, 64 << 20)
    try:
        assert os.fstat(disk).st_size == 64 << 20
        for blob in from_header(os.pread(disk, HEADER_BYTES, 0)).blobs:
            data = os.pread(disk, blob.size_bytes, blob.offset_bytes)
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == blob.digest
    finally:
        os.close(disk)
    assert descriptors() == before
    assert len(contents.missing(both)) == 2


async def test_what_comes_as_something_else_leaves_nothing() -> None:
    contents, before = Contents(), descriptors()
    for pieces in ((b"other" * 20,), (DATA["small"], b"more"), (DATA["small"][:-1],), (b"",)):
        with pytest.raises(Invalid):
            await send(contents, "small", *pieces)
    assert descriptors() == before
    await send(contents, "small")


async def test_there_is_a_limit_for_all_and_an_end_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = Contents()
    await send(contents, "small")
    with pytest.raises(Busy):
        await send(contents, "small")
    monkeypatch.setattr(module, "MAX_CONTENT_BYTES", len(DATA["large"]))
    with pytest.raises(Busy):
        await send(contents, "large")
    monkeypatch.setattr(module, "KEPT_S", -1.0)
    await send(contents, "large")
    assert len(contents.missing([WEB, MACHINE])) == 2


# -- the port of a guest


async def test_a_guest_is_told_once_it_waits_and_twice_never_the_same(tmp_path: Any) -> None:
    path, heard = str(tmp_path / "identity"), list[bytes]()

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"waiting\n")
        heard.append(await reader.readline())
        writer.close()

    async with await asyncio.start_unix_server(guest, path):
        port = GuestPort(path)
        await port.until_waiting(10)
        for _ in range(2):
            port.tell()
            assert port.is_open
            async with asyncio.timeout(10):
                while len([line for line in heard if line]) < 1 + _:
                    await asyncio.sleep(0.01)
        port.close()
    one, two = [line.split() for line in heard if line]
    assert one[0] == two[0] == b"1"
    assert len(one[1]) == 128
    assert one[1] != two[1]
    assert int(one[2]) > 1_700_000_000
