"""The calls of the replication service, and what its owner must do with what it is told.

The *owner* (the user's control plane) keeps one record of each volume, durably: the last generation
that it named, and which replicas are in sync. The calls are its domain's on the source's host:

``mirror.open``        a new generation; the map and one NBD stream for each connected replica
``mirror.connect``     an NBD socket for whoever uses the volume
``lease.renew``        nothing is answered without it; answers the stamp for the next
``mirror.fence``       a newer generation exists: this one never answers again
``replica.attach``     a replica is there again, with a new stream
``replica.confirm``    the record says what ``replica.stale`` or ``replica.resynced`` told
``mirror.quiesce``     connections end; ``mirror.quiet`` is told when all replicas are equal
``mirror.state``, ``mirror.list``, ``mirror.close``

Told, and told again each second until confirmed: ``replica.stale``, ``replica.resynced``, both with
``generation`` and ``turn``. The owner changes its record only if the generation is the record's and
the turn is greater than the last of that replica, and never marks the last one in sync as stale.
Told once: ``replica.evidence``, ``replica.dropped`` (attach it again), ``mirror.over``.
"""

import contextlib
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from supercloud.model.errors import BadState, Busy, Denied, Invalid, NotFound
from supercloud.services.base import Tell
from supercloud.services.replication import begin as beginning
from supercloud.services.replication.begin import Replica
from supercloud.services.replication.front import Front
from supercloud.services.replication.lease import MAX_VALID_MS, Lease
from supercloud.services.replication.members import Link, Member
from supercloud.services.replication.mirror import Mirror
from supercloud.services.replication.regions import MOST_REPLICAS, Map
from supercloud.services.replication.remote import Remote
from supercloud.services.replication.unsettled import Unsettled
from supercloud.wire.codec import Limit, Name, decode
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.reactor import Reactor

MAX_VOLUMES: Final = 32
MAX_CONNECTIONS: Final = 8
LOOK_EVERY_S: Final = 0.25
REMIND_EVERY_S: Final = 1.0
SILENCE_MS: Final = 15_000
_BUFFER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaWish:
    """One replica of ``mirror.open``: a stream comes for each that is ``connected``, in order.

    See ``begin.Replica``.
    """

    replica: Name
    in_sync: bool
    kept: bool
    connected: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorOpen:
    """``clean``: those in sync are equal: ``mirror.quiet`` was told, or they are new."""

    volume: Name
    generation: Annotated[int, Limit(ge=1, le=1 << 62)]
    size_bytes: Annotated[int, Limit(ge=4096, le=1 << 44)]
    replicas: Annotated[list[ReplicaWish], Limit(min_length=1, max_length=MOST_REPLICAS)]
    clean: bool = False
    silence_ms: Annotated[int, Limit(ge=100, le=600_000)] = SILENCE_MS


@dataclass(slots=True)
class _Held:
    mirror: Mirror
    map: Map
    silence_s: float
    fronts: list[Front] = field(default_factory=list)


class ReplicationService:
    """Mirrors by the name of their volume."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._reactor, self._tell = reactor, tell
        self._held: dict[str, _Held] = {}
        self._newest: dict[str, int] = {}  # generation that was seen of a volume
        reactor.every(LOOK_EVERY_S, self._look)
        reactor.every(REMIND_EVERY_S, self._remind)

    def handlers(self) -> Mapping[str, Handler]:
        """Method -> what serves it."""
        return {
            "mirror.open": self.open,
            "mirror.connect": self.connect,
            "mirror.fence": self.fence,
            "mirror.state": self.state,
            "mirror.list": self.list,
            "mirror.quiesce": self.quiesce,
            "mirror.close": self.close_one,
            "lease.renew": self.renew,
            "replica.attach": self.attach,
            "replica.confirm": self.confirm,
        }

    # -- a mirror's life

    def open(self, request: Request) -> dict[str, Any]:
        """``MirrorOpen`` and [map, streams]: ``{stamp, ...state}``; it answers nothing yet.

        A generation is opened once. One that is open is ended by a newer one.
        """
        wish = decode(MirrorOpen, request.untrusted)
        self._fresh(wish)
        if not any(replica.in_sync and replica.connected for replica in wish.replicas):
            raise Invalid("no replica that is in sync is connected", where="replicas")
        streams = _streams(request, wish)
        found = Map(request.descriptors[0], wish.size_bytes)
        replicas = [Replica(r.replica, r.in_sync, r.kept, r.connected) for r in wish.replicas]
        lease = Lease(wish.generation)
        self._end(wish.volume)
        members = beginning.begin(found, wish.generation, replicas, clean=wish.clean)
        self._newest[wish.volume] = wish.generation
        tell = self._teller(wish.volume, wish.generation)
        mirror = Mirror(wish.size_bytes, lease, members, Unsettled(found.unsettled), tell)
        held = _Held(mirror, found, wish.silence_ms / 1000)
        mirror.on_over = lambda: self._over(wish.volume, held)
        self._held[wish.volume] = held
        connected = [replica.name for replica in replicas if replica.connected]
        for name, number in zip(connected, streams, strict=True):
            member = mirror.named(name)
            beginning.connect(member, self._link(mirror, member, os.dup(number)))
        mirror.begin()
        return self._state(held)

    def _fresh(self, wish: MirrorOpen) -> None:
        newest = self._newest.get(wish.volume, 0)
        if wish.generation <= newest:
            raise Denied(f"generation {newest} of volume {wish.volume} was here already")
        if wish.volume not in self._held and len(self._held) >= MAX_VOLUMES:
            raise Busy(f"{MAX_VOLUMES} volumes are open", hint="close one")
        if len({replica.replica for replica in wish.replicas}) < len(wish.replicas):
            raise Invalid("two replicas of one name", where="replicas")

    def _link(self, mirror: Mirror, member: Member, descriptor: int) -> Link:
        sock = socket.socket(fileno=descriptor)

        def gone(reason: str) -> None:
            if member.link is link:
                mirror.fail(member, reason)

        link = Remote(self._reactor, sock, mirror.size_bytes, gone)
        return link

    def connect(self, request: Request) -> Reply:
        """``{volume}``: a connected NBD socket. It is silent while nothing may be answered."""
        held = self._serving(request)
        if len(held.fronts) >= MAX_CONNECTIONS:
            raise Busy(f"a volume has at most {MAX_CONNECTIONS} connections")
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        front = Front(self._reactor, ours, held.mirror, lambda: held.fronts.remove(front))
        held.fronts.append(front)
        return Reply({}, [theirs.detach()])

    def quiesce(self, request: Request) -> dict[str, Any]:
        """``{volume}``: connections end; ``mirror.quiet`` is told when all replicas are equal.

        That may never come (no lease, a replica that fails): closed then, it is not clean, and some
        of what was never answered may be on one replica and not on another.
        """
        held = self._serving(request)
        self._finish(held)
        held.mirror.quiesce()
        return self._state(held)

    def close_one(self, request: Request) -> dict[str, Any]:
        """``{volume}``: at once; what was answered is on the replicas, as durable as it was."""
        self._named(request)
        self._end(request.name("volume"))
        return {}

    def close(self) -> None:
        """End all mirrors: what was answered is on the replicas."""
        for name in [*self._held]:
            self._end(name)

    def _end(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            held.mirror.on_over = lambda: None
            held.mirror.end("it was closed")
            self._finish(held)
            held.map.close()

    def _finish(self, held: _Held) -> None:
        for front in held.fronts:
            front.close()
        held.fronts.clear()

    def _over(self, name: str, held: _Held) -> None:
        """By itself: whoever uses it finds its connections ended, never a wrong answer."""
        self._finish(held)
        generation = held.mirror.lease.generation
        what = {"volume": name, "generation": generation, "reason": held.mirror.over}
        self._tell("mirror.over", what)

    # -- the owner's word

    def renew(self, request: Request) -> dict[str, Any]:
        """``{volume, generation, stamp, valid_ms}``: ``{stamp, left_ms}``."""
        held = self._serving(request)
        generation, stamp = request.number("generation"), request.number("stamp")
        self._see(request.name("volume"), generation)
        held.mirror.renew(generation, stamp, request.number("valid_ms", 1, MAX_VALID_MS))
        return {"stamp": held.mirror.lease.stamp(), "left_ms": held.mirror.lease.left_ms()}

    def fence(self, request: Request) -> dict[str, Any]:
        """``{volume, generation}``: it has begun elsewhere; whatever is older ends here."""
        name, generation = request.name("volume"), request.number("generation", 1)
        self._see(name, generation)
        if name in self._held:
            self._held[name].mirror.fence(generation)
        return {"newest": self._newest[name]}

    def _see(self, name: str, generation: int) -> None:
        self._newest[name] = max(generation, self._newest.get(name, 0))

    def attach(self, request: Request) -> dict[str, Any]:
        """``{volume, generation, replica}`` and [stream]: it gets what it lacks."""
        held, name = self._current(request), request.name("replica")
        if len(request.descriptors) != 1 or not _is_stream(request.descriptors[0]):
            raise Invalid("one connected stream is wanted")
        member = held.mirror.named(name)
        if member.link is not None:
            raise BadState(f"replica {name} is connected ({member.standing})")
        descriptor = os.dup(request.descriptors[0])
        held.mirror.attach(name, self._link(held.mirror, member, descriptor))
        return self._state(held)

    def confirm(self, request: Request) -> dict[str, Any]:
        """``{volume, generation, replica, turn, in_sync}``: that is in the record now."""
        held, name = self._current(request), request.name("replica")
        turn, in_sync = request.number("turn"), request.untrusted.get("in_sync")
        if not isinstance(in_sync, bool):
            raise Invalid("in_sync must be true or false", where="in_sync")
        if in_sync:
            held.mirror.confirm_in_sync(name, turn)
        else:
            held.mirror.confirm_stale(name, turn)
        return self._state(held)

    # -- what there is

    def state(self, request: Request) -> dict[str, Any]:
        """``{volume}``: generation, lease, replicas, and why nothing is answered, if so."""
        return self._state(self._named(request))

    def list(self, _request: Request) -> dict[str, Any]:
        """``{volumes: {name: state}}``."""
        return {"volumes": {name: self._state(held) for name, held in self._held.items()}}

    def _state(self, held: _Held) -> dict[str, Any]:
        mirror = held.mirror
        return {
            "generation": mirror.lease.generation,
            "stamp": mirror.lease.stamp(),
            "left_ms": mirror.lease.left_ms(),
            "closed_by": mirror.closed_by(),
            "replicas": [_standing(member) for member in mirror.members],
        }

    # -- time

    def _look(self) -> None:
        for held in [*self._held.values()]:
            held.mirror.look(held.silence_s)

    def _remind(self) -> None:
        for held in [*self._held.values()]:
            if not held.mirror.over:
                held.mirror.remind()

    # -- what a request names

    def _teller(self, volume: str, generation: int) -> Tell:
        def tell(method: str, parameters: Mapping[str, Any]) -> None:
            self._tell(method, {"volume": volume, "generation": generation, **parameters})

        return tell

    def _named(self, request: Request) -> _Held:
        name = request.name("volume")
        if name not in self._held:
            raise NotFound(f"volume {name} is not open", where="volume")
        return self._held[name]

    def _serving(self, request: Request) -> _Held:
        held = self._named(request)
        if held.mirror.over:
            raise Denied(f"the mirror is over: {held.mirror.over}", hint="open a new generation")
        return held

    def _current(self, request: Request) -> _Held:
        held, generation = self._serving(request), request.number("generation")
        self._see(request.name("volume"), generation)
        if generation > held.mirror.lease.generation:
            held.mirror.fence(generation)
        if generation != held.mirror.lease.generation:
            raise Denied(f"this is generation {held.mirror.lease.generation}, not {generation}")
        return held


def make(reactor: Reactor, tell: Tell) -> ReplicationService:
    """For the launcher."""
    return ReplicationService(reactor, tell)


def _standing(member: Member) -> dict[str, Any]:
    return {
        "replica": member.name,
        "standing": member.standing,
        "turn": member.turn,
        "connected": member.link is not None,
        "lacks_bytes": len(member.lacks) << 16,
        "reason": member.reason,
    }


def _streams(request: Request, wish: MirrorOpen) -> list[int]:
    count = sum(replica.connected for replica in wish.replicas)
    found = request.descriptors[1:]
    if len(request.descriptors) != count + 1 or not all(map(_is_stream, found)):
        raise Invalid(f"wanted are the map and {count} connected streams")
    return found


def _is_stream(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as sock, contextlib.suppress(OSError):
        sock.getpeername()
        return sock.type == socket.SOCK_STREAM
    return False
