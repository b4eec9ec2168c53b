"""What an EE's volumes hold is snapshotted at the moment at which the EE stands still.

First all that it wrote is brought to the disks: a container's file systems are frozen
(``FIFREEZE``, as fsfreeze(8) does), so that they are whole and clean there; a stopped QEMU has
flushed its disks, and what this kernel keeps of them is flushed, too. Then the control plane is
asked for the snapshots, and the EE goes on when they are there.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from supercloud.model.errors import Temporary, Unsupported
from supercloud.upper.platform.agent import paths, syscalls
from supercloud.upper.platform.agent.volumes import Claim, Volumes
from supercloud.wire.checkpoints import CheckpointSnapshot, CheckpointTake
from supercloud.wire.messages import EnvironmentSpec

DISKS_TIMEOUT_S = 20.0
SNAPSHOT_TIMEOUT_S = 20.0

log = logging.getLogger("supercloud.agent.standstill")

Ask = Callable[[CheckpointSnapshot], Awaitable[None]]
"""Asks the control plane for the snapshots."""
T = TypeVar("T")


def check(spec: EnvironmentSpec, wanted: CheckpointTake) -> None:
    """Unsupported when it writes to volumes and whoever asks knows nothing of that."""
    names = ", ".join(v.volume for v in spec.volumes if not v.read_only)
    if names and not wanted.snapshot:
        raise Unsupported(
            f"{wanted.name} writes to volumes ({names}), and its control plane takes no snapshots "
            "of them with a checkpoint"
        )


async def ahead(volumes: Volumes, uid: str) -> None:
    """Write out what can be before it stands still, so that there is less to do then."""
    for claim in _written(volumes, uid):
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_flush, claim)


async def keep(volumes: Volumes, wanted: CheckpointTake, ask: Ask) -> None:
    """Have the snapshots taken of an EE that stands still. What raises has kept nothing."""
    claims = _written(volumes, wanted.uid)
    if not claims:
        return
    asked = CheckpointSnapshot(name=wanted.name, uid=wanted.uid, snapshot=wanted.snapshot)
    begun_s = time.monotonic()
    async with contextlib.AsyncExitStack() as frozen:
        try:
            async with asyncio.timeout(DISKS_TIMEOUT_S):
                for claim in claims:
                    await frozen.enter_async_context(_settled(claim))
        except TimeoutError:
            raise Temporary("the disks of its volumes are too busy") from None
        settled_s = time.monotonic()
        await ask(asked)
    parts = settled_s - begun_s, time.monotonic() - settled_s
    log.info("%s: volumes on their disks %.1f, snapshots %.1f ms",
             wanted.name, *(part * 1000 for part in parts))  # fmt: skip


def _written(volumes: Volumes, uid: str) -> list[Claim]:
    return [claim for claim in volumes.of(uid) if not claim.read_only]


@contextlib.asynccontextmanager
async def _settled(claim: Claim) -> AsyncIterator[None]:
    """All that was written is on the disk, and nothing more comes.

    A thread cannot be cancelled: what it has frozen is thawed when it has ended.
    """
    place = _place(claim)
    if not place:
        await asyncio.to_thread(_flush, claim)
        yield
        return
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    freezing = asyncio.ensure_future(asyncio.to_thread(syscalls.freeze_file_system, descriptor))
    try:
        await asyncio.shield(freezing)
        yield
    finally:
        if freezing.done():
            _thaw(descriptor)
        else:
            freezing.add_done_callback(lambda _: _thaw(descriptor))


def _thaw(descriptor: int) -> None:
    try:
        with contextlib.suppress(OSError):  # it was not frozen
            syscalls.thaw_file_system(descriptor)
    finally:
        os.close(descriptor)


def _flush(claim: Claim) -> None:
    place = _place(claim)
    if place:
        syscalls.sync_file_system(place)
        return
    descriptor = os.open(claim.disk.device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(claim: Claim) -> str:
    """Where its file system is mounted; "" for a disk that is a VM's."""
    place = f"{paths.VOLUMES}/{claim.volume}/fs"
    return place if claim.kind == "container" and os.path.ismount(place) else ""


def thaw_all() -> None:
    """What an agent that was killed meanwhile has left frozen."""
    for place in _mounted():
        _thaw(os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _mounted() -> Iterator[str]:
    for volume in os.listdir(paths.VOLUMES) if os.path.isdir(paths.VOLUMES) else ():
        place = f"{paths.VOLUMES}/{volume}/fs"
        if os.path.ismount(place):
            yield place


async def together(first: Awaitable[T], *others: Awaitable[Any]) -> T:
    """The first's result; all have ended when this returns or raises what one of them raised."""
    done = await asyncio.gather(first, *others, return_exceptions=True)
    for found in done:
        if isinstance(found, BaseException):
            raise found
    result: T = done[0]  # type: ignore[assignment]
    return result
