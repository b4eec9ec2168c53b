"""The core's process: boot a host from its manifest, or take over from a core that died.

The manifest is copied at boot onto a tmpfs in the keeper's private mount namespace, where the
runtime image is mounted too: both outlive the core, unchanged.
"""

import hashlib
import os
import signal
import socket
import time

from supercloud.lower.core import keeper, sandbox, system
from supercloud.lower.core.broker import Broker
from supercloud.lower.core.cgroup import Groups
from supercloud.lower.core.domain import Domains
from supercloud.lower.core.loop import Loop
from supercloud.lower.core.manifest import MAX_MANIFEST_BYTES, parse
from supercloud.lower.core.measure import Chain, Measurements, hash_tree, read_chain, say
from supercloud.lower.core.state import Domain, Object, State
from supercloud.model.capability import ObjectType
from supercloud.model.refusals import NotFound, UserError
from supercloud.wire.frames import DomainState, Event, pack_answer

_STOP_TIMEOUT_S = 15.0
_COPY, _READY = f"{sandbox.STAGE}/manifest.json", f"{sandbox.STAGE}/ready"


class Core:
    """Everything wired together, for one life of the core."""

    def __init__(self, options: dict[str, str], link: socket.socket) -> None:
        self._source, directory = options["--manifest"], options["--state"]
        self._ready, self._status = f"{options['--run']}/ready", 0
        self._fresh, self._woken = not os.path.exists(_READY), keeper.wake_on_signals()
        self._loop, self._vault = Loop(), keeper.Vault(link)
        self._stored = self._vault.load()
        self._loop.watch(link.fileno(), lambda _: os._exit(1))  # the keeper is gone
        if self._fresh:
            _cover_stage(self._source)
        with open(_COPY, "rb") as file:
            self._manifest = parse(file.read())
        os.makedirs(directory, mode=0o711, exist_ok=True)
        self._groups = Groups(self._manifest.instance, self._manifest.groups)
        self._measured = Measurements(f"{directory}/measurements.log", fresh=self._fresh)
        self._grants = f"{directory}/grants.log"
        self._log = Chain(self._grants, fresh=self._fresh)
        self._domains = Domains(self._loop, self._vault, self._groups, self._manifest, directory)
        self._state = State(self._manifest)
        self._broker = Broker(self._state, self._log, self._measured, self._domains)

    def run(self) -> int:
        """Boot or take over, then serve until told to stop; the exit status."""
        if self._fresh:
            self._boot()
        code = os.path.normpath(os.path.join(os.path.abspath(__file__), *[".."] * 3))
        self._measured.extend("code", hash_tree(code), "supercloud")
        if self._fresh:
            for name, kind in self._manifest.kinds.items():
                digest = hashlib.sha256(bytes.fromhex(kind.filter)).hexdigest()
                self._measured.extend("filter", digest, name)
            self._make_initial()
            for path in (_READY, self._ready):
                os.close(os.open(path, os.O_CREAT, 0o644))
        else:
            self._take_over()
        self._loop.watch(self._woken.fileno(), lambda _: self._on_signals(self._woken.recv(4096)))
        self._tick()
        say("ready", fresh=self._fresh, domains=len(self._state.domains))
        while self._loop.running:
            self._loop.turn()
        return self._status

    def _boot(self) -> None:
        """Clear away what an instance of this name left, and begin anew."""
        if not self._groups.sweep():
            raise NotFound("processes of an earlier run cannot be killed")
        self._groups.make_top()
        self._clear_stored()
        self._broker.commit("boot", manifest=self._manifest.sha256)
        path = self._manifest.runtime
        digest = sandbox.mount_runtime(path, self._manifest.runtime_sha256)
        self._measured.extend("runtime", digest, path)
        self._measured.extend("manifest", self._manifest.sha256, self._source)

    def _make_initial(self) -> None:
        """The manifest's own domains and grants."""
        manifest, broker = self._manifest, self._broker
        for name, kind in manifest.domains:
            limits = manifest.kinds[kind].limits
            broker.make_domain(manifest.kinds[kind], name, limits, self._state.root)
        made = {domain.name: domain for domain in self._state.domains.values()}
        # what a grant may name, with id and type
        things = {f"domain:{name}": (made[name].id, ObjectType.DOMAIN) for name in made}
        for kept in list(self._stored):  # what the keeper was started with
            number = self._state.next_id
            broker.commit("device", id=number, name=kept[1:])
            self._reattach(self._state.objects[number])
            things[f"inherited:{kept[1:]}"] = number, ObjectType.DEVICE
        for grant in manifest.grants:
            if grant.object not in things:
                raise NotFound(f"a grant names {grant.object}, which is not there")
            number, type_ = things[grant.object]
            to, rights = made[grant.to].id, int(grant.rights)
            broker.commit("grant", id=number, type=type_, to=to, rights=rights, name=grant.name)
        for domain in made.values():
            broker.resume(domain)

    def _take_over(self) -> None:
        """What a dead core has left."""
        for record in read_chain(self._grants):
            self._state.apply(record)
        for made in self._state.objects.values():
            self._reattach(made)
        lost = [d for d in self._state.domains.values() if not self._adopt(d)]
        self._clear_stored()
        for root in os.listdir(sandbox.ROOTS):  # what the dead core had begun to make, and to end
            sandbox.unstage(f"{sandbox.ROOTS}/{root}")
        wanted = {domain.context.path for domain in self._state.domains.values()}
        for path in sorted(self._groups.paths() - wanted, reverse=True):
            self._groups.sweep(path)
        for domain in self._state.domains.values():
            self._domains.prepare(domain)
        for process in self._domains.running.values():
            process.link.send(pack_answer(Event.RESTARTED, 0, 0))  # never dropped as events are
        for domain in lost:
            if domain.state is not DomainState.CREATED:
                self._broker.resume(domain)

    def _reattach(self, made: Object) -> None:
        name = f"i{made.name}" if made.type is ObjectType.DEVICE else f"o{made.id}"
        if name in self._stored:
            made.descriptors = self._stored.pop(name)
        else:  # the core died before it had stored them, so that nobody has them
            self._broker.open(made)

    def _adopt(self, domain: Domain) -> bool:
        """Take up the process that the dead core started for a domain, if it came to that."""
        process = next((n for n in self._stored if n.startswith(f"p{domain.id}.")), "")
        if domain.state is not DomainState.RUNNING or not process:
            return False
        pidfd, end = self._stored.pop(process)
        pid = int(process.split(".")[1])
        self._domains.watch(domain, pid, pidfd, socket.socket(fileno=end))
        return True

    def _clear_stored(self) -> None:
        for name in [name for name in self._stored if not name.startswith("i")]:
            self._vault.drop(name)
            system.close_all(self._stored.pop(name))

    def _on_signals(self, numbers: bytes) -> None:
        if signal.SIGTERM in numbers:
            self._stop()
        elif signal.SIGHUP in numbers:
            self._status, self._loop.running = keeper.RESTART_STATUS, False

    def _stop(self) -> None:
        """End all domains and leave nothing behind."""
        say("stopping")
        while self._state.domains:
            self._broker.destroy(next(iter(self._state.domains)))
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while self._domains.dying and time.monotonic() < deadline_s:
            self._loop.turn(0.1)
            self._domains.tick()
        if not self._groups.sweep():
            say("stop.incomplete")
        self._log.sync()
        os.unlink(self._ready)
        self._loop.running = False

    def _tick(self) -> None:
        self._log.sync()
        self._domains.tick()
        self._loop.later(1.0, self._tick)


def _cover_stage(manifest: str) -> None:
    """A tmpfs of our own over ``STAGE``, in the keeper's mount namespace only."""
    if os.path.exists(sandbox.ROOTS):  # a boot that failed half-way
        system.umount(sandbox.STAGE)
    flags = system.MS_NOSUID | system.MS_NOEXEC | system.MS_NODEV
    system.mount("supercloud", sandbox.STAGE, "tmpfs", flags, "mode=0711,size=64m")
    os.mkdir(sandbox.ROOTS, 0o711)
    with open(manifest, "rb") as source, open(_COPY, "wb") as copy:
        copy.write(source.read(MAX_MANIFEST_BYTES + 1))


def main(options: dict[str, str], link: socket.socket) -> int:
    """Run as the core; the exit status tells the keeper what to do next."""
    try:
        return Core(options, link).run()
    except UserError as error:
        say("failed", error=str(error), hint=error.hint)
        return keeper.CONFIGURATION_STATUS
