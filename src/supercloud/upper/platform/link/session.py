"""One enrolled agent's connection, as the control plane uses it."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from supercloud.model.errors import Invalid, SupercloudError
from supercloud.model.events import Event
from supercloud.upper.platform.link.owner import Owner
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import (
    Apply,
    ByName,
    Exec,
    Hello,
    Logs,
    PlatformReport,
)
from supercloud.wire.peer import ConnectionLost, Peer, Stream

MAX_WAITING_EVENTS: Final = 1024
CHECKPOINT_TIMEOUT_S: Final = 3600.0

log = logging.getLogger("supercloud.upper.platform.link")


class AgentSession:
    """Calls to a platform's agent. ``pin`` is of its public key; ``since_s`` since the epoch.

    Every call raises ConnectionLost (a Temporary) when the connection ends before the answer.
    """

    def __init__(self, peer: Peer, hello: Hello, pin: str, owner: Owner) -> None:
        self.peer, self.hello, self.pin, self._owner = peer, hello, pin, owner
        self.platform, self.since_s = hello.platform, time.time()
        self._report: PlatformReport | None = None
        self._events: deque[Event] = deque(maxlen=MAX_WAITING_EVENTS)
        self._news = asyncio.Event()
        self._abandoned = False
        self.files = 0  # on their way to it
        self.depositing = asyncio.Lock()
        peer.notified = self._notified

    # -- calls

    async def apply(self, desired: Apply, *, timeout_s: float = 60.0) -> PlatformReport:
        """Say what the platform is to run; answered at once, progress comes as reports."""
        answer = await self.peer.call("ee.apply", encode(desired), timeout_s=timeout_s)
        return decode(PlatformReport, answer, "ee.apply", ignore_unknown=True)

    async def list(self, *, timeout_s: float = 30.0) -> PlatformReport:
        """What the platform runs now."""
        answer = await self.peer.call("ee.list", timeout_s=timeout_s)
        return decode(PlatformReport, answer, "ee.list", ignore_unknown=True)

    async def restart(self, name: str) -> None:
        """Start an environment anew."""
        await self.peer.call("ee.restart", encode(ByName(name=name)))

    async def checkpoint(
        self, asked: CheckpointTake, *, timeout_s: float = CHECKPOINT_TIMEOUT_S
    ) -> CheckpointTaken:
        """Take a checkpoint of an environment; answered when it is in the store."""
        answer = await self.peer.call("ee.checkpoint", encode(asked), timeout_s=timeout_s)
        return decode(CheckpointTaken, answer, "ee.checkpoint", ignore_unknown=True)

    async def shutdown(self, *, timeout_s: float = 60.0) -> None:
        """Stop all environments and power off; a connection lost on the way is the success."""
        try:
            await self.peer.call("platform.shutdown", timeout_s=timeout_s)
        except ConnectionLost:
            log.debug("%s: powered off before it answered", self.platform)

    def exec(self, asked: Exec) -> AbstractAsyncContextManager[Stream]:
        """A program's terminal, or its input and output; see ``Exec``."""
        return self.peer.open("ee.exec", encode(asked))

    def logs(self, asked: Logs) -> AbstractAsyncContextManager[Stream]:
        """An environment's output."""
        return self.peer.open("ee.logs", encode(asked))

    def console(self, name: str) -> AbstractAsyncContextManager[Stream]:
        """A VM's serial console."""
        return self.peer.open("ee.console", encode(ByName(name=name)))

    def close(self) -> None:
        """End the connection; the agent dials again."""
        self.peer.close()

    def abandon(self) -> None:
        """End it at once, heeding nothing more that comes: a newer session has taken its place."""
        self._abandoned = True
        self.peer.writer.transport.abort()

    # -- what the agent tells

    def _notified(self, method: str, untrusted: Any) -> None:
        """Keep the newest report and the last events; the owner is told by ``deliver``."""
        if self._abandoned:
            return
        try:
            if method == "agent.report":
                self._report = decode(PlatformReport, untrusted, method, ignore_unknown=True)
            elif method == "agent.event":
                self._events.append(self._event(untrusted))
            else:
                log.debug("%s: unknown notification %.80s", self.platform, method)
        except Invalid as error:
            log.warning("%s: %s", self.platform, error)
            return
        self._news.set()

    def _event(self, untrusted: Any) -> Event:
        """The event with what a platform may not say of others put right."""
        event = decode(Event, untrusted, "agent.event", ignore_unknown=True)
        if event.ucloud != self.hello.ucloud:
            raise Invalid(f"an event of U-Cloud {event.ucloud!r:.80}", where="agent.event")
        return event

    async def deliver(self) -> None:
        """Tell the owner, in order, one at a time, until cancelled."""
        await self._tell(self._owner.connected(self))
        while True:
            await self._news.wait()
            self._news.clear()
            while self._events:
                await self._tell(self._owner.event(self, self._events.popleft()))
            report, self._report = self._report, None
            if report is not None:
                await self._tell(self._owner.report(self, report))

    async def _tell(self, telling: Coroutine[Any, Any, None]) -> None:
        if self._abandoned:
            telling.close()
            return
        try:
            await telling
        except SupercloudError as error:
            log.warning("%s: %s", self.platform, error)
        except Exception:
            log.exception("%s: a bug in what was told of it", self.platform)
