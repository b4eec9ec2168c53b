"""Going back to a checkpoint: what is decided, in one row, so that it is decided whole or not."""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace

from supercloud.control import specs
from supercloud.control.checkpoints import CheckpointService
from supercloud.control.controllers.access import verify
from supercloud.control.controllers.learning import halted
from supercloud.control.controllers.plane import Plane
from supercloud.control.desire import Decision, Move
from supercloud.control.documents import (
    Assignment,
    CheckpointsDocument,
    EnvironmentDocument,
    PlatformDocument,
    UCloudDocument,
    ucloud_key,
)
from supercloud.control.kept import KeptCheckpoint, Place, Restore
from supercloud.model.errors import BadState, Busy, Invalid, NotFound, Unsupported
from supercloud.model.resources import Environment, Placement
from supercloud.model.states import UCLOUD, observed
from supercloud.wire import api

Decide = Callable[[UCloudDocument, dict[str, Move]], Awaitable[Decision]]
"""The decision for a U-Cloud as it is, with these EEs moved."""


class RestoreService:
    """See ``restore``."""

    def __init__(self, plane: Plane, checkpoints: CheckpointService, decide: Decide) -> None:
        """Acts through ``plane``; ``decide`` asks the providers."""
        self._plane, self._checkpoints, self._decide = plane, checkpoints, decide

    async def restore(self, ucloud: str, name: str, number: int, to: str) -> api.Restoring:
        """Have an EE or a platform made anew from its checkpoint ``number`` (0: the newest).

        ``to`` is another provider to put an EE at. NotFound, BadState; NoResources for the place.
        Denied for one that cannot be read, if volumes are to go back with it: as they are is lost.
        """
        number = await self._read(ucloud, name, number, to)
        async with self._plane.deciding:
            owner = await self._owner(ucloud)
            document = await self._checkpoints.find(ucloud, name)
            kept = _chosen(document, number)
            if document.of == "platform":
                platform = await self._platform(owner, document, kept, to)
                restore = _decided(_next(owner, platform), kept)
                changed, place = await self._store(owner, name, restore), name
                await self._plane.state.change(platform, _without_error)
            else:
                changed, place = await self._environment(owner, document, kept, to)
        self._plane.look(ucloud_key(ucloud), 0.0)
        self._plane.tell(changed, "ucloud.restore", f"{name} from checkpoint {kept.sequence}")
        return api.Restoring(
            ucloud=ucloud,
            name=name,
            number=kept.sequence,
            platform=place,
            generation=changed.generation,
            volumes=sorted(kept.snapshots),
        )

    async def _owner(self, ucloud: str) -> UCloudDocument:
        owner = await self._plane.state.ucloud(ucloud)
        if owner is None or owner.deleting:
            raise BadState(f"U-Cloud {ucloud} is not up", hint="supercloud up FILE, then again")
        return owner

    async def _read(self, ucloud: str, name: str, number: int, to: str) -> int:
        """The number of a checkpoint that was read whole, if that is called for.

        It takes a while, so nothing else waits for it, and its EE runs on. A platform's host reads
        by itself before it takes volumes back.
        """
        owner, document = await self._owner(ucloud), await self._checkpoints.find(ucloud, name)
        kept = _chosen(document, number)
        if document.of == "platform" or not kept.snapshots:
            return number
        await self._restorable(owner, document, kept, to)
        await verify(self._plane, document, kept.sequence)
        return kept.sequence

    async def _platform(
        self, owner: UCloudDocument, document: CheckpointsDocument, kept: KeptCheckpoint, to: str
    ) -> PlatformDocument:
        """The platform, if it can be restored from that."""
        if to:
            raise Invalid("is for environments: a platform is restored where it was", where="to")
        platform = await self._plane.state.platform(owner.name, document.name)
        if platform is None or platform.deleting or document.name not in owner.platforms:
            raise BadState(
                f"there is no platform {document.name} any more",
                hint=f"supercloud inspect {owner.name} lists the platforms there are",
            )
        if kept.shape != specs.platform_shape(platform):
            raise _other(document, kept)
        await self._volumes(owner, document, kept, to)
        await self._reachable(owner, platform, document, kept)
        return platform

    async def _reachable(
        self,
        owner: UCloudDocument,
        platform: PlatformDocument,
        document: CheckpointsDocument,
        kept: KeptCheckpoint,
    ) -> None:
        """Whether its volumes are where it is, and nobody's elsewhere."""
        place = (platform.wish.provider.name, platform.wish.host)
        for name in kept.snapshots:
            volume = await self._plane.state.volume(owner.name, name)
            if volume is not None and (volume.provider.name, volume.host) != place:
                raise Unsupported(
                    f"checkpoint {kept.sequence} goes back with volume {name}, which is on host "
                    f"{volume.host} of {volume.provider.name} by now",
                    hint=_another(document),
                )
        for item in await self._plane.state.environments(owner.name):
            shared = {use.name for use in item.spec.volumes} & kept.snapshots.keys()
            if shared and item.assignment.platform != platform.name and not item.deleting:
                raise BadState(
                    f"checkpoint {kept.sequence} goes back with volume {min(shared)}, which "
                    f"{item.name} uses on {item.assignment.platform}",
                    hint=f"take {item.name} out of the manifest, and supercloud up; then restore",
                )

    async def _restorable(
        self, owner: UCloudDocument, document: CheckpointsDocument, kept: KeptCheckpoint, to: str
    ) -> EnvironmentDocument:
        """The EE, if it can be restored from that."""
        name = document.name
        item = await self._plane.state.environment(owner.name, name)
        if item is None or item.deleting or name not in owner.assignments:
            raise BadState(
                f"there is no environment {name} in U-Cloud {owner.name}",
                hint="put it into the manifest as it was, and supercloud up",
            )
        if item.ready is None or not item.current:
            raise BadState(
                f"environment {name} is being changed",
                hint="restore it when supercloud ps shows it running or serving",
            )
        if kept.shape != specs.shape_of(item.ready):
            raise _other(document, kept)
        await self._volumes(owner, document, kept, to)
        return item

    async def _environment(
        self, owner: UCloudDocument, document: CheckpointsDocument, kept: KeptCheckpoint, to: str
    ) -> tuple[UCloudDocument, str]:
        name = document.name
        item = await self._restorable(owner, document, kept, to)
        restore = _decided(_next(owner, item), kept)
        if not to or owner.platforms[owner.assignments[name].platform].provider.name == to:
            place = _back(owner, name, kept)
            return await self._store(owner, name, restore, place), place.platform
        if to not in {entry.name for entry in owner.spec.providers}:
            there = ", ".join(entry.name for entry in owner.spec.providers)
            hint = f"one of {there}"
            raise NotFound(f"the manifest of {owner.name} has no provider {to}", hint=hint)
        decision = await self._decide(owner, {name: Move(to, _free(owner, name, kept))})
        place = decision.assignments[name]
        return await self._store(owner, name, restore, place, decision), place.platform

    async def _volumes(
        self, owner: UCloudDocument, document: CheckpointsDocument, kept: KeptCheckpoint, to: str
    ) -> None:
        """Whether the volumes can go back to it, too."""
        for name, snapshot in kept.snapshots.items():
            volume = await self._plane.state.volume(owner.name, name)
            if volume is None or volume.deleting or snapshot not in volume.snapshots:
                raise BadState(
                    f"checkpoint {kept.sequence} needs its snapshot of volume {name}, "
                    "which is not there any more",
                    hint=_another(document),
                )
            if volume.halted:
                raise halted(volume)
            if to not in ("", volume.provider.name):
                raise Unsupported(
                    f"checkpoint {kept.sequence} goes back with volume {name}, whose snapshot is "
                    f"on host {volume.host} of {volume.provider.name}",
                    hint="restore it there: leave `--to` out",
                )

    async def _store(
        self,
        owner: UCloudDocument,
        name: str,
        restore: Restore,
        place: Assignment | None = None,
        decision: Decision | None = None,
    ) -> UCloudDocument:
        expected = owner.generation

        def decided(fresh: UCloudDocument) -> None:
            if fresh.generation != expected or fresh.deleting:
                raise Busy(
                    f"U-Cloud {owner.name} is being changed by others",
                    hint="restore again when their command is done",
                )
            if decision is not None:
                fresh.platforms, fresh.assignments = decision.platforms, decision.assignments
                fresh.volumes, fresh.store = decision.volumes, decision.store
            if place is not None:
                fresh.assignments[name] = place
            fresh.restores[name] = restore
            fresh.generation += 1
            fresh.state = observed(UCLOUD, fresh.state, "applying")

        return await self._plane.state.change(owner, decided)


def _decided(number: int, kept: KeptCheckpoint) -> Restore:
    return Restore(number=number, sequence=kept.sequence, mark=secrets.token_hex(8))


def _without_error(platform: PlatformDocument) -> None:
    platform.error = None


def nature(environment: Environment) -> Environment:
    """What makes it what it is: another one has nothing to do with what was restored."""
    return replace(
        environment, checkpoint=None, placement=Placement(), replicas=1, buckets=[], ports=[]
    )


def _chosen(document: CheckpointsDocument, number: int) -> KeptCheckpoint:
    name = document.name
    if document.deleting or document.policy is None:
        raise BadState(
            f"{name} is to have no checkpoints any more: it cannot go on from one",
            hint="say `checkpoint: {}` of it in the manifest, and supercloud up",
        )
    if not document.kept:
        raise NotFound(
            f"there is no checkpoint of {name} yet", hint=f"supercloud checkpoint {name}"
        )
    for kept in document.kept:
        if kept.sequence == (number or document.kept[-1].sequence):
            return kept
    there = ", ".join(str(kept.sequence) for kept in document.kept)
    raise NotFound(f"there is no checkpoint {number} of {name}", hint=f"there are {there}")


def _another(document: CheckpointsDocument) -> str:
    return f"choose another one: supercloud checkpoints {document.ucloud}/{document.name}"


def _other(document: CheckpointsDocument, kept: KeptCheckpoint) -> BadState:
    what = "image or memory" if document.of == "platform" else "image, command or size"
    return BadState(
        f"checkpoint {kept.sequence} is of another {document.name}: its {what} was changed since",
        hint="put the manifest back as it was, and supercloud up; then restore",
    )


def _next(owner: UCloudDocument, item: EnvironmentDocument | PlatformDocument) -> int:
    decided = owner.restores.get(item.name)
    numbers = [item.restored, item.restore.number if item.restore else 0]
    numbers += [decided.number if decided else 0]
    numbers += [item.restoring] if isinstance(item, PlatformDocument) else []
    return max(numbers) + 1


def _free(owner: UCloudDocument, name: str, kept: KeptCheckpoint) -> Place | None:
    """Its place in the network, if nobody else has that by now."""
    place = kept.place
    if place is None:
        return None
    others = [item for other, item in owner.assignments.items() if other != name]
    if any((o.network, o.address) == (place.network, place.address) for o in others):
        return None
    return place


def _back(owner: UCloudDocument, name: str, kept: KeptCheckpoint) -> Assignment:
    """Where it is now, under the address that it had."""
    now, place = owner.assignments[name], _free(owner, name, kept)
    if place is None or place.network != now.network or place.address == now.address:
        return now
    return replace(
        now,
        address=place.address,
        prefix_length=place.prefix_length,
        gateway=place.gateway,
        mac=place.mac,
        moved=place.gateway != now.gateway,
    )
