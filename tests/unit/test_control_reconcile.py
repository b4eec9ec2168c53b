"""The work queue, in virtual time: serial per object, parallel across, back-off by the error."""

import asyncio
from itertools import pairwise

import pytest

from supercloud.control.reconcile import (
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    NOT_SOONER_S,
    RESIGNED_DELAY_S,
    WorkQueue,
)
from supercloud.model.errors import Invalid, Permanent, Temporary

pytestmark = pytest.mark.looptime


class Recorder:
    """A reconciler that does what the test says, and notes when."""

    def __init__(self):
        self.calls = []
        self.script = {}
        self.takes_s = 0.0
        self.running = self.most = 0

    def now(self):
        return round(asyncio.get_running_loop().time(), 3)

    async def __call__(self, key):
        self.calls.append((self.now(), key))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.takes_s:
                await asyncio.sleep(self.takes_s)
            steps = self.script.get(key, [])
            step = steps.pop(0) if steps else None
            if isinstance(step, BaseException):
                raise step
            return step
        finally:
            self.running -= 1

    def times(self, key):
        return [when for when, name in self.calls if name == key]


@pytest.fixture
def recorder():
    return Recorder()


async def test_many_adds_of_an_idle_key_are_one_look(recorder):
    queue = WorkQueue(recorder)
    for _ in range(10):
        queue.add("a")
    await queue.idle()
    assert recorder.times("a") == [0]
    await queue.stop()


async def test_a_key_that_comes_while_it_is_worked_on_is_looked_at_once_more(recorder):
    recorder.takes_s = 10
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(3)
    for _ in range(5):
        queue.add("a")
    await asyncio.sleep(100)
    assert recorder.times("a") == [0, 10]
    await queue.stop()


async def test_one_object_is_serial_and_different_ones_are_parallel(recorder):
    recorder.takes_s = 10
    queue = WorkQueue(recorder, workers=3)
    for key in "abcde":
        queue.add(key)
    await asyncio.sleep(9)
    assert recorder.most == 3
    for key in "abcde":
        queue.add(key)  # "abc" are being looked at: once more; "de" wait for their first look
    await asyncio.sleep(100)
    assert [len(recorder.times(key)) for key in "abcde"] == [2, 2, 2, 1, 1]
    assert all(b - a >= 10 for a, b in map(recorder.times, "abc"))
    assert recorder.most == 3
    await queue.stop()


async def test_temporary_is_tried_again_after_its_delay(recorder):
    recorder.script["a"] = [Temporary("no", delay_s=7), Temporary("no", delay_s=3)]
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(100)
    assert recorder.times("a") == [0, 7, 10]
    await queue.stop()


async def test_a_bug_is_tried_again_after_delays_that_double_up_to_a_minute(recorder):
    recorder.script["a"] = [RuntimeError("bug")] * 10
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(1000)
    times = recorder.times("a")
    gaps = [round(b - a, 2) for a, b in pairwise(times)]
    assert gaps[:4] == [FIRST_DELAY_S * 2**n for n in range(4)]
    assert max(gaps) == LONGEST_DELAY_S
    await queue.stop()


@pytest.mark.parametrize("error", [Permanent("no"), Invalid("no")])
async def test_what_will_not_help_waits_for_a_change_or_a_long_while(recorder, error):
    recorder.script["a"] = [error]
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(50)
    assert recorder.times("a") == [0]
    queue.add("a")
    await asyncio.sleep(1)
    assert recorder.times("a") == [0, 50]
    await asyncio.sleep(2 * RESIGNED_DELAY_S)
    assert len(recorder.times("a")) == 2
    await queue.stop()


async def test_a_resigned_object_is_looked_at_again_after_a_long_while(recorder):
    recorder.script["a"] = [Permanent("no")]
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(RESIGNED_DELAY_S + 1)
    assert recorder.times("a") == [0, RESIGNED_DELAY_S]
    await queue.stop()


async def test_telling_of_a_failure_does_not_make_it_spin(recorder):
    recorder.script["a"] = [Permanent("no")] * 1000

    async def told(key, _error, _bug):
        queue.add(key)  # as the store's watch does when the reason is written down

    queue = WorkQueue(recorder, failed=told)
    queue.add("a")
    await asyncio.sleep(10)
    assert len(recorder.times("a")) <= 10 / NOT_SOONER_S + 2
    await queue.stop()


async def test_success_resets_the_delays(recorder):
    bug = RuntimeError("bug")
    recorder.script["a"] = [bug, bug, None, bug, None]
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(5)
    queue.add("a")
    await asyncio.sleep(5)
    assert recorder.times("a") == [0, 0.5, 1.5, 5, 5.5]
    await queue.stop()


async def test_a_reconciler_says_when_to_look_again_and_an_earlier_change_comes_first(recorder):
    recorder.script["a"] = [30.0, 30.0, None]
    queue = WorkQueue(recorder)
    queue.add("a")
    await asyncio.sleep(10)
    queue.add("a")
    await asyncio.sleep(100)
    assert recorder.times("a") == [0, 10, 40]
    await queue.stop()


async def test_of_two_delays_the_shorter_counts(recorder):
    queue = WorkQueue(recorder)
    queue.add("a", 20)
    queue.add("a", 5)
    queue.add("a", 50)
    await asyncio.sleep(100)
    assert recorder.times("a") == [5]
    await queue.stop()


async def test_stop_cancels_what_runs_and_nothing_starts_afterwards(recorder):
    recorder.takes_s = 1000
    queue = WorkQueue(recorder)
    queue.add("a")
    queue.add("b", 5)
    await asyncio.sleep(1)
    await queue.stop()
    queue.add("c")
    await asyncio.sleep(100)
    assert [key for _, key in recorder.calls] == ["a"]
    assert recorder.running == 0


async def test_what_was_done_is_forgotten(recorder):
    queue = WorkQueue(recorder)
    for number in range(1000):
        queue.add(f"k{number}")
    await queue.idle()
    assert not queue._objects
    await queue.stop()
