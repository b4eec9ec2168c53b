"""What components without asyncio do alike: the core's events, and requests on channels."""

import logging
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from supercloud.lower.client import Answer, Core, CoreGone, Entry
from supercloud.model.capability import ObjectType
from supercloud.model.errors import Invalid, NotFound, SupercloudError
from supercloud.wire import portal
from supercloud.wire.frames import Event
from supercloud.wire.portal import Handler, Portal
from supercloud.wire.reactor import Reactor

log = logging.getLogger("supercloud.lower.component")


def set_up_logging() -> None:
    """One line a record on standard error, which is the domain's log."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )


class Component:
    """A component: its client of the core, its loop, and its ends of channels."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.reactor = Reactor(always=self._drain_core)
        self.channels: dict[str, socket.socket] = {}
        self.lost: Callable[[str], None] = lambda _name: None
        self.domain_died: Callable[[str], None] = lambda _name: None
        self._served: list[tuple[str, Mapping[str, Handler]]] = []

    def serve(self, prefix: str, handlers: Mapping[str, Handler]) -> None:
        """Answer requests on channels whose name starts with ``prefix`` by ``handlers``."""
        self._served.append((prefix, handlers))

    def run(self) -> None:
        """Take up the channels that are there, then serve until the host goes down."""
        set_up_logging()
        for entry in self.core.entries():
            self._arrived(entry)
        self.reactor.watch(self.core, lambda: None)  # drained after every turn
        try:
            self.reactor.run()
        except CoreGone:
            log.info("the host goes down")

    def ask(self, component: str, method: str, parameters: dict[str, Any]) -> Any:
        """The answer on the channel of that name; a portal for each call, so a restarted one's."""
        descriptor = self.core.take(self.core.lookup(component).selector)
        portal = Portal(socket.socket(fileno=descriptor), component)
        try:
            return portal.call(method, parameters)
        finally:
            portal.close()

    def _drain_core(self) -> None:
        for event in self.core.events():
            self._on_event(event)

    def _on_event(self, event: Answer) -> None:
        name = event.name
        if event.op in (Event.ARRIVED, Event.RENEWED):
            self._take_up(name)
        elif event.op == Event.REVOKED:
            self._drop(name)
            self.lost(name)
        elif event.op == Event.DIED:
            self.domain_died(name)
        elif event.op in (Event.RESTARTED, Event.OVERFLOW):
            self._look_again()

    def _look_again(self) -> None:
        """Events may have been lost: compare the table with what is known here."""
        entries = {entry.name: entry for entry in self.core.entries()}
        for name in [*self.channels]:
            if name not in entries:
                self._drop(name)
                self.lost(name)
        for entry in entries.values():
            if entry.name not in self.channels:
                self._arrived(entry)

    def _take_up(self, name: str) -> None:
        try:
            self._arrived(self.core.lookup(name))
        except NotFound:
            log.info("%s was gone before it was taken", name)

    def _arrived(self, entry: Entry) -> None:
        if entry.type is not ObjectType.PORTAL or entry.end < 0 or not self._wants(entry.name):
            return
        self._drop(entry.name)
        channel = socket.socket(fileno=self.core.take(entry.selector))
        channel.setblocking(False)
        self.channels[entry.name] = channel
        handlers = self._handlers(entry.name)
        if handlers is not None:
            self.reactor.watch(channel, lambda: self._serve(entry.name, channel, handlers))
        log.info("channel %s is up", entry.name)

    def _wants(self, name: str) -> bool:
        return any(name.startswith(prefix) for prefix, _ in self._served)

    def _handlers(self, name: str) -> Mapping[str, Handler] | None:
        found = (handlers for prefix, handlers in self._served if name.startswith(prefix))
        return next(found, None) or None

    def _drop(self, name: str) -> None:
        channel = self.channels.pop(name, None)
        if channel is not None:
            self.reactor.forget(channel)
            channel.close()

    def _serve(self, name: str, channel: socket.socket, handlers: Mapping[str, Handler]) -> None:
        try:
            message = portal.receive(channel)
        except BlockingIOError:
            return
        except Invalid as error:
            log.warning("%s: %s", name, error)
            return
        if message is None:
            self._drop(name)  # its other end is started again (RENEWED follows) or gone
            return
        try:
            portal.answer(channel, name, message, handlers)
        except (SupercloudError, OSError) as error:  # it does not read its answers
            log.warning("%s: %s", name, error)
