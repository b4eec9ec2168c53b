"""Volumes that are kept on several hosts: opened on all of them, leased, taken up again, moved.

::

    close what may be open anywhere -> open everywhere (epochs kept) -> the next generation kept
        -> served to the host where it is used -> its mirror made there -> leased -> served

The record and its rules are in ``record``, how long a lease may last in ``leases``. Beside the
reconciler of the volume two keys of the work queue go on: ``lease/U/V`` renews, and writes down
what the mirror tells; ``rejoin/U/V`` has a replica again whose host was away.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from supercloud.control.controllers import learning, record
from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.leasing import Leasing, lease_key
from supercloud.control.controllers.others import Others, asked_of
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import Place, other_of, place_of
from supercloud.control.documents import (
    ReplicaDocument,
    VolumeDocument,
    step_begin,
    step_end,
)
from supercloud.model.errors import BadState, Denied, NotFound, SupercloudError, Temporary
from supercloud.model.events import Severity
from supercloud.providers.base import Volumes
from supercloud.wire.mirrors import (
    Mirror,
    Replica,
    VolumeRejoin,
)
from supercloud.wire.tunnel import PeerHost
from supercloud.wire.volumes import VolumeStatus

SERVE_TRIES: Final = 40
SERVE_AGAIN_S: Final = 0.25
OPEN: Final = "open"
Result = TypeVar("Result")


class Replication:
    """One volume at a time is opened, closed or moved; leases are renewed beside that."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls
        self.others, self.leasing = Others(plane, calls), Leasing(plane, calls)
        self._leases = self.leasing.leases
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    # -- towards use

    async def open(self, volume: VolumeDocument) -> float:
        """Let it be used where it is to be. Temporary while it cannot begin."""
        async with self._lock(volume):
            volume = await self._closed(volume)

            def opening(fresh: VolumeDocument) -> None:
                learning.move(fresh, "opening")
                step_begin(fresh.steps, OPEN)

            volume = await self._change(volume, opening)
            opened = await asyncio.gather(*(self.others.open(volume, o) for o in volume.others))
            there = {
                other.replica
                for other, is_open in zip(volume.others, opened, strict=True)
                if is_open
            }
            volume = await self._opened_home(volume)
            if volume.halted:
                return 0.0
            all_ended = record.all_ended(volume, {*there, volume.replica})
            if all_ended:
                self._tell(volume, "ended", "all hosts were ended by force", "warning")
            volume, mirror = await self._next_generation(volume, there, all_ended=all_ended)
            await self._serve(volume, mirror)
        return 0.0

    async def _opened_home(self, volume: VolumeDocument) -> VolumeDocument:
        def opened(fresh: VolumeDocument) -> None:
            fresh.opened = True

        volume = await self._change(volume, opened)
        asked = asked_of(self._plane, volume, volume)
        try:
            return await self._calls.act(volume, "open", lambda host: host.open(volume.host, asked))
        except (Denied, NotFound) as error:
            if not volume.seal.root or not learning.is_of_the_volume(error):
                raise
            await self._calls.halt(volume, error)
            return await self._fresh(volume)

    async def _next_generation(
        self, volume: VolumeDocument, there: set[str], *, all_ended: bool
    ) -> tuple[VolumeDocument, Mirror]:
        """Kept before anything is served in it; who is to be served is, except where it fails."""
        clean = volume.clean

        def raised(fresh: VolumeDocument) -> None:
            fresh.generation += 1
            fresh.turns = {}
            fresh.mirroring, fresh.clean = True, False

        volume = await self._change(volume, raised)
        served = [
            await self.others.share(volume, other) if other.replica in there else False
            for other in volume.others
        ]
        replicas = [_replica(volume)]
        for other, is_there in zip(volume.others, served, strict=True):
            provider = self._plane.pool.get(volume.ucloud, other.provider)
            peer = await provider.peer(other.host) if is_there else None
            replicas.append(_replica(other, there=is_there, peer=peer))
        mirror = Mirror(
            generation=volume.generation, replicas=replicas,
            clean=clean, new=volume.given is None, all_ended=all_ended,
        )  # fmt: skip
        return volume, mirror

    async def _serve(self, volume: VolumeDocument, mirror: Mirror) -> None:
        """Make the mirror, have it leased, and let the volume be used."""
        spec, home, name, epoch = volume.spec, volume.host, volume.name, volume.seal.epoch

        def serve(host: Volumes) -> Awaitable[VolumeStatus]:
            return host.serve(home, name, epoch, mirror=mirror)

        status = await self._calls.call(volume, "serve", serve)
        if status.mirror is None:
            raise BadState(f"volume {name} has no mirror at its host")
        self._leases.heard(volume, status.mirror)
        for _ in range(SERVE_TRIES):
            self._plane.look(lease_key(volume), 0.0)
            try:
                volume = await self._calls.act(volume, "serve", serve)
                break
            except Temporary:  # it waits for its lease, or for what is to be written down
                await asyncio.sleep(SERVE_AGAIN_S)
        if volume.state not in ("served", "attached"):
            raise Temporary(f"volume {name} is {volume.state}: {volume.reason}")

        def served(fresh: VolumeDocument) -> None:
            fresh.given, fresh.waits = spec, ""
            step_end(fresh.steps, OPEN)

        await self._change(volume, served)

    # -- again

    async def rejoin(self, ucloud: str, name: str) -> float | None:
        """Have the replicas again that are not connected; they get what they lack."""
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None:
            return None
        async with self._lock(volume):
            volume = await self._plane.state.volume(ucloud, name)
            if volume is None or not _is_used(volume) or not await self.leasing.is_home(volume):
                return None
            status = self._plane.mirrors.get((ucloud, name))
            away = {o.replica for o in status.replicas if not o.connected} if status else set()
            for other in volume.others:
                if other.replica in away:
                    await self._rejoined(volume, other)
        return None

    async def _rejoined(self, volume: VolumeDocument, other: ReplicaDocument) -> None:
        if not await self.others.open(volume, other):
            return
        volume = await self._fresh(volume)
        if not await self.others.share(volume, other_of(volume, other.replica)):
            return
        peer = await self._plane.pool.get(volume.ucloud, other.provider).peer(other.host)
        asked = VolumeRejoin(
            name=volume.name, generation=volume.generation, replica=other.replica, peer=peer
        )
        there = await self._calls.volumes(volume)
        try:
            await self._plane.seam(
                "provider.volume_rejoin", lambda: there.rejoin(volume.host, asked)
            )
        except SupercloudError as error:
            await self.others.note(volume, other.replica, error, refused=False)
        else:
            self._tell(volume, "rejoined", f"replica {other.replica} at {other.host}", "info")

    # -- away from use

    async def close(self, volume: VolumeDocument) -> float | None:
        """Nobody uses it: closed everywhere, equal everywhere if that can be had."""
        async with self._lock(volume):
            volume = await self._closed(await self._fresh(volume))
            for other in volume.others:
                try:
                    await self.others.close(volume, other)
                except SupercloudError as error:
                    await self.others.note(volume, other.replica, error, refused=False)
        return None

    async def _closed(self, volume: VolumeDocument) -> VolumeDocument:
        """Where it was used it is not open any more, nor is its mirror."""
        if not volume.opened and not volume.mirroring:
            return volume
        host, name = volume.host, volume.name
        try:
            status = await self._calls.call(volume, "close", lambda there: there.close(host, name))
        except NotFound:
            status = None
        clean = status is not None and status.mirror is not None and status.mirror.clean

        def closed(fresh: VolumeDocument) -> None:
            if status is None:
                fresh.kept = fresh.kept and not fresh.opened
                learning.move(fresh, "kept")
            else:
                record.ended(fresh, status)
                learning.take(fresh, status)
            fresh.opened = False
            if fresh.mirroring:
                fresh.mirroring, fresh.clean = False, clean

        volume = await self._change(volume, closed)
        self._leases.drop(volume)
        self._plane.mirrors.pop((volume.ucloud, volume.name), None)
        return volume

    # -- elsewhere

    async def move(self, volume: VolumeDocument, place: Place) -> float:
        """Have it used on another of its hosts: when nothing answers where it was.

        Its host closes it if it can be asked; else its lease is waited for. Seconds to wait, or 0.
        """
        name = (volume.ucloud, volume.name)
        async with self._lock(volume):
            self.leasing.moving.add(name)
            volume = await self._fresh(volume)
            if volume.mirroring:
                left_s = await self._let_go(volume)
                if left_s:
                    return left_s
                volume = await self._fresh(volume)
            before = place_of(volume)

            def moved(fresh: VolumeDocument) -> None:
                record.move(fresh, place)

            volume = await self._change(volume, moved)
            self.leasing.moving.discard(name)
            self._leases.drop(volume)
            self._plane.mirrors.pop(name, None)
            self._plane.seen.pop(name, None)
            self._tell(volume, "moved", f"from {'/'.join(before)} to {'/'.join(place)}", "warning")
        return 0.0

    def stay(self, volume: VolumeDocument) -> None:
        """It is to be used where it is: a move that was begun, and waited, is none any more."""
        self.leasing.moving.discard((volume.ucloud, volume.name))

    async def _let_go(self, volume: VolumeDocument) -> float:
        """0 when its mirror answers no more, for certain."""
        try:
            async with asyncio.timeout(self._plane.pace.lease_valid_s):
                await self._closed(volume)
        except (SupercloudError, TimeoutError):
            return self._leases.left_s(volume)
        return 0.0

    # -- helpers

    async def _change(
        self, volume: VolumeDocument, mutate: Callable[[VolumeDocument], object]
    ) -> VolumeDocument:
        return await self._plane.state.change(volume, mutate)

    async def _fresh(self, volume: VolumeDocument) -> VolumeDocument:
        fresh = await self._plane.state.volume(volume.ucloud, volume.name)
        if fresh is None:
            raise NotFound(f"volume {volume.name} is gone")
        return fresh

    def _tell(self, volume: VolumeDocument, code: str, message: str, severity: Severity) -> None:
        self._plane.tell(volume, f"volume.replica_{code}", message, severity)

    def _lock(self, volume: VolumeDocument) -> asyncio.Lock:
        return self._locks.setdefault((volume.ucloud, volume.name), asyncio.Lock())


def _replica(
    replica: record.Replica, *, there: bool = True, peer: PeerHost | None = None
) -> Replica:
    return Replica(
        replica=replica.replica, in_sync=replica.in_sync, kept=replica.kept, there=there, peer=peer
    )


def _is_used(volume: VolumeDocument) -> bool:
    return volume.mirroring and volume.state in ("served", "attached")
