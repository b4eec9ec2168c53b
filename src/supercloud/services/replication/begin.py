"""How a mirror begins: which replica is the source, and what the others lack.

What the owner has written down says who has everything that was answered. Beyond that replicas may
differ: in writes that were never answered, and in what a device forgot that was killed before a
flush. One replica, the source, is what the volume is from now on; who differs from it, or may, is
failing until its owner has written down that it is stale, and is then made equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from supercloud.services.replication.members import Link, Member
from supercloud.services.replication.regions import MOST_REPLICAS, Before, Map


@dataclass(frozen=True, slots=True)
class Replica:
    """What the owner says of one.

    ``kept``: since it was last in sync its device was never ended but in order, so that it has all
    that it answered, and not only what it flushed.
    """

    name: str
    in_sync: bool
    kept: bool
    connected: bool


def begin(found: Map, generation: int, replicas: Sequence[Replica], *, clean: bool) -> list[Member]:
    """The members, without links yet; the source first. The map is of this generation then.

    ``clean``: the owner knows that all that are in sync are equal, since they were closed in order
    or are new. At least one that is in sync must be connected.
    """
    before = found.before()
    if before is not None and before.generation != generation - 1:
        before = None  # others have written since
    places = _places(before, replicas)
    if before is None:
        found.empty()
    known = before.places if before else {}
    for replica in replicas:
        if replica.name not in known and not (replica.in_sync and clean):
            found.lacking(places[replica.name]).fill()
    source = min(replicas, key=lambda replica: _rank(replica, found, places))
    _make_equal(found, source, replicas, places)
    found.write(generation, places)
    ordered = [source, *(replica for replica in replicas if replica is not source)]
    return [_member(found, replica, places[replica.name], source) for replica in ordered]


def _places(before: Before | None, replicas: Sequence[Replica]) -> dict[str, int]:
    """Those that are known keep their place in the map."""
    names = {replica.name for replica in replicas}
    known = before.places.items() if before else ()
    places = {name: place for name, place in known if name in names}
    free = [place for place in range(MOST_REPLICAS) if place not in places.values()]
    for replica in replicas:
        if replica.name not in places:
            places[replica.name] = free.pop(0)
    return places


def _rank(replica: Replica, found: Map, places: dict[str, int]) -> tuple[bool, bool, bool]:
    """The least is the source: in sync and here, its device never cut off, lacking nothing."""
    usable = replica.in_sync and replica.connected
    return (not usable, not replica.kept, bool(found.lacking(places[replica.name])))


def _make_equal(
    found: Map, source: Replica, replicas: Sequence[Replica], places: dict[str, int]
) -> None:
    own = found.lacking(places[source.name])
    for replica in replicas:
        if replica is not source:
            lacks = found.lacking(places[replica.name])
            lacks.join(found.unsettled)
            lacks.join(own)
    own.clear()


def _member(found: Map, replica: Replica, place: int, source: Replica) -> Member:
    lacks = found.lacking(place)
    member = Member(replica.name, "stale", lacks)
    if replica.in_sync:
        equal = replica is source or (replica.connected and not lacks)
        member.standing = "in_sync" if equal else "failing"
        member.turn = int(not equal)
        member.reason = "" if equal else "not connected, or perhaps not equal to the source"
    return member


def connect(member: Member, link: Link) -> None:
    """Give a member its link at the beginning."""
    member.link = link
    if member.standing == "stale":
        member.move("connected")
