"""The rules of the mirror: what must be where before a request is answered.

1. A change is sent to every replica that is written to, and is done when each of them has answered
   or is not written to any more. What a replica does not get, it *lacks*, and that is written in
   the map before the change is done.
2. Nothing is answered, reads neither, without a lease, or while a replica that the owner may still
   believe to be in sync has failed: the *gate*. So whatever was answered is on every replica that
   the owner has down as in sync, at any moment.
3. The last replica that is counted is never declared stale. It may be as slow as it likes; when it
   is gone, the mirror is over, and is opened anew in another generation.
"""

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from supercloud.model.errors import BadState, Denied, NotFound
from supercloud.services.base import Tell
from supercloud.services.replication import nbd
from supercloud.services.replication.lease import Lease
from supercloud.services.replication.members import WRITTEN, Done, Link, Member
from supercloud.services.replication.ranges import Ranges, Span
from supercloud.services.replication.regions import covering
from supercloud.services.replication.resync import Resync
from supercloud.services.replication.stream import Bytes
from supercloud.services.replication.unsettled import Unsettled

FLUSH_AFTER: Final = 2048  # regions that may be unsettled before we flush unasked: 128 MiB


@dataclass(slots=True, eq=False)
class Operation:
    """One request that is under way. ``waiting``: who has not answered it yet."""

    kind: int
    offset: int
    length: int
    data: Bytes
    flags: int
    answer: Done | None
    waiting: list[Member] = field(default_factory=list)
    error: int = 0
    read: Bytes = b""
    unreadable: list[Member] = field(default_factory=list)
    flush: int = 0
    span: Span | None = None

    @property
    def regions(self) -> range:
        """What it touches."""
        return covering(self.offset, self.length)


class Mirror:
    """One volume in one generation. ``over`` is why it serves no more, for ever."""

    def __init__(
        self,
        size_bytes: int,
        lease: Lease,
        members: Sequence[Member],
        unsettled: Unsettled,
        tell: Tell,
    ) -> None:
        self.size_bytes, self.lease, self.members = size_bytes, lease, list(members)
        self.over = ""
        self.on_over: Callable[[], None] = lambda: None
        self._unsettled, self._tell = unsettled, tell
        self._ranges = Ranges()
        self._under_way: dict[int, Operation] = {}
        self._ready: deque[Operation] = deque()
        self._flushing_unasked = self._quiescing = False
        self._resync = Resync(self, self._ranges)

    def begin(self) -> None:
        """Tell what is to be confirmed, and begin to copy what is lacking."""
        self.remind()
        for member in self.members:
            self._resync.go_on(member)

    # -- requests

    def submit(
        self, kind: int, offset: int, length: int, data: Bytes, flags: int, done: Done | None
    ) -> None:
        """Serve a request that is within bounds (see ``front.Volume``)."""
        if self.over:
            return
        # what a device keeps of a trimmed block is its own affair: two need not agree
        kind = nbd.ZEROES if kind == nbd.TRIM else kind
        operation = Operation(kind, offset, length, data, flags, done)
        if kind == nbd.FLUSH:
            self._begin(operation)
            return
        span = Span(offset, offset + length, kind == nbd.READ, lambda: self._begin(operation))
        operation.span = span
        self._ranges.enter(span)

    def _begin(self, operation: Operation) -> None:
        if self.over:
            return
        self._under_way[id(operation)] = operation
        if operation.kind == nbd.READ:
            self._read(operation)
        elif operation.kind == nbd.FLUSH:
            self._flush(operation)
        else:
            self._write(operation)

    def _write(self, operation: Operation) -> None:
        regions = operation.regions
        self._unsettled.begin(regions)
        asked = []
        for member in self.members:
            if member.standing in WRITTEN and not _lacks_all(member, regions):
                asked.append(member)
            else:
                member.lacks.add(regions)
        self._ask(operation, asked)

    def _flush(self, operation: Operation) -> None:
        operation.flush = self._unsettled.flush()
        self._ask(operation, [member for member in self.members if member.link])

    def _read(self, operation: Operation) -> None:
        readable = [m for m in self.members if m.counted and m not in operation.unreadable]
        if readable:
            self._ask(operation, readable[:1])
        else:
            operation.error = errno.EIO
            self._finish(operation)

    def _ask(self, operation: Operation, members: list[Member]) -> None:
        operation.waiting = list(members)
        data = operation.data if operation.kind == nbd.WRITE else b""
        for member in members:
            self._ask_one(operation, member, data)

    def _ask_one(self, operation: Operation, member: Member, data: Bytes) -> None:
        link = member.link

        def done(error: int, read: Bytes) -> None:
            if member.link is link and member in operation.waiting:
                operation.waiting.remove(member)
                self._answered(operation, member, error, read)

        if link is not None:
            at = (operation.kind, operation.offset, operation.length)
            link.send(*at, data, operation.flags, done)

    def _answered(self, operation: Operation, member: Member, error: int, read: Bytes) -> None:
        if operation.kind == nbd.READ:
            self._was_read(operation, member, error, read)
            return
        if error and not self._alone(member):
            self.fail(member, f"it answered {errno.errorcode.get(error, error)}")
        elif error:
            operation.error = error
        self._finish_if_done(operation)

    def _was_read(self, operation: Operation, member: Member, error: int, read: Bytes) -> None:
        if error:
            operation.unreadable.append(member)
            self.evidence(member, operation.offset, operation.length, error)
            self._read(operation)
            return
        operation.read = read
        for other in operation.unreadable:
            self._damaged(other, operation.regions)
        self._finish(operation)

    def _finish_if_done(self, operation: Operation) -> None:
        if not operation.waiting and id(operation) in self._under_way and not self.over:
            self._finish(operation)

    def _finish(self, operation: Operation) -> None:
        del self._under_way[id(operation)]
        if operation.kind == nbd.FLUSH:
            self._unsettled.flushed(operation.flush, well=not operation.error)
        elif operation.kind != nbd.READ:
            self._unsettled.end(operation.regions)
        if operation.span is not None:
            self._ranges.leave(operation.span)
        if operation.answer is not None:
            self._ready.append(operation)
            self.release()
        if len(self._unsettled) > FLUSH_AFTER and not self._flushing_unasked and not self.over:
            self._flushing_unasked = True
            self.submit(nbd.FLUSH, 0, 0, b"", 0, self._flushed_unasked)

    def _flushed_unasked(self, _error: int, _read: Bytes) -> None:
        self._flushing_unasked = False

    # -- the gate

    def closed_by(self) -> str:
        """Why nothing is answered now; empty when it is."""
        if self.over:
            return self.over
        if not self.lease.valid():
            return "no lease"
        failing = [m.name for m in self.members if m.standing == "failing"]
        return f"not confirmed as stale: {', '.join(failing)}" if failing else ""

    def release(self) -> None:
        """Answer what is done, if it may be answered."""
        while self._ready and not self.closed_by():
            operation = self._ready.popleft()
            if operation.answer is not None:
                operation.answer(operation.error, operation.read)

    # -- replicas

    def fail(self, member: Member, reason: str) -> None:
        """It is not to be written to any more: it is gone, silent, or refused a change."""
        if self.over or member.link is None:
            return
        if self._alone(member):
            self.end(f"the last replica, {member.name}, is gone: {reason}")
            return
        link, member.link = member.link, None
        link.close()
        member.forget_copies()
        member.lacks.join(self._unsettled.bits)
        if member.counted:
            self._declare(member, reason)
        else:
            member.move("dropped")
            self._tell("replica.dropped", {"replica": member.name, "reason": reason})
        for operation in [*self._under_way.values()]:
            if member in operation.waiting:
                operation.waiting.remove(member)
                self._without(operation)
        self._resync.without(member)

    def _without(self, operation: Operation) -> None:
        if operation.kind == nbd.READ:
            self._read(operation)
        else:
            self._finish_if_done(operation)

    def _alone(self, member: Member) -> bool:
        return member.counted and not any(m.counted for m in self.members if m is not member)

    def _declare(self, member: Member, reason: str) -> None:
        member.move("failed")
        member.turn += 1
        member.reason = reason
        self._tell_of(member)

    def _damaged(self, member: Member, regions: range) -> None:
        """It did not keep these, others did: it is stale until it has them again."""
        member.lacks.add(regions)
        member.settled.difference_update(regions)
        if member.counted and not self._alone(member):
            self._declare(member, "it did not keep what it had")

    def attach(self, name: str, link: Link) -> None:
        """It is there again. BadState when it is there already."""
        member = self.named(name)
        if member.link is not None:
            raise BadState(f"replica {name} is connected ({member.standing})")
        member.link = link
        if member.standing == "stale":
            member.move("connected")
            self._resync.go_on(member)

    def confirm_stale(self, name: str, turn: int) -> None:
        """The owner has written down that it is stale; repeated, it changes nothing."""
        member = self.named(name)
        if member.standing == "failing" and member.turn == turn:
            member.move("confirmed_stale")
            if member.link is not None:
                member.move("connected")
                self._resync.go_on(member)
            self.release()

    def confirm_in_sync(self, name: str, turn: int) -> None:
        """The owner has written down that it is in sync."""
        member = self.named(name)
        if member.standing == "joining" and member.turn == turn:
            member.move("confirmed_in_sync")

    def completed(self, member: Member) -> None:
        """It lacks nothing. From now on it is counted, before the owner hears of it."""
        member.move("complete")
        member.turn += 1
        self._tell_of(member)

    def named(self, name: str) -> Member:
        """NotFound."""
        for member in self.members:
            if member.name == name:
                return member
        raise NotFound(f"the volume has no replica {name}", where="replica")

    def source(self) -> Member | None:
        """Who is read from."""
        return next((member for member in self.members if member.counted), None)

    # -- what is told, and what time does

    def evidence(self, member: Member, offset: int, length: int, error: int) -> None:
        """A replica did not give back what it was given."""
        found = {"offset": offset, "length": length, "errno": error}
        self._tell("replica.evidence", {"replica": member.name, **found})

    def _tell_of(self, member: Member) -> None:
        what: dict[str, Any] = {"replica": member.name, "turn": member.turn}
        if member.standing == "failing":
            self._tell("replica.stale", {**what, "reason": member.reason})
        elif member.standing == "joining":
            self._tell("replica.resynced", what)

    def remind(self) -> None:
        """Tell again what the owner has not confirmed."""
        for member in self.members:
            self._tell_of(member)

    def look(self, silence_s: float) -> None:
        """Give up who has been silent for too long, unless nobody else has it all."""
        for member in self.members:
            silent = member.link is not None and member.link.waiting_s() > silence_s
            if silent and not self._alone(member):
                self.fail(member, f"no answer for {silence_s:g} s")
        self.release()
        if self._quiescing and not self.over:
            self._quiesce()

    def quiesce(self) -> None:
        """Nothing is asked any more: tell ``mirror.quiet`` when all is durable everywhere."""
        self._quiescing = True

    def _quiesce(self) -> None:
        if self._under_way or self._ready or self.closed_by():
            return
        if self._unsettled.bits:
            self.submit(nbd.FLUSH, 0, 0, b"", 0, None)
            return
        self._quiescing = False
        self._tell("mirror.quiet", {"clean": True})

    def fence(self, generation: int) -> None:
        """A newer generation exists."""
        self.lease.fence(generation)
        if self.lease.fenced_by:
            self.end(f"generation {self.lease.fenced_by} has begun elsewhere")

    def renew(self, generation: int, stamp: int, valid_ms: int) -> None:
        """See ``lease``; Denied when this generation is over."""
        try:
            self.lease.renew(generation, stamp, valid_ms)
        except Denied:
            self.fence(generation)
            raise
        self.release()

    def end(self, reason: str) -> None:
        """Serve no more: nothing that is under way is answered."""
        if self.over:
            return
        self.over = reason
        self._ready.clear()
        self._under_way.clear()
        for member in self.members:
            if member.link is not None:
                member.link.close()
                member.link = None
        self.on_over()


def _lacks_all(member: Member, regions: range) -> bool:
    """Whether it is no use to write there: it will be copied whole, later."""
    return member.standing == "syncing" and all(member.to_copy(region) for region in regions)
