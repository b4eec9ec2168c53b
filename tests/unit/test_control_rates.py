"""What goes through a volume is told from two reports, and only when they can be compared."""

from dataclasses import replace

import pytest

from supercloud.control.rates import LEAST_S, next_gauge
from supercloud.wire.volumes import Seal, VolumeFigures, VolumeStatus

STATUS = VolumeStatus(
    name="data",
    state="attached",
    size_bytes=1 << 30,
    format="qcow2",
    seal=Seal(epoch=3, sequence=1, root="0" * 64),
    figures=VolumeFigures(
        reads=100,
        read_bytes=400_000,
        read_latency_us=50.0,
        writes=10,
        written_bytes=40_960,
        write_latency_us=1000.0,
    ),
)
LATER = replace(
    STATUS,
    figures=VolumeFigures(
        reads=300,
        read_bytes=1_400_000,
        read_latency_us=150.0,
        writes=10,
        written_bytes=40_960,
        write_latency_us=1000.0,
    ),
)


def test_one_report_says_nothing():
    assert next_gauge(None, STATUS, 7.0).rates is None


def test_two_say_what_went_through_between_them_and_how_long_that_took():
    rates = next_gauge(next_gauge(None, STATUS, 7.0), LATER, 9.0).rates
    assert (rates.interval_s, rates.reads_per_s, rates.read_bytes_per_s) == (2.0, 100.0, 500_000.0)
    # 300 of 150 us in the mean, 100 of them of 50: the other 200 took 200 us each
    assert rates.read_latency_us == pytest.approx(200.0)
    assert (rates.writes_per_s, rates.write_bytes_per_s, rates.write_latency_us) == (0, 0, 0)


def test_reports_that_come_together_wait_for_a_later_one():
    first = next_gauge(None, STATUS, 7.0)
    soon = next_gauge(first, LATER, 7.0 + LEAST_S / 2)
    assert soon is first
    assert next_gauge(soon, LATER, 9.0).rates.reads_per_s == 100.0


def test_what_was_known_stays_until_more_is():
    known = next_gauge(next_gauge(None, STATUS, 7.0), LATER, 9.0)
    assert next_gauge(known, LATER, 9.1).rates == known.rates
    assert next_gauge(known, LATER, 11.0).rates.reads_per_s == 0


@pytest.mark.parametrize(
    "other",
    [
        replace(LATER, seal=replace(LATER.seal, epoch=4)),  # opened anew: it counts from 0
        replace(LATER, figures=replace(LATER.figures, reads=99)),
        replace(LATER, figures=replace(LATER.figures, writes=9)),
    ],
)
def test_counters_that_began_anew_are_compared_with_nothing(other):
    gauge = next_gauge(next_gauge(None, STATUS, 7.0), other, 9.0)
    assert gauge.rates is None
    assert next_gauge(gauge, other, 11.0).rates.reads_per_s == 0


def test_one_that_nobody_can_use_has_no_rates():
    known = next_gauge(next_gauge(None, STATUS, 7.0), LATER, 9.0)
    assert next_gauge(known, replace(LATER, state="closed"), 11.0) is None
