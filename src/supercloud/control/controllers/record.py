"""The record of a volume that is kept on several hosts: who is in sync, who was kept. Pure.

What it must keep to is in decision 0013: above all, that the last replica in sync stays it.
"""

import time

from supercloud.control import seals
from supercloud.control.controllers import learning
from supercloud.control.documents import ReplicaDocument, VolumeDocument
from supercloud.model.errors import Temporary
from supercloud.wire.mirrors import MirrorStatus, ReplicaStatus, Written
from supercloud.wire.volumes import VolumeStatus

Replica = VolumeDocument | ReplicaDocument
Place = tuple[str, str]


def place_of(replica: Replica) -> Place:
    """Provider and host."""
    return replica.provider.name, replica.host


def whole_at(volume: VolumeDocument) -> set[Place]:
    """Where all that was answered is, whatever else is lost."""
    return {place_of(replica) for replica in volume.replicas if replica.in_sync and replica.kept}


def other_of(volume: VolumeDocument, name: str) -> ReplicaDocument:
    """The replica of that name, which is not where the volume is used; KeyError."""
    for other in volume.others:
        if other.replica == name:
            return other
    raise KeyError(name)


def ended(replica: Replica, status: VolumeStatus) -> None:
    """Its host has closed it: in order when it shows its last seal."""
    if replica.opened and not status.seal.root:
        replica.kept = False
    replica.opened = False


def take(other: ReplicaDocument, status: VolumeStatus) -> str:
    """Note what a host says of another replica; why it cannot be, when it cannot."""
    reason = seals.objection(other.seal, status.seal)
    if reason:
        other.refused = f"its host shows another one than it had: {reason}"
        return other.refused
    if (seal := seals.newest(other.seal, status.seal)) != other.seal:
        other.seal, other.sealed_s = seal, time.time()
    other.reason = status.reason
    return ""


def write_down(volume: VolumeDocument, status: MirrorStatus) -> list[ReplicaStatus]:
    """Note what a mirror tells of its replicas; what was new of it."""
    news: list[ReplicaStatus] = []
    if status.generation != volume.generation:
        return news
    by_name = {replica.replica: replica for replica in volume.replicas}
    for one in status.replicas:
        replica = by_name.get(one.replica)
        if replica is None or not _is_news(volume, one):
            continue
        in_sync = one.standing == "joining"
        if not in_sync and not any(r.in_sync for r in volume.replicas if r is not replica):
            continue
        volume.turns[one.replica] = one.turn
        replica.in_sync, replica.kept = in_sync, replica.kept or in_sync
        news.append(one)
    return news


def has_news(volume: VolumeDocument, status: MirrorStatus) -> bool:
    """Whether there may be something to write down."""
    return any(_is_news(volume, one) for one in status.replicas)


def _is_news(volume: VolumeDocument, one: ReplicaStatus) -> bool:
    waits = one.standing in ("failing", "joining")
    return waits and one.turn > volume.turns.get(one.replica, 0)


def written(volume: VolumeDocument, status: MirrorStatus) -> tuple[Written, ...]:
    """What the mirror waits for, and what is in the record of it."""
    if status.generation != volume.generation:
        return ()
    return tuple(
        Written(replica=one.replica, turn=one.turn, in_sync=one.standing == "joining")
        for one in status.replicas
        if one.standing in ("failing", "joining") and volume.turns.get(one.replica) == one.turn
    )


def all_ended(volume: VolumeDocument, there: set[str]) -> bool:
    """Whether none that is in sync was kept, of all of them. Temporary: it cannot begin yet.

    ``there`` are the replicas that can be used now.
    """
    in_sync = [replica for replica in volume.replicas if replica.in_sync]
    usable = [replica for replica in in_sync if replica.replica in there]
    if any(replica.kept for replica in usable):
        return False
    away = [replica for replica in in_sync if replica.replica not in there]
    if away or not usable:
        hosts = ", ".join("/".join(place_of(replica)) for replica in away)
        raise Temporary(f"waits for {hosts}, where more of it may be than elsewhere", delay_s=1.0)
    return True


def move(volume: VolumeDocument, place: Place) -> bool:
    """Have it used at another of its replicas; False when there is none.

    The mirror where it was used is over by now, or its lease is.
    """
    target = next((other for other in volume.others if place_of(other) == place), None)
    if target is None:
        return False
    before = ReplicaDocument(
        replica=volume.replica, provider=volume.provider, host=volume.host,
        wrapped_key=volume.wrapped_key, seal=volume.seal, sealed_s=volume.sealed_s,
        opened=volume.opened, in_sync=volume.in_sync, kept=volume.kept,
    )  # fmt: skip
    volume.others = [before if other is target else other for other in volume.others]
    volume.replica, volume.provider, volume.host = target.replica, target.provider, target.host
    volume.wrapped_key, volume.seal, volume.sealed_s = (
        target.wrapped_key,
        target.seal,
        target.sealed_s,
    )
    volume.opened, volume.in_sync, volume.kept = target.opened, target.in_sync, target.kept
    volume.mirroring = volume.clean = False
    volume.platform, volume.slot, volume.mode, volume.incarnation = "", 0, "", 0
    volume.reason, volume.error = "", None
    learning.move(volume, "kept")
    return True
