"""Copying to a replica what it lacks, while requests go on.

A copy keeps its range to itself from the read to the write, so what it writes is never older than
what a request wrote. A region is no longer lacked when the replica has *flushed* it: a device that
is killed may lose what it has not.
"""

from dataclasses import dataclass
from typing import Final, Protocol

from supercloud.services.replication import nbd
from supercloud.services.replication.members import Done, Link, Member
from supercloud.services.replication.ranges import Ranges, Span
from supercloud.services.replication.regions import REGION_BYTES
from supercloud.services.replication.stream import Bytes

AT_ONCE: Final = 2
RUN: Final = 16  # regions in one copy: 1 MiB
FLUSH_EVERY: Final = 256  # regions


class Owner(Protocol):
    """The mirror, as far as copying needs it."""

    size_bytes: int
    over: str

    def source(self) -> Member | None:
        """Who is read from."""

    def fail(self, member: Member, reason: str) -> None:
        """Not to be written to any more."""

    def evidence(self, member: Member, offset: int, length: int, error: int) -> None:
        """It could not be read."""

    def completed(self, member: Member) -> None:
        """Nothing is lacking any more."""


@dataclass(slots=True, eq=False)
class _Copy:
    target: Member
    link: Link  # it ends with this connection
    regions: range
    span: Span
    source: Member | None = None

    @property
    def alive(self) -> bool:
        return self.target.link is self.link


class Resync:
    """All copying of one mirror."""

    def __init__(self, mirror: Owner, ranges: Ranges) -> None:
        self._mirror, self._ranges = mirror, ranges
        self._copies: list[_Copy] = []

    def go_on(self, member: Member) -> None:
        """Begin what is to be done next for it, if anything."""
        if member.standing != "syncing" or member.link is None or self._mirror.over:
            return
        while member.copies < AT_ONCE:
            first = member.next_to_copy()
            if first is None:
                break
            self._start(member, member.link, first)
        if member.flushing or (member.copies >= AT_ONCE and len(member.settled) < FLUSH_EVERY):
            return
        if member.settled and (not member.copies or len(member.settled) >= FLUSH_EVERY):
            self._flush(member, member.link)
        elif not member.copies and not member.lacks:
            self._mirror.completed(member)

    def without(self, member: Member) -> None:
        """It is gone: copies from it are read elsewhere, copies to it end."""
        for copy in [*self._copies]:
            if copy.target is member:
                self._end(copy)
            elif copy.source is member:
                self._read(copy)

    def _start(self, member: Member, link: Link, first: int) -> None:
        end = first + 1
        while end - first < RUN and end < member.lacks.count and member.to_copy(end):
            end += 1
        regions = range(first, end)
        member.copying.update(regions)
        member.copies += 1
        last = min(end * REGION_BYTES, self._mirror.size_bytes)
        copy = _Copy(member, link, regions, Span(first * REGION_BYTES, last, False, _nothing))
        copy.span.go = lambda: self._begin(copy)
        self._ranges.enter(copy.span)

    def _begin(self, copy: _Copy) -> None:
        self._copies.append(copy)
        if copy.alive:
            self._read(copy)
        else:
            self._end(copy)

    def _read(self, copy: _Copy) -> None:
        source = self._mirror.source()
        if source is None or source.link is None:
            return  # the mirror is over
        copy.source = source
        then = lambda error, data: self._was_read(copy, source, error, data)  # noqa: E731
        self._ask(copy, source, nbd.READ, b"", then)

    def _was_read(self, copy: _Copy, source: Member, error: int, data: Bytes) -> None:
        if error:
            self._mirror.evidence(source, copy.span.first, len(copy.span), error)
            self._mirror.fail(copy.target, f"{source.name} cannot read what is to be copied")
            return
        copy.source = None
        kind = nbd.WRITE if any_set(data) else nbd.ZEROES
        self._ask(copy, copy.target, kind, data, lambda e, _: self._written(copy, e))

    def _ask(self, copy: _Copy, member: Member, kind: int, data: Bytes, then: Done) -> None:
        link = member.link

        def done(error: int, read: Bytes) -> None:
            if copy in self._copies and copy.alive and member.link is link:
                then(error, read)

        if link is not None:
            data = data if kind == nbd.WRITE else b""
            link.send(kind, copy.span.first, len(copy.span), data, 0, done)

    def _written(self, copy: _Copy, error: int) -> None:
        if error:
            self._mirror.fail(copy.target, f"it refuses what is copied to it ({error})")
            return
        copy.target.settled.update(copy.regions)
        self._end(copy)

    def _end(self, copy: _Copy) -> None:
        self._copies.remove(copy)
        if copy.alive:
            copy.target.copying.difference_update(copy.regions)
            copy.target.copies -= 1
        self._ranges.leave(copy.span)
        self.go_on(copy.target)

    def _flush(self, member: Member, link: Link) -> None:
        member.flushing, taken = True, set(member.settled)

        def done(error: int, _read: Bytes) -> None:
            if member.link is not link:
                return
            member.flushing = False
            if error:
                self._mirror.fail(member, f"it does not flush ({error})")
                return
            member.lacks.remove(taken & member.settled)
            member.settled -= taken
            self.go_on(member)

        link.send(nbd.FLUSH, 0, 0, b"", 0, done)


def any_set(data: Bytes) -> bool:
    """Whether that is anything but zeros."""
    return data.count(0) != len(data) if not isinstance(data, memoryview) else any(data)


def _nothing() -> None:
    """Replaced at once."""
