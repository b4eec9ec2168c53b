"""What went through a volume lately, from two reports of its host. Pure.

Hosts count since a volume was opened, where its requests end: at the protected device, so the
tables of its image are counted too, and what its throttle holds back is not waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from supercloud.control.seals import WINDOW_S
from supercloud.wire.api import VolumeRates
from supercloud.wire.volumes import VolumeFigures, VolumeStatus

LEAST_S: Final = 1.0
"""Reports come with every call too: what lies closer together than this says little."""
LATEST_S: Final = 2 * WINDOW_S
"""So long after its last report nobody knows how much goes through a volume now."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """The report that the next one is held against, and what the last two said."""

    figures: VolumeFigures
    epoch: int
    at_s: float
    rates: VolumeRates | None = None


def next_gauge(before: Gauge | None, status: VolumeStatus, at_s: float) -> Gauge | None:
    """After a report that came at ``at_s`` (of a clock that only goes on). None: it counts none."""
    figures, epoch = status.figures, status.seal.epoch
    if not _is_used(status):
        return None
    if before is None or before.epoch != epoch or _went_back(before.figures, figures):
        return Gauge(figures, epoch, at_s)
    elapsed_s = at_s - before.at_s
    if elapsed_s < LEAST_S:
        return before
    return Gauge(figures, epoch, at_s, _rates(before.figures, figures, elapsed_s))


def _is_used(status: VolumeStatus) -> bool:
    """Whether it is used, so that something can go through it."""
    return status.state in ("served", "attached")


def _went_back(before: VolumeFigures, after: VolumeFigures) -> bool:
    """It was opened anew meanwhile."""
    return after.reads < before.reads or after.writes < before.writes


def _rates(before: VolumeFigures, after: VolumeFigures, elapsed_s: float) -> VolumeRates:
    def rate(count: Callable[[VolumeFigures], int]) -> float:
        return round(max(0, count(after) - count(before)) / elapsed_s, 1)

    return VolumeRates(
        interval_s=round(elapsed_s, 1),
        read_bytes_per_s=rate(lambda f: f.read_bytes),
        write_bytes_per_s=rate(lambda f: f.written_bytes),
        reads_per_s=rate(lambda f: f.reads),
        writes_per_s=rate(lambda f: f.writes),
        read_latency_us=_mean(
            (before.reads, before.read_latency_us), (after.reads, after.read_latency_us)
        ),
        write_latency_us=_mean(
            (before.writes, before.write_latency_us), (after.writes, after.write_latency_us)
        ),
    )


def _mean(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Of what is between two means over all; each comes with how many it is of."""
    count = after[0] - before[0]
    if count <= 0:
        return 0.0
    return round(max(0.0, after[0] * after[1] - before[0] * before[1]) / count, 1)
