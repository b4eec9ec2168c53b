"""The core's process: boot a host from its manifest, or take over from a core that died.

What a later core needs and must not have changed meanwhile (the manifest, the filters) is copied
at boot onto a tmpfs in the keeper's private mount namespace, where the runtime image is mounted
too; both outlive the core.
"""

import argparse
import os
import signal
import socket
import time

from supercloud.lower.core import sandbox, system
from supercloud.lower.core.broker import Broker
from supercloud.lower.core.cgroup import Groups
from supercloud.lower.core.domain import Domains
from supercloud.lower.core.image import mount_runtime
from supercloud.lower.core.loop import Loop
from supercloud.lower.core.manifest import Sealed, parse
from supercloud.lower.core.measure import (
    Chain,
    Measurements,
    hash_tree,
    read_chain,
    read_sealed,
    say,
)
from supercloud.lower.core.slots import Slots
from supercloud.lower.core.state import Domain, Object, State
from supercloud.lower.core.vault import Vault
from supercloud.model.capability import ObjectType
from supercloud.model.errors import NotFound, UserError
from supercloud.wire.frames import DomainState, Event

RESTART_STATUS, CONFIGURATION_STATUS = 75, 78
_STOP_TIMEOUT_S = 15.0
_SWEEP_TIMEOUT_S = 10.0
_COPY = f"{sandbox.STAGE}/sealed"
_READY = f"{sandbox.STAGE}/ready"


class Core:
    """Everything wired together, for one life of the core."""

    def __init__(self, arguments: argparse.Namespace, link: socket.socket) -> None:
        self._arguments = arguments
        self._fresh = not os.path.exists(_READY)
        self._loop, self._vault = Loop(), Vault(link)
        self._stored, self._ends = self._vault.load()
        if self._fresh:
            _cover_stage()
        document = self._sealed_copy("manifest.json", Sealed(arguments.manifest, ""))
        self._manifest = parse(document)
        directory = arguments.state
        os.makedirs(directory, mode=0o711, exist_ok=True)
        self._groups = Groups(self._manifest.instance)
        self._measurements = Measurements(f"{directory}/measurements.log", fresh=self._fresh)
        self._grants = f"{directory}/grants.log"
        self._log = Chain(self._grants, fresh=self._fresh)
        self._domains = Domains(self._loop, self._vault, self._groups, self._manifest, directory)
        self._state = State(self._manifest)
        slots = Slots(f"{directory}/uids.json", self._manifest.uid_count)
        self._broker = Broker(
            self._state, self._log, self._measurements, self._vault, self._domains, slots
        )
        self._status = 0

    def run(self) -> int:
        """Boot or take over, then serve until told to stop; the exit status."""
        if self._fresh:
            self._boot()
        self._measure()
        if self._fresh:
            self._make_initial()
            _touch(_READY)
            _touch(f"{self._arguments.run}/ready")
        else:
            self._take_over()
        self._watch_signals()
        self._loop.watch(self._vault.fileno(), self._hear_keeper)
        self._loop.later(1.0, self._tick)
        say("ready", fresh=self._fresh, domains=len(self._state.domains))
        self._loop.run()
        return self._status

    # ---- boot

    def _sealed_copy(self, name: str, source: Sealed) -> bytes:
        """A file's content as it was at boot, checked against its hash then."""
        path = f"{_COPY}/{name}"
        if not self._fresh:
            return read_sealed(Sealed(path, source.sha256))
        content = read_sealed(source)
        with open(path, "wb") as file:
            file.write(content)
        return content

    def _boot(self) -> None:
        """Clear away what an instance of this name left, and begin a new log."""
        if not self._groups.sweep(_SWEEP_TIMEOUT_S):
            raise NotFound("processes of an earlier run cannot be killed")
        self._groups.make_top()
        for name in [name for name in self._stored if not name.startswith("i")]:
            os.close(self._stored.pop(name))
            self._vault.drop(name)
        self._broker.commit({"op": "boot", "manifest": self._manifest.sha256})
        digest = mount_runtime(self._manifest.runtime, sandbox.RUNTIME)
        self._measurements.extend("runtime", digest, self._manifest.runtime.path)
        self._measurements.extend("manifest", self._manifest.sha256, self._arguments.manifest)

    def _measure(self) -> None:
        """The code of this core, and the filters that it will apply."""
        code = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._measurements.extend("code", hash_tree(code), "supercloud")
        for kind in self._manifest.kinds.values():
            program = self._sealed_copy(f"{kind.name}.bpf", kind.filter)
            self._domains.load_filter(kind.name, program)
            if self._fresh:
                self._measurements.extend("filter", kind.filter.sha256, kind.name)

    def _make_initial(self) -> None:
        manifest, broker, named = self._manifest, self._broker, self._state.domain_named
        for initial in manifest.domains:
            kind = manifest.kinds[initial.kind]
            limits = initial.limits or kind.limits
            broker.make_domain(kind, initial.name, limits, self._state.root)
        for channel in manifest.channels:
            a, b = named(channel.a), named(channel.b)
            if a and b:
                broker.make_channel(a, b, channel.type, (channel.name_a, channel.name_b))
        for grant in manifest.grants:
            number, type_ = self._granted(*grant.object.split(":", 1))
            to = named(grant.to)
            record = {"op": "grant", "id": number, "type": type_, "rights": int(grant.rights)}
            if to:
                broker.commit({**record, "to": to.id, "name": grant.name})
        for domain in list(self._state.domains.values()):
            broker.start_initial(domain)

    def _granted(self, sort: str, name: str) -> tuple[int, ObjectType]:
        """The object that a grant of the manifest names."""
        domain = self._state.domain_named(name)
        if sort == "inherited":
            return self._inherited(name).id, ObjectType.DEVICE
        if domain is None:
            raise NotFound(f"a grant names a domain {name!r} that is not there")
        if sort == "domain":
            return domain.id, ObjectType.DOMAIN
        return domain.context.id, ObjectType.SCHEDULING_CONTEXT

    def _inherited(self, name: str) -> Object:
        for known in self._state.objects.values():
            if known.type is ObjectType.DEVICE and known.name == name:
                return known
        if f"i{name}" not in self._stored:
            raise NotFound(f"a grant names the inherited descriptor {name!r}: start with --fd")
        number = self._state.next_id
        self._broker.commit({"op": "device", "id": number, "name": name})
        made = self._state.objects[number]
        made.descriptors = [self._stored.pop(f"i{name}")]
        return made

    # ---- taking over from a dead core

    def _take_over(self) -> None:
        for record in read_chain(self._grants):
            self._state.apply(record)
        self._state.take_gone()
        for made in self._state.objects.values():
            self._reattach(made)
        lost = [d for d in self._state.domains.values() if not self._readopt(d)]
        self._clear_leftovers()
        for domain in list(self._state.domains.values()):
            self._domains.prepare(domain)
        for process in list(self._domains.running.values()):
            process.link.event(Event.RESTARTED)
        for pid, status in self._ends.items():
            self._domains.ended(pid, status)
        for domain in lost:
            if domain.id in self._state.domains:
                self._broker.resume(domain)

    def _reattach(self, made: Object) -> None:
        ends = 2 if made.type is ObjectType.PORTAL else 1
        names = [f"o{made.id}.{number}" for number in range(ends)]
        if made.type is ObjectType.DEVICE:
            names = [f"i{made.name}"]
        if all(name in self._stored for name in names):
            made.descriptors = [self._stored.pop(name) for name in names]
        else:  # the core died before it had stored them, so that nobody has them
            self._broker.remake(made)

    def _readopt(self, domain: Domain) -> bool:
        end = f"s{domain.id}"
        process = next((n for n in self._stored if n.startswith(f"p{domain.id}.")), "")
        if domain.state is not DomainState.RUNNING or end not in self._stored or not process:
            return False
        started = sandbox.Started(int(process.split(".")[1]), self._stored.pop(process))
        self._domains.adopt(domain, started, socket.socket(fileno=self._stored.pop(end)))
        return True

    def _clear_leftovers(self) -> None:
        """What the dead core had begun to end, or to make without having logged it."""
        for root in os.listdir(sandbox.ROOTS):
            sandbox.unstage(f"{sandbox.ROOTS}/{root}")
        for name, descriptor in self._stored.items():
            if not name.startswith("i"):
                self._vault.drop(name)
            os.close(descriptor)
        wanted = {domain.context.path for domain in self._state.domains.values()}
        deadline_s = time.monotonic() + _SWEEP_TIMEOUT_S
        for path in sorted(self._groups.paths() - wanted, reverse=True):
            while not self._groups.remove(path) and time.monotonic() < deadline_s:
                self._groups.kill(path)
                time.sleep(0.005)

    # ---- life

    def _watch_signals(self) -> None:
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._signal_ends = woken, wake
        self._loop.watch(woken.fileno(), lambda _: self._on_signals(woken.recv(4096)))

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            self._stop()
        elif signal.SIGHUP in numbers:
            self._status = RESTART_STATUS
            self._loop.running = False

    def _stop(self) -> None:
        """End all domains and leave nothing behind."""
        say("stopping")
        for domain in list(self._state.domains.values()):
            if domain.id in self._state.domains:
                self._broker.destroy(domain.id)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while self._domains.dying and time.monotonic() < deadline_s:
            self._loop.turn(0.1)
            self._domains.tick()
        if not self._groups.sweep(_SWEEP_TIMEOUT_S):
            say("stop.incomplete")
        self._log.sync()
        os.unlink(f"{self._arguments.run}/ready")
        self._loop.running = False

    def _hear_keeper(self, _: int) -> None:
        if not self._vault.read_ends(self._domains.ended):
            self._loop.running = False

    def _tick(self) -> None:
        self._log.sync()
        self._domains.tick()
        self._loop.later(1.0, self._tick)


def _cover_stage() -> None:
    """A tmpfs of our own over ``STAGE``, in the keeper's mount namespace only."""
    if os.path.exists(_COPY):  # a boot that failed half-way
        system.umount(sandbox.STAGE)
    flags = system.MS_NOSUID | system.MS_NOEXEC | system.MS_NODEV
    system.mount("supercloud", sandbox.STAGE, "tmpfs", flags, "mode=0711,size=64m")
    os.mkdir(_COPY, 0o700)
    os.mkdir(sandbox.ROOTS, 0o711)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))


def main(words: list[str], link: socket.socket) -> int:
    """Run as the core; the exit status tells the keeper what to do next."""
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser(prog="keeper")
    for name in ("--manifest", "--run", "--state"):
        parser.add_argument(name, required=True)
    try:
        return Core(parser.parse_args(words), link).run()
    except UserError as error:
        say("failed", error=str(error), hint=error.hint)
        return CONFIGURATION_STATUS
