"""The core's calls: check everything, log, apply, then carry out what is left to do.

One method per :class:`Op`; the table :data:`CALLS` says how many arguments and names each takes.
A call that changes anything makes one record (:meth:`Broker.commit`); everything that may be
refused is refused before that.
"""

import fcntl
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from supercloud.lower.core.domain import Domains, start_error
from supercloud.lower.core.loop import Link
from supercloud.lower.core.manifest import Kind
from supercloud.lower.core.measure import Chain, Measurements, hash_descriptor, say
from supercloud.lower.core.slots import Slots
from supercloud.lower.core.state import Context, Domain, Gone, Object, Record, State, Values
from supercloud.lower.core.vault import Vault, close_all
from supercloud.model.capability import (
    ALL_RIGHTS,
    REVOCATION,
    Capability,
    Limits,
    ObjectType,
    Revocation,
    Rights,
)
from supercloud.model.errors import (
    BadState,
    Busy,
    Denied,
    Exists,
    Invalid,
    NoResources,
    Unsupported,
    UserError,
)
from supercloud.wire.frames import (
    DOMAIN_NAME,
    ENTRIES_PER_PAGE,
    ENTRY,
    DomainState,
    Event,
    Op,
    Request,
    pack_answer,
    status_of,
    unpack_request,
)

MAX_DEPTH = 8
MAX_SEALED_BYTES = 512 << 20
_PAGE_BYTES = 4096
_MFD_NOEXEC_SEAL = 8
_START_FAILED_STATUS = 127 << 8
_MAX_INT = 1 << 62


class Reply(NamedTuple):
    """What answers a call; ``later``: nothing now, the call answers itself when it is done."""

    values: Values = ()
    payload: bytes = b""
    descriptor: int = -1
    later: bool = False


LATER = Reply(later=True)


class Broker:
    """Checks and carries out the calls of all domains."""

    def __init__(
        self,
        state: State,
        log: Chain,
        measurements: Measurements,
        vault: Vault,
        domains: Domains,
        slots: Slots,
    ) -> None:
        """Answer the domains that run from now on."""
        self.state, self._log, self._measurements = state, log, measurements
        self._vault, self._domains, self._slots = vault, domains, slots
        self._groups = domains.groups
        domains.on_request = self.answer
        domains.on_exit = self.exited

    # ---- one call

    def answer(self, caller: Domain, link: Link, untrusted: bytes) -> None:
        """Take one frame of a domain, and answer it whatever it was."""
        op, sequence = (untrusted[1] if len(untrusted) > 1 else 0), 0
        try:
            request = unpack_request(untrusted)
            op, sequence = request.op, request.sequence
            reply = self._call(caller, link, request)
        except UserError as error:
            if isinstance(error, Invalid):
                link.offend(str(error))
            link.send(pack_answer(op, status_of(error), sequence, (), str(error).encode()))
        except Exception as error:  # noqa: BLE001  one domain's call must not take the host down
            say("bug", op=op, domain=caller.name, error=traceback.format_exc())
            link.send(pack_answer(op, status_of(error), sequence, (), b"see the core's log"))
        else:
            if not reply.later:
                frame = pack_answer(op, 0, sequence, reply.values, reply.payload)
                link.send(frame, reply.descriptor)

    def _call(self, caller: Domain, link: Link, request: Request) -> Reply:
        call = CALLS.get(request.op)
        if call is None:
            raise Invalid(f"no call {request.op}")
        method, arguments, names = call
        if any(request.args[arguments:]) or bool(request.second) > (names > 1):
            raise Invalid("an argument that this call does not have")
        if request.sequence == caller.last[0]:  # asked again after the core was replaced
            return self._again(caller, request)
        if names and not (request.first and (request.second or names == 1)):
            raise Invalid("a name is missing")
        return method(self, caller, link, request)

    def _again(self, caller: Domain, request: Request) -> Reply:
        _, values, sha256 = caller.last
        if request.op == Op.START:
            process = self._domains.running.get(self._need(caller, request.args[0]).object_id)
            if process is None:
                raise BadState("it did not start, or has ended")
            values = (process.pid,)
        return Reply(values, bytes.fromhex(sha256))

    def commit(self, record: Record, caller: Domain | None = None, sequence: int = 0) -> Values:
        """Log a checked record and apply it; nothing is carried out yet."""
        if caller is not None:
            record = {"by": caller.id, "seq": sequence, **record}
        self._log.append({"t": int(time.time() * 1000), **record})
        return self.state.apply(record)

    def _need(
        self,
        caller: Domain,
        selector: int,
        right: Rights = Rights.NONE,
        type_: ObjectType | None = None,
    ) -> Capability:
        capability = self.state.graph.get(caller.id, selector)
        if type_ is not None and capability.type is not type_:
            raise Invalid(f"selector {selector} is a {capability.type.name}, not a {type_.name}")
        if right & ~capability.rights:
            raise Denied(f"selector {selector} does not carry {right.name}")
        return capability

    def _need_domain(self, caller: Domain, selector: int, right: Rights) -> Domain:
        capability = self._need(caller, selector, right, ObjectType.DOMAIN)
        return self.state.domains[capability.object_id]

    def _need_context(self, caller: Domain, selector: int, right: Rights) -> Context:
        capability = self._need(caller, selector, right, ObjectType.SCHEDULING_CONTEXT)
        return self.state.contexts[capability.object_id]

    # ---- calls that only look

    def _ping(self, _caller: Domain, _link: Link, _request: Request) -> Reply:
        return _NOTHING

    def _lookup(self, caller: Domain, _link: Link, request: Request) -> Reply:
        found = self.state.graph.find(caller.id, request.first)
        return Reply((found.selector, found.type, found.rights, found.object_id, found.end))

    def _list(self, caller: Domain, _link: Link, request: Request) -> Reply:
        entries = [e for e in self.state.graph.entries(caller.id) if e.selector >= request.args[0]]
        page, rest = entries[:ENTRIES_PER_PAGE], entries[ENTRIES_PER_PAGE:]
        packed = b"".join(
            ENTRY.pack(e.selector, e.object_id, e.type, e.rights, e.end, 0, e.name.encode())
            for e in page
        )
        return Reply((len(page), rest[0].selector if rest else 0), packed)

    def _limits(self, caller: Domain, _link: Link, request: Request) -> Reply:
        return Reply(self._need_context(caller, request.args[0], Rights.READ).limits.values())

    def _usage(self, caller: Domain, _link: Link, request: Request) -> Reply:
        context = self._need_context(caller, request.args[0], Rights.READ)
        _, _, *booked = context.booked.values()
        return Reply((*self._groups.usage(context.path), *booked))

    def _state(self, caller: Domain, _link: Link, request: Request) -> Reply:
        domain = self._need_domain(caller, request.args[0], Rights.NONE)
        return Reply((domain.state, domain.starts, domain.wait_status))

    # ---- domains

    def _create_domain(self, caller: Domain, _link: Link, request: Request) -> Reply:
        selector, *figures = request.args[:7]
        context = self._need_context(caller, selector, Rights.CHARGE)
        if request.first not in caller.kind.creates:
            raise Denied(f"a {caller.kind.name} may not make a {request.first}")
        self.state.graph.room(caller.id, request.second, f"sched:{request.second}")
        kind = self.state.manifest.kinds[request.first]
        limits = _checked_limits(figures) if any(figures) else kind.limits
        domain, values = self.make_domain(
            kind, request.second, limits, context, caller, request.sequence
        )
        del domain
        return Reply(values)

    def make_domain(
        self,
        kind: Kind,
        name: str,
        limits: Limits,
        context: Context,
        caller: Domain | None = None,
        sequence: int = 0,
    ) -> tuple[Domain, Values]:
        """Check and make a domain (not started); also for the manifest's own."""
        self._check_domain(kind, name, limits, context)
        number = self.state.next_id
        slot = self._slots.choose(name, self._slots_in_use(), keep=kind.state)
        record: Record = {"op": "domain", "id": number, "kind": kind.name, "name": name}
        record |= {"parent": caller.id if caller else 0, "context": context.id, "slot": slot}
        record |= {"limits": limits.values()}
        values = self.commit(record, caller, sequence)
        domain = self.state.domains[number]
        try:
            self._domains.prepare(domain)
        except OSError as error:
            self.destroy(domain.id)
            raise NoResources(f"could not make {name}: {error}") from error
        return domain, values

    def _check_domain(self, kind: Kind, name: str, limits: Limits, context: Context) -> None:
        if not DOMAIN_NAME.match(name):
            raise Invalid(f"{name!r} is not a name for a domain")
        if self.state.domain_named(name):
            raise Exists(f"a domain {name!r} is there")
        if not limits.memory_bytes or not limits.pids:
            raise Invalid("memory and pids must be limited")
        owner = self.state.domains.get(context.id - 1)
        if owner is not None and not owner.kind.creates:
            raise Denied(f"{context.name} is of a kind that has no children")
        if context.path.count("/") >= MAX_DEPTH:
            raise NoResources("scheduling contexts nest too deep")
        asked = Limits(limits.cpu_weight, limits.cpu_permille, *limits.values()[2:])
        context.check(_one_more_domain(asked))
        own = self.state.own_limits(kind, limits)
        if own.memory_bytes > limits.memory_bytes or own.pids > limits.pids:
            raise NoResources(f"a {kind.name} needs {own.memory_bytes} bytes, {own.pids} pids")

    def _slots_in_use(self) -> set[int]:
        return {d.slot for d in self.state.domains.values()} | self._domains.slots_in_use()

    def _start(self, caller: Domain, _link: Link, request: Request) -> Reply:
        domain = self._need_domain(caller, request.args[0], Rights.CONTROL)
        if domain.state is not DomainState.CREATED:
            raise BadState(f"{domain.name} is {domain.state.name.lower()}")
        numbers = request.args[1:]
        ranges = domain.kind.numbers
        fits = all(a <= n <= b for n, (a, b) in zip(numbers, ranges, strict=False))
        if any(numbers[len(ranges) :]) or not fits:
            raise Invalid(f"numbers must be in {list(ranges)}")
        given = numbers[: len(ranges)]
        return Reply((self.start(domain, given, caller, request.sequence),))

    def start(
        self,
        domain: Domain,
        numbers: Values,
        caller: Domain | None = None,
        sequence: int = 0,
    ) -> int:
        """Run a domain's program; its process id. BadState when it does not start."""
        self._wired(domain)  # refused before anything is logged
        record: Record = {"op": "start", "id": domain.id, "numbers": numbers}
        self.commit(record, caller, sequence)
        return self.run(domain)

    def run(self, domain: Domain) -> int:
        """Run the program of a domain whose start is logged; its process id."""
        try:
            return self._domains.start(domain, self._wired(domain)).pid
        except (OSError, UserError) as error:
            status = _START_FAILED_STATUS
            stopped = DomainState.CREATED
            self.commit({"op": "stopped", "id": domain.id, "state": stopped, "status": status})
            raise start_error(error) from error

    def _wired(self, domain: Domain) -> list[int]:
        """The descriptors that its kind wants at the start."""
        entries = [self.state.graph.find(domain.id, name) for name in domain.kind.descriptors]
        return [self._descriptor(domain, entry) for entry in entries]

    def start_initial(self, domain: Domain) -> None:
        """Start a domain of the manifest; when it fails, as when it dies."""
        try:
            self.start(domain, domain.numbers)
        except UserError as error:
            say("domain.start_failed", domain=domain.name, error=str(error))
            self.exited(domain, _START_FAILED_STATUS, 0.0)

    def resume(self, domain: Domain) -> None:
        """Go on with a domain that has no process though the last core wanted one."""
        if domain.state is DomainState.RUNNING:
            try:
                self.run(domain)
            except UserError as error:
                say("domain.start_failed", domain=domain.name, error=str(error))
        if domain.state is DomainState.WAITING:
            self._domains.restart_later(domain, 0.0, lambda: self.restart(domain))

    def exited(self, domain: Domain, status: int, lasted_s: float) -> None:
        """A domain's program ended by itself or by us."""
        say("domain.exited", domain=domain.name, status=status)
        if domain.kind.restart:
            waiting = DomainState.WAITING
            self.commit({"op": "stopped", "id": domain.id, "state": waiting, "status": status})
            self._renew_channels(domain)
            self._domains.restart_later(domain, lasted_s, lambda: self.restart(domain))
        else:
            domain.wait_status = status
            self.destroy(domain.id)

    def restart(self, domain: Domain) -> None:
        """Start a domain that died once more, if it is still wanted."""
        if self.state.domains.get(domain.id) is not domain or domain.id in self._domains.running:
            return
        self.start_initial(domain)
        if domain.parent is not None and domain.id in self._domains.running:
            self._tell_about(domain, Event.STARTED, domain.starts)

    def _tell_about(self, domain: Domain, event: Event, value: int) -> None:
        assert domain.parent is not None  # noqa: S101  asked by the caller
        for capability in self.state.graph.of_object(domain.id):
            if capability.holder == domain.parent.id and capability.parent is None:
                self._tell(domain.parent.id, event, (capability.selector, value), domain.name)

    def _tell(self, holder: int, event: Event, values: Values, name: str) -> None:
        process = self._domains.running.get(holder)
        if process is not None:
            process.link.event(event, values, name)

    def _destroy_call(self, caller: Domain, link: Link, request: Request) -> Reply:
        selector, purge = request.args[:2]
        capability = self._need(caller, selector, Rights.CONTROL)
        if capability.type is ObjectType.SCHEDULING_CONTEXT or purge not in (0, 1):
            raise Invalid("a scheduling context ends with its domain")
        op, sequence = request.op, request.sequence

        def done() -> None:
            link.send(pack_answer(op, 0, sequence))

        domain = self.state.domains.get(capability.object_id)
        self.commit({"op": "destroy", "id": capability.object_id}, caller, sequence)
        purged = domain if purge else None
        return self._carry_out(caller, done, purged)

    def destroy(self, number: int) -> None:
        """End a domain or object for reasons of our own."""
        self.commit({"op": "destroy", "id": number})
        self._carry_out(None, None, None)

    # ---- what a record took out of the tables

    def _carry_out(
        self, caller: Domain | None, done: Callable[[], None] | None, purged: Domain | None
    ) -> Reply:
        gone = self.state.take_gone()
        for domain, selector, context_selector in gone.domains:
            if domain.parent and domain.parent is not caller:
                values = (selector, domain.wait_status, context_selector)
                self._tell(domain.parent.id, Event.DIED, values, domain.name)
        self._tell_revoked(gone, caller)
        for ended in gone.objects:
            self._close_object(ended)
        return self._end_domains([entry[0] for entry in gone.domains], done, purged)

    def _end_domains(
        self, domains: list[Domain], done: Callable[[], None] | None, purged: Domain | None
    ) -> Reply:
        left = {domain.id for domain in domains}

        def one_is_dead(domain: Domain) -> None:
            if domain is purged:
                self._domains.purge(domain.name)
                self._slots.release(domain.name)
            left.discard(domain.id)
            if not left and done is not None:
                done()

        for domain in domains:
            self._domains.end(domain, one_is_dead)
        return LATER if domains and done is not None else _NOTHING

    def _tell_revoked(self, gone: Gone, caller: Domain | None) -> None:
        ended = {d.id: d for d, _, _ in gone.domains}
        ended |= {d.context.id: d for d, _, _ in gone.domains}
        for lost in gone.capabilities:
            holder = self.state.domains.get(lost.holder)
            domain = ended.get(lost.object_id)
            if holder is None or (domain is not None and domain.parent is holder):
                continue
            if holder is not caller:
                self._tell(lost.holder, Event.REVOKED, (lost.selector, lost.type), lost.name)
            if lost.taken and lost.parent and REVOCATION[lost.type] is Revocation.KILL:
                self._domains.kill(holder, f"{lost.type.name.lower()} {lost.name!r} was revoked")

    def _close_object(self, ended: Object) -> None:
        if ended.type is ObjectType.PORTAL:
            _shut_down(ended.descriptors)
        for number in range(len(ended.descriptors)):
            self._vault.drop(f"o{ended.id}.{number}")
        close_all(ended.descriptors)

    # ---- portals, memory, semaphores

    def _create_channel(self, caller: Domain, _link: Link, request: Request) -> Reply:
        a, b = (self._need_domain(caller, n, Rights.CONNECT) for n in request.args[:2])
        type_ = request.args[2]
        self._check_budget(caller)
        ends = [(caller.id, "")] if caller in (a, b) else []
        for holder, name in [(a.id, request.first), (b.id, request.second), *ends]:
            self.state.graph.room(holder, name)
        values = self.make_channel(
            a, b, type_, (request.first, request.second), caller, request.sequence
        )
        for end, name, selector in ((a, request.first, values[1]), (b, request.second, values[2])):
            if end is not caller:
                self._tell(end.id, Event.ARRIVED, (selector, ObjectType.PORTAL), name)
        return Reply(values)

    def make_channel(
        self,
        a: Domain,
        b: Domain,
        type_: int,
        names: tuple[str, str],
        caller: Domain | None = None,
        sequence: int = 0,
    ) -> Values:
        """Check and make a channel; also for the manifest's own."""
        passes = a.kind.peers.get(b.kind.name)
        if a is b or passes is None:
            raise Denied(f"a {a.kind.name} and a {b.kind.name} are no peers")
        if type_ not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            raise Invalid("a channel is a stream or seqpacket")
        record: Record = {"op": "channel", "id": self.state.next_id, "a": a.id, "b": b.id}
        record |= {"type": type_, "name_a": names[0], "name_b": names[1], "descriptors": passes}
        return self._make(record, lambda: socket_pair(type_), caller, sequence)

    def _create_memory(self, caller: Domain, _link: Link, request: Request) -> Reply:
        context = self._need_context(caller, request.args[0], Rights.CHARGE)
        size = request.args[1]
        if not 0 < size <= _MAX_INT or size % _PAGE_BYTES:
            raise Invalid(f"the size must be a multiple of {_PAGE_BYTES}")
        context.check(Limits(0, 0, memory_bytes=size))
        self._check_budget(caller)
        self.state.graph.room(caller.id, request.first)
        record: Record = {"op": "memory", "id": self.state.next_id, "name": request.first}
        record |= {"context": context.id, "bytes": size}
        make = self._make(record, lambda: memory_object(size), caller, request.sequence)
        return Reply(make)

    def _create_semaphore(self, caller: Domain, _link: Link, request: Request) -> Reply:
        value = request.args[0]
        if not 0 <= value < 1 << 31:
            raise Invalid("the value must be 0..2^31-1")
        self._check_budget(caller)
        self.state.graph.room(caller.id, request.first)
        record: Record = {"op": "semaphore", "id": self.state.next_id, "name": request.first}
        record |= {"value": value}
        return Reply(self._make(record, lambda: semaphore(value), caller, request.sequence))

    def _check_budget(self, caller: Domain) -> None:
        if caller.made >= caller.kind.objects:
            raise NoResources(f"{caller.name} has made {caller.made} objects, as many as it may")

    def _make(
        self,
        record: Record,
        open_: Callable[[], list[int]],
        caller: Domain | None,
        sequence: int,
    ) -> Values:
        """Open the descriptors of a new object, commit it, and store them with the keeper."""
        with ExitStack() as undo:
            descriptors = open_()
            undo.callback(close_all, descriptors)
            values = self.commit(record, caller, sequence)
            undo.pop_all()
        self.attach(self.state.objects[record["id"]], descriptors)
        return values

    def attach(self, made: Object, descriptors: list[int]) -> None:
        """Give an object its descriptors, kept by the keeper as well."""
        made.descriptors = descriptors
        for number, descriptor in enumerate(descriptors):
            self._vault.put(f"o{made.id}.{number}", descriptor)

    def remake(self, made: Object) -> None:
        """Make the descriptors of an object anew that nobody has taken yet, or of a channel."""
        if made.type is ObjectType.PORTAL:
            self.attach(made, socket_pair(made.socket_type))
        elif made.type is ObjectType.MEMORY:
            self.attach(made, memory_object(made.size_bytes))
        elif made.type is ObjectType.SEMAPHORE:
            self.attach(made, semaphore(made.size_bytes))

    def _renew_channels(self, domain: Domain) -> None:
        """A dead domain's channels: end-of-file on the old ends, new ones for who takes them."""
        for portal in self.state.objects.values():
            if domain not in portal.ends:
                continue
            _shut_down(portal.descriptors)
            close_all(portal.descriptors)
            self.remake(portal)
            for capability in self.state.graph.of_object(portal.id):
                if capability.end >= 0 and capability.holder != domain.id:
                    values = (capability.selector,)
                    self._tell(capability.holder, Event.RENEWED, values, capability.name)

    def _seal(self, caller: Domain, _link: Link, request: Request) -> Reply:
        right, type_ = Rights.WRITE, ObjectType.MEMORY
        capability = self._need(caller, request.args[0], right, type_)
        memory = self.state.objects[capability.object_id]
        if memory.sha256:
            return Reply((), bytes.fromhex(memory.sha256))
        if memory.size_bytes > MAX_SEALED_BYTES:
            raise Unsupported(f"only up to {MAX_SEALED_BYTES} bytes can be sealed")
        try:
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memory.descriptors[0], fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            raise Busy("it is mapped for writing somewhere") from error
        os.fchmod(memory.descriptors[0], 0o444)
        digest = hash_descriptor(memory.descriptors[0])
        self._measurements.extend("memory", digest, f"{caller.name}/{memory.name}")
        record: Record = {"op": "seal", "id": memory.id, "sha256": digest}
        self.commit(record, caller, request.sequence)
        return Reply((), bytes.fromhex(digest))

    # ---- capabilities

    def _delegate(self, caller: Domain, _link: Link, request: Request) -> Reply:
        capability = self._need(caller, request.args[0])
        target = self._need_domain(caller, request.args[1], Rights.CONNECT)
        rights = request.args[2]
        if not 0 < rights <= ALL_RIGHTS:
            raise Invalid("no such rights")
        if target is not caller and not caller.kind.peers.get(target.kind.name):
            raise Denied(f"nothing may pass from a {caller.kind.name} to a {target.kind.name}")
        self.state.graph.check_derive(capability, target.id, Rights(rights), request.first)
        record: Record = {"op": "delegate", "holder": caller.id, "selector": capability.selector}
        record |= {"to": target.id, "rights": rights, "name": request.first}
        values = self.commit(record, caller, request.sequence)
        if target is not caller:
            arrived = (values[0], capability.type)
            self._tell(target.id, Event.ARRIVED, arrived, request.first)
        return Reply(values)

    def _revoke(self, caller: Domain, _link: Link, request: Request) -> Reply:
        capability = self._need(caller, request.args[0])
        record: Record = {"op": "revoke", "holder": caller.id, "selector": capability.selector}
        values = self.commit(record, caller, request.sequence)
        self._carry_out(caller, None, None)
        return Reply(values)

    def _take(self, caller: Domain, _link: Link, request: Request) -> Reply:
        capability = self._need(caller, request.args[0])
        return Reply((capability.type,), b"", self._descriptor(caller, capability))

    def _descriptor(self, domain: Domain, capability: Capability) -> int:
        """The descriptor behind a capability, noting that it is out; refusals as ``take``."""
        taken = self.state.objects.get(capability.object_id)
        if taken is None:
            raise Invalid(f"a {capability.type.name} has no descriptor")
        needed = Rights.USE
        if capability.type is ObjectType.MEMORY:
            needed = Rights.READ if taken.sha256 else Rights.WRITE
        if not capability.rights & needed:
            raise Denied(f"{capability.name!r} does not carry {needed.name}")
        if not capability.taken and REVOCATION[capability.type] is Revocation.KILL:
            record = {"op": "taken", "holder": domain.id, "selector": capability.selector}
            self.commit(record)
        return taken.descriptors[max(capability.end, 0)]

    # ---- scheduling contexts

    def _set_limits(self, caller: Domain, _link: Link, request: Request) -> Reply:
        context = self._need_context(caller, request.args[0], Rights.CONTROL)
        new, old = _checked_limits(list(request.args[1:7])), context.limits
        for what in ("memory_bytes", "pids", "domains", "disk_bytes"):
            if getattr(new, what) < getattr(context.booked, what):
                raise Busy(f"{what}: {getattr(context.booked, what)} is in use")
        if context.parent is not None:
            context.parent.check(_difference(new, old))
        record: Record = {"op": "limits", "id": context.id, "limits": new.values()}
        self.commit(record, caller, request.sequence)
        try:
            self._groups.limit(context.path, new)
        except OSError as error:
            self.commit({"op": "limits", "id": context.id, "limits": old.values()})
            self._groups.limit(context.path, old)
            raise Busy(f"more than that is in use: {error}") from error
        return _NOTHING

    def _charge(self, caller: Domain, _link: Link, request: Request) -> Reply:
        context = self._need_context(caller, request.args[0], Rights.CHARGE)
        more = request.args[1]
        if context.charges.get(caller.id, 0) + more < 0:
            raise Invalid("more released than this domain has booked")
        context.check(Limits(0, 0, disk_bytes=max(more, 0)))
        record: Record = {"op": "charge", "id": context.id, "bytes": more}
        return Reply(self.commit(record, caller, request.sequence))


def _checked_limits(figures: list[int]) -> Limits:
    weight, permille, *rest = figures
    if not 1 <= weight <= 10000 or (permille and not 10 <= permille <= 1 << 20):
        raise Invalid("cpu_weight must be 1..10000, cpu_permille 0 or 10..2^20")
    if any(not 0 <= figure <= _MAX_INT for figure in rest):
        raise Invalid("a limit is out of range")
    return Limits(*figures)


def _one_more_domain(limits: Limits) -> Limits:
    return replace(limits, domains=limits.domains + 1)


def _difference(new: Limits, old: Limits) -> Limits:
    """What ``new`` takes more of the parent; the cpu quota is not a difference."""
    pairs = zip(new.values()[2:], old.values()[2:], strict=True)
    return Limits(0, new.cpu_permille, *(a - b for a, b in pairs))


def socket_pair(type_: int) -> list[int]:
    """Both ends of a new channel."""
    return [end.detach() for end in socket.socketpair(socket.AF_UNIX, type_)]


def memory_object(size_bytes: int) -> list[int]:
    """A memfd whose size can't change; any holder of it may write until it is sealed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("memory", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # Linux < 6.3
        descriptor = os.memfd_create("memory", flags)
    os.fchmod(descriptor, 0o666)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return [descriptor]


def semaphore(value: int) -> list[int]:
    """An eventfd that counts."""
    return [os.eventfd(value, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)]


def _shut_down(descriptors: list[int]) -> None:
    """End a channel for whoever holds an end of it."""
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as end:
            end.shutdown(socket.SHUT_RDWR)


_NOTHING = Reply()
_Method = Callable[[Broker, Domain, Link, Request], Reply]

CALLS: dict[int, tuple[_Method, int, int]] = {
    Op.PING: (Broker._ping, 0, 0),  # noqa: SLF001  the table is the class's other half
    Op.LOOKUP: (Broker._lookup, 0, 1),  # noqa: SLF001
    Op.LIST: (Broker._list, 1, 0),  # noqa: SLF001
    Op.CREATE_DOMAIN: (Broker._create_domain, 7, 2),  # noqa: SLF001
    Op.START: (Broker._start, 8, 0),  # noqa: SLF001
    Op.DESTROY: (Broker._destroy_call, 2, 0),  # noqa: SLF001
    Op.CREATE_CHANNEL: (Broker._create_channel, 3, 2),  # noqa: SLF001
    Op.CREATE_MEMORY: (Broker._create_memory, 2, 1),  # noqa: SLF001
    Op.SEAL: (Broker._seal, 1, 0),  # noqa: SLF001
    Op.CREATE_SEMAPHORE: (Broker._create_semaphore, 1, 1),  # noqa: SLF001
    Op.DELEGATE: (Broker._delegate, 3, 1),  # noqa: SLF001
    Op.REVOKE: (Broker._revoke, 1, 0),  # noqa: SLF001
    Op.TAKE: (Broker._take, 1, 0),  # noqa: SLF001
    Op.SET_LIMITS: (Broker._set_limits, 7, 0),  # noqa: SLF001
    Op.USAGE: (Broker._usage, 1, 0),  # noqa: SLF001
    Op.LIMITS: (Broker._limits, 1, 0),  # noqa: SLF001
    Op.CHARGE: (Broker._charge, 2, 0),  # noqa: SLF001
    Op.STATE: (Broker._state, 1, 0),  # noqa: SLF001
}
