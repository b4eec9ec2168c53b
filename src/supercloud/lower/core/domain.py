"""Domains as processes: start, adopt, restart, end, and what of them must be cleaned up."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from supercloud.lower.core import sandbox
from supercloud.lower.core.cgroup import OWN, Groups
from supercloud.lower.core.keeper import Vault
from supercloud.lower.core.loop import Link, Loop
from supercloud.lower.core.manifest import Bind, Manifest
from supercloud.lower.core.measure import say
from supercloud.lower.core.state import Domain
from supercloud.model.refusals import NoResources

_LOG_BYTES, _LOG_KEEP_BYTES, _LOG_FLOOD_BYTES = 1 << 20, 256 << 10, 256 << 20


@dataclass(slots=True, eq=False)
class Process:
    """The program of a domain."""

    domain: Domain
    pid: int
    pidfd: int
    link: Link
    started_s: float = field(default_factory=time.monotonic)


class Domains:
    """Every process of the host; ``directory`` keeps logs and private directories."""

    on_request: Callable[[Domain, Link, bytes], None]
    on_exit: Callable[[Domain, int, float], None]

    def __init__(
        self, loop: Loop, vault: Vault, groups: Groups, manifest: Manifest, directory: str
    ) -> None:
        self.loop, self.vault, self.groups = loop, vault, groups
        self._first_uid, self._uids = manifest.first_uid, manifest.uids
        self._logs, self._private = f"{directory}/log", f"{directory}/domains"
        self.running: dict[int, Process] = {}
        self._unreaped: set[Domain] = set()
        self.dying: dict[Domain, Callable[[Domain], None]] = {}
        for path in (self._logs, self._private):
            os.makedirs(path, mode=0o711, exist_ok=True)

    def choose_slot(self, name: str, taken: set[int], *, keep: bool) -> int:
        """Which uid a domain gets: that of its private directory if it has one, else a free one."""
        kept = {e.name: e.stat().st_uid - self._first_uid for e in os.scandir(self._private)}
        taken |= {domain.slot for domain in self.dying} | {*kept.values()}
        free = {kept[name]} if keep and name in kept else {*range(self._uids)} - taken
        if not free:
            raise NoResources("all uids of this host are taken")
        return min(free)

    def prepare(self, domain: Domain) -> None:
        """Make what a domain needs before its first start: groups, its private directory."""
        kind, context = domain.kind, domain.context
        self.groups.create(context.path, context.limits, kind.own if kind.creates else None)
        if kind.state:
            private, uid = f"{self._private}/{domain.name}", self._first_uid + domain.slot
            os.makedirs(private, mode=0o700, exist_ok=True)
            os.chown(private, uid, uid)

    def start(self, domain: Domain, descriptors: list[int]) -> None:
        """Run a domain's program; BadState or OSError when it could not be executed."""
        with ExitStack() as ends, ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends.enter_context(theirs)
            undo.enter_context(ours)
            log, flags = f"{self._logs}/{domain.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
            output, null = os.open(log, flags, 0o600), os.open(os.devnull, os.O_RDWR)
            for descriptor in (output, null):
                ends.callback(os.close, descriptor)

            def admit(pid: int, pidfd: int) -> None:
                """Held at the gate: into its groups, and noted where a later core finds it."""
                path = domain.context.path
                self.groups.add(f"{path}/{OWN}" if domain.kind.creates else path, pid)
                undo.callback(self.vault.drop, f"p{domain.id}.{pid}")
                self.vault.put(f"p{domain.id}.{pid}", pidfd, ours.fileno())

            third = theirs.fileno() if domain.kind.speaks else null
            plan = self._plan(domain, [third, *descriptors], output)
            started = sandbox.start(plan, admit, name=f"{domain.id}.{domain.starts}")
            undo.pop_all()
        self.watch(domain, *started, ours)

    def watch(self, domain: Domain, pid: int, pidfd: int, ours: socket.socket) -> None:
        """Serve a program that runs; also one that a core before this started."""
        link = Link(self.loop, ours, partial(self.on_request, domain), partial(self.kill, domain))
        process = self.running[domain.id] = Process(domain, pid, pidfd, link)
        self._unreaped.add(domain)
        self.loop.watch(pidfd, lambda _: self._ended(process))

    def kill(self, domain: Domain, why: str) -> None:
        """End a domain's program; what follows comes by its exit."""
        if domain.id in self.running:
            say("domain.killed", domain=domain.name, why=why)
            _kill(self.running[domain.id].pidfd)

    def _ended(self, process: Process) -> None:
        """It is dead: ours to reap, or (one that was adopted) the keeper's."""
        domain = process.domain
        self.loop.forget(process.pidfd)
        try:
            status = os.waitpid(process.pid, 0)[1]
        except ChildProcessError:
            status = self.vault.wait_status(process.pid)
        os.close(process.pidfd)
        self._unreaped.discard(domain)
        if domain in self.dying:
            self._bury(domain)
        else:  # logged before the keeper forgets it: a new core must not start it again
            process.link.close()
            del self.running[domain.id]
            self.on_exit(domain, status, time.monotonic() - process.started_s)
        self.vault.drop(f"p{domain.id}.{process.pid}")

    def end(self, domain: Domain, done: Callable[[Domain], None]) -> None:
        """Kill a domain that is gone from the tables; ``done`` when nothing of it is left."""
        process = self.running.pop(domain.id, None)
        self.dying[domain] = done
        if process is None:
            self._bury(domain)
        else:
            process.link.close()
            _kill(process.pidfd)

    def tick(self) -> None:
        """Once a second: bound the logs, say what was dropped, retry what could not be removed."""
        for process in list(self.running.values()):
            process.link.catch_up()
            self._bound_log(process.domain)
        for domain in set(self.dying) - self._unreaped:
            self._bury(domain)

    def _bury(self, domain: Domain) -> None:
        """Its process is dead: remove the groups, or leave it for the next tick."""
        if self.groups.remove(domain.context.path):
            if domain.purge and domain.kind.state:  # and with it the claim to its uid
                import shutil  # noqa: PLC0415  costs memory, seldom needed

                shutil.rmtree(f"{self._private}/{domain.name}")
            self.dying.pop(domain)(domain)

    def _plan(self, domain: Domain, descriptors: list[int], output: int) -> sandbox.Plan:
        kind, name, argv = domain.kind, domain.name, list(domain.kind.argv)
        for index, number in enumerate(domain.numbers):
            argv = [word.replace(f"{{{index}}}", str(number)) for word in argv]
        usual = {"PATH": "/usr/bin:/usr/sbin", "HOME": "/run", "LANG": "C.UTF-8"}
        said = {"SUPERCLOUD_DOMAIN": name, "SUPERCLOUD_KIND": kind.name}
        environment, uid = {**usual, **kind.environment, **said}, self._first_uid + domain.slot
        private = Bind(f"{self._private}/{name}", sandbox.STATE_TARGET, writable=True)
        inside = environment, uid, uid + self._uids, (*kind.binds, *[private] * kind.state)
        return sandbox.Plan(kind, argv, *inside, descriptors, output)

    def _bound_log(self, domain: Domain) -> None:
        path = f"{self._logs}/{domain.name}.log"
        size = os.stat(path).st_size
        if size > _LOG_BYTES:
            with open(path, "r+b", buffering=0) as log, open(f"{path}.1", "wb") as old:
                log.seek(size - _LOG_KEEP_BYTES)
                old.write(log.read(_LOG_KEEP_BYTES))
                log.truncate(0)
        if size > _LOG_FLOOD_BYTES:
            self.kill(domain, "it floods its log")


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):  # dead already: its end is on the way
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
