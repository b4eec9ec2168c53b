"""The work queue of the reconcilers: serial per object, parallel across, level-triggered.

A key says "look at this object", nothing of what happened to it. Keys that wait are one; a key
that comes while its object is being worked on is worked on once more afterwards. A reconciler
observes, acts, and says when to look again; what it raises decides the rest: ``Temporary`` is
tried again after its delay, other errors after a delay that grows, and a ``UserError`` or
``Permanent`` waits for a change (and a long while).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from supercloud.model.errors import Permanent, Temporary, UserError
from supercloud.model.events import event_id

log = logging.getLogger("supercloud.control.reconcile")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
RESIGNED_DELAY_S = 120.0
NOT_SOONER_S = 0.25
"""Before this, what failed is not tried again, whatever changes."""

Reconciler = Callable[[str], Awaitable[float | None]]
"""Works on one key; seconds until it wants to look again, or None when only a change matters."""

Failed = Callable[[str, BaseException, str], Awaitable[None]]
"""Told of what a reconciler raised: key, error, and the id of the bug ("" if it is none)."""


async def _untold(_key: str, _error: BaseException, _bug: str) -> None:
    """Nobody to tell."""


@dataclass(slots=True)
class _Object:
    queued: bool = False  # it will be looked at
    running: bool = False  # it is being looked at
    again: bool = False
    failures: int = 0
    timer: asyncio.TimerHandle | None = None


class WorkQueue:
    """Runs ``reconcile`` for keys, at most ``workers`` at a time."""

    def __init__(
        self, reconcile: Reconciler, *, workers: int = 32, failed: Failed = _untold
    ) -> None:
        """``failed`` is awaited for every error before the next try is set."""
        self._reconcile, self._failed = reconcile, failed
        self._objects: dict[str, _Object] = {}
        self._slots = asyncio.Semaphore(workers)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False

    def add(self, key: str, delay_s: float = 0.0) -> None:
        """Look at ``key`` soon, or after ``delay_s`` unless it is looked at before."""
        if self._stopped:
            return
        item = self._objects.setdefault(key, _Object())
        if delay_s > 0:
            self._later(key, item, delay_s)
        elif item.running:
            item.again = True
        elif not item.queued:
            self._start(key, item)

    async def idle(self) -> None:
        """Wait until nothing is being worked on (timers may still be set)."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Take nothing more, cancel what is being worked on, and wait for it to end."""
        self._stopped = True
        for item in self._objects.values():
            if item.timer is not None:
                item.timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _later(self, key: str, item: _Object, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if item.timer is not None:
            if item.timer.when() <= loop.time() + delay_s:
                return
            item.timer.cancel()
        item.timer = loop.call_later(delay_s, self._due, key, item)

    def _due(self, key: str, item: _Object) -> None:
        item.timer = None
        self.add(key)

    def _start(self, key: str, item: _Object) -> None:
        item.queued = True
        self._busy += 1
        self._idle.clear()
        task = asyncio.get_running_loop().create_task(self._work(key, item), name=key)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._busy -= 1
        if not self._busy:
            self._idle.set()

    async def _work(self, key: str, item: _Object) -> None:
        async with self._slots:
            item.queued, item.running = False, True
            if item.timer is not None:
                item.timer.cancel()
                item.timer = None
            try:
                delay_s = await self._try(key, item)
            finally:
                item.running = False
        self._next(key, item, delay_s)

    def _next(self, key: str, item: _Object, delay_s: float | None) -> None:
        if item.again:
            item.again = False
            # What failed has told of it, which is a change too: that must not make it spin.
            self.add(key, min(delay_s or 0.0, NOT_SOONER_S) if item.failures else 0.0)
        elif delay_s is not None:
            self.add(key, max(delay_s, 0.001))
        elif not item.failures and item.timer is None:
            self._objects.pop(key, None)

    async def _try(self, key: str, item: _Object) -> float | None:
        try:
            delay_s = await self._reconcile(key)
        except Temporary as error:
            item.failures += 1
            await self._failed(key, error, "")
            return max(error.delay_s, 0.001)
        except (UserError, Permanent) as error:
            item.failures += 1
            await self._failed(key, error, "")
            return RESIGNED_DELAY_S
        except Exception as error:
            item.failures += 1
            bug = event_id()
            log.exception("bug %s while reconciling %s", bug, key)
            await self._failed(key, error, bug)
            return min(FIRST_DELAY_S * 2.0 ** (item.failures - 1), LONGEST_DELAY_S)
        item.failures = 0
        return delay_s
