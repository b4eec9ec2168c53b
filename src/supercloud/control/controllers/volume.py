"""The reconciler of volumes: open while somebody wants it, attached where it is wanted.

::

    open (its epoch is kept) -> serve -> attach (its slot is published) -> detach -> close

Every seal that a host shows goes through ``control.seals``. A volume whose host shows one that
cannot be, or refuses to open it for that, is *halted*: left alone until its user acts.
"""

import base64
import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

from supercloud.control import held
from supercloud.control.controllers import learning
from supercloud.control.controllers.copying import Copying, is_asked_for, is_under_way
from supercloud.control.controllers.hostcalls import HostCalls, wire_spec
from supercloud.control.controllers.leasing import lease_key
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import place_of
from supercloud.control.controllers.replication import Replication
from supercloud.control.controllers.sealing import USABLE, Sealing, seals_keys
from supercloud.control.controllers.usage import Usage, usage_of
from supercloud.control.documents import (
    PlatformDocument,
    VolumeDocument,
    platform_key,
    step_begin,
    step_end,
    ucloud_key,
)
from supercloud.model.errors import BadState, Busy, Denied, NotFound, UserError, to_wire
from supercloud.model.events import Severity
from supercloud.providers.base import Volumes
from supercloud.wire.volumes import VolumeOpen, VolumeStatus

OPEN, ATTACH = "open", "attach"

log = logging.getLogger("supercloud.control.controllers.volume")


class VolumeController:
    """Reconciles one volume at a time; see ``reconcile``. ``sealing`` asks after the seals.

    ``calls`` is the way to the hosts of volumes, for all that act on volumes.
    """

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane
        self.calls = HostCalls(plane)
        self._act = self.calls.act
        self.replication = Replication(plane, self.calls)
        self.copying = Copying(plane, self.calls)
        self.sealing = Sealing(plane, self.calls, self.replication.others)

    async def reconcile(self, ucloud: str, name: str) -> float | None:
        """One look; seconds until the next one, or None."""
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None:
            return None
        usage = await usage_of(self._plane, volume)
        if volume.deleting:
            return await self._delete(volume, usage)
        if volume.halted:
            return await self._let_go(volume, usage)
        volume = await self._keyed(volume)
        if volume.others:
            place = await self.replication.leasing.home_of(volume)
            if place != place_of(volume):
                return await self.replication.move(volume, place)
            self.replication.stay(volume)
        if volume.opened:
            for key in seals_keys(volume):
                self._plane.look(key, self._plane.pace.seal_s)
        if volume.mirroring:
            self._plane.look(lease_key(volume), self._plane.pace.lease_s)
        wanted = (
            usage.wanted
            or learning.waits(volume.task)
            or bool(await self._unclaimed(volume))
            or await self.copying.holds(volume)
        )
        if volume.state in USABLE:
            return await self._use(volume, usage, wanted=wanted)
        if wanted:
            return await self._open(volume)
        return await (self._close(volume) if volume.opened else self.copying.next_s(volume))

    # -- towards use

    async def _keyed(self, volume: VolumeDocument) -> VolumeDocument:
        """With a data key, under the present wrapping key."""
        keys, before = self._plane.keys(volume.ucloud), volume.wrapped_key
        wrapped = keys.rewrapped(before) if before else keys.make()
        if wrapped == before:
            return volume

        def keyed(fresh: VolumeDocument) -> None:
            if fresh.wrapped_key == before:
                fresh.wrapped_key = wrapped

        return await self._change(volume, keyed)

    async def _open(self, volume: VolumeDocument) -> float:
        if volume.others:
            return await self.replication.open(volume)

        def opening(fresh: VolumeDocument) -> None:
            learning.move(fresh, "opening")
            fresh.opened = True
            step_begin(fresh.steps, OPEN)

        volume = await self._change(volume, opening)
        key = self._plane.keys(volume.ucloud).unwrap(volume.wrapped_key)
        spec, encoded = volume.spec, base64.b64encode(key).decode()
        asked = VolumeOpen(spec=wire_spec(volume), key_base64=encoded, seal=volume.seal)
        try:
            # What it tells is kept by then, its epoch above all: before it is used.
            volume = await self._act(volume, "open", lambda host: host.open(volume.host, asked))
        except (Denied, NotFound) as error:
            if not volume.seal.root or not learning.is_of_the_volume(error):
                raise
            await self.calls.halt(volume, error)
            return 0.0
        if volume.halted:
            return 0.0
        epoch = volume.seal.epoch
        await self._act(volume, "serve", lambda host: host.serve(volume.host, volume.name, epoch))

        def served(fresh: VolumeDocument) -> None:
            fresh.given, fresh.waits = spec, ""
            step_end(fresh.steps, OPEN)

        await self._change(volume, served)
        return 0.0

    async def _use(self, volume: VolumeDocument, usage: Usage, *, wanted: bool) -> float | None:
        if is_under_way(volume):
            return await self.copying.go_on(volume, volume.copying)
        if usage.coming:
            return await self._come(volume, usage)
        if volume.given != volume.spec:
            waiting = await self._grow(volume)
            if waiting is None:
                return 0.0
            volume = waiting
        if back := await self._back(volume):
            return await self._go_back(volume, usage, back)
        if learning.waits(volume.task) and not is_asked_for(volume.task):
            return await self._task(volume)
        if unclaimed := await self._unclaimed(volume):
            return await self._forget(volume, unclaimed)
        if not volume.platform and (number := await self.copying.due(volume)):
            return await self.copying.go_on(volume, number)
        if volume.platform:
            if usage.attached(volume):
                return self._plane.pace.lost_observe_s if volume.waits else None
            stuck = volume.full and not usage.wanted  # who waits for room lets go of nothing
            free = usage.free or stuck
            return await self._detach(volume) if free else self._plane.pace.release_s
        if usage.platform is not None and usage.platform.state == "ready":
            return await self._attach(volume, usage.platform)
        return None if wanted else await self._close(volume)

    async def _grow(self, volume: VolumeDocument) -> VolumeDocument | None:
        """None when it has grown; one that cannot under its user waits, and is as it was."""
        if volume.others and volume.given and volume.given.size_bytes < volume.spec.size_bytes:
            return await self._reopen(volume)
        spec, asked = volume.spec, wire_spec(volume)
        try:
            await self._act(volume, "change", lambda host: host.change(volume.host, asked))
        except (BadState, Busy) as refused:
            if not volume.platform:
                raise
            return await self._waits(volume, refused.message)

        def given(fresh: VolumeDocument) -> None:
            fresh.given, fresh.waits = spec, ""

        await self._change(volume, given)
        return None

    async def _reopen(self, volume: VolumeDocument) -> VolumeDocument | None:
        """One that is kept on several hosts grows when it is opened, before it is mirrored."""
        if volume.platform:
            why = "it is kept on several hosts, and grows once nothing uses it"
            return await self._waits(volume, f"{why}: supercloud down, then up again")
        await self._close(volume)
        return None

    async def _waits(self, volume: VolumeDocument, why: str) -> VolumeDocument:
        if volume.waits != why:
            self._plane.tell(volume, "volume.waits", why, severity="warning")
        return await self._change(volume, lambda fresh: setattr(fresh, "waits", why))

    async def _attach(self, volume: VolumeDocument, platform: PlatformDocument) -> float:
        def attaching(fresh: VolumeDocument) -> None:
            fresh.incarnation = platform.incarnation
            step_begin(fresh.steps, ATTACH)

        volume = await self._change(volume, attaching)
        name = platform.name
        restorable = await self._is_restorable(platform)
        await self._act(
            volume,
            "attach",
            lambda host: host.attach(volume.host, volume.name, name, restorable=restorable),
        )
        await self._change(volume, lambda fresh: step_end(fresh.steps, ATTACH))
        self._plane.look(platform_key(volume.ucloud, name), 0.0)
        return 0.0

    async def _is_restorable(self, platform: PlatformDocument) -> bool:
        """Whether checkpoints are to be taken of the platform."""
        found = await self._plane.state.checkpoints_of(platform.ucloud, platform.name)
        return found is not None and found.of == "platform" and found.policy is not None

    async def _come(self, volume: VolumeDocument, usage: Usage) -> float | None:
        """Free, then untouched while its platform is made with it; then it is known to have it."""
        platform = usage.platform
        if platform is None or usage.attached(volume):
            return None
        if volume.platform:
            return await self._detach(volume) if usage.free else self._plane.pace.release_s
        if platform.state in ("booting", "ready"):
            return await self._attach(volume, platform)
        return None

    # -- away from use

    async def _detach(self, volume: VolumeDocument) -> float:
        await self._act(volume, "detach", lambda host: host.detach(volume.host, volume.name))
        return 0.0

    async def _close(self, volume: VolumeDocument) -> float:
        volume = await self._change(volume, lambda fresh: learning.move(fresh, "closing"))
        if volume.others:
            await self.replication.close(volume)
        else:
            await self._act(volume, "close", lambda host: host.close(volume.host, volume.name))
        self._plane.look(ucloud_key(volume.ucloud), self._plane.pace.settle_s)
        return 0.0

    async def _let_go(self, volume: VolumeDocument, usage: Usage) -> float | None:
        """Nobody uses a halted one any more: its host closes it, whatever its seal."""
        if usage.wanted or not volume.opened:
            return None
        if not usage.free:
            return self._plane.pace.release_s
        host, name = volume.host, volume.name
        try:
            if volume.platform:
                await self.calls.call(volume, "detach", lambda there: there.detach(host, name))
            await self.calls.call(volume, "close", lambda there: there.close(host, name))
        except (NotFound, BadState, Denied) as error:
            self._plane.tell(volume, "volume.close", str(error), severity="warning")

        def closed(fresh: VolumeDocument) -> None:
            fresh.opened, fresh.platform, fresh.slot = False, "", 0

        await self._change(volume, closed)
        self._plane.look(ucloud_key(volume.ucloud), self._plane.pace.settle_s)
        return None

    async def _delete(self, volume: VolumeDocument, usage: Usage) -> float | None:
        if is_under_way(volume):
            return await self.copying.go_on(volume, volume.copying)
        if not usage.free or await self.copying.is_under_way(volume):
            return self._plane.pace.release_s
        volume = await self._change(volume, lambda fresh: learning.move(fresh, "deleting"))
        if volume.opened or volume.seal.root:  # otherwise its host never heard of it
            await self._delete_there(volume)
        await self.replication.others.delete(volume)
        await self._plane.state.remove(volume)
        self._plane.seen.pop((volume.ucloud, volume.name), None)
        self._plane.tell(volume, "volume.deleted")
        self._plane.look(ucloud_key(volume.ucloud), 0.0)
        return None

    async def _delete_there(self, volume: VolumeDocument) -> None:
        host, name = volume.host, volume.name
        there = await self.calls.volumes(volume)
        if volume.platform:
            with contextlib.suppress(NotFound):
                await self._plane.seam("provider.volume_detach", lambda: there.detach(host, name))
        await self._plane.seam("provider.volume_delete", lambda: there.delete(host, name))

    # -- snapshots of checkpoints

    async def _back(self, volume: VolumeDocument) -> held.Back | None:
        state, ucloud = self._plane.state, volume.ucloud
        environments = await state.environments(ucloud)
        return held.going_back(volume, environments, await state.checkpoints(ucloud))

    async def _go_back(self, volume: VolumeDocument, usage: Usage, back: held.Back) -> float:
        """Nobody has it before this is written down: half done, it may be done again."""
        if volume.platform:
            return await self._detach(volume) if usage.free else self._plane.pace.release_s
        name, snapshot = volume.name, back.snapshot
        await self._act(volume, "revert", lambda host: host.revert(volume.host, name, snapshot))

        def gone_back(fresh: VolumeDocument) -> None:
            fresh.reverted = back.mark

        volume = await self._change(volume, gone_back)
        message = f"as it was at checkpoint {back.sequence} of {back.name}"
        self._plane.tell(volume, "volume.reverted", message, severity="warning")
        return 0.0

    async def _unclaimed(self, volume: VolumeDocument) -> list[str]:
        return held.unclaimed(volume, await self._plane.state.checkpoints(volume.ucloud))

    async def _forget(self, volume: VolumeDocument, snapshots: list[str]) -> float:
        for name in snapshots:
            try:
                await self._act(volume, "forget", functools.partial(_forget, volume, name))
            except (Busy, BadState) as error:
                log.info("volume %s: %s", volume.name, error)
                return self._plane.pace.checkpoint_retry_s
        return 0.0

    # -- what the user asks for once

    async def _task(self, volume: VolumeDocument) -> float:
        task = volume.task
        if task is None:
            raise BadState(f"nothing is asked of volume {volume.name}")
        error: dict[str, Any] | None = None
        try:
            if task.what == "revert" and volume.platform:
                raise learning.in_use(volume)
            volume = await self._act(
                volume,
                task.what,
                lambda host: getattr(host, task.what)(volume.host, volume.name, task.snapshot),
            )
        except UserError as refused:
            error = to_wire(refused)

        def done(fresh: VolumeDocument) -> None:
            if fresh.task is not None and fresh.task.id == task.id:
                fresh.task.done, fresh.task.error = True, error

        volume = await self._change(volume, done)
        message = str(error["message"]) if error else task.snapshot
        severity: Severity = "warning" if error else "info"
        self._plane.tell(volume, f"volume.{task.what}", message, severity)
        return 0.0

    # -- helpers

    async def _change(
        self, volume: VolumeDocument, mutate: Callable[[VolumeDocument], object]
    ) -> VolumeDocument:
        return await self._plane.state.change(volume, mutate)


async def _forget(volume: VolumeDocument, snapshot: str, host: Volumes) -> VolumeStatus:
    return await host.forget(volume.host, volume.name, snapshot)
