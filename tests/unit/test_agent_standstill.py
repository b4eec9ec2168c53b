"""A file system that was frozen for a snapshot is thawed, whatever comes of it."""

import asyncio
import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.model.errors import Denied, Temporary, Unsupported
from supercloud.upper.platform.agent import paths, standstill, syscalls
from supercloud.upper.platform.agent.disks import Disk
from supercloud.upper.platform.agent.volumes import Claim
from supercloud.wire.checkpoints import CheckpointSnapshot, CheckpointTake, StoreAccess
from supercloud.wire.messages import EnvironmentSpec, ImageRef, VolumeMount

STORE = StoreAccess(
    secret="00" * 32, server_name="s", ca_pem="", access_key="", secret_key="", region="local"
)
WANTED = CheckpointTake(name="web", uid="u1", store=STORE, snapshot="supercloud-0123456789abcdef")


class Kernel:
    """File systems that freeze when ``may_freeze`` is set; ``done`` is what happened to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
        self.done: list[tuple[str, str]] = []
        self.may_freeze, self.is_frozen = threading.Event(), set[str]()
        self.may_freeze.set()
        monkeypatch.setattr(paths, "VOLUMES", str(place))
        monkeypatch.setattr(os.path, "ismount", os.path.isdir)
        monkeypatch.setattr(syscalls, "freeze_file_system", self._freeze)
        monkeypatch.setattr(syscalls, "thaw_file_system", self._thaw)

    def _freeze(self, descriptor: int) -> None:
        assert self.may_freeze.wait(30)
        self._note("freeze", descriptor)

    def _thaw(self, descriptor: int) -> None:
        self._note("thaw", descriptor)

    def _note(self, what: str, descriptor: int) -> None:
        volume = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name
        if what == "thaw" and volume not in self.is_frozen:
            raise OSError(errno.EINVAL, "not frozen")
        (self.is_frozen.add if what == "freeze" else self.is_frozen.remove)(volume)
        self.done.append((what, volume))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    for volume in ("data", "more", "read"):
        (tmp_path / volume / "fs").mkdir(parents=True)
    return Kernel(monkeypatch, tmp_path)


def claimed() -> Any:
    """An EE with two volumes that it writes to, and one that it reads."""
    disk = Disk("vda", 1)
    claims = [
        Claim(name, "u1", "web", "container", disk, read_only=name == "read")
        for name in ("data", "more", "read")
    ]
    return SimpleNamespace(of=lambda uid: claims if uid == "u1" else [])


async def test_all_that_it_writes_to_stands_still_while_snapshots_are_taken(kernel: Kernel) -> None:
    async def ask(asked: CheckpointSnapshot) -> None:
        assert (asked.uid, asked.snapshot) == ("u1", WANTED.snapshot)
        assert kernel.is_frozen == {"data", "more"}

    await standstill.keep(claimed(), WANTED, ask)
    assert kernel.is_frozen == set()
    assert len(kernel.done) == 4


async def test_without_a_snapshot_it_is_thawed_and_the_reason_told(kernel: Kernel) -> None:
    async def ask(_: CheckpointSnapshot) -> None:
        raise Denied("no")

    with pytest.raises(Denied):
        await standstill.keep(claimed(), WANTED, ask)
    assert kernel.is_frozen == set()


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_what_freezes_too_late_is_thawed_when_it_has(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def ask(_: CheckpointSnapshot) -> None:
        raise AssertionError("it does not stand still")

    kernel.may_freeze.clear()
    if how == "late":
        monkeypatch.setattr(standstill, "DISKS_TIMEOUT_S", 0.05)
    keeping = asyncio.ensure_future(standstill.keep(claimed(), WANTED, ask))
    await asyncio.sleep(0.1)
    if how == "cancelled":
        keeping.cancel()
    with pytest.raises(Temporary if how == "late" else asyncio.CancelledError):
        await keeping
    kernel.may_freeze.set()
    async with asyncio.timeout(30):
        while ("thaw", "data") not in kernel.done:
            await asyncio.sleep(0.01)
    assert kernel.is_frozen == set()


async def test_the_next_agent_thaws_what_one_that_died_has_left(kernel: Kernel) -> None:
    kernel.is_frozen |= {"more", "read"}
    standstill.thaw_all()
    assert kernel.is_frozen == set()


async def test_all_have_ended_before_any_failure_is_told() -> None:
    ended = []

    async def slow() -> str:
        await asyncio.sleep(0.05)
        ended.append("slow")
        return "slow"

    async def fails() -> None:
        raise Denied("no")

    with pytest.raises(Denied):
        await standstill.together(slow(), fails())
    assert ended == ["slow"]
    assert await standstill.together(slow(), slow()) == "slow"


def test_a_control_plane_that_takes_no_snapshots_is_refused_for_what_writes() -> None:
    image = ImageRef(format="erofs", blobs={})
    writes = EnvironmentSpec(
        name="web", uid="u1", kind="container", image=image, volumes=[VolumeMount(volume="data")]
    )
    plain = CheckpointTake(name="web", uid="u1", store=STORE)
    with pytest.raises(Unsupported, match=r"writes to volumes \(data\)"):
        standstill.check(writes, plain)
    standstill.check(writes, WANTED)
    read = VolumeMount(volume="data", read_only=True)
    reads = EnvironmentSpec(name="web", uid="u1", kind="container", image=image, volumes=[read])
    standstill.check(reads, plain)
