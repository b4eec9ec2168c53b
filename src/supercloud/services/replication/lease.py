"""Until when answers may be given: the owner's lease, by this host's clock alone.

A renewal names a *stamp*, a reading of this clock that the owner was told before. The lease is
counted from the stamp, not from when the renewal arrived: however long that took, it ends no later
than the owner, who got the stamp later than it was read, must assume. The clock goes on while the
host sleeps. Source: leases as in Gray and Cheriton (SOSP 1989), with the grant's delay on the
holder's side.
"""

import time
from collections.abc import Callable
from typing import Final

from supercloud.model.errors import Denied, Invalid

MAX_VALID_MS: Final = 60_000
_NS_PER_MS: Final = 1_000_000


def boot_clock_ns() -> int:
    """Nanoseconds since the host was started, asleep or not."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Lease:
    """Of one generation. It begins expired."""

    def __init__(self, generation: int, clock_ns: Callable[[], int] = boot_clock_ns) -> None:
        self.generation = generation
        self._clock_ns = clock_ns
        self._made_ns = self._until_ns = clock_ns()
        self.fenced_by = 0

    def stamp(self) -> int:
        """What a later renewal may be counted from."""
        return self._clock_ns()

    def renew(self, generation: int, stamp: int, valid_ms: int) -> None:
        """Valid until ``valid_ms`` after ``stamp``; Denied for any other generation."""
        if generation > self.generation:
            self.fence(generation)
        if self.fenced_by:
            raise Denied(f"generation {self.generation} is over: {self.fenced_by} has begun")
        if generation < self.generation:
            raise Denied(f"generation {generation} is over: this is {self.generation}")
        if not self._made_ns <= stamp <= self._clock_ns() or not 0 < valid_ms <= MAX_VALID_MS:
            raise Invalid("a stamp that was never told, or a lease too long", where="stamp")
        self._until_ns = max(self._until_ns, stamp + valid_ms * _NS_PER_MS)

    def fence(self, generation: int) -> None:
        """A newer generation exists: for ever no more answers. An older one changes nothing."""
        if generation > self.generation:
            self.fenced_by = max(generation, self.fenced_by)

    def left_ms(self) -> int:
        """0 when nothing may be answered."""
        if self.fenced_by:
            return 0
        return max(0, (self._until_ns - self._clock_ns()) // _NS_PER_MS)

    def valid(self) -> bool:
        """Whether an answer may be given now."""
        return not self.fenced_by and self._clock_ns() < self._until_ns
