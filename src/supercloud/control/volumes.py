"""What the API can be asked to do with volumes."""

import asyncio
import contextlib
from collections.abc import Sequence

from supercloud.control import held, seals, views
from supercloud.control.controllers.access import rewrap, wrapped_in
from supercloud.control.controllers.learning import halted, in_use, waits
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import whole_at
from supercloud.control.documents import (
    EnvironmentDocument,
    ReplicaWish,
    Task,
    UCloudDocument,
    VolumeDocument,
    VolumeWish,
    volume_key,
)
from supercloud.control.homes import reached_home
from supercloud.control.offers import Offer
from supercloud.model.errors import BadState, Busy, Denied, NotFound, Temporary, from_wire
from supercloud.wire import api

TASK_TIMEOUT_S = 50.0
LOOK_AGAIN_S = 0.05
SHARED = "vhost-user-blk"
"""How a volume is attached that needs the RAM of its platform, which a restored one has not."""
ROOT_SHOWN = 12
"""So many characters of a root are enough to say which one is meant."""


class VolumeService:
    """The operations. ``deciding`` is held while what there is must not change."""

    def __init__(self, plane: Plane, deciding: asyncio.Lock) -> None:
        """Acts through ``plane``."""
        self._plane, self._deciding = plane, deciding

    # -- what there is

    async def rows(self, ucloud: str = "") -> list[api.VolumeRow]:
        """Those of a U-Cloud, or all: also of U-Clouds that are not up."""
        volumes = await self._plane.state.volumes(ucloud)
        environments = {
            name: await self._plane.state.environments(name)
            for name in {volume.ucloud for volume in volumes}
        }
        seen = self._plane.seen
        return [
            views.volume_row(item, environments[item.ucloud], seen.get(views.id_of(item)))
            for item in volumes
        ]

    async def volume(self, ucloud: str, name: str) -> api.VolumeView:
        """One in all detail; NotFound."""
        volume = await self._volume(ucloud, name)
        environments = await self._plane.state.environments(ucloud)
        checkpoints = await self._plane.state.checkpoints(ucloud)
        seen = self._plane.seen.get((ucloud, name))
        return views.volume_view(volume, environments, checkpoints, seen)

    async def mounted(self, environment: EnvironmentDocument) -> list[api.Mounted]:
        """The volumes of an EE."""
        volumes = await self._plane.state.volumes(environment.ucloud)
        return views.mounted(environment, {item.name: item for item in volumes}, self._plane.seen)

    async def kept(
        self, ucloud: str, before: UCloudDocument | None, offers: Sequence[Offer]
    ) -> dict[str, VolumeWish]:
        """The volumes that there are, with their homes; one that is being deleted is none.

        One that is kept on several hosts is at home at another, when its own is not offered.
        """
        documents = await self._plane.state.volumes(ucloud)
        kept = {}
        if before is not None and not before.deleting:  # decided, and not written down yet
            kept = {**before.volumes}
        for item in documents:
            kept.pop(item.name, None)
            if not item.deleting:
                spec = item.given or item.spec
                others = [ReplicaWish(provider=o.provider, host=o.host) for o in item.others]
                wish = VolumeWish(spec=spec, provider=item.provider, host=item.host, others=others)
                kept[item.name] = reached_home(wish, whole_at(item), offers)
        return kept

    async def shared(self, ucloud: str) -> dict[str, str]:
        """The platforms of those that are attached as no checkpoint could restore them, by name."""
        volumes = await self._plane.state.volumes(ucloud)
        return {v.name: v.platform for v in volumes if v.platform and v.mode == SHARED}

    # -- changing

    async def task(self, ucloud: str, name: str, what: str, snapshot: str) -> api.VolumeView:
        """``snapshot``, ``revert``, ``forget`` or ``backup``; waits until it is done.

        Busy, BadState.
        """
        volume = await self._volume(ucloud, name)
        task = Task(what=what, snapshot=snapshot)

        def asked(fresh: VolumeDocument) -> None:
            _check_task(fresh, task)
            fresh.task = task

        await self._plane.state.change(volume, asked)
        self._plane.look(volume_key(ucloud, name), 0.0)
        try:
            async with asyncio.timeout(TASK_TIMEOUT_S):
                await self._done(ucloud, name, task)
        except TimeoutError:
            raise Temporary(
                f"volume {name}: the {what} is not done after {TASK_TIMEOUT_S:g} s; it goes on"
            ) from None
        return await self.volume(ucloud, name)

    async def _done(self, ucloud: str, name: str, task: Task) -> None:
        while True:
            volume = await self._volume(ucloud, name)
            now = volume.task
            if now is None or now.id != task.id or volume.halted:
                if volume.halted:
                    raise halted(volume)
                raise BadState(
                    f"volume {name} was changed by others meanwhile",
                    hint=f"supercloud volumes inspect {ucloud}/{name} says how it is now",
                )
            if now.done:
                if now.error:
                    raise from_wire(now.error)
                return
            if volume.error:
                raise from_wire(volume.error)
            await asyncio.sleep(LOOK_AGAIN_S)

    async def delete(self, ucloud: str, name: str) -> None:
        """With all that is in it. BadState while the manifest has it."""
        async with self._deciding:
            volume = await self._volume(ucloud, name)
            owner = await self._plane.state.ucloud(ucloud)
            if owner is not None and not owner.deleting and name in owner.volumes:
                raise BadState(
                    f"volume {name} is in the manifest of {ucloud}, which is up",
                    hint=f"take it out of the manifest first, or supercloud down {ucloud}",
                )
            await self._delete(volume)

    async def delete_all(self, ucloud: str) -> int:
        """All volumes of a U-Cloud that is going or gone; how many. ``deciding`` is held."""
        volumes = await self._plane.state.volumes(ucloud)
        for volume in volumes:
            await self._delete(volume)
        return len(volumes)

    async def _delete(self, volume: VolumeDocument) -> None:
        def absent(fresh: VolumeDocument) -> None:
            fresh.deleting = True

        with contextlib.suppress(NotFound):  # gone already is fine
            await self._plane.state.change(volume, absent)
        self._plane.look(volume_key(volume.ucloud, volume.name), 0.0)

    async def accept(self, ucloud: str, name: str, root: str) -> api.VolumeView:
        """Take a halted volume as it was found, which ``root`` must begin that of.

        What was written since is lost, and that is said in an event. Without anything found it
        is only tried again. BadState when it is not halted, Denied for another root.
        """
        volume = await self._volume(ucloud, name)
        _check_accept(volume, root)
        before = volume.seal

        def taken(fresh: VolumeDocument) -> None:
            _check_accept(fresh, root)
            if fresh.found is not None:
                fresh.seal = seals.accepted(fresh.seal, fresh.found)
            fresh.halted, fresh.found, fresh.reason, fresh.error = "", None, "", None

        volume = await self._plane.state.change(volume, taken)
        self._plane.tell(
            volume,
            "volume.accepted",
            f"from state {before.sequence} to {volume.seal.sequence}, by its user's word",
            severity="warning",
            before=before.root,
            after=volume.seal.root,
        )
        self._plane.look(volume_key(ucloud, name), 0.0)
        return await self.volume(ucloud, name)

    async def rotate_key(self, ucloud: str) -> api.Rotated:
        """A new wrapping key for a U-Cloud's volumes and buckets; their data stays as it is."""
        volumes = await self._plane.state.volumes(ucloud)
        store = await self._plane.state.store_document(ucloud)
        if not volumes and store is None:
            raise NotFound(
                f"U-Cloud {ucloud} has no volumes and no buckets",
                hint="supercloud volumes and supercloud buckets list those there are",
            )
        keys = self._plane.keys(ucloud)
        keys.rotate()

        def rewrapped(fresh: VolumeDocument) -> None:
            for replica in fresh.replicas:
                if replica.wrapped_key:
                    replica.wrapped_key = keys.rewrapped(replica.wrapped_key)

        for volume in volumes:
            changed = await self._plane.state.change(volume, rewrapped)
            self._plane.tell(changed, "volume.rewrapped", keys.current)
        if store is not None:
            rewrapped_store = await self._plane.state.change(store, lambda s: rewrap(s, keys))
            self._plane.tell(rewrapped_store, "objects.rewrapped", keys.current)
        now = await self._plane.state.volumes(ucloud)
        kept = await self._plane.state.store_document(ucloud)
        wrapped = [item.wrapped_key for volume in now for item in volume.replicas]
        wrapped += wrapped_in(kept) if kept is not None else []
        keys.settle(text for text in wrapped if text)
        return api.Rotated(ucloud=ucloud, wrapping_key=keys.current, volumes=len(now))

    async def _volume(self, ucloud: str, name: str) -> VolumeDocument:
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None:
            raise NotFound(
                f"U-Cloud {ucloud} has no volume {name}", hint="supercloud volumes lists them"
            )
        return volume


def _check_task(volume: VolumeDocument, task: Task) -> None:
    """All refusals before any effect."""
    what = task.what
    if held.is_ours(task.snapshot):
        raise Denied(
            f"snapshots called {held.PREFIX}... belong to checkpoints",
            hint="supercloud restore goes back to one, supercloud checkpoints lists them; they go "
            "when their checkpoint does",
        )
    if volume.deleting:
        raise BadState(
            f"volume {volume.name} is being deleted",
            hint="supercloud volumes lists it until it is gone; supercloud up makes a new one then",
        )
    if volume.halted:
        raise halted(volume)
    if waits(volume.task):
        raise Busy(
            f"volume {volume.name}: a {volume.task and volume.task.what} is under way",
            hint="again, when that is done",
        )
    if what == "backup":
        if volume.spec.backup is None:
            hint = "say so in the manifest: volumes[].backup: {of: NAME}"
            raise BadState(f"volume {volume.name} is a backup of nothing", hint=hint)
        return
    if not volume.seal.root:
        raise BadState(
            f"volume {volume.name} was never opened yet",
            hint="there is nothing in it: it is opened when an environment first uses it",
        )
    if volume.spec.format != "qcow2":
        raise BadState(
            f"volume {volume.name} is {volume.spec.format}: only qcow2 has snapshots",
            hint="say `format: qcow2` of a new volume, and copy what is in this one there",
        )
    if what == "revert" and volume.platform:
        raise in_use(volume)


def _check_accept(volume: VolumeDocument, root: str) -> None:
    if not volume.halted:
        raise BadState(
            f"volume {volume.name} is {volume.state}: there is nothing to accept",
            hint="only a halted volume waits for that; supercloud volumes inspect tells",
        )
    found = volume.found
    if found is None:
        return
    if len(root) < ROOT_SHOWN or not found.root.startswith(root):
        raise Denied(
            f"volume {volume.name} was found at epoch {found.epoch}, state {found.sequence}; "
            f"what is trusted is epoch {volume.seal.epoch}, state {volume.seal.sequence}: what was "
            "written in between would be lost",
            hint="if that is what you want: supercloud volumes accept "
            f"{volume.ucloud}/{volume.name} --root {found.root[:ROOT_SHOWN]}",
            details={"found": found.root},
        )
