"""Long work beside a reactor: it runs in threads, what comes of it is told by the reactor."""

import logging
import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from supercloud.model.errors import Busy, SupercloudError, to_wire
from supercloud.model.events import event_id
from supercloud.services.base import Tell
from supercloud.wire.reactor import Reactor

MAX_JOBS: Final = 64
_THREADS: Final = 2

log = logging.getLogger("supercloud.services.checkpoint.jobs")


class Jobs:
    """``start`` gives each a number; ``done`` or ``failed`` is told with it when it has ended."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._tell = tell
        self._pool = ThreadPoolExecutor(_THREADS, "job")
        self._ended: queue.SimpleQueue[tuple[int, str, dict[str, Any]]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._last = 0
        self.running: dict[int, str] = {}
        reactor.watch(self, self._tell_all)

    def fileno(self) -> int:
        """Readable when a job has ended."""
        return self._event

    def start(self, what: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, int]:
        """Run it soon; its number. Busy when too many wait."""
        if len(self.running) >= MAX_JOBS:
            raise Busy(f"{MAX_JOBS} checkpoint jobs wait already")
        self._last += 1
        self.running[self._last] = what
        self._pool.submit(self._run, self._last, work)
        return {"job": self._last}

    def close(self) -> None:
        """Finish all that was started."""
        self._pool.shutdown()

    def _run(self, number: int, work: Callable[[], Mapping[str, Any]]) -> None:
        """On a thread."""
        try:
            ended = ("done", {"result": dict(work())})
        except SupercloudError as error:
            ended = ("failed", {"error": to_wire(error)})
        except Exception as error:
            bug = event_id()
            log.exception("bug %s in job %d", bug, number)
            ended = ("failed", {"error": to_wire(error, bug_id=bug)})
        self._ended.put((number, *ended))
        os.eventfd_write(self._event, 1)

    def _tell_all(self) -> None:
        os.eventfd_read(self._event)
        while not self._ended.empty():
            number, how, parameters = self._ended.get()
            what = self.running.pop(number, "")
            self._tell(f"job.{how}", {"job": number, "what": what, **parameters})
