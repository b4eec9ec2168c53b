"""The control plane's events: a bounded ring in memory, kept as rows ``event/ID``, and followed.

Ids are the control plane's own and grow from event to event, so that "since" means something.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import replace

import msgspec

from supercloud.control.store import Store
from supercloud.model.errors import SupercloudError
from supercloud.model.events import Event

KEPT_EVENTS = 4096
MAX_BEHIND = 8192
_PREFIX = "event/"

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

log = logging.getLogger("supercloud.control.events")


def _shown(event: Event) -> dict[str, str]:
    return {"ucloud": event.ucloud, "subject": event.subject, "text": event.message}


class EventLog:
    """Takes events without waiting; they are written behind."""

    def __init__(self, store: Store, kept: int = KEPT_EVENTS) -> None:
        """``kept`` is how many events there are at most."""
        self._store, self._kept = store, kept
        self._ring: deque[Event] = deque()
        self._versions: dict[str, int] = {}
        self._followers: set[asyncio.Queue[Event | None]] = set()
        self._new: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Take up the events that the store has, and begin to write new ones."""
        rows, _ = await self._store.list(_PREFIX)
        for row in rows:
            self._versions[row.key] = row.version
            self._ring.append(msgspec.json.decode(row.value, type=Event))
        self._writing = asyncio.get_running_loop().create_task(self._write(), name="events")

    def add(self, event: Event) -> None:
        """Keep the event, and show it to whoever follows."""
        last = self._ring[-1].id if self._ring else ""
        if event.id <= last:
            event = replace(event, id=f"{int(last, 16) + 1:020x}")
        log.log(_LEVELS[event.severity], "%s", event.code, extra=_shown(event))
        self._ring.append(event)
        self._new.append(event)
        self._wake.set()
        for queue in list(self._followers):
            if queue.qsize() < MAX_BEHIND:
                queue.put_nowait(event)

    def since(self, since: str = "", ucloud: str = "") -> list[Event]:
        """The events with an id after ``since``, of one U-Cloud or of all, oldest first."""
        return [e for e in self._ring if e.id > since and (not ucloud or e.ucloud == ucloud)]

    async def follow(self, since: str = "", ucloud: str = "") -> AsyncGenerator[Event, None]:
        """The events after ``since``, then new ones as they come, until ``close``."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._followers.add(queue)
        try:
            for event in self.since(since, ucloud):
                yield event
            while (item := await queue.get()) is not None:
                if not ucloud or item.ucloud == ucloud:
                    yield item
        finally:
            self._followers.discard(queue)

    async def close(self) -> None:
        """Write what is left, and end all followers."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
            with contextlib.suppress(SupercloudError):  # a store that fails is told elsewhere
                await self._flush()
        self.end_followers()

    def end_followers(self) -> None:
        """Tell all followers that there is no more."""
        for queue in list(self._followers):
            queue.put_nowait(None)

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._flush()
            except SupercloudError as error:
                log.warning("events cannot be kept: %s", error)

    async def _flush(self) -> None:
        batch = list(self._new)
        self._new.clear()
        await asyncio.gather(*(self._put(event) for event in batch))
        while len(self._ring) > self._kept:
            key = _PREFIX + self._ring.popleft().id
            if version := self._versions.pop(key, 0):
                await self._store.delete_if_version(key, version)

    async def _put(self, event: Event) -> None:
        key = _PREFIX + event.id
        self._versions[key] = await self._store.put_if_version(key, msgspec.json.encode(event), 0)
