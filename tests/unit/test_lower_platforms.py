"""The user domain's platforms over pretended drivers: what a machine's monitor may bring about."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.assembly import Uplink
from supercloud.lower.user_domain.deposits import Deposits
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.records import Record
from supercloud.model.errors import Busy, NotFound, Temporary
from supercloud.wire.host import Deposit, PlatformSpec, TemplateSpec
from supercloud.wire.lease import Lease
from supercloud.wire.places import deposit_at

FACTS: dict[str, Any] = {
    "images": ["sha256:" + "1" * 64], "accelerator": "tcg", "runtime_sha256": "2" * 64,
    "kernel": "6.18",
}  # fmt: skip
SPEC = PlatformSpec(
    name="p", image=FACTS["images"][0], cpus=1, memory_bytes=512 << 20, scratch_bytes=1 << 30,
    config_base64="", ports=4,
)  # fmt: skip


@pytest.fixture
def platforms(tmp_path: Path) -> Platforms:
    hub: Any = SimpleNamespace(core=None, join=lambda *_: None)
    made = Platforms(hub, "u", FACTS, Feed("u", "host/t"), str(tmp_path / "platforms"))
    made._records.put(Record(SPEC, "tcg", 0.0, state="running"))
    return made


@pytest.mark.parametrize("word", ["deleting", "gone", "creating", "nonsense", None, ["failed"]])
async def test_a_monitor_cannot_say_that_its_platform_is_deleted(
    platforms: Platforms, word: Any
) -> None:
    for state in (word, "gone"):
        platforms._told("machine.state", {"platform": "p", "state": state}, [])
    await asyncio.sleep(0)
    (status,) = platforms.statuses()
    assert status.state == "running"


def test_a_host_without_templates_says_so_to_who_asks(tmp_path: Path) -> None:
    hub: Any = SimpleNamespace(core=None, join=lambda *_: None)
    facts = {**FACTS, "templates": "none"}
    made = Platforms(hub, "u", facts, Feed("u", "host/t"), str(tmp_path / "platforms"))
    with pytest.raises(NotFound, match="nothing from memory"):
        made.prepare(TemplateSpec(image=FACTS["images"][0]))


class Made:
    """An assembly that can make nothing, or nothing from memory; templates that say yes."""

    def __init__(self, *, boots: bool) -> None:
        self.boots = boots
        self.distrusted: list[str] = []

    async def make(self, _spec: Any, _config: bytes, template: Any = None) -> Uplink:
        if template is not None or not self.boots:
            raise Temporary("it could not be made")
        guest = Lease(address="10.0.2.15/24", gateway="10.0.2.2", resolvers=[])
        return Uplink("uplink", "127.0.0.1", 40000, guest)

    def distrust(self, key: str, _why: str) -> None:
        self.distrusted.append(key)


@pytest.mark.parametrize("boots", [True, False])
async def test_a_template_is_to_blame_only_where_a_platform_boots_that_did_not_start_from_it(
    platforms: Platforms, boots: bool
) -> None:
    made: Any = Made(boots=boots)
    platforms._assembly = platforms._templates = made
    record = Record(SPEC, "tcg", 0.0, template="key")
    template: Any = SimpleNamespace(key="key")
    with contextlib.nullcontext() if boots else pytest.raises(Temporary):
        await platforms._start(record, b"", template)
    assert made.distrusted == (["key"] if boots else [])


async def test_an_agent_that_dials_all_the_time_costs_no_more_than_one_that_dials_once(
    platforms: Platforms,
) -> None:
    for _ in range(300):
        ours, theirs = socket.socketpair()
        theirs.close()
        platforms._agent_connected("connection", {"platform": "p"}, [ours.detach()])
    assert len(platforms._tasks) == 1
    platforms.rendezvous.drop("p")
    for task in platforms._tasks:
        task.cancel()


class Streaming:
    """A call that brings a stream: pieces, each when it is asked for; ``accepted`` when it is."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces, self.accepted, self.go_on = pieces, asyncio.Event(), asyncio.Event()

    def accept(self, _answer: Any) -> "Streaming":
        self.accepted.set()
        return self

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
            await self.go_on.wait()


async def test_files_are_laid_down_one_at_a_time_and_not_below_what_is_written_over(
    platforms: Platforms, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.touch()

    async def make_disk(_: PlatformSpec) -> int:
        return os.open(disk, os.O_RDWR)

    platforms._assembly.make_disk = make_disk  # type: ignore[method-assign]
    split = set[str]()
    deposits = Deposits(platforms, split.__contains__)
    first, asked = Streaming(b"fir", b"st"), Deposit(platform="p", size_bytes=5)
    laying: Any = asyncio.ensure_future(deposits.deposit(first, asked))  # type: ignore[arg-type]
    await first.accepted.wait()
    with pytest.raises(Busy, match="another file"):
        await deposits.deposit(Streaming(b"other"), asked)  # type: ignore[arg-type]
    first.go_on.set()
    await laying
    split.add("p")
    with pytest.raises(Busy, match="a checkpoint of p"):
        await deposits.deposit(Streaming(b"other"), asked)  # type: ignore[arg-type]
    assert _end_of(disk) == b"first"


def _end_of(disk: Path) -> bytes:
    with disk.open("rb") as file:
        file.seek(deposit_at(SPEC.scratch_bytes))
        return file.read()
