"""Requests that overlap are served one after another, in the order in which they came.

A device may serve what it got at once in any order, so two writes of one block that are under way
together could end differently on two replicas. Reads share; everything else excludes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Span:
    """Bytes ``first`` to ``end``; ``go`` is called once they may be touched."""

    first: int
    end: int
    shared: bool
    go: Callable[[], None]
    blocked_by: int = 0
    blocks: list["Span"] = field(default_factory=list)

    def __len__(self) -> int:
        return self.end - self.first

    def conflicts(self, other: "Span") -> bool:
        """Whether one of them must wait for the other."""
        apart = self.end <= other.first or other.end <= self.first
        return not apart and not (self.shared and other.shared)


class Ranges:
    """All spans that are touched or waiting; each waits for those before it that conflict."""

    def __init__(self) -> None:
        self._spans: dict[int, Span] = {}  # in the order in which they came

    def enter(self, span: Span) -> None:
        """Call ``span.go`` now or later."""
        for other in self._spans.values():
            if span.conflicts(other):
                span.blocked_by += 1
                other.blocks.append(span)
        self._spans[id(span)] = span
        if not span.blocked_by:
            span.go()

    def leave(self, span: Span) -> None:
        """It is done; lets go what only waited for it."""
        del self._spans[id(span)]
        free = []
        for other in span.blocks:
            other.blocked_by -= 1
            if not other.blocked_by:
                free.append(other)
        for other in free:
            other.go()
