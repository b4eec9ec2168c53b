"""The core's calls: check everything, log, apply, then carry out what is left to do.

One method per :class:`Op`. A call that changes anything makes one record (:meth:`Broker.commit`);
everything that may be refused is refused before that.
"""

import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from supercloud.lower.core import descriptors
from supercloud.lower.core import state as tables
from supercloud.lower.core.domain import Domains
from supercloud.lower.core.loop import Link
from supercloud.lower.core.manifest import Kind
from supercloud.lower.core.measure import Chain, Measurements, say
from supercloud.lower.core.state import Context, Domain, Object, State, Values
from supercloud.lower.core.vault import Vault
from supercloud.model import errors
from supercloud.model.capability import KILLS, Capability, Limits, ObjectType, Rights
from supercloud.wire import frames
from supercloud.wire.frames import DomainState, Event, Op, pack_answer

MAX_DEPTH = 8
_START_FAILED = 127 << 8  # as a wait status
_MAX_INT = 1 << 62
_ANY = Rights.NONE


class Call(NamedTuple):
    """One request of one domain."""

    caller: Domain
    link: Link
    op: int
    sequence: int
    args: Values
    first: str
    second: str


class Reply(NamedTuple):
    """What answers a call; ``later``: nothing now, it will be answered when it is done."""

    values: Values = ()
    payload: bytes = b""
    descriptor: int = -1
    later: bool = False


class Broker:
    """Checks and carries out the calls of all domains."""

    def __init__(
        self, state: State, log: Chain, measured: Measurements, vault: Vault, domains: Domains
    ) -> None:
        self.state, self._graph, self._log, self._measured = state, state.graph, log, measured
        self._vault, self._domains = vault, domains
        domains.on_request, domains.on_exit = self.answer, self.exited
        # op -> what carries it out, how many arguments and names it takes
        self._calls: dict[int, tuple[Callable[[Call], Reply], int, int]] = {
            Op.PING: (lambda _: _NOTHING, 0, 0),
            Op.LOOKUP: (self._lookup, 0, 1),
            Op.LIST: (self._list, 1, 0),
            Op.CREATE_DOMAIN: (self._create_domain, 7, 2),
            Op.START: (self._start, 8, 0),
            Op.DESTROY: (self._destroy, 2, 0),
            Op.CREATE_CHANNEL: (self._create_channel, 3, 2),
            Op.CREATE_MEMORY: (self._create_memory, 2, 1),
            Op.SEAL: (self._seal, 1, 0),
            Op.CREATE_SEMAPHORE: (self._create_semaphore, 1, 1),
            Op.DELEGATE: (self._delegate, 3, 1),
            Op.REVOKE: (self._revoke, 1, 0),
            Op.TAKE: (self._take, 1, 0),
            Op.SET_LIMITS: (self._set_limits, 7, 0),
            Op.USAGE: (self._usage, 1, 0),
            Op.LIMITS: (lambda c: Reply(self._need_context(c, Rights.READ).limits.values()), 1, 0),
            Op.CHARGE: (self._charge, 2, 0),
            Op.STATE: (self._state, 1, 0),
        }

    def answer(self, caller: Domain, link: Link, untrusted: bytes) -> None:
        """Take one frame of a domain, and answer it whatever it was."""
        op, sequence = (untrusted[1] if len(untrusted) > 1 else 0), 0
        try:
            call = Call(caller, link, *frames.unpack_request(untrusted))
            sequence = call.sequence
            reply = self._carry(call)
            if not reply.later:
                frame = pack_answer(op, 0, sequence, reply.values, reply.payload)
                link.send(frame, reply.descriptor)
        except errors.UserError as error:
            if isinstance(error, errors.Invalid):
                link.offend(str(error))
            status, text = frames.status_of(error), str(error).encode()
            link.send(pack_answer(op, status, sequence, (), text))
        except Exception:  # noqa: BLE001  one domain's call must not take the host down
            say("bug", op=op, domain=caller.name, error=traceback.format_exc())
            link.send(pack_answer(op, frames.BUG_STATUS, sequence, (), b"see the core's log"))

    def _carry(self, call: Call) -> Reply:
        method, arguments, names = self._calls.get(call.op, (None, 0, 0))
        if method is None:
            raise errors.Invalid(f"no call {call.op}")
        if any(call.args[arguments:]) or bool(call.first) + bool(call.second) != names:
            raise errors.Invalid("an argument too many, or a name that is missing")
        if call.sequence == call.caller.last[0]:
            return self._again(call)
        return method(call)

    def _again(self, call: Call) -> Reply:
        """A call that was done already, before the core was replaced."""
        _, values, sha256 = call.caller.last
        if call.op == Op.START:
            process = self._domains.running.get(self._need(call, 0).object_id)
            if process is None:
                raise errors.BadState("it did not start, or has ended")
            values = (process.pid,)
        return Reply(values, bytes.fromhex(sha256))

    def commit(self, op: str, call: Call | None = None, **what: Any) -> Values:
        """Log a checked record and apply it; nothing is carried out yet."""
        by = {"by": call.caller.id, "seq": call.sequence} if call else {}
        record = {"t": int(time.time() * 1000), "op": op, **by, **what}
        self._log.append(record)
        return self.state.apply(record)

    def _need(
        self, call: Call, index: int, right: Rights = _ANY, type_: ObjectType | None = None
    ) -> Capability:
        """The caller's capability at the selector that an argument gives, with that right."""
        capability = self._graph.get(call.caller.id, call.args[index])
        if type_ is not None and capability.type is not type_:
            raise errors.Invalid(
                f"{capability.name!r} is a {capability.type.name}, not a {type_.name}"
            )
        if right & ~capability.rights:
            raise errors.Denied(f"{capability.name!r} does not carry {right.name}")
        return capability

    def _need_domain(self, call: Call, index: int, right: Rights) -> Domain:
        return self.state.domains[self._need(call, index, right, ObjectType.DOMAIN).object_id]

    def _need_context(self, call: Call, right: Rights) -> Context:
        capability = self._need(call, 0, right, ObjectType.SCHEDULING_CONTEXT)
        return self.state.contexts[capability.object_id]

    # ---- calls that only look

    def _lookup(self, call: Call) -> Reply:
        found = self._graph.find(call.caller.id, call.first)
        return Reply((found.selector, found.type, found.rights, found.object_id, found.end))

    def _list(self, call: Call) -> Reply:
        entries = [e for e in self._graph.entries(call.caller.id) if e.selector >= call.args[0]]
        page, rest = entries[: frames.ENTRIES_PER_PAGE], entries[frames.ENTRIES_PER_PAGE :]
        packed = b""
        for e in page:
            what = e.selector, e.object_id, e.type, e.rights, e.end, 0, e.name.encode()
            packed += frames.ENTRY.pack(*what)
        return Reply((len(page), rest[0].selector if rest else 0), packed)

    def _usage(self, call: Call) -> Reply:
        context = self._need_context(call, Rights.READ)
        return Reply((*self._domains.groups.usage(context.path), *context.booked.values()))

    def _state(self, call: Call) -> Reply:
        domain = self._need_domain(call, 0, _ANY)
        return Reply((domain.state, domain.starts, domain.wait_status))

    # ---- domains

    def _create_domain(self, call: Call) -> Reply:
        context, name = self._need_context(call, Rights.CHARGE), call.second
        if call.first not in call.caller.kind.creates:
            raise errors.Denied(f"a {call.caller.kind.name} may not make a {call.first}")
        self._graph.check_room(call.caller.id, name, f"sched:{name}")
        kind, figures = self.state.manifest.kinds[call.first], call.args[1:7]
        limits = tables.checked_limits(figures) if any(figures) else kind.limits
        return Reply(self.make_domain(kind, name, limits, context, call))

    def make_domain(
        self, kind: Kind, name: str, limits: Limits, context: Context, call: Call | None = None
    ) -> Values:
        """Check and make a domain (not started); also for the manifest's own."""
        others = self.state.domains.values()
        if not frames.DOMAIN_NAME.match(name) or not limits.memory_bytes or not limits.pids:
            raise errors.Invalid(f"memory and pids must be limited, {name!r} must be a name")
        if any(other.name == name for other in others):
            raise errors.Exists(f"a domain {name!r} is there")
        owner = self.state.domains.get(context.id - 1)
        if owner is not None and not owner.kind.creates:
            raise errors.Denied(f"{context.name} is of a kind that has no children")
        if context.path.count("/") >= MAX_DEPTH:
            raise errors.NoResources("scheduling contexts nest too deep")
        context.check(limits.cpu_permille, **tables.booking(limits))
        own = kind.own if kind.creates else limits
        if own.memory_bytes > limits.memory_bytes or own.pids > limits.pids:
            raise errors.NoResources(
                f"a {kind.name} needs {own.memory_bytes} bytes, {own.pids} pids"
            )
        slot = self._domains.choose_slot(name, {d.slot for d in others}, keep=kind.state)
        number = self.state.next_id
        values = self.commit(
            "domain", call, id=number, kind=kind.name, name=name, context=context.id, slot=slot,
            parent=call.caller.id if call else 0, limits=limits.values(),
        )  # fmt: skip
        try:
            self._domains.prepare(self.state.domains[number])
        except OSError as error:
            self.destroy(number)
            raise errors.NoResources(f"could not make {name}: {error}") from error
        return values

    def _start(self, call: Call) -> Reply:
        domain, numbers = self._need_domain(call, 0, Rights.CONTROL), call.args[1:]
        if domain.state is not DomainState.CREATED:
            raise errors.BadState(f"{domain.name} is {domain.state.name.lower()}")
        ranges = domain.kind.numbers
        fits = all(a <= n <= b for n, (a, b) in zip(numbers, ranges, strict=False))
        if any(numbers[len(ranges) :]) or not fits:
            raise errors.Invalid(f"numbers must be in {list(ranges)}")
        return Reply((self.start(domain, numbers[: len(ranges)], call),))

    def start(self, domain: Domain, numbers: Values = (), call: Call | None = None) -> int:
        """Run a domain's program; its process id. BadState when it does not start."""
        self._wired(domain)  # refused before anything is logged
        self.commit("start", call, id=domain.id, numbers=numbers)
        return self._run(domain)

    def _run(self, domain: Domain) -> int:
        try:
            return self._domains.start(domain, self._wired(domain)).pid
        except (OSError, errors.UserError) as error:
            say("domain.start_failed", domain=domain.name, error=str(error))
            created = DomainState.CREATED
            self.commit("stopped", id=domain.id, state=created, status=_START_FAILED)
            raise errors.BadState(f"could not start: {error}") from error

    def _wired(self, domain: Domain) -> list[int]:
        """The descriptors that its kind wants at the start."""
        entries = [self._graph.find(domain.id, name) for name in domain.kind.descriptors]
        return [self._descriptor(domain, entry) for entry in entries]

    def resume(self, domain: Domain, *, logged: bool = False) -> None:
        """Start a domain that should run; ``logged`` when only the process is missing."""
        if self.state.domains.get(domain.id) is not domain or domain.id in self._domains.running:
            return
        try:
            self._run(domain) if logged else self.start(domain, domain.numbers)
        except errors.UserError:
            self.exited(domain, _START_FAILED, 0.0)
            return
        if domain.starts > 1:
            self._tell_maker(domain, Event.STARTED, domain.starts)

    def exited(self, domain: Domain, status: int, lasted_s: float) -> None:
        """A domain's program ended by itself or by us."""
        say("domain.exited", domain=domain.name, status=status)
        if domain.kind.restart:
            waiting = DomainState.WAITING
            self.commit("stopped", id=domain.id, state=waiting, status=status)
            self._renew_channels(domain)
            self._domains.restart_later(domain, lasted_s, lambda: self.resume(domain))
        else:
            domain.wait_status = status
            self.destroy(domain.id)

    def _tell(self, holder: int, event: Event, values: Values, name: str) -> None:
        process = self._domains.running.get(holder)
        if process is not None:
            process.link.event(event, values, name)

    def _tell_maker(self, domain: Domain, event: Event, value: int) -> None:
        if domain.parent is not None:
            values = (self.state.at_parent(domain, domain.id), value)
            self._tell(domain.parent.id, event, values, domain.name)

    def _destroy(self, call: Call) -> Reply:
        capability, purge = self._need(call, 0, Rights.CONTROL), call.args[1]
        if capability.type is ObjectType.SCHEDULING_CONTEXT or purge not in (0, 1):
            raise errors.Invalid("a scheduling context ends with its domain")
        domain = self.state.domains.get(capability.object_id)
        self.commit("destroy", call, id=capability.object_id)
        return self._carry_out(call, domain if purge else None)

    def destroy(self, number: int) -> None:
        """End a domain or object for reasons of our own."""
        self.commit("destroy", id=number)
        self._carry_out()

    # ---- what a record took out of the tables

    def _carry_out(self, call: Call | None = None, purged: Domain | None = None) -> Reply:
        gone, caller = self.state.take_gone(), call.caller if call else None
        for domain, selector, context_selector in gone.domains:
            if domain.parent and domain.parent is not caller:
                values = (selector, domain.wait_status, context_selector)
                self._tell(domain.parent.id, Event.DIED, values, domain.name)
        self._tell_revoked(gone, caller)
        for ended in gone.objects:
            self._close_object(ended)
        left = {domain.id for domain, _, _ in gone.domains}

        def one_is_dead(domain: Domain) -> None:
            if domain is purged:
                self._domains.purge(domain)
            left.discard(domain.id)
            if not left and call:
                call.link.send(pack_answer(call.op, 0, call.sequence))

        for domain, _, _ in gone.domains:
            self._domains.end(domain, one_is_dead)
        return Reply(later=True) if gone.domains else _NOTHING

    def _tell_revoked(self, gone: tables.Gone, caller: Domain | None) -> None:
        ended = {n: d for d, _, _ in gone.domains for n in (d.id, d.context.id)}
        for lost in gone.capabilities:
            holder, domain = self.state.domains.get(lost.holder), ended.get(lost.object_id)
            if holder is None or (domain is not None and domain.parent is holder):
                continue  # gone as well, or told by DIED
            if holder is not caller:
                self._tell(lost.holder, Event.REVOKED, (lost.selector, lost.type), lost.name)
            if lost.taken and lost.parent and lost.type in KILLS:
                self._domains.kill(holder, f"{lost.type.name.lower()} {lost.name!r} was revoked")

    def _close_object(self, ended: Object) -> None:
        for number in range(len(ended.descriptors)):
            self._vault.drop(f"o{ended.id}.{number}")
        descriptors.close_all(ended.descriptors, shut_down=ended.type is ObjectType.PORTAL)

    # ---- portals, memory, semaphores

    def _create_channel(self, call: Call) -> Reply:
        a, b = (self._need_domain(call, n, Rights.CONNECT) for n in (0, 1))
        names, entries = (call.first, call.second), {call.caller.id: [""]}  # the whole has no name
        for end, name in zip((a, b), names, strict=True):
            entries.setdefault(end.id, []).append(name)
        self._check_budget(call, entries)
        values = self.make_channel(a, b, call.args[2], names, call)
        for end, name, selector in zip((a, b), names, values[1:], strict=True):
            if end is not call.caller:
                self._tell(end.id, Event.ARRIVED, (selector, ObjectType.PORTAL), name)
        return Reply(values)

    def make_channel(
        self, a: Domain, b: Domain, type_: int, names: tuple[str, str], call: Call | None = None
    ) -> Values:
        """Check and make a channel; also for the manifest's own."""
        peer = a.kind.peers.get(b.kind.name)
        if a is b or peer is None:
            raise errors.Denied(f"a {a.kind.name} and a {b.kind.name} are no peers")
        if type_ not in descriptors.SOCKETS.values():
            raise errors.Invalid("a channel is a stream or seqpacket")
        ends = {"a": a.id, "b": b.id, "name_a": names[0], "name_b": names[1]}
        return self._make("channel", call, **ends, type=type_, descriptors=peer.descriptors)

    def _create_memory(self, call: Call) -> Reply:
        context, size = self._need_context(call, Rights.CHARGE), call.args[1]
        if not 0 < size <= _MAX_INT or size % descriptors.PAGE_BYTES:
            raise errors.Invalid(f"the size must be a multiple of {descriptors.PAGE_BYTES}")
        context.check(memory_bytes=size)
        self._check_budget(call, {call.caller.id: [call.first]})
        return Reply(self._make("memory", call, name=call.first, context=context.id, bytes=size))

    def _create_semaphore(self, call: Call) -> Reply:
        if not 0 <= call.args[0] < 1 << 31:
            raise errors.Invalid("the value must be 0..2^31-1")
        self._check_budget(call, {call.caller.id: [call.first]})
        return Reply(self._make("semaphore", call, name=call.first, value=call.args[0]))

    def _check_budget(self, call: Call, entries: dict[int, list[str]]) -> None:
        """Refuse one more object of the caller, or these entries in these tables."""
        for holder, names in entries.items():
            self._graph.check_room(holder, *names)
        if call.caller.made >= call.caller.kind.objects:
            raise errors.NoResources(f"{call.caller.name} has made as many objects as it may")

    def _make(self, op: str, call: Call | None, **what: Any) -> Values:
        number = self.state.next_id
        values = self.commit(op, call, id=number, **what)
        try:
            self.open(self.state.objects[number])
        except OSError as error:
            self.destroy(number)
            raise errors.NoResources(f"no descriptor for it: {error}") from error
        return values

    def open(self, made: Object) -> None:
        """Give an object descriptors (new ones for a channel), kept by the keeper as well."""
        made.descriptors = descriptors.OPEN[made.type](made.number)
        for number, descriptor in enumerate(made.descriptors):
            self._vault.put(f"o{made.id}.{number}", descriptor)

    def _renew_channels(self, domain: Domain) -> None:
        """A dead domain's channels: end-of-file on the old ends, new ones for who takes them."""
        for portal in [o for o in self.state.objects.values() if domain in o.ends]:
            descriptors.close_all(portal.descriptors, shut_down=True)
            self.open(portal)
            for end in self._graph.of_object(portal.id):
                if end.end >= 0 and end.holder != domain.id:
                    self._tell(end.holder, Event.RENEWED, (end.selector,), end.name)

    def _seal(self, call: Call) -> Reply:
        capability = self._need(call, 0, Rights.WRITE, ObjectType.MEMORY)
        memory = self.state.objects[capability.object_id]
        if memory.sha256:
            return Reply((), bytes.fromhex(memory.sha256))
        descriptors.seal(memory.descriptors[0])
        self._domains.hash(memory.descriptors, lambda h: self._hashed(call, memory, h))
        return Reply(later=True)

    def _hashed(self, call: Call, memory: Object, sha256: str) -> None:
        """Sealed and hashed: noted once, and the caller answered if it waits still."""
        process = self._domains.running.get(call.caller.id)
        by = call if process is not None and process.link is call.link else None
        if sha256 and not memory.sha256:
            self._measured.extend("memory", sha256, f"{call.caller.name}/{memory.name}")
            self.commit("seal", by, id=memory.id, sha256=sha256)
        status = 0 if sha256 else frames.status_of(errors.NotFound("gone"))
        call.link.send(pack_answer(call.op, status, call.sequence, (), bytes.fromhex(sha256)))

    # ---- capabilities

    def _delegate(self, call: Call) -> Reply:
        capability, rights, caller = self._need(call, 0), call.args[2], call.caller
        target = self._need_domain(call, 1, Rights.CONNECT)
        peer = caller.kind.peers.get(target.kind.name)
        if not 0 < rights < 128:
            raise errors.Invalid("no such rights")
        if target is not caller and not (peer and peer.descriptors):
            raise errors.Denied(
                f"nothing may pass from a {caller.kind.name} to a {target.kind.name}"
            )
        self._graph.check_derive(capability, target.id, Rights(rights), call.first)
        source = {"holder": caller.id, "selector": capability.selector}
        values = self.commit(
            "delegate", call, **source, to=target.id, rights=rights, name=call.first
        )
        if target is not caller:
            self._tell(target.id, Event.ARRIVED, (values[0], capability.type), call.first)
        return Reply(values)

    def _revoke(self, call: Call) -> Reply:
        selector = self._need(call, 0).selector
        values = self.commit("revoke", call, holder=call.caller.id, selector=selector)
        self._carry_out()
        return Reply(values)

    def _take(self, call: Call) -> Reply:
        capability = self._need(call, 0)
        return Reply((capability.type,), b"", self._descriptor(call.caller, capability))

    def _descriptor(self, domain: Domain, capability: Capability) -> int:
        """The descriptor behind a capability, noting that it is out; refusals as ``TAKE``."""
        taken = self.state.objects.get(capability.object_id)
        if taken is None:
            raise errors.Invalid(f"a {capability.type.name} has no descriptor")
        needed = Rights.USE
        if capability.type is ObjectType.MEMORY:  # who has it unsealed can write to it
            needed = Rights.READ if taken.sha256 else Rights.WRITE
        if not capability.rights & needed:
            raise errors.Denied(f"{capability.name!r} does not carry {needed.name}")
        if not capability.taken and capability.type in KILLS:
            self.commit("taken", holder=domain.id, selector=capability.selector)
        return taken.descriptors[max(capability.end, 0)]

    # ---- scheduling contexts

    def _set_limits(self, call: Call) -> Reply:
        context, new = (
            self._need_context(call, Rights.CONTROL),
            tables.checked_limits(call.args[1:7]),
        )
        old, groups = context.limits, self._domains.groups
        for what in context.booked:
            if getattr(new, what) < context.booked[what]:
                raise errors.Busy(f"{what}: {context.booked[what]} is in use")
        if context.parent is not None:
            more = {what: getattr(new, what) - getattr(old, what) for what in context.booked}
            context.parent.check(new.cpu_permille, **more)
        self.commit("limits", call, id=context.id, limits=new.values())
        try:
            groups.limit(context.path, new)
        except OSError as error:
            self.commit("limits", id=context.id, limits=old.values())
            groups.limit(context.path, old)
            raise errors.Busy(f"more than that is in use: {error}") from error
        return _NOTHING

    def _charge(self, call: Call) -> Reply:
        context, more = self._need_context(call, Rights.CHARGE), call.args[1]
        if context.charges.get(call.caller.id, 0) + more < 0:
            raise errors.Invalid("more released than this domain has booked")
        context.check(disk_bytes=max(more, 0))
        return Reply(self.commit("charge", call, id=context.id, bytes=more))


_NOTHING = Reply()
