"""Events of this domain: the last ones kept, all passed on to whoever watches."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from supercloud.model.events import Event, Severity

KEPT = 500
_MAX_BEHIND = 2000

log = logging.getLogger("supercloud.lower.user_domain.events")


class Feed:
    """Made by one user's domain; ``actor`` is who speaks, ``ucloud`` for whom."""

    def __init__(self, ucloud: str, actor: str) -> None:
        self._ucloud, self._actor = ucloud, actor
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._watchers: set[asyncio.Queue[Event]] = set()

    def say(
        self,
        subject: str,
        code: str,
        message: str = "",
        *,
        severity: Severity = "info",
        details: dict[str, Any] | None = None,
    ) -> None:
        """Something happened."""
        event = Event(
            ucloud=self._ucloud,
            subject=subject,
            actor=self._actor,
            code=code,
            message=message,
            severity=severity,
            details=details or {},
        )
        log.info("%s %s %s", code, subject, message)
        self._kept.append(event)
        for watcher in self._watchers:
            if watcher.qsize() < _MAX_BEHIND:  # one that does not read misses some
                watcher.put_nowait(event)

    async def watch(self) -> AsyncIterator[Event]:
        """What was kept, then everything new; ends only by cancellation."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        for event in self._kept:
            queue.put_nowait(event)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)
