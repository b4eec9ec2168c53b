"""Regions that were written since the last flush that every replica answered.

A device may lose what was not flushed when its service is killed, and a write that was under way
may have come to one replica and not to another: what is in here is what replicas may differ in.
"""

from collections.abc import Iterable

from supercloud.services.replication.regions import Regions


class Unsettled:
    """``bits`` is the set as it outlives this process; what is in it already stays for now."""

    def __init__(self, bits: Regions) -> None:
        self.bits = bits
        self._under_way: dict[int, int] = {}
        self._written: set[int] = set(bits)
        self._flushing: dict[int, set[int]] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._written)

    def begin(self, regions: range) -> None:
        """They are about to be written."""
        self.bits.add(regions)
        for region in regions:
            self._under_way[region] = self._under_way.get(region, 0) + 1

    def end(self, regions: range) -> None:
        """That was answered, or given up, everywhere."""
        for region in regions:
            self._under_way[region] -= 1
            if not self._under_way[region]:
                del self._under_way[region]
        self._written.update(regions)

    def flush(self) -> int:
        """A flush begins; the number to end it by."""
        self._last += 1
        self._flushing[self._last], self._written = self._written, set()
        return self._last

    def flushed(self, number: int, *, well: bool) -> None:
        """It was answered everywhere; ``well`` when it is durable."""
        taken = self._flushing.pop(number)
        if not well:
            self._written |= taken
            return
        self.bits.remove(taken - self._written - self._under_way.keys() - self._in(taken))

    def _in(self, taken: set[int]) -> set[int]:
        others: Iterable[set[int]] = self._flushing.values()
        return {region for other in others for region in other & taken}
