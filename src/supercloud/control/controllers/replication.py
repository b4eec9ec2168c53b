"""Volumes that are kept on several hosts: opened on all of them, leased, taken up again, moved.

::

    close what may be open anywhere -> open everywhere (epochs kept) -> the next generation kept
        -> served to the host where it is used -> its mirror made there -> leased -> served

The record and its rules are in ``record``, how long a lease may last in ``leases``. Beside the
reconciler of the volume two keys of the work queue go on: ``lease/U/V`` renews, and writes down
what the mirror tells; ``rejoin/U/V`` has a replica again whose host was away.
"""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from supercloud.control.controllers import learning, record
from supercloud.control.controllers.hostcalls import HostCalls, wire_spec
from supercloud.control.controllers.leases import Leases
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import Place, other_of, place_of
from supercloud.control.documents import (
    ReplicaDocument,
    VolumeDocument,
    step_begin,
    step_end,
    volume_key,
)
from supercloud.model.errors import BadState, Denied, NotFound, SupercloudError, Temporary
from supercloud.model.events import Severity
from supercloud.providers.base import Volumes
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    Replica,
    ReplicaStatus,
    Shared,
    VolumeRejoin,
)
from supercloud.wire.tunnel import PeerHost
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeStatus

SERVE_TRIES: Final = 40
SERVE_AGAIN_S: Final = 0.25
OPEN: Final = "open"
Result = TypeVar("Result")


def lease_key(volume: VolumeDocument) -> str:
    """The work queue's key for renewing its lease."""
    return f"lease/{volume.ucloud}/{volume.name}"


def rejoin_key(volume: VolumeDocument) -> str:
    """The work queue's key for having replicas again."""
    return f"rejoin/{volume.ucloud}/{volume.name}"


class Replication:
    """One volume at a time is opened, closed or moved; leases are renewed beside that."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls
        self.leases = Leases(plane.pace.lease_valid_s)
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._rejoined_s: dict[tuple[str, str], float] = {}
        self._moving: set[tuple[str, str]] = set()  # nothing is granted to them any more

    # -- towards use

    async def open(self, volume: VolumeDocument) -> float:
        """Let it be used where it is to be. Temporary while it cannot begin."""
        async with self._lock(volume):
            volume = await self._closed(volume)

            def opening(fresh: VolumeDocument) -> None:
                learning.move(fresh, "opening")
                step_begin(fresh.steps, OPEN)

            volume = await self._change(volume, opening)
            opened = await asyncio.gather(*(self._opened(volume, o) for o in volume.others))
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
        asked = self._asked(volume, volume)
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
            await self._shared(volume, other) if other.replica in there else False
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
        self.leases.heard(volume, status.mirror)
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
            fresh.given = spec
            step_end(fresh.steps, OPEN)

        await self._change(volume, served)

    # -- other replicas

    async def _opened(self, volume: VolumeDocument, other: ReplicaDocument) -> bool:
        """Whether it is open, anew: what was in older connections is never served."""
        name = other.replica
        try:
            await self._closed_other(volume, other)
            other = await self._renewed(volume, name)
            if other.refused:
                return False

            def opening(fresh: VolumeDocument) -> None:
                other_of(fresh, name).opened = True

            volume = await self._change(volume, opening)
            asked = self._asked(volume, other_of(volume, name))
            status = await self._at(
                volume, other, "open", lambda there: there.open(other.host, asked)
            )
        except SupercloudError as error:
            refused = isinstance(error, Denied | NotFound) and learning.is_of_the_volume(error)
            await self._note(volume, name, error, refused=refused and bool(other.seal.root))
            return False
        return await self._learn(volume, name, status)

    async def _renewed(self, volume: VolumeDocument, name: str) -> ReplicaDocument:
        """One that was refused, and is not in sync, is made anew: others have it all."""
        other = other_of(volume, name)
        if other.refused and not other.in_sync:
            host = other.host
            await self._at(volume, other, "delete", lambda there: there.delete(host, volume.name))
            self._tell(volume, "renewed", f"at {host}, where {other.refused}", "error")

            def renewed(fresh: VolumeDocument) -> None:
                replica = other_of(fresh, name)
                replica.seal, replica.wrapped_key = Seal(), ""
                replica.opened, replica.refused = False, ""

            volume = await self._change(volume, renewed)
        other = other_of(volume, name)
        if other.wrapped_key:
            return other
        made = self._plane.keys(volume.ucloud).make()

        def keyed(fresh: VolumeDocument) -> None:
            replica = other_of(fresh, name)
            replica.wrapped_key = replica.wrapped_key or made

        return other_of(await self._change(volume, keyed), name)

    async def _shared(self, volume: VolumeDocument, other: ReplicaDocument) -> bool:
        """Whether it is served to the host where the volume is used."""
        home = await self._plane.pool.get(volume.ucloud, volume.provider).peer(volume.host)
        shared = Shared(host=home.name, generation=volume.generation)
        name, epoch = volume.name, other.seal.epoch
        try:
            status = await self._at(
                volume,
                other,
                "serve",
                lambda there: there.serve(other.host, name, epoch, shared=shared),
            )
        except SupercloudError as error:
            await self._note(volume, other.replica, error, refused=False)
            return False
        return await self._learn(volume, other.replica, status)

    async def _learn(self, volume: VolumeDocument, name: str, status: VolumeStatus) -> bool:
        wrong = ""

        def learned(fresh: VolumeDocument) -> None:
            nonlocal wrong
            wrong = record.take(other_of(fresh, name), status)

        await self._change(volume, learned)
        if wrong:
            self._tell(volume, "evidence", f"replica {name}: {wrong}", "error")
        return not wrong

    async def learn_listed(
        self, volume: VolumeDocument, name: str, status: VolumeStatus, valid: Callable[[], bool]
    ) -> None:
        """What a host's list says of another replica; see ``hostcalls``."""
        if valid() and status.seal.root:
            await self._learn(volume, name, status)

    async def _note(
        self, volume: VolumeDocument, name: str, error: SupercloudError, *, refused: bool
    ) -> None:
        before = other_of(volume, name)

        def noted(fresh: VolumeDocument) -> None:
            other = other_of(fresh, name)
            other.reason = str(error)
            if refused:
                other.refused = str(error)

        if (before.reason, bool(before.refused)) != (str(error), refused):
            await self._change(volume, noted)
            severity: Severity = "error" if refused else "warning"
            self._tell(volume, "away", f"replica {name} at {before.host}: {error}", severity)

    async def rejoin(self, ucloud: str, name: str) -> float | None:
        """Have the replicas again that are not connected; they get what they lack."""
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None:
            return None
        async with self._lock(volume):
            volume = await self._plane.state.volume(ucloud, name)
            if volume is None or not _is_used(volume) or not await self._is_home(volume):
                return None
            status = self._plane.mirrors.get((ucloud, name))
            away = {o.replica for o in status.replicas if not o.connected} if status else set()
            for other in volume.others:
                if other.replica in away:
                    await self._rejoined(volume, other)
        return None

    async def _rejoined(self, volume: VolumeDocument, other: ReplicaDocument) -> None:
        if not await self._opened(volume, other):
            return
        volume = await self._fresh(volume)
        if not await self._shared(volume, other_of(volume, other.replica)):
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
            await self._note(volume, other.replica, error, refused=False)
        else:
            self._tell(volume, "rejoined", f"replica {other.replica} at {other.host}", "info")

    # -- the lease, and the record

    async def lease(self, ucloud: str, name: str) -> float | None:
        """Renew it, and write down what the mirror tells; when to do so again."""
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None or not volume.mirroring or volume.halted:
            return None
        if not await self._is_home(volume):
            return None  # it is to be used elsewhere: nothing is granted here any more
        there = await self._calls.volumes(volume)
        if (ucloud, name) in self._moving:
            return None
        asked = self.leases.next(volume)
        try:
            async with asyncio.timeout(self._plane.pace.lease_valid_s):
                status = await there.lease(volume.host, asked)
        except (Denied, NotFound):  # it is over: the volume's state says so, too
            self.leases.drop(volume)
            self._plane.look(volume_key(ucloud, name), self._plane.pace.lease_s)
            return self._plane.pace.lease_s
        except (SupercloudError, TimeoutError):
            return self._plane.pace.lease_s / 2
        wait_s = await self._heard(volume, status)
        return wait_s if asked.valid_ms else 0.0

    async def _heard(self, volume: VolumeDocument, status: MirrorStatus) -> float:
        name = (volume.ucloud, volume.name)
        news: list[ReplicaStatus] = []
        if record.has_news(volume, status):

            def written(fresh: VolumeDocument) -> None:
                news[:] = record.write_down(fresh, status)

            volume = await self._change(volume, written)
            for one in news:
                severity: Severity = "warning" if one.standing == "failing" else "info"
                what = "stale" if one.standing == "failing" else "in_sync"
                self._tell(volume, what, f"replica {one.replica} {one.reason}".strip(), severity)
        waiting = record.written(volume, status)
        self.leases.heard(volume, status, waiting)
        self._plane.mirrors[name] = status
        away = any(not one.connected for one in status.replicas)
        now_s = time.monotonic()
        if away and now_s - self._rejoined_s.get(name, 0.0) > self._plane.pace.rejoin_s:
            self._rejoined_s[name] = now_s
            self._plane.look(rejoin_key(volume), 0.0)
        return 0.0 if waiting else self._plane.pace.lease_s

    # -- away from use

    async def close(self, volume: VolumeDocument) -> float | None:
        """Nobody uses it: closed everywhere, equal everywhere if that can be had."""
        async with self._lock(volume):
            volume = await self._closed(await self._fresh(volume))
            for other in volume.others:
                try:
                    await self._closed_other(volume, other)
                except SupercloudError as error:
                    await self._note(volume, other.replica, error, refused=False)
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
        self.leases.drop(volume)
        self._plane.mirrors.pop((volume.ucloud, volume.name), None)
        return volume

    async def _closed_other(self, volume: VolumeDocument, other: ReplicaDocument) -> None:
        if not other.opened:
            return
        host, name = other.host, other.replica
        try:
            status = await self._at(
                volume, other, "close", lambda there: there.close(host, volume.name)
            )
        except NotFound:
            status = None

        def closed(fresh: VolumeDocument) -> None:
            replica = other_of(fresh, name)
            if status is None:
                replica.opened = replica.kept = False
            else:
                record.ended(replica, status)
                record.take(replica, status)

        await self._change(volume, closed)

    async def delete(self, volume: VolumeDocument) -> None:
        """Whatever other hosts have of it."""
        for other in volume.others:
            if other.opened or other.seal.root:
                host = other.host
                delete = _deleting(host, volume.name)
                await self._at(volume, other, "delete", delete)

    # -- elsewhere

    async def move(self, volume: VolumeDocument, place: Place) -> float:
        """Have it used on another of its hosts: when nothing answers where it was.

        Its host closes it if it can be asked; else its lease is waited for. Seconds to wait, or 0.
        """
        name = (volume.ucloud, volume.name)
        async with self._lock(volume):
            self._moving.add(name)
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
            self._moving.discard(name)
            self.leases.drop(volume)
            self._plane.mirrors.pop(name, None)
            self._plane.seen.pop(name, None)
            self._tell(volume, "moved", f"from {'/'.join(before)} to {'/'.join(place)}", "warning")
        return 0.0

    async def _let_go(self, volume: VolumeDocument) -> float:
        """0 when its mirror answers no more, for certain."""
        try:
            async with asyncio.timeout(self._plane.pace.lease_valid_s):
                await self._closed(volume)
        except (SupercloudError, TimeoutError):
            return self.leases.left_s(volume)
        return 0.0

    async def home_of(self, volume: VolumeDocument) -> Place:
        """Where it is to be used, as decided."""
        owner = await self._plane.state.ucloud(volume.ucloud)
        wish = owner.volumes.get(volume.name) if owner is not None else None
        return place_of(volume) if wish is None else (wish.provider.name, wish.host)

    async def _is_home(self, volume: VolumeDocument) -> bool:
        return await self.home_of(volume) == place_of(volume)

    # -- helpers

    def _asked(self, volume: VolumeDocument, replica: record.Replica) -> VolumeOpen:
        key = self._plane.keys(volume.ucloud).unwrap(replica.wrapped_key)
        encoded = base64.b64encode(key).decode()
        return VolumeOpen(spec=wire_spec(volume), key_base64=encoded, seal=replica.seal)

    async def _at(
        self,
        volume: VolumeDocument,
        other: ReplicaDocument,
        what: str,
        call: Callable[[Volumes], Awaitable[Result]],
    ) -> Result:
        there = await self._calls.volumes_of(volume.ucloud, other.provider)
        with self._calls.calling(volume):
            return await self._plane.seam(f"provider.volume_{what}", lambda: call(there))

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


def _deleting(host: str, name: str) -> Callable[[Volumes], Awaitable[None]]:
    return lambda there: there.delete(host, name)
