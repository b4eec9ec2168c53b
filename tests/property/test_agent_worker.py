"""The life of an EE under any order of failures, exits, restarts and removal: virtual time."""

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from unittest import mock

import looptime
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import Invalid, Permanent, Temporary
from supercloud.model.states import ENVIRONMENT
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.logs import Log
from supercloud.upper.platform.agent.volumes import Absent
from supercloud.upper.platform.agent.worker import BACK_OFF_S, Worker
from supercloud.wire.messages import EnvironmentSpec, ImageRef, VolumeUsage

ERRORS = (Temporary("later"), Permanent("no"), Invalid("bad"), OSError(28, "disk full"))
HORIZON_S = 4000.0


@dataclass
class Process:
    """In place of a watched process: ends by itself after ``lasts_s``, or when told."""

    pid: int
    lasts_s: float
    status: int
    start_ticks: int = 1
    launched_s: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        asyncio.get_running_loop().call_later(self.lasts_s, self.ended.set)

    def send(self, _number: int) -> None:
        self.ended.set()

    async def wait(self) -> int:
        await self.ended.wait()
        return self.status

    async def ended_within(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self.ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        pass


class Engine:
    """Fails as it is told; knows what is there."""

    name = "fake"
    log: Log | None = None
    started_from = ""

    def __init__(self, failures: Iterator[int], lives: Iterator[tuple[float, int]]) -> None:
        self.spec = SPEC
        self._failures, self._lives = failures, lives
        self.prepared = self.destroyed = False
        self.processes: list[Process] = []

    def _may_fail(self) -> None:
        if number := next(self._failures, 0):
            raise ERRORS[number - 1]

    @property
    def alive(self) -> list[Process]:
        return [process for process in self.processes if not process.ended.is_set()]

    async def prepare(self) -> None:
        await asyncio.sleep(0.1)
        self._may_fail()
        self.prepared = True

    async def attach(self, waiting: Callable[[str], None]) -> None:
        waiting("for nothing")
        self._may_fail()

    async def lost(self) -> None:
        await asyncio.sleep(1e9)

    async def returned(self) -> None:
        await asyncio.sleep(1.0)

    def usage(self) -> list[VolumeUsage]:
        return []

    async def start(self) -> Process:
        assert self.prepared
        assert not self.alive, "two processes of one EE"
        await asyncio.sleep(0.1)
        self._may_fail()
        lasts_s, status = next(self._lives, (1e9, 0))
        self.processes.append(Process(len(self.processes) + 1, lasts_s, status))
        return self.processes[-1]

    async def resume(self) -> None:
        self._may_fail()

    async def stop(self, process: Process, grace_s: float) -> None:
        await asyncio.sleep(min(grace_s, 0.2))
        process.send(15)

    async def ended(self) -> None:
        for process in self.alive:
            process.send(9)
        self._may_fail()

    async def destroy(self) -> None:
        for process in self.alive:
            process.send(9)
        self._may_fail()
        self.prepared, self.destroyed = False, True


SPEC = EnvironmentSpec(
    name="e", uid="e-1", kind="container", image=ImageRef(format="erofs", blobs={})
)


def virtual(main: Coroutine[object, object, None]) -> None:
    """Run in virtual time, with a directory of its own for what an agent keeps in memory."""
    loop = looptime.patch_event_loop(asyncio.new_event_loop())
    try:
        with (
            tempfile.TemporaryDirectory() as place,
            mock.patch.object(paths, "ENVIRONMENTS", place),
        ):
            loop.run_until_complete(main)
    finally:
        loop.close()


def make(engine: Engine, restart: str, states: list[tuple[str, str]]) -> Worker:
    spec = engine.spec = EnvironmentSpec(
        name="e", uid="e-1", kind="container", restart=restart, image=SPEC.image
    )  # type: ignore[arg-type]
    settled = asyncio.Event()
    settled.set()
    return Worker(
        spec, engine, 65536, settled, lambda _w, state, reason, _s: states.append((state, reason))
    )  # type: ignore[arg-type]


failures = st.lists(st.integers(0, len(ERRORS)), max_size=12)
lives = st.lists(st.tuples(st.floats(0.01, 30), st.sampled_from([0, 1, 137])), max_size=5)
policies = st.sampled_from(["always", "on-failure", "never"])
moments = st.lists(st.floats(0, 60), max_size=3)


@settings(max_examples=150, deadline=None)
@given(failures, lives, policies, moments, st.floats(0, 90))
def test_any_life_is_legal_and_ends_with_nothing_left(
    fails: list[int],
    lasting: list[tuple[float, int]],
    policy: str,
    restarts: list[float],
    end: float,
) -> None:
    """Every step is in the table, never two processes, and removal always comes to its end."""

    async def live() -> None:
        engine, states = Engine(iter(fails), iter(lasting)), [("pending", "")]
        worker = make(engine, policy, states)
        worker.begin()
        loop = asyncio.get_running_loop()
        for moment in restarts:
            if moment < end:
                loop.call_later(moment, worker.restart)
        loop.call_later(end, worker.go)
        await asyncio.wait_for(worker.done.wait(), HORIZON_S)
        assert engine.destroyed
        assert not engine.alive
        for (before, _), (after, reason) in itertools.pairwise(states):
            assert after == before or after in ENVIRONMENT[before], states
            assert "internal error" not in reason, reason
        assert states[-1][0] == "gone"

    virtual(live())


@settings(max_examples=60, deadline=None)
@given(failures, policies)
def test_failures_that_stop_do_not_keep_it_down(fails: list[int], policy: str) -> None:
    """Level-triggered: once nothing fails any more it runs, whatever failed before."""

    async def live() -> None:
        engine, states = Engine(iter(fails), iter([])), [("pending", "")]
        worker = make(engine, policy, states)
        worker.begin()
        await asyncio.sleep(HORIZON_S)
        assert worker.state == "running", states
        worker.go()
        await asyncio.wait_for(worker.done.wait(), HORIZON_S)

    virtual(live())


@settings(max_examples=60, deadline=None)
@given(lives.filter(bool), policies)
def test_the_restart_policy_decides(lasting: list[tuple[float, int]], policy: str) -> None:
    async def live() -> None:
        engine, states = Engine(iter([]), iter(lasting)), [("pending", "")]
        worker = make(engine, policy, states)
        worker.begin()
        await asyncio.sleep(HORIZON_S)
        stops = [
            n for n, (_, status) in enumerate(lasting) if policy == "on-failure" and not status
        ]
        expected = {
            "never": 1, "always": len(lasting) + 1,
            "on-failure": stops[0] + 1 if stops else len(lasting) + 1,
        }[policy]  # fmt: skip
        assert len(engine.processes) == expected
        assert worker.restarts == expected - 1
        assert worker.state == ("running" if expected > len(lasting) else "exited")
        worker.go()
        await asyncio.wait_for(worker.done.wait(), HORIZON_S)

    virtual(live())


class OnVolume(Engine):
    """Runs while its volume is there."""

    there = True

    async def attach(self, waiting: Callable[[str], None]) -> None:
        if not self.there:
            waiting("not yet")
            raise Absent("volume data is not attached")

    async def lost(self) -> None:
        while self.there:
            await asyncio.sleep(1.0)
        raise Absent("volume data has gone")

    async def returned(self) -> None:
        while not self.there:
            await asyncio.sleep(1.0)


@settings(max_examples=40, deadline=None)
@given(policies, st.lists(st.floats(2.0, 500), min_size=2, max_size=6), st.booleans())
def test_ee_runs_when_its_volume_is_there_and_only_then(
    policy: str, turns_s: list[float], begins: bool
) -> None:
    """Come and gone any number of times; one that is never restarted stays down after the first."""

    async def live() -> None:
        engine, states = OnVolume(iter([]), iter([])), [("pending", "")]
        engine.there = begins
        worker = make(engine, policy, states)
        worker.begin()
        lost = 0
        for turn_s in turns_s:
            await asyncio.sleep(turn_s)
            ran = bool(engine.alive)
            engine.there = not engine.there
            lost += ran
            await asyncio.sleep(5.0)
            held = policy == "never" and lost
            assert bool(engine.alive) == bool(engine.there and not held), states
            assert worker.state == ("running" if engine.alive else "failed"), states
            assert worker.restarts == (0 if held else lost - (bool(lost) and not engine.there))
            if ran:
                assert worker.reason == "volume data has gone"
        worker.go()
        await asyncio.wait_for(worker.done.wait(), HORIZON_S)
        assert not engine.alive

    virtual(live())


def test_one_that_always_dies_at_once_is_started_less_and_less_often() -> None:
    async def live() -> None:
        engine, states = Engine(iter([]), iter([(0.01, 1)] * 10_000)), [("pending", "")]
        worker = make(engine, "always", states)
        worker.begin()
        await asyncio.sleep(3600)
        steady = 3600 / BACK_OFF_S[1]
        assert steady * 0.9 < len(engine.processes) < steady + 15
        worker.go()
        await asyncio.wait_for(worker.done.wait(), HORIZON_S)

    virtual(live())
