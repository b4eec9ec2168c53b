"""The replicas of a volume and how each stands, as a table.

``counted`` is what the owner may have written down as in sync: nothing is answered before each of
these has it. One that fails is *failing* until the owner has written down that it is stale: while
one is failing nothing is answered at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from supercloud.services.replication.regions import Regions
from supercloud.services.replication.stream import Bytes

Standing = Literal["in_sync", "joining", "failing", "stale", "syncing"]
Done = Callable[[int, Bytes], None]
"""``done(errno or 0, data that was read)``."""

# what happens -> standing before -> standing after
MOVES: Final[Mapping[str, Mapping[Standing, Standing]]] = {
    "failed": {"in_sync": "failing", "joining": "failing"},
    "confirmed_stale": {"failing": "stale"},
    "connected": {"stale": "syncing"},
    "dropped": {"syncing": "stale", "failing": "failing"},
    "complete": {"syncing": "joining"},
    "confirmed_in_sync": {"joining": "in_sync"},
}
COUNTED: Final = ("in_sync", "joining")
WRITTEN: Final = ("in_sync", "joining", "syncing")


class Link(Protocol):
    """A connection to one replica. What fails as a whole is told to its maker, not to ``done``."""

    def send(
        self, kind: int, offset: int, length: int, data: Bytes, flags: int, done: Done
    ) -> None:
        """Ask; ``done`` is called later, never from within, and never after ``close``."""

    def waiting_s(self) -> float:
        """How long it has been silent though it was asked something; 0 when it was not."""

    def close(self) -> None:
        """End it."""


@dataclass(slots=True, eq=False)
class Member:
    """One replica. ``turn`` counts what the owner must write down of it in this generation."""

    name: str
    standing: Standing
    lacks: Regions
    link: Link | None = None
    turn: int = 0
    reason: str = ""
    settled: set[int] = field(default_factory=set)  # copied, and not flushed yet
    copying: set[int] = field(default_factory=set)
    copies: int = 0
    flushing: bool = False

    def move(self, what: str) -> None:
        """One step of ``MOVES``; a KeyError is a bug of the caller."""
        self.standing = MOVES[what][self.standing]

    @property
    def counted(self) -> bool:
        """Whether nothing is answered before it has it."""
        return self.standing in COUNTED

    def forget_copies(self) -> None:
        """What was copied to it and not flushed may be gone."""
        self.settled.clear()
        self.copying.clear()
        self.copies, self.flushing = 0, False

    def to_copy(self, region: int) -> bool:
        """Whether that region is still to be copied to it."""
        return region in self.lacks and region not in self.settled and region not in self.copying

    def next_to_copy(self) -> int | None:
        """The first region that is to be copied."""
        region = self.lacks.first()
        while region is not None and not self.to_copy(region):
            region = self.lacks.first(region + 1) if region + 1 < self.lacks.count else None
        return region
