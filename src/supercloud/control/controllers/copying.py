"""Volumes that are copies of others: clones of a snapshot, made once, and backups, made again.

::

    due -> both are open -> begun (its number is kept) -> asked until it is done -> closed if unused

While one is under way neither is closed or deleted. Whatever dies, it is asked for again by number.
"""

import time

from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.sealing import USABLE
from supercloud.control.documents import Task, VolumeDocument, volume_key
from supercloud.model.errors import BadState, Busy, Permanent, UserError, to_wire
from supercloud.wire.volumes import VolumeCopy


def is_under_way(volume: VolumeDocument) -> bool:
    """Whether something is being copied into it."""
    return volume.copying > volume.copied


def due(volume: VolumeDocument, now_s: float) -> int:
    """The number of the copy into it that is to be made now, or is being made; 0: none."""
    if is_under_way(volume):
        return volume.copying
    return volume.copied + 1 if left_s(volume, now_s) == 0 else 0


def left_s(volume: VolumeDocument, now_s: float) -> float | None:
    """How long until the next copy into it; None: never by itself."""
    backup = volume.spec.backup
    if (volume.spec.clone or backup) and not volume.copied:
        return 0.0
    if backup is None:
        return None
    if is_asked_for(volume.task):
        return 0.0
    return max(0.0, volume.copied_s + backup.every_s - now_s) if backup.every_s else None


def is_asked_for(task: Task | None) -> bool:
    """Whether its user wants a backup now."""
    return task is not None and task.what == "backup" and not task.done


class Copying:
    """The copies of all U-Clouds' volumes."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """Acts through ``plane``; ``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls

    async def due(self, volume: VolumeDocument) -> int:
        """As ``due``; by itself nothing is begun for a U-Cloud that goes or has it no more."""
        number = due(volume, time.time())
        if not number or is_under_way(volume) or is_asked_for(volume.task):
            return number
        owner = await self._plane.state.ucloud(volume.ucloud)
        wanted = owner is not None and not owner.deleting and volume.name in owner.volumes
        return number if wanted else 0

    async def next_s(self, volume: VolumeDocument) -> float | None:
        """When a closed one is to be looked at again."""
        left = left_s(volume, time.time())
        owner = await self._plane.state.ucloud(volume.ucloud)
        if left is None or owner is None or owner.deleting or volume.name not in owner.volumes:
            return None
        return max(left, self._plane.pace.release_s)

    async def holds(self, volume: VolumeDocument) -> bool:
        """Whether it is to be open for a copy, into it or out of it."""
        if await self.due(volume):
            return True
        for other in await self._plane.state.volumes(volume.ucloud):
            if other.spec.copy_of == volume.name and not other.halted and await self.due(other):
                return True
        return False

    async def is_under_way(self, volume: VolumeDocument) -> bool:
        """Whether it may not be closed."""
        others = await self._plane.state.volumes(volume.ucloud)
        copies = [other for other in others if other.spec.copy_of == volume.name]
        return any(map(is_under_way, [volume, *copies]))

    async def go_on(self, volume: VolumeDocument, number: int) -> float:
        """Begin it, or ask how far it is; when to ask again. UserError, Permanent: it failed."""
        try:
            source = await self._source(volume)
        except BadState as error:
            await self._over(volume, error)
            raise
        if source.state not in USABLE:
            self._plane.look(volume_key(source.ucloud, source.name), 0.0)
            await self._waits(volume, f"it waits until {source.name} is open, to be copied")
            return self._plane.pace.release_s
        clone = volume.spec.clone
        asked = VolumeCopy(
            name=volume.name,
            of=source.name,
            number=number,
            snapshot=clone.snapshot if clone else "",
        )
        volume = await self._begun(volume, number)
        try:
            volume = await self._calls.act(
                volume, "copy", lambda host: host.fill(volume.host, asked)
            )
        except Busy as busy:  # another copy of the same source goes on
            await self._waits(volume, busy.message)
            return self._plane.pace.release_s
        except (UserError, Permanent) as error:
            await self._over(volume, error)
            raise
        if volume.copied < number:
            return self._plane.pace.release_s
        await self._over(volume, None)
        self._plane.tell(volume, "volume.copied", f"from {source.name}")
        self._plane.look(volume_key(source.ucloud, source.name), 0.0)
        return 0.0

    async def _source(self, volume: VolumeDocument) -> VolumeDocument:
        name = volume.spec.copy_of
        source = await self._plane.state.volume(volume.ucloud, name)
        gone = source is None or (source.deleting and not is_under_way(volume))
        if source is None or gone or source.halted:
            raise BadState(
                f"volume {volume.name} is to be a copy of {name}, which cannot be read",
                hint=f"supercloud volumes inspect {volume.ucloud}/{name} says why, if it is there",
            )
        if (source.provider.name, source.host) != (volume.provider.name, volume.host):
            raise BadState(
                f"volume {volume.name} is not on the host of {name}",
                hint="a new volume is made there: give the copy another name in the manifest",
            )
        return source

    async def _begun(self, volume: VolumeDocument, number: int) -> VolumeDocument:
        def begun(fresh: VolumeDocument) -> None:
            fresh.copying = max(fresh.copying, number)
            fresh.waits = f"it is being copied from {volume.spec.copy_of}"

        if volume.copying >= number and volume.waits:
            return volume
        return await self._plane.state.change(volume, begun)

    async def _waits(self, volume: VolumeDocument, why: str) -> None:
        if volume.waits != why:
            await self._plane.state.change(volume, lambda fresh: setattr(fresh, "waits", why))

    async def _over(self, volume: VolumeDocument, error: Exception | None) -> None:
        told = to_wire(error) if isinstance(error, UserError | Permanent) else None

        def over(fresh: VolumeDocument) -> None:
            fresh.copying, fresh.waits = fresh.copied, ""
            if fresh.task is not None and is_asked_for(fresh.task):
                fresh.task.done, fresh.task.error = True, told

        await self._plane.state.change(volume, over)
