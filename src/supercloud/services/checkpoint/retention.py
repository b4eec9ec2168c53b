"""Which checkpoints of an EE are kept: the last few, and one an hour or a day beyond them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final

from supercloud.services.checkpoint.manifest import MAX_HISTORY, Known
from supercloud.wire.codec import Limit

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS

Count = Annotated[int, Limit(ge=0, le=MAX_HISTORY)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The ``last`` ones, and the newest of each of so many hours and days (UTC) that have any.

    The newest of all is always kept.
    """

    last: Annotated[int, Limit(ge=1, le=MAX_HISTORY)] = 1
    hourly: Count = 0
    daily: Count = 0

    def wanted(self, known: Iterable[Known]) -> set[int]:
        """The sequences to keep of these."""
        newest_first = sorted(known, key=lambda k: k.sequence, reverse=True)
        kept = {k.sequence for k in newest_first[: max(1, self.last)]}
        for period_ms, count in ((HOUR_MS, self.hourly), (DAY_MS, self.daily)):
            newest_of: dict[int, int] = {}
            for checkpoint in newest_first:
                newest_of.setdefault(checkpoint.taken_ms // period_ms, checkpoint.sequence)
            kept |= {newest_of[period] for period in sorted(newest_of, reverse=True)[:count]}
        return kept
