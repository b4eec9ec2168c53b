"""The life of one EE: prepared, started, watched, started again, removed. Serial for each EE."""

import asyncio
import logging
import os
import time
from collections.abc import Callable

from supercloud.model.errors import (
    BadState,
    Busy,
    NotFound,
    SupercloudError,
    Unsupported,
    UserError,
)
from supercloud.model.states import ENVIRONMENT, step
from supercloud.upper.platform.agent import cgroups, networks, readiness
from supercloud.upper.platform.agent.engine import Engine, NotRestored, Places
from supercloud.upper.platform.agent.processes import Watched, adopt
from supercloud.upper.platform.agent.state import read_json, write_json
from supercloud.upper.platform.agent.volumes import Absent, Broken
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.codec import encode
from supercloud.wire.messages import EnvironmentSpec, EnvironmentStatus

BACK_OFF_S = (0.1, 30.0)
STEADY_S = 10.0
CLEAN_RETRY_S = 1.0
RUNNING = ("running", "serving", "unready")
GRACE_S = {"container": 10.0, "vm": 8.0}

log = logging.getLogger("supercloud.agent.worker")
Tell = Callable[["Worker", str, str, str], None]  # worker, event, message, severity


class Worker:
    """``tell`` is called with each change of state; ``done`` is set when the EE is gone."""

    def __init__(
        self,
        spec: EnvironmentSpec,
        engine: Engine,
        base_id: int,
        settled: asyncio.Event,
        tell: Tell,
    ) -> None:
        self.spec, self.engine, self.base_id = spec, engine, base_id
        self._settled = settled  # the platform's network is as the desired set has it
        self.state, self.reason = "pending", ""
        self.exit_status: int | None = None
        self.restarts, self.started_s = 0, 0.0
        self.done = asyncio.Event()
        self._tell = tell
        self._process: Watched | None = None
        self._going = asyncio.Event()
        self._again = self._is_saving = False
        self._delay_s = BACK_OFF_S[0]
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # -- told by the manager

    def begin(self, after: asyncio.Event | None = None) -> None:
        """Start living, once the EE that had this name before is gone."""
        self._task = asyncio.ensure_future(self._run(after))

    @property
    def begun(self) -> bool:
        """Whether ``begin`` was called."""
        return self._task is not None

    def update(self, spec: EnvironmentSpec) -> None:
        """Other ports, restart policy or limits for the same EE; the next start sees them all."""
        if spec != self.spec:
            self.spec = self.engine.spec = spec
            self._save()

    def go(self) -> None:
        """Stop and remove it; ``done`` is set when that is so."""
        self._going.set()

    def restart(self) -> None:
        """Stop its process and start it anew; BadState when it has none and waits for nothing."""
        if self._going.is_set():
            raise BadState(f"{self.spec.name} is being removed")
        self._again = True
        self._delay_s = BACK_OFF_S[0]
        self._wake.set()

    def status(self, *, figures: bool = False) -> EnvironmentStatus:
        """As it is now; what it has used is looked up where ``figures`` are asked for."""
        memory_bytes, cpu_s = cgroups.usage(self.spec.uid) if figures else (0, 0.0)
        return EnvironmentStatus(
            name=self.spec.name, uid=self.spec.uid, kind=self.spec.kind, state=self.state,
            engine=self.engine.name, pid=self._process.pid if self._process else 0,
            exit_status=self.exit_status, restarts=self.restarts, started_s=self.started_s,
            reason=self.reason, memory_bytes=memory_bytes, cpu_s=cpu_s,
            volumes=self.engine.usage() if self.spec.volumes else [],
            started_from=self.engine.started_from,
        )  # fmt: skip

    def check_running(self) -> None:
        """BadState when it does not run."""
        if self._process is None or self.state not in RUNNING:
            raise BadState(f"{self.spec.name} is {self.state}, not running")

    async def checkpoint(self, wanted: CheckpointTake) -> CheckpointTaken:
        """Take one of what runs; Busy while one is being taken."""
        self.check_running()
        if wanted.uid != self.spec.uid:
            raise NotFound(f"{wanted.name} is another one by now", where=wanted.uid)
        reason = self.engine.refusal() if self.spec.checkpoints else "it was not started for that"
        if reason:
            raise Unsupported(f"{wanted.name} cannot be checkpointed: {reason}")
        if self._is_saving or self._process is None:
            raise Busy(f"a checkpoint of {wanted.name} is being taken")
        self._is_saving = True
        try:
            return await self.engine.checkpoint(wanted, self._process)
        finally:
            self._is_saving = False

    # -- its life

    async def _run(self, after: asyncio.Event | None) -> None:
        life = asyncio.ensure_future(self._live(after))
        going = asyncio.ensure_future(self._going.wait())
        await asyncio.wait({life, going}, return_when=asyncio.FIRST_COMPLETED)
        life.cancel()
        going.cancel()
        await asyncio.wait({life, going})
        if not life.cancelled() and life.exception() is not None:
            log.error("bug in the life of %s", self.spec.name, exc_info=life.exception())
            self._to("failed", f"internal error: {type(life.exception()).__name__}")
            await self._going.wait()
        await self._remove()

    async def _live(self, after: asyncio.Event | None) -> None:
        if after:
            await after.wait()
        try:
            await self._adopt()
        except (SupercloudError, OSError) as error:
            await self._failed(error)  # which ends whatever of it still runs
        while True:
            try:
                if self._process is None:
                    await self._bring_up()
                status = await self._watch()
            except (SupercloudError, OSError) as error:
                await self._failed(error)
                continue
            await self._ended(status)

    async def _adopt(self) -> None:
        """Take up what an earlier agent knew of it: that it runs, or how it ended."""
        saved = read_json(Places(self.spec.uid).state, {})
        if not saved.get("pid") and saved.get("state") != "exited" and not saved.get("held"):
            return
        self.restarts = saved["restarts"]
        self.started_s = saved["started_s"] or time.time()  # it waited in the template
        self.exit_status = saved["exit_status"]
        self.engine.started_from = saved.get("started_from", "")
        if saved.get("held"):
            self.state, self.reason = "failed", saved["reason"]
            await self._hold()
            return
        if not saved["pid"]:
            self.state, self.reason = "exited", saved["reason"]
            await self.engine.resume()
            await self._rest()
            return
        self.state = "lost"  # until we know
        self._process = adopt(saved["pid"], saved["ticks"], saved["launched_s"])
        if self._process is None:  # it ended while no agent looked
            self._process = Watched(saved["pid"], saved["launched_s"])
            self._process.close()
        await self.engine.resume()
        log.info("adopted %s (process %d)", self.spec.name, self._process.pid)

    async def _bring_up(self) -> None:
        self._again = False
        self._wake.clear()
        self._to("pending" if self.state == "failed" else self.state)
        self._save()
        if self.state == "pending":
            self._to("preparing")
            await self.engine.prepare()
            self._to("placed")
        self._to("starting")
        await self.engine.attach(self._waiting)
        self.reason = ""
        self._process = await self.engine.start()
        self.started_s = time.time()
        self._save()

    def _waiting(self, reason: str) -> None:
        """What it waits for before it can start."""
        if reason != self.reason:
            self.reason = reason
            self._tell(self, self.state, reason, "info")

    async def _watch(self) -> int | None:
        """Until its process ends; the exit status. Absent when a volume goes first."""
        process = self._process
        if process is None:
            raise BadState("nothing to watch")
        self.exit_status = None
        self._to("running")
        ended = asyncio.ensure_future(process.wait())
        probing = asyncio.ensure_future(self._probe())
        again = asyncio.ensure_future(self._stop_when_told(process))
        lost = asyncio.ensure_future(self.engine.lost())
        try:
            await asyncio.wait({ended, lost}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                lost.result()
            return await ended
        finally:
            for task in (ended, probing, again, lost):
                task.cancel()
            await asyncio.wait({ended, probing, again, lost})

    async def _stop_when_told(self, process: Watched) -> None:
        await self._wake.wait()
        await self.engine.stop(process, GRACE_S[self.spec.kind])

    async def _probe(self) -> None:
        """Serving while the first TCP port accepts."""
        port = next((p.port for p in self.spec.ports if p.protocol == "tcp"), 0)
        if not port or not self.spec.nics:
            return
        address = self.spec.nics[0].address.partition("/")[0]
        while True:
            serving = self.state == "serving"
            limit_s = readiness.CONFIRM_TIMEOUT_S if serving else readiness.CONNECT_TIMEOUT_S
            if await readiness.accepts(address, port, limit_s):
                await self._settled.wait()
                self._to("serving")
            elif serving:
                self._to("unready", f"port {port} does not answer")
            if self.state == "serving":
                await asyncio.sleep(readiness.STEADY_S)
            else:
                await self._next_look()

    async def _next_look(self) -> None:
        """A moment later; for a guest that has not sent anything yet, as soon as it has."""
        silent = self.spec.kind == "vm" and self.engine.started_from != "memory"
        tap = networks.device_name("tp", self.spec.uid, 0) if silent else ""
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + readiness.SILENT_S
        while True:
            await asyncio.sleep(readiness.STARTING_S)
            if not tap or readiness.has_spoken(tap) or loop.time() > limit_s:
                return

    async def _ended(self, status: int | None) -> None:
        killed = cgroups.oom_kills(self.spec.uid)
        await self._clean()
        self.exit_status = status
        reason = f"ended with exit status {'unknown' if status is None else status}"
        self._to("exited", reason + (", out of memory" if killed else ""))
        self._save()
        if time.time() - self.started_s > STEADY_S:
            self._delay_s = BACK_OFF_S[0]
        await self._rest()

    async def _rest(self) -> None:
        """After an end: until the policy, or somebody, wants it to start again."""
        if not self._again and not self._shall_restart(self.exit_status):
            await self._wake.wait()
        elif not self._again:
            await self._pause()
        self.restarts += 1

    def _shall_restart(self, status: int | None) -> bool:
        policy = self.spec.restart
        return policy == "always" or (policy == "on-failure" and status != 0)

    async def _clean(self) -> None:
        """Nothing of it runs any more when this returns."""
        while True:
            try:
                await self.engine.ended()
                break
            except (SupercloudError, OSError) as error:
                log.warning("%s: %s", self.spec.name, error)
                self.reason = f"cannot be cleaned up: {error}"[:1000]
                await asyncio.sleep(CLEAN_RETRY_S)
        if self._process:
            self._process.close()
            self._process = None

    async def _failed(self, error: Exception) -> None:
        message = error.message if isinstance(error, UserError) else str(error)
        lost = self.state in RUNNING and isinstance(error, Absent)
        held = (lost and self.spec.restart == "never") or isinstance(error, NotRestored)
        await self._clean()
        self._to("failed", message[:1000])
        self._save(held=held)
        if held:
            await self._hold()
            return
        if isinstance(error, Absent) and not isinstance(error, Broken):
            await self._until_returned()
        else:
            await self._pause()
        self.restarts += lost

    async def _hold(self) -> None:
        """It lost what it ran on and its policy is never, or its checkpoint is no good.

        Until somebody wants it again.
        """
        await self._wake.wait()
        self.restarts += 1

    async def _until_returned(self) -> None:
        """Wait for what is missing, or to be told to try without."""
        returned = asyncio.ensure_future(self.engine.returned())
        woken = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({returned, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (returned, woken):
                task.cancel()
            await asyncio.wait({returned, woken})

    async def _pause(self) -> None:
        """Wait before the next try, longer each time, unless told to go on."""
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 2, BACK_OFF_S[1])
        try:
            await asyncio.wait_for(self._wake.wait(), delay_s)
        except TimeoutError:
            return

    async def _remove(self) -> None:
        while True:
            try:
                self._to("deleting")
                if self._process:
                    await self.engine.stop(self._process, GRACE_S[self.spec.kind])
                    await self._process.ended_within(5.0)
                    self._process.close()
                    self._process = None
                await self.engine.destroy()
                break
            except (SupercloudError, OSError) as error:
                self._to("failed", f"cannot be removed: {error}"[:1000])
                await asyncio.sleep(self._delay_s)
                self._delay_s = min(self._delay_s * 2, BACK_OFF_S[1])
        self._to("gone")
        self.done.set()

    def _to(self, state: str, reason: str = "") -> None:
        before, self.reason = self.state, reason
        self.state = step(ENVIRONMENT, before, state)
        if before != state:
            bad = state in ("failed", "unready") or (state == "exited" and self.exit_status != 0)
            self._tell(self, state, reason, "warning" if bad else "info")

    def _save(self, *, held: bool = False) -> None:
        process, places = self._process, Places(self.spec.uid)
        os.makedirs(places.run, mode=0o710, exist_ok=True)
        write_json(places.state, {
            "spec": encode(self.spec), "base_id": self.base_id, "restarts": self.restarts,
            "started_s": self.started_s, "pid": process.pid if process else 0,
            "ticks": process.start_ticks if process else 0,
            "launched_s": process.launched_s if process else 0.0, "state": self.state,
            "reason": self.reason, "exit_status": self.exit_status, "held": held,
            "started_from": self.engine.started_from,
        })  # fmt: skip
