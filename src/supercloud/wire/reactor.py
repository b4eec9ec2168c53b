"""A small event loop for components that must stay small: no asyncio, a third of its memory.

Everything runs in one thread, one callback at a time. Callbacks get nothing: what is readable,
which timer is due, or what the core says is known from the closure that was registered.
"""

import heapq
import itertools
import logging
import selectors
import time
from collections.abc import Callable
from typing import Protocol

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

log = logging.getLogger("supercloud.wire.reactor")


class HasFileno(Protocol):
    """A socket, or the client of the core."""

    def fileno(self) -> int:
        """The descriptor to wait for."""


class Timer:
    """A call that is due at a time; ``cancel`` makes it nothing."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call it."""
        self.callback = None


class Reactor:
    """Waits for descriptors and times. ``always`` runs after each turn (draining the core)."""

    def __init__(self, always: Callable[[], None] = lambda: None) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._always = always
        self._stopped = False

    def watch(self, source: HasFileno, callback: Callable[[], None], events: int = READ) -> None:
        """Call ``callback`` whenever ``source`` is ready; replaces what was registered."""
        if source.fileno() in self._selector.get_map():
            self._selector.modify(source, events, callback)
        else:
            self._selector.register(source, events, callback)

    def forget(self, source: HasFileno) -> None:
        """No more calls for ``source``; to be called before it is closed."""
        if source.fileno() in self._selector.get_map():
            self._selector.unregister(source)

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``delay_s`` from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._count), timer))
        return timer

    def every(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` each ``period_s``, the first time after one."""

        def again() -> None:
            self.after(period_s, again)
            callback()

        self.after(period_s, again)

    def stop(self) -> None:
        """Make ``run`` return after this turn."""
        self._stopped = True

    def run(self) -> None:
        """Serve until ``stop``. An exception of a callback is the program's."""
        self._always()
        while not self._stopped:
            for key, _ in self._selector.select(self._wait_s()):
                if self._selector.get_map().get(key.fd) is key:  # not changed by one before
                    key.data()
            self._run_timers()
            self._always()

    def _wait_s(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()
