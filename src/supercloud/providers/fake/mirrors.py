"""A pretended mirror: the rules of ``services.replication`` over lists of words."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from supercloud.model.errors import Denied, Invalid, NotFound
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    ReplicaStatus,
    Standing,
    VolumeLease,
)
from supercloud.wire.tunnel import PeerHost

Words = list[str]
COUNTED = ("in_sync", "joining")


@dataclass(slots=True, kw_only=True)
class Member:
    """A replica; without a ``peer`` it is the one that is here."""

    replica: str
    standing: Standing
    turn: int = 0
    connected: bool = False
    peer: PeerHost | None = None
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Mirrored:
    """A mirror in one generation. Times are those of a monotonic clock."""

    generation: int
    members: list[Member] = field(default_factory=list)
    until_s: float = 0.0

    @classmethod
    def begun(cls, asked: Mirror, words: dict[str, Words], own: Words) -> "Mirrored":
        """With the words of who is connected: the source's are what it holds from now on."""
        usable = [r for r in asked.replicas if r.in_sync and r.replica in words]
        source = min(usable, key=lambda r: (not r.kept, words[r.replica] is not own))
        members = []
        for replica in asked.replicas:
            there = replica.replica in words
            same = there and words[replica.replica] == words[source.replica]
            equal = replica is source or (same and (asked.clean or replica.kept))
            standing: Standing = "stale" if not there else "syncing"
            if replica.in_sync:
                standing = "in_sync" if equal else "failing"
            members.append(
                Member(
                    replica=replica.replica,
                    standing=standing,
                    connected=there,
                    peer=replica.peer,
                    turn=int(standing == "failing"),
                )
            )
        return cls(generation=asked.generation, members=members)

    def member(self, name: str) -> Member:
        """NotFound."""
        for member in self.members:
            if member.replica == name:
                return member
        raise NotFound(f"the volume has no replica {name}")

    def closed_by(self) -> str:
        """Why nothing is answered now."""
        if time.monotonic() >= self.until_s:
            return "no lease"
        failing = [member.replica for member in self.members if member.standing == "failing"]
        return f"not confirmed as stale: {', '.join(failing)}" if failing else ""

    def status(self) -> MirrorStatus:
        """As its host shows it."""
        now_s = time.monotonic()
        return MirrorStatus(
            generation=self.generation,
            stamp=int(now_s * 1e9),
            left_ms=max(0, int((self.until_s - now_s) * 1000)),
            closed_by=self.closed_by(),
            replicas=[
                ReplicaStatus(
                    replica=member.replica,
                    standing=member.standing,
                    turn=member.turn,
                    connected=member.connected,
                    reason=member.reason,
                )
                for member in self.members
            ],
        )

    def closed(self) -> MirrorStatus:
        """Its last; clean when it could answer to the end."""
        status = self.status()
        return MirrorStatus(
            generation=status.generation, clean=not status.closed_by, replicas=status.replicas
        )

    def look(self, words: Callable[[Member], Words | None]) -> None:
        """See who is gone, and copy what is lacking. ``words`` gives None for who is gone."""
        for member in self.members:
            if member.connected and words(member) is None:
                self._gone(member)
        source = next((m for m in self.members if m.standing in COUNTED and m.connected), None)
        for member in self.members:
            if member.standing != "syncing" or source is None:
                continue
            theirs, ours = words(member), words(source)
            if theirs is not None and ours is not None:
                theirs[:] = ours
                member.standing = "joining"
                member.turn += 1

    def _gone(self, member: Member) -> None:
        member.connected = False
        if member.standing in COUNTED:
            member.standing, member.reason = "failing", "it is gone"
            member.turn += 1
        elif member.standing == "syncing":
            member.standing = "stale"

    def leased(self, asked: VolumeLease) -> None:
        """What is written down is so, and answers may be given."""
        for one in asked.written:
            member = self.member(one.replica)
            if member.turn != one.turn:
                continue
            if member.standing == "failing" and not one.in_sync:
                member.standing = "syncing" if member.connected else "stale"
            elif member.standing == "joining" and one.in_sync:
                member.standing = "in_sync"
        for member in self.members:
            if member.standing == "stale" and member.connected:
                member.standing = "syncing"
        if not asked.valid_ms:
            return
        stamp_s = asked.stamp / 1e9
        if stamp_s > time.monotonic():
            raise Invalid("a stamp that was never told", where="stamp")
        if not self.members:
            raise Denied("nobody is left")
        self.until_s = max(self.until_s, stamp_s + asked.valid_ms / 1000)
