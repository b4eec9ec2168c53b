"""The core's calls: check everything, log, apply, then carry out what is left to do.

One method per :class:`Op`. A call that changes anything makes one record (:meth:`Broker.commit`);
everything that may be refused is refused before that.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

from supercloud.lower.core import descriptors
from supercloud.lower.core import state as tables
from supercloud.lower.core.domain import Domains
from supercloud.lower.core.keeper import Vault
from supercloud.lower.core.loop import Link
from supercloud.lower.core.manifest import Kind
from supercloud.lower.core.measure import Chain, Measurements, say
from supercloud.lower.core.state import Context, Domain, Object, State, Values
from supercloud.model import refusals as errors
from supercloud.model.capability import KILLS, Capability, Limits, ObjectType, Rights
from supercloud.wire import frames
from supercloud.wire.frames import DomainState, Event, Op, pack_answer

MAX_DEPTH = 8
MAX_SEALED_BYTES = 512 << 20
_START_FAILED = 127 << 8  # as a wait status


class _Need(NamedTuple):
    """What the capability that an argument selects must carry and be."""

    right: Rights
    type: ObjectType | None = None


_CONTEXT, _NUMBER, _ANY = ObjectType.SCHEDULING_CONTEXT, None, _Need(Rights.NONE)
_CHARGED, _READABLE = _Need(Rights.CHARGE, _CONTEXT), _Need(Rights.READ, _CONTEXT)
_CONTROLLED = _Need(Rights.CONTROL, ObjectType.DOMAIN)
_CONNECTED = _Need(Rights.CONNECT, ObjectType.DOMAIN)


@dataclass(slots=True)
class Call:
    """One request of one domain, and what answers it besides the values that its method returns.

    ``later``: nothing answers it now, it will be answered when it is done.
    """

    caller: Domain
    link: Link
    op: int
    sequence: int
    args: Values
    first: str
    second: str
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
        # op -> what carries it out, what each argument must be, how many names it takes
        self._calls: dict[int, tuple[Callable[..., Values], tuple[_Need | None, ...], int]] = {
            Op.PING: (lambda _: (), (), 0),
            Op.LOOKUP: (self._lookup, (), 1),
            Op.LIST: (self._list, (_NUMBER,), 0),
            Op.CREATE_DOMAIN: (self._create_domain, (_CHARGED, *[_NUMBER] * 6), 2),
            Op.START: (self._start, (_CONTROLLED, *[_NUMBER] * 7), 0),
            Op.DESTROY: (self._destroy, (_Need(Rights.CONTROL), _NUMBER), 0),
            Op.CREATE_CHANNEL: (self._create_channel, (_CONNECTED, _CONNECTED, _NUMBER), 2),
            Op.CREATE_MEMORY: (self._create_memory, (_CHARGED, _NUMBER), 1),
            Op.SEAL: (self._seal, (_Need(Rights.WRITE, ObjectType.MEMORY),), 0),
            Op.CREATE_SEMAPHORE: (self._create_semaphore, (_NUMBER,), 1),
            Op.DELEGATE: (self._delegate, (_ANY, _CONNECTED, _NUMBER), 1),
            Op.REVOKE: (self._revoke, (_ANY,), 0),
            Op.TAKE: (self._take, (_ANY,), 0),
            Op.SET_LIMITS: (self._set_limits, (_Need(Rights.CONTROL, _CONTEXT), *[_NUMBER] * 6), 0),
            Op.USAGE: (self._usage, (_READABLE,), 0),
            Op.LIMITS: (lambda _, context: context.limits.values(), (_READABLE,), 0),
            Op.CHARGE: (self._charge, (_CHARGED, _NUMBER), 0),
            Op.STATE: (self._state, (_Need(Rights.NONE, ObjectType.DOMAIN),), 0),
        }

    def answer(self, caller: Domain, link: Link, untrusted: bytes) -> None:
        """Take one frame of a domain, and answer it whatever it was."""
        op, sequence = (untrusted[1] if len(untrusted) > 1 else 0), 0
        try:
            call = Call(caller, link, *frames.unpack_request(untrusted))
            sequence = call.sequence
            values = self._carry(call)
            if not call.later:
                link.send(pack_answer(op, 0, sequence, values, call.payload), call.descriptor)
        except errors.UserError as error:
            if isinstance(error, errors.Invalid):
                link.offend(str(error))
            status, text = frames.status_of(error), str(error).encode()
            link.send(pack_answer(op, status, sequence, (), text))
        except Exception:  # noqa: BLE001  one domain's call must not take the host down
            say("bug", op=op, domain=caller.name, error=traceback.format_exc())
            link.send(pack_answer(op, frames.BUG_STATUS, sequence, (), b"see the core's log"))

    def _carry(self, call: Call) -> Values:
        if call.op not in self._calls:
            raise errors.Invalid(f"no call {call.op}")
        method, needs, names = self._calls[call.op]
        if any(call.args[len(needs) :]) or bool(call.first) + bool(call.second) != names:
            raise errors.Invalid("an argument too many, or a name that is missing")
        last, values, sha256 = call.caller.last
        if call.sequence != last:
            return method(call, *map(self._resolve, repeat(call.caller.id), needs, call.args))
        call.payload = bytes.fromhex(sha256)  # it was done already, before the core was replaced
        if call.op == Op.START:
            domain = self._resolve(call.caller.id, needs[0], call.args[0])
            process = self._domains.running.get(domain.id)
            if process is None:
                raise errors.BadState("it did not start, or has ended")
            return (process.pid,)
        return values

    def commit(self, op: str, call: Call | None = None, **what: Any) -> Values:
        """Log a checked record and apply it; nothing is carried out yet."""
        by = {"by": call.caller.id, "seq": call.sequence} if call else {}
        record = {"t": int(time.time() * 1000), "op": op, **by, **what}
        self._log.append(record)
        return self.state.apply(record)

    def _resolve(self, holder: int, need: "_Need | None", argument: int) -> Any:
        """An argument as a number, or what is behind the selector that it is."""
        if need is None:
            return argument
        capability = self._graph.get(holder, argument)
        name, is_a = capability.name, capability.type
        if need.type is not None and is_a is not need.type:
            raise errors.Invalid(f"{name!r} is a {is_a.name}, not a {need.type.name}")
        if need.right & ~capability.rights:
            raise errors.Denied(f"{name!r} does not carry {need.right.name}")
        return self.state.behind[is_a][capability.object_id] if need.type else capability

    # ---- calls that only look

    def _lookup(self, call: Call) -> Values:
        found = self._graph.find(call.caller.id, call.first)
        return found.selector, found.type, found.rights, found.object_id, found.end

    def _list(self, call: Call, first: int) -> Values:
        entries = [e for e in self._graph.entries(call.caller.id) if e.selector >= first]
        page, rest = entries[: frames.ENTRIES_PER_PAGE], entries[frames.ENTRIES_PER_PAGE :]
        for e in page:
            what = e.selector, e.object_id, e.type, e.rights, e.end, 0, e.name.encode()
            call.payload += frames.ENTRY.pack(*what)
        return len(page), rest[0].selector if rest else 0

    def _usage(self, _: Call, context: Context) -> Values:
        return *self._domains.groups.usage(context.path), *context.booked.values()

    def _state(self, _: Call, domain: Domain) -> Values:
        return domain.state, domain.starts, domain.wait_status

    # ---- domains

    def _create_domain(self, call: Call, context: Context, *figures: int) -> Values:
        name = call.second
        if call.first not in call.caller.kind.creates:
            raise errors.Denied(f"a {call.caller.kind.name} may not make a {call.first}")
        self._graph.check_room(call.caller.id, name, f"sched:{name}")
        kind = self.state.manifest.kinds[call.first]
        limits = tables.checked_limits(figures) if any(figures) else kind.limits
        return self.make_domain(kind, name, limits, context, call)

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
            raise errors.NoResources(f"a {kind.name} itself needs {own}")
        slot = self._domains.choose_slot(name, {d.slot for d in others}, keep=kind.state)
        number, parent = self.state.next_id, call.caller.id if call else 0
        what = {"kind": kind.name, "name": name, "slot": slot, "limits": limits.values()}
        values = self.commit("domain", call, id=number, parent=parent, context=context.id, **what)
        try:
            self._domains.prepare(self.state.domains[number])
        except OSError as error:
            self.destroy(number)
            raise errors.NoResources(f"could not make {name}: {error}") from error
        return values

    def _start(self, call: Call, domain: Domain, *numbers: int) -> Values:
        if domain.state is not DomainState.CREATED:
            raise errors.BadState(f"{domain.name} is {domain.state.name.lower()}")
        ranges = domain.kind.numbers
        fits = all(a <= n <= b for n, (a, b) in zip(numbers, ranges, strict=False))
        if any(numbers[len(ranges) :]) or not fits:
            raise errors.Invalid(f"numbers must be in {list(ranges)}")
        self._wired(domain)  # refused before anything is logged
        self.commit("start", call, id=domain.id, numbers=numbers[: len(ranges)])
        return (self._run(domain),)

    def _run(self, domain: Domain) -> int:
        """Its process id; BadState, which is noted, when it does not start."""
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
        if not logged:
            self.commit("start", id=domain.id, numbers=domain.numbers)
        try:
            self._run(domain)
        except errors.UserError:
            self.exited(domain, _START_FAILED, 0.0)
            return
        if domain.starts > 1 and domain.parent is not None:
            values = self.state.at_parent(domain, domain.id), domain.starts
            self._tell(domain.parent, Event.STARTED, values, domain.name)

    def exited(self, domain: Domain, status: int, lasted_s: float) -> None:
        """A domain's program ended by itself or by us."""
        say("domain.exited", domain=domain.name, status=status)
        if domain.kind.restart:
            waiting = DomainState.WAITING
            self.commit("stopped", id=domain.id, state=waiting, status=status)
            self._renew_channels(domain)
            self._domains.restart_later(lasted_s, lambda: self.resume(domain))
        else:
            domain.wait_status = status
            self.destroy(domain.id)

    def _tell(self, domain: Domain, event: Event, values: Values, name: str) -> None:
        if domain.id in self._domains.running:
            self._domains.running[domain.id].link.event(event, values, name)

    def _destroy(self, call: Call, capability: Capability, purge: int) -> Values:
        if capability.type is _CONTEXT or purge not in (0, 1):
            raise errors.Invalid("a scheduling context ends with its domain")
        domain = self.state.domains.get(capability.object_id)
        self.commit("destroy", call, id=capability.object_id)
        self._carry_out(call, domain if purge else None)
        return ()

    def destroy(self, number: int) -> None:
        """End a domain or object for reasons of our own."""
        self.commit("destroy", id=number)
        self._carry_out()

    # ---- what a record took out of the tables

    def _carry_out(self, call: Call | None = None, purged: Domain | None = None) -> None:
        gone, caller = self.state.gone, call.caller if call else None
        for domain, *selectors in gone.domains:
            if domain.parent and domain.parent is not caller:
                values = (selectors[0], domain.wait_status, selectors[1])
                self._tell(domain.parent, Event.DIED, values, domain.name)
        self._tell_revoked(gone, caller)
        for ended in gone.objects:
            self._vault.drop(f"o{ended.id}")
            is_portal = ended.type is ObjectType.PORTAL
            descriptors.close_all(ended.descriptors, shut_down=is_portal)
        left = {domain for domain, *_ in gone.domains}

        def one_is_dead(domain: Domain) -> None:
            if purged:  # with the directories of those that hung from it
                self._domains.purge(domain)
            left.discard(domain)
            if not left and call:
                call.link.send(pack_answer(call.op, 0, call.sequence))

        if call:
            call.later = bool(left)
        for domain, *_ in gone.domains:
            self._domains.end(domain, one_is_dead)

    def _tell_revoked(self, gone: tables.Gone, caller: Domain | None) -> None:
        ended = {n: d for d, *_ in gone.domains for n in (d.id, d.context.id)}
        for lost in gone.capabilities:
            holder, domain = self.state.domains.get(lost.holder), ended.get(lost.object_id)
            if holder is None or (domain is not None and domain.parent is holder):
                continue  # gone as well, or told by DIED
            if holder is not caller:
                self._tell(holder, Event.REVOKED, (lost.selector, lost.type), lost.name)
            if lost.taken and lost.parent and lost.type in KILLS:
                self._domains.kill(holder, f"{lost.type.name.lower()} {lost.name!r} was revoked")

    # ---- portals, memory, semaphores

    def _create_channel(self, call: Call, a: Domain, b: Domain, type_: int) -> Values:
        names, entries = (call.first, call.second), {call.caller.id: [""]}  # the whole has no name
        for end, name in zip((a, b), names, strict=True):
            entries.setdefault(end.id, []).append(name)
        self._check_budget(call, entries)
        values = self.make_channel(a, b, type_, names, call)
        for end, name, selector in zip((a, b), names, values[1:], strict=True):
            if end is not call.caller:
                self._tell(end, Event.ARRIVED, (selector, ObjectType.PORTAL), name)
        return values

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
        return self._make("portal", call, **ends, number=type_, descriptors=peer.descriptors)

    def _create_memory(self, call: Call, context: Context, size: int) -> Values:
        if not 0 < size <= tables.MAX_INT or size % descriptors.PAGE_BYTES:
            raise errors.Invalid(f"the size must be a multiple of {descriptors.PAGE_BYTES}")
        context.check(memory_bytes=size)
        self._check_budget(call, {call.caller.id: [call.first]})
        return self._make("memory", call, name=call.first, context=context.id, number=size)

    def _create_semaphore(self, call: Call, value: int) -> Values:
        if not 0 <= value < 1 << 31:
            raise errors.Invalid("the value must be 0..2^31-1")
        self._check_budget(call, {call.caller.id: [call.first]})
        return self._make("semaphore", call, name=call.first, number=value)

    def _check_budget(self, call: Call, entries: dict[int, list[str]]) -> None:
        """Refuse one more object of the caller, or these entries in these tables."""
        for holder, names in entries.items():
            self._graph.check_room(holder, *names)
        made = [o for o in self.state.objects.values() if o.maker is call.caller]
        if len(made) >= call.caller.kind.objects:
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
        self._vault.put(f"o{made.id}", *made.descriptors)

    def _renew_channels(self, domain: Domain) -> None:
        """A dead domain's channels: end-of-file on the old ends, new ones for who takes them."""
        for portal in [o for o in self.state.objects.values() if domain in o.ends]:
            descriptors.close_all(portal.descriptors, shut_down=True)
            self.open(portal)
            for end in self._graph.of_object(portal.id):
                holder = self.state.domains[end.holder]
                if end.end >= 0 and holder is not domain:
                    self._tell(holder, Event.RENEWED, (end.selector,), end.name)

    def _seal(self, call: Call, memory: Object) -> Values:
        if not memory.sha256:
            if memory.number > MAX_SEALED_BYTES:
                raise errors.Invalid(f"only up to {MAX_SEALED_BYTES} bytes can be sealed")
            try:
                digest = descriptors.seal(memory.descriptors[0])
            except OSError as error:
                raise errors.Busy("it is mapped for writing somewhere") from error
            self._measured.extend("memory", digest, f"{call.caller.name}/{memory.name}")
            self.commit("seal", call, id=memory.id, sha256=digest)
        call.payload = bytes.fromhex(memory.sha256)
        return ()

    # ---- capabilities

    def _delegate(self, call: Call, held: Capability, target: Domain, rights: int) -> Values:
        caller, ours, theirs = call.caller, call.caller.kind, target.kind.name
        if not 0 < rights < 128:
            raise errors.Invalid("no such rights")
        if target is not caller and not (theirs in ours.peers and ours.peers[theirs].descriptors):
            raise errors.Denied(f"nothing may pass from a {ours.name} to a {theirs}")
        self._graph.check_derive(held, target.id, Rights(rights), call.first)
        what = {"selector": held.selector, "rights": rights, "name": call.first}
        values = self.commit("delegate", call, holder=caller.id, to=target.id, **what)
        if target is not caller:
            self._tell(target, Event.ARRIVED, (values[0], held.type), call.first)
        return values

    def _revoke(self, call: Call, held: Capability) -> Values:
        values = self.commit("revoke", call, holder=call.caller.id, selector=held.selector)
        self._carry_out()
        return values

    def _take(self, call: Call, held: Capability) -> Values:
        call.descriptor = self._descriptor(call.caller, held)
        return (held.type,)

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

    def _set_limits(self, call: Call, context: Context, *new: int) -> Values:
        old, limits, groups = context.limits, tables.checked_limits(new), self._domains.groups
        more = {what: getattr(limits, what) - getattr(old, what) for what in context.booked}
        for what, booked in context.booked.items():
            if getattr(limits, what) < booked:
                raise errors.Busy(f"{what}: {booked} is in use")
        if context.parent is not None:
            context.parent.check(limits.cpu_permille, **more)
        self.commit("limits", call, id=context.id, limits=new)
        try:
            groups.limit(context.path, limits)
        except OSError as error:
            self.commit("limits", id=context.id, limits=old.values())
            groups.limit(context.path, old)
            raise errors.Busy(f"more than that is in use: {error}") from error
        return ()

    def _charge(self, call: Call, context: Context, more: int) -> Values:
        if context.charges.get(call.caller.id, 0) + more < 0:
            raise errors.Invalid("more released than this domain has booked")
        context.check(disk_bytes=max(more, 0))
        return self.commit("charge", call, id=context.id, bytes=more)
