"""Driver for uplinks: one passt in a domain of its own per platform, and its range of host ports.

The driver makes passt's domain in the host's network and gives the user's domain the right to join
it to that user's machine by a channel; frames never pass through the driver. It also dials for
users' domains (``dial``). ``SUPERCLOUD_UPLINK`` holds ``{"address", "first_port", "last_port",
"dial", "guest"}`` of this instance; ``guest`` is the lease that each passt gives.
"""

import json
import logging
import os
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.lower.names import domain_name
from supercloud.lower.provider import dial
from supercloud.lower.provider.ports import PortRanges, Range, is_free
from supercloud.lower.quota import from_limits
from supercloud.model.capability import Rights
from supercloud.model.errors import NoResources, NotFound
from supercloud.wire.frames import DomainState
from supercloud.wire.portal import Reply, Request

USER_PREFIX = "user:"
DOMAIN_PREFIX = "uplink-net"
MAX_PORTS = 1024

log = logging.getLogger("supercloud.lower.uplink")


class UplinkDriver(Component):
    """passt domains and port ranges of all users; a holder is ``USER/PLATFORM``."""

    def __init__(self, core: Core, state: str = "/run/state") -> None:
        super().__init__(core)
        settings = json.loads(os.environ["SUPERCLOUD_UPLINK"])
        self._address = settings["address"]
        self._policy = str(settings["dial"])
        self._guest = settings["guest"]
        self._allowance = dial.Allowance()
        self._ranges = PortRanges(
            f"{state}/ranges.json",
            settings["first_port"],
            settings["last_port"],
            lambda port: is_free(self._address, port),
        )
        self.serve(
            USER_PREFIX,
            {
                "uplink.create": self.create,
                "uplink.start": self.start,
                "uplink.delete": self.delete,
                "uplink.list": self.names,
                "uplink.dial": self.dial,
            },
        )
        self.serve("admin", {"driver.status": self.status})
        self.serve("multiplexing", {"user.forget": self.forget})

    def create(self, request: Request) -> dict[str, Any]:
        """``{platform, ports}`` -> ``{domain, address, first_port, ports, guest}``.

        The user's domain then has CONNECT on the passt domain, under the name ``domain``, joins
        its ``guest`` to the machine by a stream channel, and calls ``uplink.start``.
        """
        user, platform = _user(request), request.name("platform")
        count = request.number("ports", 0, MAX_PORTS)
        name = domain_name(DOMAIN_PREFIX, user, platform)
        self._check_share(user, platform, count)
        first, count = self._ranges.allot(f"{user}/{platform}", count)
        if self._find(name) is None:
            self._make(user, name, count)
        given = {"domain": name, "first_port": first, "ports": count}
        return {**given, "address": self._address, "guest": self._guest}

    def start(self, request: Request) -> dict[str, Any]:
        """``{platform}``: run it; nothing when it runs."""
        user, platform = _user(request), request.name("platform")
        name = domain_name(DOMAIN_PREFIX, user, platform)
        selector = self._find(name)
        held = self._ranges.held.get(f"{user}/{platform}")
        if selector is None or held is None:
            raise NotFound(f"no uplink for {platform}")
        if self.core.state(selector).state is DomainState.CREATED:
            self.core.start(selector, *_numbers(held))
        return {}

    def delete(self, request: Request) -> dict[str, Any]:
        """``{platform}``: gone with its ports, also when it was not there."""
        self._delete(_user(request), request.name("platform"))
        return {}

    def names(self, request: Request) -> list[str]:
        """Platforms of the user that have an uplink."""
        prefix = _user(request) + "/"
        return [h.removeprefix(prefix) for h in self._ranges.held if h.startswith(prefix)]

    def dial(self, request: Request) -> Reply:
        """``{address, port}``: a socket that connects there; Denied, Busy, Temporary."""
        address = dial.check(request.text("address", most=64), self._policy)
        port = request.number("port", 1, 65535)
        self._allowance.take(_user(request))
        return Reply({}, [dial.begin(address, port).detach()])

    def status(self, _request: Request) -> dict[str, Any]:
        """For the admin console: who holds which ports."""
        return {
            "driver": "uplink",
            "address": self._address,
            "dial": self._policy,
            "ranges": [
                {"holder": holder, "first_port": first, "ports": count}
                for holder, (first, count) in sorted(self._ranges.held.items())
            ],
        }

    def forget(self, request: Request) -> dict[str, Any]:
        """``{user}``, from the multiplexing: no longer of this host, and so is all it had."""
        user = request.name("user")
        for holder in [*self._ranges.held]:
            owner, _, platform = holder.partition("/")
            if owner == user:
                self._delete(user, platform)
        return {}

    def _check_share(self, user: str, platform: str, count: int) -> None:
        """No more uplinks than machines, and half of the ports at most; NoResources."""
        others = {
            holder: ports
            for holder, (_, ports) in self._ranges.held.items()
            if holder.startswith(f"{user}/") and holder != f"{user}/{platform}"
        }
        vms = from_limits(self.core.limits(self.core.lookup(f"sched:{user}").selector)).vms
        if len(others) >= vms:
            raise NoResources(f"{user} has {len(others)} uplinks, as many as machines are allowed")
        most = max(1, self._ranges.size // 2)
        if count + sum(others.values()) > most:
            raise NoResources(f"{user} may have {most} host ports in all", hint="ask for fewer")

    def _make(self, user: str, name: str, count: int) -> None:
        kind = "uplink-net" if count else "uplink-net-closed"
        made = self.core.create_domain(kind, name)
        try:
            to = self.core.lookup(f"domain:{user}").selector
            self.core.delegate(made.selector, to, Rights.CONNECT, name)
        except BaseException:
            self.core.destroy(made.selector)
            raise
        log.info("%s made with %d ports", name, count)

    def _find(self, name: str) -> int | None:
        try:
            return self.core.lookup(name).selector
        except NotFound:
            return None

    def _delete(self, user: str, platform: str) -> None:
        self.core.destroy_named(domain_name(DOMAIN_PREFIX, user, platform))
        self._ranges.release(f"{user}/{platform}")


def _numbers(held: Range) -> tuple[int, ...]:
    first, count = held
    return (first, first + count - 1) if count else ()


def _user(request: Request) -> str:
    return request.peer.removeprefix(USER_PREFIX)


if __name__ == "__main__":
    os.umask(0o077)
    UplinkDriver(Core()).run()
