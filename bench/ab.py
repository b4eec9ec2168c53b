"""A/B runs: two or more ways to do the same thing, alternating, in one run on one machine.

A benchmark registers its sides, the direct way first (the baseline), and calls :func:`run`.
Rounds alternate between the sides, so that load and frequency changes hit all alike. A run whose
baseline drifted (the slowest of its quarters more than ``DRIFT_LIMIT`` times the fastest) says
nothing and is rejected, with exit status 3, after ``attempts`` tries.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DRIFT_LIMIT = 2.0
REJECTED_STATUS, MISSED_STATUS = 3, 1
Measure = Callable[[], float]
"""Does the thing once; seconds (or any unit) that it took."""


@dataclass
class Side:
    """One way, its figures, and how much worse than the baseline it may be (None: any)."""

    name: str
    measure: Measure
    at_most: float | None = None
    figures: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.figures)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a part of the median."""
        low, _, high = statistics.quantiles(self.figures, n=4)
        return (high - low) / self.median


@dataclass
class Report:
    """The outcome of a run; ``ratios`` against the first side."""

    title: str
    unit: str
    sides: list[Side]
    drift: float

    @property
    def ratios(self) -> dict[str, float]:
        return {side.name: side.median / self.sides[0].median for side in self.sides}

    @property
    def rejected(self) -> bool:
        return self.drift > DRIFT_LIMIT

    @property
    def missed(self) -> list[str]:
        """Sides that are slower than they may be."""
        return [s.name for s in self.sides if s.at_most and self.ratios[s.name] > s.at_most]

    def table(self) -> str:
        lines = [f"{self.title} ({self.unit}, {len(self.sides[0].figures)} rounds)"]
        lines += [f"{'':44} {'median':>10} {'spread':>8} {'ratio':>7} {'at most':>8}"]
        for side in self.sides:
            limit = f"{side.at_most:.2f}" if side.at_most else ""
            lines += [
                (
                    f"{side.name:44} {side.median:10.3f} {side.spread:8.0%} "
                    f"{self.ratios[side.name]:7.2f} {limit:>8}"
                )
            ]
        verdict = "REJECTED: the baseline drifted" if self.rejected else "baseline drift"
        return "\n".join([*lines, f"{verdict} {self.drift:.2f}x"])

    def to_json(self) -> dict[str, object]:
        return {
            "title": self.title,
            "unit": self.unit,
            "rounds": len(self.sides[0].figures),
            "drift": self.drift,
            "rejected": self.rejected,
            "sides": [
                {
                    "name": s.name,
                    "median": s.median,
                    "spread": s.spread,
                    "ratio": self.ratios[s.name],
                    "at_most": s.at_most,
                }
                for s in self.sides
            ],
        }


def drift(figures: list[float]) -> float:
    """How far the medians of the four quarters of a series lie apart, as a ratio."""
    quarter = max(1, len(figures) // 4)
    starts = range(0, 4 * quarter, quarter)
    medians = [statistics.median(part) for i in starts if (part := figures[i : i + quarter])]
    return max(medians) / min(medians)


def alternate(title: str, unit: str, sides: list[Side], rounds: int, warm_up: int = 1) -> Report:
    """Measure all sides in turns; the order within a round reverses from round to round."""
    for side in sides:
        side.figures.clear()
        for _ in range(warm_up):
            side.measure()
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            side.figures.append(side.measure())
    return Report(title, unit, sides, drift(sides[0].figures))


def seconds(action: Callable[[], object]) -> Measure:
    """A measure: the wall time of an action."""

    def measure() -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    return measure


def arguments(rounds: int) -> argparse.Namespace:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def run(
    title: str, unit: str, sides: list[Side], options: argparse.Namespace, warm_up: int = 1
) -> int:
    """Measure, print, and the exit status: 0, 1 when a side missed its figure, 3 when rejected."""
    report = alternate(title, unit, sides, options.rounds, warm_up)
    for _ in range(options.attempts - 1):
        if not report.rejected:
            break
        print("baseline drifted, once more", file=sys.stderr)
        report = alternate(title, unit, sides, options.rounds, warm_up)
    print(json.dumps(report.to_json(), indent=2) if options.json else report.table())
    if report.rejected:
        return REJECTED_STATUS
    return MISSED_STATUS if report.missed else 0
