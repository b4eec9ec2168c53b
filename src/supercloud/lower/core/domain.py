"""Domains as processes: start, adopt, restart, end, and what of them must be cleaned up."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from supercloud.lower.core import sandbox
from supercloud.lower.core.cgroup import OWN, Groups
from supercloud.lower.core.loop import Link, Loop
from supercloud.lower.core.manifest import Bind, Manifest
from supercloud.lower.core.measure import hash_in_rounds, say
from supercloud.lower.core.state import Domain
from supercloud.lower.core.vault import Vault
from supercloud.model.errors import BadState, NoResources

_BACKOFF_S, _STEADY_S, _NEXT_ROUND_S = (0.1, 5.0), 10.0, 0.001
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
    """Every process of the host; ``directory`` keeps logs and private directories."""

    on_request: Callable[[Domain, Link, bytes], None]
    on_exit: Callable[[Domain, int, float], None]

    def __init__(
        self, loop: Loop, vault: Vault, groups: Groups, manifest: Manifest, directory: str
    ) -> None:
        self._loop, self._vault, self.groups, self._manifest = loop, vault, groups, manifest
        self._directory = directory
        self._backoff_s: dict[int, float] = {}
        self._by_pid: dict[int, Process] = {}
        self.filters: dict[str, bytes] = {}
        self.running: dict[int, Process] = {}
        self.dying: dict[Domain, Callable[[Domain], None]] = {}
        for name in ("log", "domains"):
            os.makedirs(f"{directory}/{name}", mode=0o711, exist_ok=True)

    def choose_slot(self, name: str, taken: set[int], *, keep: bool) -> int:
        """Which uid a domain gets: that of its private directory if it has one, else a free one."""
        uids, private = self._manifest.uids, os.scandir(f"{self._directory}/domains")
        kept = {entry.name: entry.stat().st_uid - uids.first for entry in private}
        if keep and name in kept:
            return kept[name]
        taken |= {domain.slot for domain in self.dying} | set(kept.values())
        for slot in range(uids.count):
            if slot not in taken:
                return slot
        raise NoResources("all uids of this host are taken")

    def prepare(self, domain: Domain) -> None:
        """Make what a domain needs before its first start: groups, its private directory."""
        kind, context = domain.kind, domain.context
        self.groups.create(context.path, context.limits, kind.own if kind.creates else None)
        if kind.state:
            os.makedirs(self._private(domain), mode=0o700, exist_ok=True)
            uid = self._manifest.uids.first + domain.slot
            os.chown(self._private(domain), uid, uid)

    def purge(self, domain: Domain) -> None:
        """Remove a domain's private directory, and with it the claim to its uid."""
        import shutil  # noqa: PLC0415  costs memory, seldom needed

        if domain.kind.state:
            shutil.rmtree(self._private(domain))

    def start(self, domain: Domain, descriptors: list[int]) -> Process:
        """Run a domain's program; BadState or OSError when it could not be executed."""
        with ExitStack() as ends, ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends.enter_context(theirs)
            undo.enter_context(ours)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            output, null = os.open(self._log(domain), flags, 0o600), os.open(os.devnull, os.O_RDWR)
            for descriptor in (output, null):
                ends.callback(os.close, descriptor)

            def admit(made: sandbox.Started) -> None:
                """Held at the gate: into its groups, and noted where a later core finds it."""
                path = domain.context.path
                self.groups.add(f"{path}/{OWN}" if domain.kind.creates else path, made.pid)
                undo.callback(self._drop, domain, made.pid)
                self._vault.put(f"p{domain.id}.{made.pid}", made.pidfd)
                self._vault.put(f"s{domain.id}", ours.fileno())

            third = theirs.fileno() if domain.kind.speaks else null
            plan = self._plan(domain, [third, *descriptors], output)
            started = sandbox.start(plan, admit, name=f"{domain.id}.{domain.starts}")
            undo.pop_all()
        return self.watch(domain, started, ours)

    def watch(self, domain: Domain, started: sandbox.Started, ours: socket.socket) -> Process:
        """Serve a program that runs; also one that a core before this started."""
        link = Link(
            self._loop,
            ours,
            lambda link, data: self.on_request(domain, link, data),
            lambda what: self.kill(domain, what),
        )
        process = Process(domain, *started, link)
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
        os.close(process.pidfd)
        if process.over is not None:
            process.over()
        else:  # logged before the keeper forgets it: a new core must not start it again
            process.link.close()
            del self.running[process.domain.id]
            self.on_exit(process.domain, status, time.monotonic() - process.started_s)
        self._drop(process.domain, pid)

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

    def hash(self, descriptors: list[int], done: Callable[[str], None]) -> None:
        """Hash a large file, the calls of all domains in between."""
        hash_in_rounds(descriptors, lambda piece: self._loop.later(_NEXT_ROUND_S, piece), done)

    def tick(self) -> None:
        """Once a second: bound the logs, and retry what could not be removed."""
        for process in list(self.running.values()):
            self._bound_log(process.domain)
        for domain in set(self.dying) - {process.domain for process in self._by_pid.values()}:
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
        kind, uid, argv = domain.kind, self._manifest.uids.first + domain.slot, domain.kind.argv
        for index, number in enumerate(domain.numbers):
            argv = tuple(argument.replace(f"{{{index}}}", str(number)) for argument in argv)
        usual = {"PATH": "/usr/bin:/usr/sbin", "HOME": "/run", "LANG": "C.UTF-8"}
        said = {"SUPERCLOUD_DOMAIN": domain.name, "SUPERCLOUD_KIND": kind.name}
        private = (Bind(self._private(domain), sandbox.STATE_TARGET, writable=True),)
        parent = self.running.get(domain.parent.id) if domain.parent else None
        if kind.network == "parent" and parent is None:
            raise BadState(f"{domain.name} joins its creator's network, which does not run")
        return sandbox.Plan(
            kind=kind,
            argv=list(argv),
            environment={**usual, **kind.environment, **said},
            uid=uid,
            owner_uid=uid + self._manifest.uids.count,
            filter=self.filters[kind.name],
            network=parent.pidfd if parent and kind.network == "parent" else -1,
            binds=kind.binds + (private if kind.state else ()),
            descriptors=descriptors,
            output=output,
        )

    def _private(self, domain: Domain) -> str:
        return f"{self._directory}/domains/{domain.name}"

    def _log(self, domain: Domain) -> str:
        return f"{self._directory}/log/{domain.name}.log"

    def _bound_log(self, domain: Domain) -> None:
        size = os.stat(self._log(domain)).st_size
        if size > _LOG_BYTES:
            with open(self._log(domain), "r+b", buffering=0) as log:
                log.seek(size - _LOG_KEEP_BYTES)
                with open(f"{self._log(domain)}.1", "wb") as old:
                    old.write(log.read(_LOG_KEEP_BYTES))
                log.truncate(0)
        if size > _LOG_FLOOD_BYTES:
            self.kill(domain, "it floods its log")


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):  # dead already: its end is on the way
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
