"""Domains as processes: start, adopt, restart, end, and what of them must be cleaned up."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from supercloud.lower.core import sandbox
from supercloud.lower.core.cgroup import OWN, Groups
from supercloud.lower.core.loop import Link, Loop
from supercloud.lower.core.manifest import Bind, Manifest
from supercloud.lower.core.measure import say
from supercloud.lower.core.state import Domain
from supercloud.lower.core.vault import Vault
from supercloud.model.errors import BadState, UserError

_BACKOFF_S = (0.1, 5.0)
_STEADY_S = 10.0
_LOG_BYTES, _LOG_KEEP_BYTES, _LOG_FLOOD_BYTES = 1 << 20, 256 << 10, 256 << 20


@dataclass(slots=True, eq=False)
class Process:
    """The running program of a domain."""

    domain: Domain
    pid: int
    pidfd: int
    link: Link
    adopted: bool = False
    started_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class Dying:
    """A domain that is gone from the tables while its process and groups still end."""

    domain: Domain
    process: Process | None
    done: Callable[[Domain], None]


class Domains:
    """Every process of the host, by domain id."""

    def __init__(
        self, loop: Loop, vault: Vault, groups: Groups, manifest: Manifest, state_directory: str
    ) -> None:
        """Nothing runs yet; the broker sets the callbacks."""
        self._loop, self._vault, self.groups, self._manifest = loop, vault, groups, manifest
        self._state_directory = state_directory
        self._filters: dict[str, bytes] = {}
        self._backoff_s: dict[int, float] = {}
        self.running: dict[int, Process] = {}
        self.dying: list[Dying] = []
        self.on_request: Callable[[Domain, Link, bytes], None]
        self.on_exit: Callable[[Domain, int, float], None]
        for name in ("log", "domains"):
            os.makedirs(f"{state_directory}/{name}", mode=0o711, exist_ok=True)

    def load_filter(self, name: str, program: bytes) -> None:
        """The BPF program of a kind, checked already."""
        self._filters[name] = program

    def prepare(self, domain: Domain) -> None:
        """Make what a domain needs before its first start: groups, its private directory."""
        context, kind = domain.context, domain.kind
        self.groups.create(context.path, context.limits, kind.own if kind.creates else None)
        if domain.kind.state:
            directory = self._private_directory(domain.name)
            os.makedirs(directory, mode=0o700, exist_ok=True)
            uid = self._manifest.first_uid + domain.slot
            os.chown(directory, uid, uid)

    def start(self, domain: Domain, descriptors: list[int]) -> Process:
        """Run a domain's program; BadState when it could not be executed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            output = self._open_log(domain.name)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            admitted: list[int] = []
            third = theirs.fileno() if domain.kind.speaks else null
            try:
                plan = self._plan(domain, [third, *descriptors], output)
                started = sandbox.start(
                    plan,
                    lambda made: admitted.append(self._admit(domain, made, ours)),
                    stage_name=f"{domain.id}.{domain.starts}",
                )
            except BaseException:
                for pid in admitted:
                    self._drop(domain, pid)
                ours.close()
                raise
            finally:
                os.close(output)
                os.close(null)
        return self._watch(domain, started, ours, adopted=False)

    def adopt(self, domain: Domain, started: sandbox.Started, end: socket.socket) -> None:
        """Take over a program that a core before this one started."""
        self._watch(domain, started, end, adopted=True)

    def kill(self, domain: Domain, why: str) -> None:
        """End a domain's program; what follows comes by its exit."""
        process = self.running.get(domain.id)
        if process is not None:
            say("domain.killed", domain=domain.name, why=why)
            _kill(process.pidfd)

    def ended(self, pid: int, status: int) -> None:
        """The keeper reaped an adopted program."""
        for process in list(self.running.values()):
            if process.adopted and process.pid == pid:
                self._exited(process, status)
        for dying in list(self.dying):
            if dying.process and dying.process.adopted and dying.process.pid == pid:
                self._finish(dying)

    def end(self, domain: Domain, done: Callable[[Domain], None]) -> None:
        """Kill a domain that is gone from the tables; ``done`` when nothing of it is left."""
        process = self.running.pop(domain.id, None)
        self._backoff_s.pop(domain.id, None)
        dying = Dying(domain, process, done)
        self.dying.append(dying)
        if process is None:
            self._finish(dying)
            return
        process.link.close()
        _kill(process.pidfd)
        if not process.adopted:
            self._loop.forget(process.pidfd)
            self._loop.watch(process.pidfd, lambda _: self._reap_dying(dying))

    def purge(self, name: str) -> None:
        """Remove a domain's private directory."""
        shutil.rmtree(self._private_directory(name), ignore_errors=False)

    def restart_later(self, domain: Domain, lasted_s: float, start: Callable[[], None]) -> None:
        """Start again after a delay that doubles while it keeps dying young."""
        before_s = 0.0 if lasted_s > _STEADY_S else self._backoff_s.get(domain.id, 0.0)
        delay_s = min(max(2 * before_s, _BACKOFF_S[0]), _BACKOFF_S[1])
        self._backoff_s[domain.id] = delay_s
        self._loop.later(delay_s, start)

    def slots_in_use(self) -> set[int]:
        """Slots of uids whose processes may still be alive though the domain is gone."""
        return {dying.domain.slot for dying in self.dying}

    def tick(self) -> None:
        """Once a second: bound the logs, and retry what could not be removed."""
        for process in list(self.running.values()):
            self._bound_log(process.domain)
        for dying in list(self.dying):
            if dying.process is None:
                self._finish(dying)

    def _admit(self, domain: Domain, made: sandbox.Started, ours: socket.socket) -> int:
        """Held at the gate: into its groups, and noted where a later core finds it."""
        path = domain.context.path
        self.groups.add(f"{path}/{OWN}" if domain.kind.creates else path, made.pid)
        self._vault.put(f"p{domain.id}.{made.pid}", made.pidfd)
        self._vault.put(f"s{domain.id}", ours.fileno())
        return made.pid

    def _drop(self, domain: Domain, pid: int) -> None:
        self._vault.drop(f"p{domain.id}.{pid}")
        self._vault.drop(f"s{domain.id}")

    def _watch(
        self, domain: Domain, started: sandbox.Started, ours: socket.socket, *, adopted: bool
    ) -> Process:
        link = Link(
            self._loop,
            ours,
            lambda link, data: self.on_request(domain, link, data),
            lambda what: self.kill(domain, what),
        )
        process = Process(domain, started.pid, started.pidfd, link, adopted)
        self.running[domain.id] = process
        if not adopted:
            self._loop.watch(process.pidfd, lambda _: self._reap(process))
        return process

    def _reap(self, process: Process) -> None:
        status = _wait(process.pidfd)
        if status is not None:
            self._exited(process, status)

    def _exited(self, process: Process, status: int) -> None:
        """Its end is logged before the keeper forgets it: a new core must not start it again."""
        del self.running[process.domain.id]
        process.link.close()
        self._loop.forget(process.pidfd)
        os.close(process.pidfd)
        self.on_exit(process.domain, status, time.monotonic() - process.started_s)
        self._drop(process.domain, process.pid)

    def _reap_dying(self, dying: Dying) -> None:
        assert dying.process is not None  # noqa: S101  it was watched because it has one
        if _wait(dying.process.pidfd) is not None:
            self._loop.forget(dying.process.pidfd)
            self._finish(dying)

    def _finish(self, dying: Dying) -> None:
        """The process is dead: remove the rest, or leave it for the next tick."""
        if dying.process is not None:
            os.close(dying.process.pidfd)
            self._drop(dying.domain, dying.process.pid)
            dying.process = None
        if not self.groups.remove(dying.domain.context.path):
            self.groups.kill(dying.domain.context.path)
            return
        self.dying.remove(dying)
        dying.done(dying.domain)

    def _plan(self, domain: Domain, descriptors: list[int], output: int) -> sandbox.Plan:
        kind, manifest = domain.kind, self._manifest
        uid = manifest.first_uid + domain.slot
        binds: Iterable[Bind] = kind.binds
        if kind.state:
            private = Bind(self._private_directory(domain.name), sandbox.STATE_TARGET, True)  # noqa: FBT003
            binds = (*kind.binds, private)
        return sandbox.Plan(
            argv=[_fill(argument, domain.numbers) for argument in kind.argv],
            environment={
                "PATH": "/usr/bin:/usr/sbin",
                "HOME": "/run",
                "LANG": "C.UTF-8",
                **kind.environment,
                "SUPERCLOUD_DOMAIN": domain.name,
                "SUPERCLOUD_KIND": kind.name,
            },
            uid=uid,
            owner_uid=uid + manifest.uid_count,
            filter=self._filters[kind.name],
            own_network=kind.network == "own",
            join_network=self._parent_network(domain) if kind.network == "parent" else None,
            tcp=kind.tcp,
            nests=kind.nests,
            proc=kind.proc,
            tmp_bytes=kind.tmp_bytes,
            nofile=kind.nofile,
            binds=tuple(binds),
            devices=kind.devices,
            descriptors=descriptors,
            output=output,
        )

    def _parent_network(self, domain: Domain) -> int:
        parent = self.running.get(domain.parent.id) if domain.parent else None
        if parent is None:
            raise BadState(f"{domain.name} joins its creator's network, which does not run")
        return parent.pidfd

    def _private_directory(self, name: str) -> str:
        return f"{self._state_directory}/domains/{name}"

    def _log_path(self, name: str) -> str:
        return f"{self._state_directory}/log/{name}.log"

    def _open_log(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self._log_path(name), flags, 0o600)

    def _bound_log(self, domain: Domain) -> None:
        path = self._log_path(domain.name)
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
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return  # dead already: its exit is on the way


def _wait(pidfd: int) -> int | None:
    """The wait status of our own child, or None while it lives."""
    end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if end is None:
        return None
    dumped = 0x80 if end.si_code == os.CLD_DUMPED else 0
    return end.si_status << 8 if end.si_code == os.CLD_EXITED else end.si_status | dumped


def start_error(error: BaseException) -> UserError:
    """A failed start as something to tell."""
    return error if isinstance(error, UserError) else BadState(f"could not start: {error}")
