"""When checkpoints are due, and which ones are given up."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.control import schedule
from supercloud.control.documents import CheckpointsDocument
from supercloud.control.kept import KeptCheckpoint, TakeTask
from supercloud.model.resources import Checkpointing

NOW_S = 1_700_000_000.0
RETRY_S = 5.0


def kept(sequence, taken_s=NOW_S):
    return KeptCheckpoint(
        sequence=sequence, root="0" * 64, engine="crun", taken_ms=int(taken_s * 1000), pause_ms=1.0,
        base=False, memory_bytes=1, dirty_bytes=1, disk_bytes=1, new_bytes=1, details={}, shape="s",
        provider="p", host="h",
    )  # fmt: skip


def document(every_s=600, keep=5, name="web", **more):
    policy = Checkpointing(every_s=every_s, keep=keep)
    values = {"policy": policy, "created_s": NOW_S, **more}
    return CheckpointsDocument(ucloud="u", name=name, of="environment", **values)


def due(item):
    return schedule.due_s(item, RETRY_S)


def test_the_first_one_is_taken_within_the_time_between_two():
    firsts = [due(document(name=f"web-{n}")) - NOW_S for n in range(200)]
    assert min(firsts) >= 60
    assert max(firsts) <= 660
    assert max(firsts) - min(firsts) > 300, "not all at once"


def test_the_next_one_is_about_as_far_away_as_was_asked_for():
    nexts = [due(document(kept=[kept(n)])) - NOW_S for n in range(1, 200)]
    assert min(nexts) >= 540
    assert max(nexts) <= 660
    assert len({round(left) for left in nexts}) > 20


def test_it_follows_from_the_document_alone():
    item = document(kept=[kept(3)])
    assert due(item) == due(document(kept=[kept(3)]))
    assert due(item) != due(document(kept=[kept(4)]))


def test_without_a_time_it_is_taken_when_somebody_asks():
    assert due(document(every_s=0)) is None
    assert due(document(every_s=0, task=TakeTask())) <= time.time()
    assert due(document(every_s=0, task=TakeTask(done=True))) is None


@pytest.mark.parametrize("more", [{"policy": None}, {"deleting": True}])
def test_what_is_no_more_is_not_taken(more):
    assert due(document(task=TakeTask(), **more)) is None


def test_after_failures_it_is_tried_again_later_and_later():
    delays = [
        due(document(every_s=0, task=TakeTask(), failures=n, tried_s=NOW_S)) - NOW_S
        for n in range(1, 40)
    ]
    assert delays[:3] == [5.0, 10.0, 20.0]
    assert all(a <= b for a, b in pairwise(delays))
    assert delays[-1] == schedule.LONGEST_DELAY_S


def test_a_failure_does_not_bring_the_next_one_forward():
    item = document(kept=[kept(1)], failures=1, tried_s=NOW_S - 9999)
    assert due(item) >= NOW_S + 540


@given(
    st.lists(st.integers(1, 1000), min_size=0, max_size=30, unique=True),
    st.integers(1, 100),
    st.integers(1, 1000),
)
def test_what_is_given_up_is_never_the_newest_nor_what_is_restored_from(numbers, keep, pinned):
    numbers = sorted(numbers)
    item = document(keep=keep, kept=[kept(n) for n in numbers])
    going = schedule.given_up(item, pinned)
    assert going == sorted(going)
    assert not {pinned, *numbers[-1:]} & set(going)
    left = [n for n in numbers if n not in going]
    assert len(left) <= max(keep, 1) + (pinned in numbers[:-1])
    if len(numbers) > keep:
        assert len(left) >= keep
    else:
        assert going == []


def test_all_are_kept_of_what_is_no_more():
    item = document(policy=None, kept=[kept(n) for n in range(1, 9)])
    assert schedule.given_up(item, None) == []
