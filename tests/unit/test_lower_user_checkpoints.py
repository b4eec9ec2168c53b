"""Checkpoints in the user's domain, over a pretended monitor: what is left of one that failed."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.checkpoints import Checkpoints
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.records import Record
from supercloud.model.errors import Temporary
from supercloud.wire.checkpoints import CheckpointTake, StoreAccess
from supercloud.wire.host import PlatformSpec

SPEC = PlatformSpec(
    name="p", image="sha256:" + "1" * 64, cpus=1, memory_bytes=512 << 20, scratch_bytes=1 << 30,
    config_base64="", ports=4,
)  # fmt: skip
FIGURES = {"taken_ms": 1, "pause_ms": 1.0, "quiet_ms": 1.0, "memory_bytes": 1, "incremental": True}
STORE = {
    "secret": "0" * 64, "server_name": "s", "ca_pem": "", "access_key": "a", "secret_key": "b",
    "region": "r",
}  # fmt: skip
ASKED = CheckpointTake(name="p", uid="i1", store=StoreAccess(**STORE))


class Monitor:
    """Says what it captured at a moment that it chooses; ``files`` are what it gave."""

    def __init__(self, says: str) -> None:
        self.says, self.files = says, list[int]()
        self.tell: Any = None

    async def call(self, method: str, *_: Any) -> None:
        assert method == "machine.checkpoint"
        if self.says == "at once":
            self._captured()
        raise Temporary("no answer to machine.checkpoint")

    async def result(self, method: str, *_: Any) -> Any:
        if method == "machine.checkpoint-end":
            if self.says == "when it is over":
                self._captured()
            self.tell("checkpoint.over", {"platform": "p"}, [])
        return {"disks": [], "memory_bytes": 1 << 20, "dirty_bytes": 0}

    def _captured(self) -> None:
        self.files = [os.memfd_create("state"), os.memfd_create("memory")]
        self.tell("checkpoint.captured", {"platform": "p", **FIGURES}, [*self.files])


class Assembly:
    """Room is booked; it is given back while nobody has a file that is charged to it."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.is_back = monitor, False

    async def make_overlay(self, _spec: PlatformSpec, _size_bytes: int) -> int:
        return os.memfd_create("overlay")

    async def drop_overlay(self, _platform: str) -> None:
        pass

    def give_room(self, _spec: PlatformSpec, memory_bytes: int) -> None:
        self.is_back = not memory_bytes and not any(map(is_open, self.monitor.files))


def is_open(descriptor: int) -> bool:
    try:
        return "memfd" in os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("says", ["never", "at once", "when it is over"])
async def test_what_was_captured_and_nobody_waits_for_takes_no_memory(says: str) -> None:
    monitor = Monitor(says)
    assembly = Assembly(monitor)

    async def machine(_name: str) -> Monitor:
        return monitor

    platforms: Any = SimpleNamespace(
        machine=machine, assembly=assembly, record=lambda _: Record(SPEC, "tcg", 0.0)
    )

    @contextlib.asynccontextmanager
    async def opened(*_: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(spoil=lambda _error: None)

    sessions: Any = SimpleNamespace(open=opened)
    hub: Any = SimpleNamespace(core=None)
    volumes: Any = None
    made = Checkpoints(hub, sessions, platforms, volumes, Feed("u", "host/t"))
    monitor.tell = platforms.on_checkpoint
    with pytest.raises(Temporary, match="no answer"):
        await made.take(ASKED)
    assert (len(monitor.files), assembly.is_back) == (0 if says == "never" else 2, True)
    assert not any(map(is_open, monitor.files))
    assert not made.is_under_way("p")
    await asyncio.sleep(0)
