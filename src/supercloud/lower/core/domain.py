"""Domains as processes: start, adopt, restart, end, and what of them must be cleaned up."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from supercloud.lower.core import sandbox
from supercloud.lower.core.cgroup import OWN, Groups
from supercloud.lower.core.loop import Link, Loop
from supercloud.lower.core.manifest import Bind, Manifest
from supercloud.lower.core.measure import say
from supercloud.lower.core.state import Domain
from supercloud.lower.core.vault import Vault
from supercloud.model.errors import BadState, NoResources

_BACKOFF_S = (0.1, 5.0)
_STEADY_S = 10.0
_LOG_BYTES, _LOG_KEEP_BYTES, _LOG_FLOOD_BYTES = 1 << 20, 256 << 10, 256 << 20


@dataclass(slots=True, eq=False)
class Process:
    """The program of a domain; ``over`` is called when it is dead, if nobody wants it to live."""

    domain: Domain
    pid: int
    pidfd: int
    link: Link
    over: Callable[[], None] | None = None
    started_s: float = field(default_factory=time.monotonic)


class Domains:
    """Every process of the host, by domain id."""

    def __init__(
        self, loop: Loop, vault: Vault, groups: Groups, manifest: Manifest, directory: str
    ) -> None:
        """``directory`` keeps logs and private directories. The broker sets the callbacks."""
        self._loop, self._vault, self.groups, self._manifest = loop, vault, groups, manifest
        self._directory = directory
        self._backoff_s: dict[int, float] = {}
        self._by_pid: dict[int, Process] = {}
        self.filters: dict[str, bytes] = {}
        self.running: dict[int, Process] = {}
        self.dying: dict[Domain, Callable[[Domain], None]] = {}
        self.on_request: Callable[[Domain, Link, bytes], None]
        self.on_exit: Callable[[Domain, int, float], None]
        for name in ("log", "domains"):
            os.makedirs(f"{directory}/{name}", mode=0o711, exist_ok=True)

    def choose_slot(self, name: str, taken: set[int], *, keep: bool) -> int:
        """Which uid a domain gets: that of its private directory if it has one, else a free one."""
        if keep and os.path.exists(self._private(name)):
            return os.stat(self._private(name)).st_uid - self._manifest.uids.first
        taken |= {domain.slot for domain in self.dying}
        for entry in os.scandir(f"{self._directory}/domains"):
            taken.add(entry.stat().st_uid - self._manifest.uids.first)
        slot = next((n for n in range(self._manifest.uids.count) if n not in taken), None)
        if slot is None:
            raise NoResources("all uids of this host are taken")
        return slot

    def prepare(self, domain: Domain) -> None:
        """Make what a domain needs before its first start: groups, its private directory."""
        kind, context = domain.kind, domain.context
        self.groups.create(context.path, context.limits, kind.own if kind.creates else None)
        if kind.state:
            os.makedirs(self._private(domain.name), mode=0o700, exist_ok=True)
            uid = self._manifest.uids.first + domain.slot
            os.chown(self._private(domain.name), uid, uid)

    def purge(self, domain: Domain) -> None:
        """Remove a domain's private directory, and with it the claim to its uid."""
        import shutil  # noqa: PLC0415  costs memory, seldom needed

        if domain.kind.state:
            shutil.rmtree(self._private(domain.name))

    def start(self, domain: Domain, descriptors: list[int]) -> Process:
        """Run a domain's program; BadState or OSError when it could not be executed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        output = os.open(self._log(domain), flags, 0o600)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        third = theirs.fileno() if domain.kind.speaks else null
        admitted: list[int] = []

        def admit(made: sandbox.Started) -> None:
            """Held at the gate: into its groups, and noted where a later core finds it."""
            path = domain.context.path
            self.groups.add(f"{path}/{OWN}" if domain.kind.creates else path, made.pid)
            admitted.append(made.pid)
            self._vault.put(f"p{domain.id}.{made.pid}", made.pidfd)
            self._vault.put(f"s{domain.id}", ours.fileno())

        try:
            plan = self._plan(domain, [third, *descriptors], output)
            started = sandbox.start(plan, admit, name=f"{domain.id}.{domain.starts}")
        except BaseException:
            for pid in admitted:
                self._drop(domain, pid)
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(output)
            os.close(null)
        return self.watch(domain, started, ours)

    def watch(self, domain: Domain, started: sandbox.Started, ours: socket.socket) -> Process:
        """Serve a program that runs; also one that a core before this started."""
        link = Link(
            self._loop,
            ours,
            lambda link, data: self.on_request(domain, link, data),
            lambda what: self.kill(domain, what),
        )
        process = Process(domain, started.pid, started.pidfd, link)
        self.running[domain.id] = self._by_pid[process.pid] = process
        return process

    def kill(self, domain: Domain, why: str) -> None:
        """End a domain's program; what follows comes by its exit."""
        if domain.id in self.running:
            say("domain.killed", domain=domain.name, why=why)
            _kill(self.running[domain.id].pidfd)

    def ended(self, pid: int, status: int) -> None:
        """A child was reaped, by us or (one that was adopted) by the keeper."""
        process = self._by_pid.pop(pid, None)
        if process is None:
            return
        domain = process.domain
        os.close(process.pidfd)
        if process.over is not None:
            process.over()
        else:  # logged before the keeper forgets it: a new core must not start it again
            process.link.close()
            del self.running[domain.id]
            self.on_exit(domain, status, time.monotonic() - process.started_s)
        self._drop(domain, pid)

    def end(self, domain: Domain, done: Callable[[Domain], None]) -> None:
        """Kill a domain that is gone from the tables; ``done`` when nothing of it is left."""
        process = self.running.pop(domain.id, None)
        self._backoff_s.pop(domain.id, None)
        self.dying[domain] = done
        if process is None:
            self._bury(domain)
            return
        process.over = lambda: self._bury(domain)
        process.link.close()
        _kill(process.pidfd)

    def restart_later(self, domain: Domain, lasted_s: float, start: Callable[[], None]) -> None:
        """Start again after a delay that doubles while it keeps dying young."""
        before_s = 0.0 if lasted_s > _STEADY_S else self._backoff_s.get(domain.id, 0.0)
        delay_s = min(max(2 * before_s, _BACKOFF_S[0]), _BACKOFF_S[1])
        self._backoff_s[domain.id] = delay_s
        self._loop.later(delay_s, start)

    def tick(self) -> None:
        """Once a second: bound the logs, and retry what could not be removed."""
        for process in list(self.running.values()):
            self._bound_log(process.domain)
        alive = {process.domain for process in self._by_pid.values()}
        for domain in set(self.dying) - alive:
            self._bury(domain)

    def _bury(self, domain: Domain) -> None:
        """Its process is dead: remove the groups, or leave it for the next tick."""
        if self.groups.remove(domain.context.path):
            self.dying.pop(domain)(domain)
        else:
            self.groups.kill(domain.context.path)

    def _drop(self, domain: Domain, pid: int) -> None:
        self._vault.drop(f"p{domain.id}.{pid}")
        self._vault.drop(f"s{domain.id}")

    def _plan(self, domain: Domain, descriptors: list[int], output: int) -> sandbox.Plan:
        kind, uid = domain.kind, self._manifest.uids.first + domain.slot
        usual = {"PATH": "/usr/bin:/usr/sbin", "HOME": "/run", "LANG": "C.UTF-8"}
        said = {"SUPERCLOUD_DOMAIN": domain.name, "SUPERCLOUD_KIND": kind.name}
        private = (Bind(self._private(domain.name), sandbox.STATE_TARGET, writable=True),)
        return sandbox.Plan(
            kind=kind,
            argv=[_fill(argument, domain.numbers) for argument in kind.argv],
            environment={**usual, **kind.environment, **said},
            uid=uid,
            owner_uid=uid + self._manifest.uids.count,
            filter=self.filters[kind.name],
            network=self._parent_network(domain) if kind.network == "parent" else -1,
            binds=kind.binds + (private if kind.state else ()),
            descriptors=descriptors,
            output=output,
        )

    def _parent_network(self, domain: Domain) -> int:
        parent = self.running.get(domain.parent.id) if domain.parent else None
        if parent is None:
            raise BadState(f"{domain.name} joins its creator's network, which does not run")
        return parent.pidfd

    def _private(self, name: str) -> str:
        return f"{self._directory}/domains/{name}"

    def _log(self, domain: Domain) -> str:
        return f"{self._directory}/log/{domain.name}.log"

    def _bound_log(self, domain: Domain) -> None:
        path = self._log(domain)
        size = os.stat(path).st_size
        if size <= _LOG_BYTES:
            return
        with open(path, "r+b", buffering=0) as log, open(f"{path}.1", "wb") as old:
            log.seek(size - _LOG_KEEP_BYTES)
            old.write(log.read(_LOG_KEEP_BYTES))
            log.truncate(0)
        if size > _LOG_FLOOD_BYTES:
            self.kill(domain, "it floods its log")


def _fill(argument: str, numbers: tuple[int, ...]) -> str:
    for index, number in enumerate(numbers):
        argument = argument.replace(f"{{{index}}}", str(number))
    return argument


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):  # dead already: its end is on the way
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
