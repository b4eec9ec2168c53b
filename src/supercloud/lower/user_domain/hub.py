"""The core's events and this domain's channels, under asyncio."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from supercloud.lower.client import Answer, Core, CoreGone
from supercloud.lower.user_domain.channel import Channel, Told
from supercloud.model.errors import NotFound
from supercloud.wire.frames import Event

log = logging.getLogger("supercloud.lower.user_domain.hub")

DRAIN_S = 0.5
"""A call may have read an event off the socket: look again after at most this."""


class Hub:
    """Channels by their name in this domain's table; ``ended`` gets names of what is gone."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.ended: Callable[[str], None] = lambda _name: None
        self.channels: dict[str, Channel] = {}
        self.gone = asyncio.Event()

    def start(self) -> None:
        """Listen to the core."""
        asyncio.get_running_loop().add_reader(self.core.fileno(), self.drain)
        self._drain_later()

    def join(self, name: str, told: Told | None = None) -> Channel:
        """The channel of that name; its socket is taken now if it is there, else when it comes."""
        channel = self.channels.get(name)
        if channel is None:
            channel = self.channels[name] = Channel(name, told, lambda: self._lost(name))
        if not channel.is_open:
            self._take_up(name)
        return channel

    def leave(self, name: str) -> None:
        """Forget a channel."""
        channel = self.channels.pop(name, None)
        if channel is not None:
            channel.close()

    def drain(self) -> None:
        """Act on all events that have come."""
        try:
            for event in self.core.events():
                self._on_event(event)
        except CoreGone:
            asyncio.get_running_loop().remove_reader(self.core.fileno())
            self.gone.set()

    def _drain_later(self) -> None:
        if not self.gone.is_set():
            self.drain()
            asyncio.get_running_loop().call_later(DRAIN_S, self._drain_later)

    def _on_event(self, event: Answer) -> None:
        name = event.name
        if event.op in (Event.ARRIVED, Event.RENEWED):
            if name in self.channels:
                self._take_up(name)
        elif event.op in (Event.DIED, Event.REVOKED):
            self.ended(name)
        elif event.op in (Event.RESTARTED, Event.OVERFLOW):
            log.warning("events may have been lost")
            for known, channel in self.channels.items():
                if not channel.is_open:  # the open ones outlive the core
                    self._take_up(known)

    def _lost(self, name: str) -> None:
        """The far end is gone, or started again and we have missed to be told."""
        asyncio.get_running_loop().call_later(DRAIN_S, self._take_up_if_closed, name)

    def _take_up_if_closed(self, name: str) -> None:
        channel = self.channels.get(name)
        if channel is not None and not channel.is_open:
            self._take_up(name)

    def _take_up(self, name: str) -> None:
        with contextlib.suppress(NotFound):
            self.channels[name].use(self.core.take(self.core.lookup(name).selector))
