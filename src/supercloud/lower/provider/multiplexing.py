"""Shares the host out: users, their quotas, and the domains that these pay for.

A user's domain is made out of what is left of the multiplexing's own scheduling context; the core
refuses what does not fit. What a domain is told at its birth (the user's name and CA) is a sealed,
measured memory object. Afterwards the multiplexing can change limits and end the domain, no more.
"""

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from supercloud.lower import quota as quotas
from supercloud.lower.client import Core, Domain
from supercloud.lower.component import Component
from supercloud.lower.names import DRIVERS
from supercloud.lower.provider.users import User, UserStore, check_ca, check_user_name
from supercloud.model.capability import SELF, ObjectType, Rights
from supercloud.model.errors import (
    Exists,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    UserError,
)
from supercloud.wire.codec import decode, encode
from supercloud.wire.frames import DomainState
from supercloud.wire.portal import Request
from supercloud.wire.quota import Quota
from supercloud.wire.reactor import Timer

USER_KIND = "user"
PREFIX = "user:"
MACHINE_PARTS = ("kernel", "initrd", "root")
FORGET_AGAIN_S = 5.0
_NOTHING = Quota(cpu_permille=10, memory_bytes=0, disk_bytes=0, vms=0)
_MAKE_ROOM = "ask for less, or take from others: supercloud-host user list, quota, user remove"
_PAGE_BYTES = 4096
_GIVEN = Rights.USE | Rights.READ | Rights.GRANT

log = logging.getLogger("supercloud.lower.multiplexing")


class Multiplexing(Component):
    """The users of this host and their domains."""

    def __init__(self, core: Core, state: str = "/run/state") -> None:
        super().__init__(core)
        self._store = UserStore(f"{state}/users.json")
        self._trouble: dict[str, str] = {}
        self._again: Timer | None = None
        handlers: dict[str, Callable[[Request], Any]] = {
            "user.add": self.add,
            "user.remove": self.remove,
            "user.list": self.rows,
            "user.quota": self.set_quota,
            "host.usage": self.usage,
            "host.domains": self.domains,
        }
        self.serve("admin", handlers)

    def start(self) -> None:
        """Make the domains agree with the users that are recorded, once all channels are there."""
        self._equip()
        for name in self._made():
            if name not in self._store.users or not self._is_started(name):
                self._end(name)
        for user in self._store.users.values():
            if user.name not in self._made():
                self._try_to_make(user)
        self._try_to_forget()

    # -- what the admin console may ask

    def add(self, request: Request) -> dict[str, Any]:
        """``{user, ca_pem, quota}``: enrol. The same again is nothing; Exists, NoResources.

        What the quota does not say goes by what the host has left.
        """
        name = check_user_name(request.text("user"))
        known = self._store.users.get(name)
        usual = known.quota if known is not None else self._fitting()
        pem = check_ca(request.text("ca_pem", most=1 << 16))
        user = User(name, pem, _changed(usual, request.untrusted.get("quota", {})))
        if known is not None:
            _check_same(known, user)
        if user.name in self._store.leaving:
            self._forget(user.name)  # what one of that name had is not this one's
        if user.name not in self._made():
            self._make(user)
        self._store.put(user)
        log.info("user %s enrolled", user.name)
        return self._row(user)

    def remove(self, request: Request) -> dict[str, Any]:
        """``{user}``: end its domain and all that hangs from it, and forget its state."""
        name = check_user_name(request.text("user"))
        if name not in self._store.users and name not in self._made():
            raise NotFound(f"no user {name}")
        self._store.remove(name)
        if name in self._made():
            self._end(name)
        log.info("user %s removed", name)
        self._try_to_forget()
        return {}

    def set_quota(self, request: Request) -> dict[str, Any]:
        """``{user, quota}``; NoResources when more is in use, or the host has not that much."""
        name = check_user_name(request.text("user"))
        known = self._store.users.get(name)
        if known is None:
            raise NotFound(f"no user {name}")
        user = User(name, known.ca_pem, _changed(known.quota, request.untrusted.get("quota")))
        if name in self._made():
            self._limit(user)
        self._store.put(user)
        if name not in self._made():
            self._make(user)
        return self._row(user)

    def rows(self, _request: Request) -> list[dict[str, Any]]:
        """A row for each user."""
        return [self._row(user) for _, user in sorted(self._store.users.items())]

    def usage(self, _request: Request) -> dict[str, Any]:
        """What users may take of the host, and what is booked of that."""
        limits, usage = self.core.limits(), self.core.usage()
        return {
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "domains": limits.domains,
            "booked_memory_bytes": usage.booked_memory_bytes,
            "booked_disk_bytes": usage.booked_disk_bytes,
            "booked_domains": usage.booked_domains,
            "used_memory_bytes": usage.memory_bytes,
            "cpu_us": usage.cpu_us,
        }

    def domains(self, _request: Request) -> list[dict[str, Any]]:
        """Users' domains as far as the provider sees them: state and use, not what is in them."""
        rows = []
        for name, domain in sorted(self._made().items()):
            status, usage = self.core.state(domain.selector), self.core.usage(domain.scheduling)
            rows.append(
                {
                    "name": f"{PREFIX}{name}",
                    "state": status.state.name.lower(),
                    "starts": status.starts,
                    "processes": usage.pids,
                    "domains_inside": usage.booked_domains,
                    "memory_bytes": usage.memory_bytes,
                    "cpu_us": usage.cpu_us,
                }
            )
        return rows

    def _row(self, user: User) -> dict[str, Any]:
        row = {"name": user.name, "ca_sha256": user.ca_sha256, "quota": encode(user.quota)}
        domain = self._made().get(user.name)
        if domain is None:
            return {**row, "state": "failed", "reason": self._trouble.get(user.name, "")}
        usage = self.core.usage(domain.scheduling)
        booked = usage.booked_memory_bytes, usage.booked_domains, usage.booked_disk_bytes
        used = {
            **quotas.used(*booked),  # as a user's domain of ours takes it; another may do otherwise
            "booked_memory_bytes": usage.booked_memory_bytes,
            "booked_domains": usage.booked_domains,
            "cpu_us": usage.cpu_us,
        }
        state = self.core.state(domain.selector).state.name.lower()
        return {**row, "state": state, "used": used}

    # -- domains

    def _made(self) -> dict[str, Domain]:
        """Users' domains in the core's table, by the user's name."""
        entries = {entry.name: entry for entry in self.core.entries()}
        return {
            name.removeprefix(PREFIX): Domain(entry.selector, entries[f"sched:{name}"].selector)
            for name, entry in entries.items()
            if entry.type is ObjectType.DOMAIN and name.startswith(PREFIX)
        }

    def _fitting(self) -> Quota:
        limits, usage = self.core.limits(), self.core.usage()
        return quotas.fitting(
            limits.memory_bytes - usage.booked_memory_bytes,
            limits.disk_bytes - usage.booked_disk_bytes,
        )

    def _is_started(self, name: str) -> bool:
        return self.core.state(self._made()[name].selector).state is not DomainState.CREATED

    def _try_to_make(self, user: User) -> None:
        try:
            self._make(user)
        except UserError as error:
            self._trouble[user.name] = str(error)
            log.warning("user %s: %s", user.name, error)

    def _make(self, user: User) -> None:
        limits = quotas.to_limits(user.quota)
        try:
            domain = self.core.create_domain(USER_KIND, PREFIX + user.name, limits)
        except NoResources as error:
            raise NoResources(str(error), hint=_MAKE_ROOM) from error
        try:
            self._outfit(user, domain)
            self.core.start(domain.selector)
        except BaseException:
            self._end(user.name)
            raise
        self._trouble.pop(user.name, None)

    def _outfit(self, user: User, domain: Domain) -> None:
        """Give a new domain its identity, its channels and the images."""
        self._identify(user, domain)
        for component in ("front_door", "disk", "uplink"):
            provider = self.core.lookup(f"domain:{component}").selector
            self.core.create_channel(provider, domain.selector, PREFIX + user.name, component)
        disk, uplink = (self.core.lookup(f"domain:{n}").selector for n in ("disk", "uplink"))
        charge = Rights.CHARGE | Rights.READ
        self.core.delegate(domain.scheduling, disk, charge, f"sched:{user.name}")
        self.core.delegate(domain.scheduling, uplink, Rights.READ, f"sched:{user.name}")
        self.core.delegate(domain.selector, uplink, Rights.CONNECT, f"domain:{user.name}")
        for entry in self.core.entries():
            if entry.name.startswith("image."):
                self.core.delegate(entry.selector, domain.selector, _GIVEN, entry.name)

    def _equip(self) -> None:
        """The provider's channels, which outlive a restart of any of their ends."""
        names = {entry.name for entry in self.core.entries()}
        if "admin" in names:  # the last that is made
            return
        console = self.core.lookup("domain:admin").selector
        for driver in DRIVERS:
            provider = self.core.lookup(f"domain:{driver}").selector
            for end, name in ((console, "admin"), (SELF, "multiplexing")):
                with suppress(Exists):  # made by a multiplexing that was killed half-way
                    self.core.create_channel(end, provider, driver, name)
        self.core.create_channel(console, SELF, "multiplexing", "admin")

    def _identify(self, user: User, domain: Domain) -> None:
        content = json.dumps({"user": user.name, "ca_pem": user.ca_pem}).encode()
        name = f"identity:{user.name}"
        size = -(-len(content) // _PAGE_BYTES) * _PAGE_BYTES
        memory = self.core.create_memory(size, name)
        descriptor = self.core.take(memory)
        try:
            os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)
        self.core.seal(memory)
        self.core.delegate(memory, domain.selector, Rights.USE | Rights.READ, "identity")

    def _limit(self, user: User) -> None:
        domain = self._made()[user.name]
        limits, usage = quotas.to_limits(user.quota), self.core.usage(domain.scheduling)
        if (
            limits.memory_bytes < usage.booked_memory_bytes
            or limits.domains < usage.booked_domains
            or limits.disk_bytes < usage.booked_disk_bytes
        ):
            raise NoResources(
                f"{user.name} uses more than that now",
                hint="delete platforms first, or ask the user to",
            )
        self.core.set_limits(domain.scheduling, limits)

    def _forget(self, name: str) -> None:
        """Have all given up that one stored who is no user any more. Temporary, NoResources."""
        if name in self._made():
            self._end(name)
        # what its domain kept goes with a domain, and there may have been none to be ended
        made = self.core.create_domain(USER_KIND, PREFIX + name, quotas.to_limits(_NOTHING))
        self.core.destroy(made.selector, purge=True)
        for driver in DRIVERS:
            self.ask(driver, "user.forget", {"user": name})
        self._store.gone(name)

    def _try_to_forget(self) -> None:
        for name in sorted(self._store.leaving):
            try:
                self._forget(name)
            except (SupercloudError, OSError) as error:  # a driver that starts again, say
                log.warning("user %s: what it stored is still there: %s", name, error)
        if self._again is not None:
            self._again.cancel()
        waits = bool(self._store.leaving)
        self._again = self.reactor.after(FORGET_AGAIN_S, self._try_to_forget) if waits else None

    def _end(self, name: str) -> None:
        made = self._made().get(name)
        if made is not None:
            self.core.destroy(made.selector, purge=name not in self._store.users)
        for entry in self.core.entries():
            if entry.name == f"identity:{name}":
                self.core.destroy(entry.selector)


def _changed(quota: Quota, untrusted_changes: Any) -> Quota:
    """``quota`` with what is given otherwise."""
    if not isinstance(untrusted_changes, dict):
        raise Invalid("the quota must be an object", where="quota")
    return decode(Quota, {**encode(quota), **untrusted_changes}, "quota")


def _check_same(known: User, asked: User) -> None:
    if known.ca_pem != asked.ca_pem:
        raise Exists(
            f"user {asked.name} is enrolled with another CA",
            hint="remove the user first; that ends all of its platforms",
        )
    if known.quota != asked.quota:
        raise Exists(
            f"user {asked.name} is enrolled with another quota",
            hint="change it by: supercloud-host quota",
        )


if __name__ == "__main__":
    os.umask(0o077)
    multiplexing = Multiplexing(Core())
    multiplexing.start()
    multiplexing.run()
