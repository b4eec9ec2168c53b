"""Volumes of EEs: waited for, claimed, mounted once each, seen in containers with stable owners.

A volume is a disk that is plugged into a slot of the platform while it runs. An EE *claims* its
volumes before each start and releases them after each end, so that what it wrote is on the disk,
and the disk is nobody's, as soon as it does not run. Claims are files in memory beside the mount:
the next agent finds both. One EE may have a volume, or any number that only read it.

On the disk are the ids that a container sees itself: its view of the mount is shifted by the same
user namespace as it runs in (mount_setattr(2), ``MOUNT_ATTR_IDMAP``), whatever range that has.
"""

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Protocol

from supercloud.model.errors import Invalid, Permanent, SupercloudError, Temporary, UserError
from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import filesystem, paths, syscalls
from supercloud.upper.platform.agent.disks import Disk, Disks
from supercloud.upper.platform.agent.state import read_json, write_json
from supercloud.wire.messages import EnvironmentSpec, VolumeMount, VolumeUsage

WAIT_S = 20.0
LOOK_S = 5.0
WORK_TIMEOUT_S = 60.0
FREE_TRIES, FREE_RETRY_S = 200, 0.05
MOUNT_TRIES = 5
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOATIME

log = logging.getLogger("supercloud.agent.volumes")


class Absent(Temporary):
    """A volume is not there, or not there any more: wait for it, trying again is no use before."""


class Broken(Absent):
    """It is there, and its file system can no longer be written: the next start mends it."""


class Wanting(Protocol):
    """Whose volumes they are. ``spec`` may be replaced meanwhile: by one with other slots."""

    spec: EnvironmentSpec


@dataclass(frozen=True, slots=True)
class Claim:
    """That an EE, called ``name`` and of that kind, has a volume."""

    volume: str
    uid: str
    name: str
    kind: str
    disk: Disk
    read_only: bool


def check(specs: Iterable[EnvironmentSpec]) -> None:
    """Invalid when EEs would share what they may not, or slots make no sense."""
    slots, volumes = dict[int, str](), dict[str, int]()
    users = defaultdict[str, list[bool]](list)
    for spec in specs:
        names = [mount.volume for mount in spec.volumes]
        if len(set(names)) != len(names):
            raise Invalid(f"{spec.name} has a volume twice")
        for mount in spec.volumes:
            users[mount.volume].append(mount.read_only)
            if mount.slot and (
                slots.setdefault(mount.slot, mount.volume) != mount.volume
                or volumes.setdefault(mount.volume, mount.slot) != mount.slot
            ):
                raise Invalid(f"slot {mount.slot} does not have one volume, or that another slot")
    for volume, readers in users.items():
        if len(readers) > 1 and not all(readers):
            raise Invalid(
                f"volume {volume} is wanted by {len(readers)} environments, and not all only read",
                hint="only volumes that all mount read_only can be shared",
            )


class Volumes:
    """All volumes of the platform."""

    def __init__(self, disks: Disks) -> None:
        self._disks = disks
        self._claims: dict[tuple[str, str], Claim] = {}  # by volume and uid
        self._locks = defaultdict[str, asyncio.Lock](asyncio.Lock)

    def start(self) -> None:
        """Take up what an earlier agent left."""
        os.makedirs(paths.VOLUMES, mode=0o700, exist_ok=True)
        for volume in os.listdir(paths.VOLUMES):
            for entry in os.listdir(f"{paths.VOLUMES}/{volume}"):
                if entry.endswith(".json"):
                    saved = read_json(f"{paths.VOLUMES}/{volume}/{entry}", None)
                    claim = Claim(**saved | {"disk": Disk(**saved["disk"])})
                    self._claims[volume, claim.uid] = claim

    def look_again(self) -> None:
        """Slots of specs may have changed."""
        self._disks.look_again()

    # -- claims

    async def claim(self, wanting: Wanting, place: str, waiting: Callable[[str], None]) -> None:
        """Have all volumes of an EE; ``waiting`` is told for what. Absent after ``WAIT_S``."""
        await self.release(wanting.spec.uid, place)  # what an agent had that died before the start
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + WAIT_S
        while reason := self.obstacle(wanting.spec):
            left_s = limit_s - loop.time()
            if left_s <= 0:
                raise Absent(reason)
            waiting(reason)
            await self._disks.changed(min(LOOK_S, left_s))
        for mount in wanting.spec.volumes:
            self._take(wanting.spec, mount)

    def obstacle(self, spec: EnvironmentSpec) -> str:
        """Why the EE cannot have its volumes now; empty when it can."""
        return next(filter(None, (self._obstacle(spec.uid, mount) for mount in spec.volumes)), "")

    def _obstacle(self, uid: str, mount: VolumeMount) -> str:
        disk = self._disks.at_slot(mount.slot) if mount.slot else None
        if disk is None:
            where = f"slot {mount.slot} is empty" if mount.slot else "it has no slot yet"
            return f"volume {mount.volume} is not attached to the platform: {where}"
        for claim in self._claims_of(mount.volume):
            shared = claim.read_only and mount.read_only and claim.disk == disk
            if claim.uid != uid and not shared:
                return f"volume {mount.volume} is still in use by {claim.name}"
        return ""

    def _take(self, spec: EnvironmentSpec, mount: VolumeMount) -> None:
        disk = self._disks.at_slot(mount.slot)
        if disk is None:
            raise Absent(f"volume {mount.volume} has just gone")
        self._disks.send_flushes(disk)
        claim = Claim(mount.volume, spec.uid, spec.name, spec.kind, disk, mount.read_only)
        os.makedirs(f"{paths.VOLUMES}/{mount.volume}", mode=0o700, exist_ok=True)
        write_json(_record(claim), asdict(claim))
        self._claims[mount.volume, spec.uid] = claim

    def _claims_of(self, volume: str) -> list[Claim]:
        return [claim for claim in self._claims.values() if claim.volume == volume]

    def of(self, uid: str) -> list[Claim]:
        """What an EE has."""
        return [claim for claim in self._claims.values() if claim.uid == uid]

    # -- what becomes of them

    async def lost(self, uid: str, grown: Callable[[Claim, int], Awaitable[None]]) -> None:
        """Absent, when a volume of the EE goes from under it. ``grown`` is told sizes in bytes."""
        known: dict[str, int] = {}
        if not self.of(uid):
            await asyncio.get_running_loop().create_future()
        while True:
            for claim in self.of(uid):
                size_bytes = self._disks.size_bytes(claim.disk)
                if size_bytes > known.get(claim.volume, 0) and not claim.read_only:
                    known[claim.volume] = size_bytes
                    await _tolerant(claim, grown(claim, size_bytes))
            self._check(uid)
            await self._disks.changed(LOOK_S)

    def _check(self, uid: str) -> None:
        """Absent, unless all that the EE has is plugged in and can be used as it should be."""
        for claim in self.of(uid):
            if not self._disks.is_present(claim.disk):
                raise Absent(f"volume {claim.volume} has gone: its disk was unplugged")
            if not claim.read_only and self._disks.errors(claim.disk):
                raise Broken(
                    f"volume {claim.volume}: its file system met an error and is read-only"
                )

    async def returned(self, wanting: Wanting) -> None:
        """When nothing stands in the way any more."""
        while self.obstacle(wanting.spec):
            await self._disks.changed(LOOK_S)

    def usage(self, uid: str) -> list[VolumeUsage]:
        """Of the file systems that the EE has mounted."""
        found = []
        for claim in self.of(uid):
            place = _mounted_at(claim.volume)
            if os.path.ismount(place):
                now = os.statvfs(place)
                used_bytes = (now.f_blocks - now.f_bfree) * now.f_frsize
                found.append(VolumeUsage(
                    volume=claim.volume, size_bytes=now.f_blocks * now.f_frsize,
                    used_bytes=used_bytes,
                ))  # fmt: skip
        return found

    # -- file systems

    async def mount(
        self, uid: str, place: str, owner: tuple[int, int], waiting: Callable[[str], None]
    ) -> None:
        """Views of all that the EE has claimed, at ``view(place, volume)``.

        ``place/ns/user`` must be there. ``owner`` is who may write to a volume that is new.
        """
        for claim in self.of(uid):
            try:
                work = partial(self._mount, claim, owner, waiting)
                await self._alone(claim, work, filesystem.CHECK_TIMEOUT_S)
                _show(claim, place)
            except (SupercloudError, OSError) as error:
                hint = f"; {error.hint}" if isinstance(error, UserError) and error.hint else ""
                raise Temporary(f"volume {claim.volume}: {error}{hint}") from error

    async def _mount(
        self, claim: Claim, owner: tuple[int, int], waiting: Callable[[str], None]
    ) -> None:
        if os.path.ismount(_mounted_at(claim.volume)):
            return
        os.makedirs(_mounted_at(claim.volume), mode=0o700, exist_ok=True)
        for _ in range(MOUNT_TRIES):
            await self._wait_until_free(claim)
            with suppress(filesystem.InUse):  # a copy of a descriptor of ours, for a moment
                await self._mount_free(claim, owner, waiting)
                return
        raise Temporary("the disk is still in use")

    async def _mount_free(
        self, claim: Claim, owner: tuple[int, int], waiting: Callable[[str], None]
    ) -> None:
        device = claim.disk.device
        hard = self._disks.is_read_only(claim.disk)
        alone = not any(other.kind == "vm" for other in self._claims_of(claim.volume))
        found = await asyncio.to_thread(filesystem.look, device)
        if found is None:
            if hard or not alone:
                raise Permanent("the disk is blank, and cannot be written")
            await filesystem.make(device, owner)
        elif not found.is_clean and alone and not hard:
            waiting(f"volume {claim.volume}: its file system was left open, and is checked")
            await filesystem.check(device)
        flags = _FLAGS | (syscalls.MS_RDONLY if claim.read_only else 0)
        options = "errors=remount-ro" + (",noload" if hard else "")
        await asyncio.to_thread(filesystem.mount, device, _mounted_at(claim.volume), flags, options)

    async def grow(self, claim: Claim, size_bytes: int) -> None:
        """Make the mounted file system as big as its disk."""
        place = _mounted_at(claim.volume)
        if os.path.ismount(place) and await filesystem.grow(claim.disk.device, place, size_bytes):
            log.info("volume %s has grown to %d bytes", claim.volume, size_bytes)

    async def release(self, uid: str, place: str) -> None:
        """Give up all that the EE has; nothing of it is open or unwritten when this returns."""
        _hide_all(place)
        for claim in self.of(uid):
            await self._alone(claim, partial(self._release, claim), WORK_TIMEOUT_S)

    async def _release(self, claim: Claim) -> None:
        if self._claims.get((claim.volume, claim.uid)) != claim:
            return
        if len(self._claims_of(claim.volume)) == 1:
            await asyncio.to_thread(self._unmount, claim)
            await self._wait_until_free(claim)
        os.unlink(_record(claim))
        del self._claims[claim.volume, claim.uid]
        self._disks.look_again()

    def _unmount(self, claim: Claim) -> None:
        place = _mounted_at(claim.volume)
        if not os.path.ismount(place):
            return
        try:
            syscalls.sync_file_system(place)
        except OSError as error:
            if self._disks.is_present(claim.disk):
                log.error("volume %s: %s", claim.volume, error)  # noqa: TRY400
        syscalls.unmount(place)

    async def _wait_until_free(self, claim: Claim) -> None:
        """The kernel has a disk for itself a moment longer than one thinks.

        After its last mount has gone, and while it looks for partitions on one that was just
        plugged in, which is in its slot already.
        """
        for _ in range(FREE_TRIES):
            if not self._disks.is_present(claim.disk):
                return
            if await asyncio.to_thread(filesystem.is_free, claim.disk.device):
                return
            await asyncio.sleep(FREE_RETRY_S)
        raise Temporary(f"volume {claim.volume} is still in use by somebody")

    async def settled(self, uid: str) -> None:
        """When nobody works on the disks that the EE has claimed."""

        async def nothing() -> None:
            return

        for claim in self.of(uid):
            work = nothing if claim.read_only else partial(self._wait_until_free, claim)
            await self._alone(claim, work, filesystem.CHECK_TIMEOUT_S)

    async def _alone(
        self, claim: Claim, work: Callable[[], Awaitable[None]], limit_s: float
    ) -> None:
        """One at a time for each volume, and to its end even when nobody waits for it any more."""

        async def working() -> None:
            async with self._locks[claim.volume]:
                await work()

        task = asyncio.ensure_future(working())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait_for(asyncio.shield(task), limit_s)
        except TimeoutError:
            raise Temporary(f"volume {claim.volume}: its disk does not answer") from None


def view(place: str, volume: str) -> str:
    """Where a container's engine finds a volume to bind."""
    return f"{place}/volumes/{volume}"


def _mounted_at(volume: str) -> str:
    return f"{paths.VOLUMES}/{volume}/fs"


def _record(claim: Claim) -> str:
    return f"{paths.VOLUMES}/{claim.volume}/{claim.uid}.json"


def _show(claim: Claim, place: str) -> None:
    target = view(place, claim.volume)
    os.makedirs(target, mode=0o711, exist_ok=True)
    if os.path.ismount(target):
        return
    namespace = os.open(f"{place}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.mount_idmapped(
            _mounted_at(claim.volume), target, namespace, read_only=claim.read_only
        )
    finally:
        os.close(namespace)


def _hide_all(place: str) -> None:
    """Unmount all views; what cannot be is in the way of deleting ``place``, as it should be."""
    if os.path.isdir(f"{place}/volumes"):
        for volume in os.listdir(f"{place}/volumes"):
            syscalls.unmount(view(place, volume))
            os.rmdir(view(place, volume))
        os.rmdir(f"{place}/volumes")


async def _tolerant(claim: Claim, work: Awaitable[None]) -> None:
    """A volume that could not grow is as good as it was."""
    try:
        await work
    except (SupercloudError, OSError) as error:
        log.warning("volume %s cannot grow: %s", claim.volume, error)
