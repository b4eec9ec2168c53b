"""The user's services on this host: each in a domain of its own, started when it is first needed.

Their domains are made at once and so booked on the user's context for good; a domain that is not
started has no process. One that died is made anew; what it had open is its users' affair.
"""

import logging
import time
from typing import Final

from supercloud.lower import quota as quotas
from supercloud.lower.names import domain_name
from supercloud.lower.user_domain.channel import Channel, Told
from supercloud.lower.user_domain.hub import Hub
from supercloud.model.capability import SELF
from supercloud.model.errors import NotFound
from supercloud.wire.frames import DomainState
from supercloud.wire.objects import ServiceStatus

CONTROL: Final = "control"

log = logging.getLogger("supercloud.lower.user_domain.services")


class Services:
    """By kind (``isolation.kinds.SERVICES``); what one tells goes to its ``told``."""

    def __init__(self, hub: Hub, user: str) -> None:
        self._hub, self._core, self._user = hub, hub.core, user
        self.told: dict[str, Told] = {}
        self._since: dict[str, float] = {}

    def reserve(self) -> None:
        """Have the domain of each, so that there is room for it when it is needed."""
        for kind, limits in quotas.SERVICES.items():
            name = self._domain(kind)
            try:
                self._core.lookup(name)
            except NotFound:
                made = self._core.create_domain(kind, name, limits)
                self._core.create_channel(SELF, made.selector, self._channel(kind), CONTROL)

    def is_running(self, kind: str) -> bool:
        """Whether it was started and lives."""
        try:
            status = self._core.state(self._core.lookup(self._domain(kind)).selector)
        except NotFound:
            return False
        return status.state is not DomainState.CREATED

    def join(self, kind: str) -> Channel:
        """The channel to it, whether it runs or not."""
        self.reserve()
        return self._hub.join(self._channel(kind), self.told.get(kind))

    def status(self, kind: str) -> ServiceStatus:
        """What it uses; ``started_s`` 0 as well when it runs longer than this process."""
        limit = quotas.SERVICES[kind].memory_bytes
        if not self.is_running(kind):
            return ServiceStatus(kind=kind, state="not running", memory_limit_bytes=limit)
        selector = self._core.lookup(f"sched:{self._domain(kind)}").selector
        return ServiceStatus(
            kind=kind,
            state="running",
            memory_bytes=self._core.usage(selector).memory_bytes,
            memory_limit_bytes=limit,
            started_s=self._since.get(kind, 0.0),
        )

    def start(self, kind: str) -> Channel:
        """The channel to it; it is started if it does not run."""
        if not self.is_running(kind):
            self._hub.drain()  # of its death is heard before it is made anew, not afterwards
        channel = self.join(kind)
        if not self.is_running(kind):
            self._core.start(self._core.lookup(self._domain(kind)).selector)
            self._since[kind] = time.time()
            log.info("service %s is started", kind)
        return channel

    def give_room(self, kind: str, memory_bytes: int) -> None:
        """Let it have so much memory beyond what every one of its kind has. NoResources."""
        limits = quotas.SERVICES[kind]
        selector = self._core.lookup(f"sched:{self._domain(kind)}").selector
        more = limits._replace(memory_bytes=limits.memory_bytes + memory_bytes)
        self._core.set_limits(selector, more)

    def end(self, kind: str, *, purge: bool = False) -> None:
        """Kill it, and have its domain anew; ``purge``: what it keeps on the disk goes, too."""
        try:
            self._core.destroy(self._core.lookup(self._domain(kind)).selector, purge=purge)
        except NotFound:
            log.info("service %s was gone already", kind)
        self._hub.leave(self._channel(kind))
        self.reserve()

    def statuses(self) -> list[ServiceStatus]:
        """Of all of them."""
        return [self.status(kind) for kind in quotas.SERVICES]

    def kind_of(self, entry: str) -> str:
        """The service whose domain has that name; "" for none."""
        return next((kind for kind in quotas.SERVICES if entry == self._domain(kind)), "")

    def _domain(self, kind: str) -> str:
        return domain_name(kind, self._user)

    @staticmethod
    def _channel(kind: str) -> str:
        return f"service:{kind}"
