"""The volumes of a U-Cloud on this host: opened, served, attached to platforms, closed, deleted.

A volume is a backing file of the provider's disk driver, under it a device of the user's protection
service, on that a volume of the user's block service. Each is worked on by one call at a time;
every refusal comes before any effect. The data key passes through here, and is not kept.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Final

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.user_domain.layers import Layers
from supercloud.lower.user_domain.mirrors import KIND as REPLICATION
from supercloud.lower.user_domain.mirrors import Mirrors
from supercloud.lower.user_domain.services import Services
from supercloud.lower.user_domain.volume_checks import check_alike, check_spec, key_of
from supercloud.lower.user_domain.volume_copies import Copies
from supercloud.lower.user_domain.volume_growth import Growth
from supercloud.lower.user_domain.volume_news import event_of
from supercloud.lower.user_domain.volume_records import Volume, VolumeRecords
from supercloud.model.errors import (
    BadState,
    Busy,
    Denied,
    Exists,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.model.events import Severity
from supercloud.wire.checkpoints import GoesBack
from supercloud.wire.mirrors import Mirror, MirrorStatus, Shared
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.volumes import (
    Seal,
    VolumeAttach,
    VolumeOpen,
    VolumeServe,
    VolumeSnapshot,
    VolumeSpec,
    VolumeStatus,
)

IN_USE: Final = ("opened", "served", "attached")
KINDS: Final = ("protection", "block")
"""The services that volumes are made of."""

Machine = Callable[[str], Awaitable[Channel]]
"""The monitor of a running platform by name; NotFound, BadState."""

log = logging.getLogger("supercloud.lower.user_domain.volumes")


class Volumes:
    """Records, and the layers that each volume is made of."""

    def __init__(
        self,
        hub: Hub,
        services: Services,
        mirrors: Mirrors,
        feed: Feed,
        directory: str,
        machine: Machine,
    ) -> None:
        self._feed, self._machine = feed, machine
        self._records = VolumeRecords(directory)
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._services = services
        services.told |= dict.fromkeys(KINDS, self._told)
        self._layers, self._mirrors = Layers(hub.join("disk"), services, mirrors), mirrors
        mirrors.over = self._mirror_over
        self._growth = Growth(self._layers, machine, self._records, self._lock)
        self.copies = Copies(self._layers, self._found, self._status, self._copied)

    # -- what is

    async def statuses(self) -> list[VolumeStatus]:
        """All of them, by name, with their seals as of now."""
        found = sorted(self._records.by_name.items())
        return list(await asyncio.gather(*(self._status(volume) for _, volume in found)))

    async def _status(self, volume: Volume) -> VolumeStatus:
        if volume.state not in IN_USE:
            return volume.status()
        name = volume.spec.name
        try:
            facts = await self._layers.facts(name, used=volume.in_use)
            if volume.mirrored:
                facts["mirror"] = await self._mirrors.status(name)
            return volume.status(**facts)
        except SupercloudError as error:  # a service is going down: the next look tells more
            log.warning("%s: %s", volume.spec.name, error)
            return volume.status()

    # -- open and close

    async def open(self, asked: VolumeOpen) -> VolumeStatus:
        """Have it, and its next epoch. Exists, NoResources, Denied (it is not what it was)."""
        key, spec = key_of(asked), asked.spec
        check_spec(spec)
        async with self._lock(spec.name):
            volume = self._records.by_name.get(spec.name)
            if volume is not None and volume.state == "deleting":
                await self._give_back(volume)  # as was begun
                volume = None
            if volume is not None:
                check_alike(volume, spec)
                if volume.state in ("served", "attached"):
                    volume.wanted = spec
                    return await self._status(volume)
                if volume.used and not asked.seal.root:
                    raise Exists(
                        f"volume {spec.name} holds data, and its seal was not given",
                        hint="only who has its seal and key can open it; delete it, or use another",
                    )
            if volume is None and asked.seal.root:
                raise NotFound(f"no volume {spec.name} here")
            fresh = volume is None
            volume = volume or Volume(spec)
            self._records.put(volume)  # before anything is made of it
            try:
                seal = await self._layers.open(volume.spec, key, asked.seal)
            except BaseException as error:
                await self._not_opened(volume, error, fresh=fresh)
                raise
            volume.wanted, volume.promised = spec, seal.epoch
            self._go(volume, "opened")
            return volume.status(seal=seal)

    async def _not_opened(self, volume: Volume, error: BaseException, *, fresh: bool) -> None:
        if fresh:
            with contextlib.suppress(SupercloudError):
                await self._give_back(volume)
        elif isinstance(error, SupercloudError):
            self._go(volume, "failed", str(error))

    async def serve(self, asked: VolumeServe) -> VolumeStatus:
        """Let it be used: its epoch is kept. BadState when another epoch is open."""
        async with self._found(asked.name) as volume:
            if volume.state == "opened":
                if asked.epoch != volume.promised:
                    raise BadState(f"volume {asked.name} was opened for epoch {volume.promised}")
                if not await self._serve(volume, asked):
                    return await self._status(volume)
            if asked.shared != volume.shared or (asked.mirror is not None) != volume.mirrored:
                raise BadState(f"volume {asked.name} is served otherwise", hint="close it first")
            if volume.state == "served" and volume.in_use:  # also if it could not the last time
                await self._change(volume, volume.wanted or volume.spec)
            if volume.state not in IN_USE:
                raise BadState(f"volume {asked.name} is {volume.state}", hint="open it first")
            return await self._status(volume)

    async def _serve(self, volume: Volume, asked: VolumeServe) -> bool:
        """Whether it is served: a mirror that was only just made is not yet."""
        new = not volume.used if asked.mirror is None else asked.mirror.new
        try:
            await self._layers.begin(volume.spec.name, volume.promised)
            if asked.mirror is not None or asked.shared is not None:
                await self._growth.replica(volume)
            if asked.mirror is not None and not volume.mirrored:
                await self._mirror(volume, asked.mirror)
                return False
            if asked.shared is None:
                await self._layers.serve(volume.spec, asked.mirror, new=new)
        except Temporary:
            raise
        except SupercloudError as error:
            self._go(volume, "failed", f"it could not be served: {error}")
            raise
        volume.used, volume.shared = True, asked.shared
        self._go(volume, "served")
        return True

    async def _mirror(self, volume: Volume, asked: Mirror) -> None:
        """It gets its lease next, and is served when it is asked for again."""
        volume.used = True  # something may be in the device from now on
        self._records.put(volume)
        await self._layers.mirror(volume.spec, asked)
        volume.mirrored = True
        self._records.put(volume)

    async def share(self, host: str, name: str, generation: int) -> socket.socket:
        """The device, for the mirror of that generation on ``host``. Denied, NotFound.

        A second stream is not given: what is in the first one yet would come after what is newer.
        """
        async with self._found(name) as volume:
            wanted = Shared(host=host, generation=generation)
            if volume.state != "served" or volume.shared != wanted:
                raise Denied(f"volume {name} is not served to host {host} in that generation")
            if volume.streamed:
                raise Denied(f"volume {name} was given to host {host} already: close it first")
            volume.streamed = True
            self._records.put(volume)
            return socket.socket(fileno=await self._layers.share(name))

    async def close(self, name: str) -> VolumeStatus:
        """What was written is on the disk, and the seal final. BadState: attached; Busy: copied.

        Asked again it answers the same; one that was not closed in order shows no seal.
        """
        async with self._found(name) as volume:
            if volume.state == "attached":
                raise BadState(f"volume {name} is attached to {volume.platform}")
            if volume.state not in (*IN_USE, "failed"):
                return volume.status(seal=volume.last)
            seal, mirror = await self._close(volume)
            volume.last = seal
            self._go(volume, "closed")
            return volume.status(seal=seal, mirror=mirror)

    async def _close(self, volume: Volume) -> tuple[Seal, MirrorStatus | None]:
        """A second try closes what the first one has left."""
        if volume.state == "failed":
            return await self._layers.put_away(volume.spec.name), None
        try:
            return await self._layers.close(volume.spec.name, mirrored=volume.mirrored)
        except SupercloudError as error:
            if not isinstance(error, Busy):  # the block service's, before anything is done
                self._go(volume, "failed", f"it could not be closed in order: {error}")
            raise

    async def delete(self, name: str) -> None:
        """With all that is in it; nothing when it is not there. BadState when attached."""
        async with self._lock(name):
            volume = self._records.by_name.get(name)
            if volume is None:
                return
            if volume.state == "attached":
                raise BadState(f"volume {name} is attached to {volume.platform}")
            await self._give_back(volume)
            self._say(volume, "gone")

    async def _give_back(self, volume: Volume) -> None:
        """Whatever there is of it; its record goes last, so that this may be tried again."""
        volume.go("deleting")
        self._records.put(volume)
        await self._layers.put_away(volume.spec.name)
        await self._layers.delete(volume.spec.name)
        self._records.remove(volume.spec.name)

    # -- attach and detach

    async def attach(self, asked: VolumeAttach) -> VolumeStatus:
        """Give it to a running platform. BadState when another one has it, NoResources: no slot."""
        async with self._found(asked.name) as volume:
            if volume.state == "attached":
                if volume.platform != asked.platform:
                    raise BadState(f"volume {asked.name} is attached to {volume.platform}")
                return await self._status(volume)
            if volume.state != "served" or not volume.in_use:
                raise BadState(f"volume {asked.name} is {volume.state}", hint="open it first")
            machine = await self._machine(asked.platform)
            async with self._lock(f"slots of {asked.platform}"):
                there = await self._layers.slots_beside(asked.name, machine)
                slot = self._free_slot(asked.platform, there)
                mode = await self._layers.attach(
                    asked.name, asked.platform, machine, slot, restorable=asked.restorable
                )
                volume.platform, volume.slot, volume.mode = asked.platform, slot, mode
                self._go(volume, "attached")
            return await self._status(volume)

    async def go_back(self, wanted: GoesBack, platform: str) -> int:
        """To a snapshot, and then to a platform that is about to be restored, in that slot.

        A socket by NBD, the caller's. BadState when it is not free, NotFound: no such snapshot.
        """
        name = wanted.volume
        async with self._found(name) as volume:
            if volume.state != "served" or not volume.in_use or volume.spec.format == "raw":
                raise BadState(f"volume {name} is {volume.state}: {platform} cannot have it back")
            await self._layers.of_snapshot("revert", volume.spec, wanted.snapshot)
            self._say(volume, f"revert.{wanted.snapshot}")
            descriptor = await self._layers.connect(name, platform)
            volume.platform, volume.slot, volume.mode = platform, wanted.slot, "nbd"
            self._go(volume, "attached")
            return descriptor

    def check_in(self, name: str, platform: str, slot: int) -> None:
        """BadState unless that platform has the volume in that slot."""
        volume = self._records.by_name.get(name)
        if volume is None or (volume.platform, volume.slot) != (platform, slot):
            raise BadState(f"{platform} has a volume {name} of no record in slot {slot}")

    async def check_room(self, platform: str) -> None:
        """NoResources when what writes to one of its volumes waits: it cannot be stopped then."""
        for name, volume in list(self._records.by_name.items()):
            if volume.platform == platform:
                await self._layers.need_room(name, "left as it is")

    def _free_slot(self, platform: str, taken: set[int]) -> int:
        taken |= {v.slot for v in self._records.by_name.values() if v.platform == platform}
        for slot in range(1, VOLUME_SLOTS + 1):
            if slot not in taken:
                return slot
        raise NoResources(f"{platform} has {VOLUME_SLOTS} volumes, which is as many as it takes")

    async def detach(self, name: str) -> VolumeStatus:
        """Take it from its platform, if one has it."""
        async with self._found(name) as volume:
            if volume.state == "attached":
                await self._detach(volume)
            return await self._status(volume)

    async def _detach(self, volume: Volume) -> None:
        try:
            machine = await self._machine(volume.platform)
        except SupercloudError:
            machine = None  # its platform has ended
        await self._layers.detach(volume.spec.name, machine)
        self._go(volume, "served")

    async def platform_ended(self, platform: str) -> None:
        """A platform is gone, and with it its end of what was attached."""
        for name, volume in list(self._records.by_name.items()):
            async with self._lock(name):
                if volume.state == "attached" and volume.platform == platform:
                    try:
                        await self._detach(volume)
                    except SupercloudError as error:
                        self._go(volume, "failed", f"it could not be detached: {error}")

    # -- changes

    async def change(self, spec: VolumeSpec) -> VolumeStatus:
        """Grow it, or throttle it otherwise. Invalid when it would shrink."""
        check_spec(spec)
        async with self._found(spec.name) as volume:
            check_alike(volume, spec)
            if not volume.in_use:
                raise BadState(f"volume {spec.name} is {volume.state}", hint="open it first")
            await self._change(volume, spec)
            return await self._status(volume)

    async def _change(self, volume: Volume, spec: VolumeSpec) -> None:
        if volume.spec == spec:
            return
        try:
            await self._growth.change(volume, spec)
        except SupercloudError:
            self._in_background(self._look_after(volume))
            raise
        volume.spec = spec
        self._records.put(volume)
        self._say(volume, "changed")

    async def snapshot(self, asked: VolumeSnapshot) -> VolumeStatus:
        """Make a snapshot; one of that name is kept as it is."""
        return await self._of_snapshot("snapshot", asked, ("served", "attached"))

    async def revert(self, asked: VolumeSnapshot) -> VolumeStatus:
        """Go back to a snapshot. BadState while a platform has the volume."""
        return await self._of_snapshot("revert", asked, ("served",))

    async def forget(self, asked: VolumeSnapshot) -> VolumeStatus:
        """Delete a snapshot."""
        return await self._of_snapshot("forget", asked, ("served", "attached"))

    async def _of_snapshot(
        self, what: str, asked: VolumeSnapshot, states: tuple[str, ...]
    ) -> VolumeStatus:
        async with self._found(asked.name) as volume:
            if volume.spec.format == "raw":
                raise Unsupported("a raw volume has no snapshots", hint="format: qcow2 has them")
            if volume.state == "attached" and "attached" not in states:
                raise BadState(f"volume {asked.name} is attached to {volume.platform}")
            if volume.state not in states or not volume.in_use:
                raise BadState(f"volume {asked.name} is {volume.state}", hint="open it first")
            await self._layers.of_snapshot(what, volume.spec, asked.snapshot)
            self._say(volume, f"{what}.{asked.snapshot}")
            return await self._status(volume)

    # -- after a restart of this domain, and when a service died

    async def adopt(self, running: set[str]) -> None:
        """Take up what is open; ``running`` are the platforms that live."""
        self._services.reserve()
        running_kinds = [kind for kind in KINDS if self._services.is_running(kind)]
        alive = len(running_kinds) == len(KINDS)
        for kind in () if alive else running_kinds:
            self._services.end(kind)  # the one is of no use without the other
        for name, volume in list(self._records.by_name.items()):
            if volume.state == "deleting":
                with contextlib.suppress(SupercloudError):  # it is asked for again
                    await self.delete(name)
            elif volume.state in IN_USE and not alive:
                self._go(volume, "closed", "the host was started anew")
        for platform in {v.platform for v in self._records.by_name.values()} - running - {""}:
            await self.platform_ended(platform)
        if alive:
            self._layers.join()
            for volume in self._records.by_name.values():
                self._in_background(self._look_after(volume))

    async def _look_after(self, volume: Volume) -> None:
        """What was lost, and nobody was there to be told."""
        with contextlib.suppress(SupercloudError):
            if volume.state in IN_USE:
                lost = await self._layers.lost(
                    volume.spec.name, used=volume.in_use, mirrored=volume.mirrored
                )
                if lost:
                    await self._lost(volume, lost)

    def service_ended(self, entry: str) -> bool:
        """A domain died: True when it was one of ours. All that was open has failed."""
        kind = self._services.kind_of(entry)
        if kind == REPLICATION:
            self._services.end(kind)
            for volume in self._records.by_name.values():
                if volume.mirrored and volume.state in IN_USE:
                    self._in_background(self._lost(volume, "its replication service died"))
            return True
        if kind not in KINDS:
            return False
        for other in KINDS:
            self._services.end(other)  # the one is of no use without the other
        for volume in self._records.by_name.values():
            if volume.state in IN_USE:
                self._go(volume, "failed", f"its {kind} service died")
        return True

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        name = str(untrusted.get("volume") or untrusted.get("device"))
        volume = self._records.by_name.get(name)
        if volume is None:
            return
        if method == "volume.copied":
            error = str(untrusted.get("error", ""))[:1000]
            self.copies.ended(str(untrusted.get("to")), error)
        elif method == "volume.lost" and volume.state in IN_USE:
            reason = str(untrusted.get("reason", ""))[:1000]
            self._in_background(self._lost(volume, f"its storage daemon ended: {reason}"))
        elif event := event_of(method, untrusted):
            code, message, severity = event
            self._feed.say(f"volume/{name}", f"host.volume.{code}", message, severity=severity)

    def _mirror_over(self, name: str, reason: str) -> None:
        volume = self._records.by_name.get(name)
        if volume is not None and volume.mirrored and volume.state in IN_USE:
            self._in_background(self._lost(volume, f"its mirror is over: {reason}"))

    async def _lost(self, volume: Volume, reason: str) -> None:
        """Something of it is gone: its platform gets I/O errors until it is there again."""
        async with self._lock(volume.spec.name):
            if volume.state not in IN_USE:
                return  # it was closed meanwhile
            if volume.state == "attached":
                with contextlib.suppress(SupercloudError):
                    await self._layers.unplug(
                        volume.spec.name, await self._machine(volume.platform)
                    )
            self._go(volume, "failed", reason)

    # -- bookkeeping

    @contextlib.asynccontextmanager
    async def _found(self, name: str) -> AsyncIterator[Volume]:
        async with self._lock(name):
            volume = self._records.by_name.get(name)
            if volume is None:
                raise NotFound(f"no volume {name} here")
            yield volume

    def _go(self, volume: Volume, state: str, reason: str = "") -> None:
        volume.go(state, reason)
        self._records.put(volume)
        self._say(volume, state)

    def _say(self, volume: Volume, code: str) -> None:
        severity: Severity = "error" if code == "failed" else "info"
        subject = f"volume/{volume.spec.name}"
        self._feed.say(subject, f"host.volume.{code}", volume.reason, severity=severity)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _copied(self, volume: Volume, number: int) -> None:
        volume.copied = number
        self._records.put(volume)
        self._say(volume, "copied")

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())
