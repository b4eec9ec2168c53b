"""The core's calls, a method each: check everything, log, apply, then carry out what is left to do.

A call that changes anything makes one record (:meth:`Broker.commit`), after all refusals.
"""

import hashlib
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from supercloud.lower.core import state as tables
from supercloud.lower.core import system
from supercloud.lower.core.domain import Domains
from supercloud.lower.core.loop import Link
from supercloud.lower.core.manifest import Kind
from supercloud.lower.core.measure import Chain, Measurements, say
from supercloud.lower.core.state import Context, Domain, Object, State, Values
from supercloud.model import refusals as errors
from supercloud.model.capability import KILLS, Capability, Limits, ObjectType, Rights
from supercloud.wire import frames
from supercloud.wire.frames import DomainState, Event, Op, pack_answer

MAX_DEPTH, PAGE_BYTES, PIECE_BYTES = 8, 4096, 8 << 20
_START_FAILED = 127 << 8  # as a wait status
_NEXT_PIECE_S, _AGAIN_S, _SPACING_S = (
    0.001,
    0.1,
    2.0,
)  # a domain that lasted longer is started again at once

OPEN: dict[ObjectType, Callable[[int], list[int]]] = {
    ObjectType.PORTAL: lambda type_: [e.detach() for e in socket.socketpair(socket.AF_UNIX, type_)],
    ObjectType.MEMORY: lambda size: [system.memory(size)],
    ObjectType.SEMAPHORE: lambda value: [os.eventfd(value, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)],
}


# What an argument must be: a number, or the selector of a capability with a right, to a type
_Need = tuple[Rights, ObjectType | None] | None
_NUMBER, _ANY = None, (Rights.NONE, None)
_CONTEXT, _DOMAIN = ObjectType.SCHEDULING_CONTEXT, ObjectType.DOMAIN
_CHARGED, _READABLE = (Rights.CHARGE, _CONTEXT), (Rights.READ, _CONTEXT)
_CONTROLLED, _CONNECTED = (Rights.CONTROL, _DOMAIN), (Rights.CONNECT, _DOMAIN)
_LOOKED_AT = (Rights.NONE, _DOMAIN)


@dataclass(slots=True)
class Call:
    """One request of one domain, and what answers it besides the values that its method returns."""

    caller: Domain
    link: Link
    op: int
    sequence: int
    args: Values
    first: str
    second: str
    payload: bytes = b""
    descriptor: int = -1
    later: bool = False  # it will be answered when it is done


class Broker:
    """Checks and carries out the calls of all domains."""

    def __init__(self, state: State, log: Chain, measured: Measurements, domains: Domains) -> None:
        self.state, self._graph, self._log, self._measured = state, state.graph, log, measured
        self._domains = domains
        domains.on_request, domains.on_exit = self.answer, self.exited
        self._hashing: deque[tuple[Call, Object, Any, int]] = deque()  # in turn
        # op -> what carries it out, what each argument must be, how many names it takes
        self._calls: dict[int, tuple[Callable[..., Values], tuple[_Need, ...], int]] = {
            Op.PING: (lambda _: (), (), 0),
            Op.LOOKUP: (self._list, (), 1),
            Op.LIST: (self._list, (_NUMBER,), 0),
            Op.CREATE_DOMAIN: (self._create_domain, (_CHARGED, *[_NUMBER] * 6), 2),
            Op.START: (self._start, (_CONTROLLED, *[_NUMBER] * 7), 0),
            Op.DESTROY: (self._destroy, ((Rights.CONTROL, None), _NUMBER), 0),
            Op.CREATE_CHANNEL: (self._create_channel, (_CONNECTED, _CONNECTED, _NUMBER), 2),
            Op.CREATE_MEMORY: (self._create_memory, (_CHARGED, _NUMBER), 1),
            Op.SEAL: (self._seal, ((Rights.WRITE, ObjectType.MEMORY),), 0),
            Op.CREATE_SEMAPHORE: (self._create_semaphore, (_NUMBER,), 1),
            Op.DELEGATE: (self._delegate, (_ANY, _CONNECTED, _NUMBER), 1),
            Op.REVOKE: (self._revoke, (_ANY,), 0),
            Op.TAKE: (self._take, (_ANY,), 0),
            Op.SET_LIMITS: (self._set_limits, ((Rights.CONTROL, _CONTEXT), *[_NUMBER] * 6), 0),
            Op.USAGE: (self._usage, (_READABLE,), 0),
            Op.LIMITS: (lambda _, context: context.limits, (_READABLE,), 0),
            Op.CHARGE: (self._charge, (_CHARGED, _NUMBER), 0),
            Op.STATE: (lambda _, d: (d.state, d.starts, d.wait_status), (_LOOKED_AT,), 0),
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
        return values

    def commit(self, op: str, call: Call | None = None, **what: Any) -> Values:
        """Log a checked record and apply it; nothing is carried out yet."""
        by = {"by": call.caller.id, "seq": call.sequence} if call else {}
        record = {"t": int(time.time() * 1000), "op": op, **by, **what}
        self._log.append(record)
        return self.state.apply(record)

    def _resolve(self, holder: int, need: _Need, argument: int) -> Any:
        """An argument as a number, or what is behind the selector that it is."""
        if need is None:
            return argument
        (right, type_), capability = need, self._graph.get(holder, argument)
        name, is_a = capability.name, capability.type
        if type_ is not None and is_a is not type_:
            raise errors.Invalid(f"{name!r} is a {is_a.name}, not a {type_.name}")
        if right & ~capability.rights:
            raise errors.Denied(f"{name!r} does not carry {right.name}")
        return self.state.behind[capability.object_id] if type_ else capability

    # ---- calls that only look

    def _list(self, call: Call, first: int = 0) -> Values:
        """The entry of a name, or a page of the table."""
        graph, holder = self._graph, call.caller.id
        found = [graph.get(holder, call.first)] if call.first else graph.entries(holder)
        entries = [e for e in found if e.selector >= first]
        page, rest = entries[: frames.ENTRIES_PER_PAGE], entries[frames.ENTRIES_PER_PAGE :]
        for e in page:
            what = e.selector, e.object_id, e.type, e.rights, e.end, 0, e.name.encode()
            call.payload += frames.ENTRY.pack(*what)
        return len(page), rest[0].selector if rest else 0

    def _usage(self, _: Call, context: Context) -> Values:
        return *self._domains.groups.usage(context.path), *self.state.booked(context)

    # ---- domains

    def _create_domain(self, call: Call, context: Context, *figures: int) -> Values:
        name = call.second
        if call.first not in call.caller.kind.creates:
            raise errors.Denied(f"a {call.caller.kind.name} may not make a {call.first}")
        self._graph.check_room((call.caller.id, name), (call.caller.id, f"sched:{name}"))
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
        memory, pids, domains, disk = limits[2:]
        self.state.check_left(context, (memory, pids, domains + 1, disk), limits.cpu_permille)
        own = kind.own if kind.creates else limits
        if own.memory_bytes > limits.memory_bytes or own.pids > limits.pids:
            raise errors.NoResources(f"a {kind.name} itself needs {own}")
        slot = self._domains.choose_slot(name, {d.slot for d in others}, keep=kind.state)
        number, parent = self.state.next_id, call.caller.id if call else 0
        what = {"kind": kind.name, "name": name, "slot": slot, "limits": limits}
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
        try:
            self._domains.start(domain, self._wired(domain))
        except (OSError, errors.UserError) as error:
            what = {"state": DomainState.CREATED, "status": _START_FAILED}
            self.commit("stopped", call, id=domain.id, **what, seq=0)  # asked again: tried again
            raise errors.BadState(f"could not start: {error}") from error
        return ()

    def _wired(self, domain: Domain) -> list[int]:
        """The descriptors that its kind wants at the start."""
        entries = [self._graph.get(domain.id, name) for name in domain.kind.descriptors]
        return [self._descriptor(domain, entry) for entry in entries]

    def resume(self, domain: Domain) -> None:
        """Start a domain that should run, or that does in the tables but has no process."""
        if self.state.domains.get(domain.id) is not domain or domain.id in self._domains.running:
            return
        if domain.state is not DomainState.RUNNING:
            self.commit("start", id=domain.id, numbers=domain.numbers)
        try:
            self._domains.start(domain, self._wired(domain))
        except (OSError, errors.UserError) as error:
            say("domain.start_failed", domain=domain.name, error=str(error))
            self.exited(domain, _START_FAILED, 0.0)

    def exited(self, domain: Domain, status: int, lasted_s: float) -> None:
        """A domain's program ended by itself or by us."""
        say("domain.exited", domain=domain.name, status=status)
        if domain.kind.restart:
            self.commit("stopped", id=domain.id, state=DomainState.WAITING, status=status)
            self._renew_channels(domain)
            delay_s = max(_AGAIN_S, _SPACING_S - lasted_s)
            self._domains.loop.later(delay_s, lambda: self.resume(domain))
        else:
            domain.wait_status = status
            self.destroy(domain.id)

    def _tell(self, domain: Domain | None, event: Event, values: Values, name: str) -> None:
        if domain and domain.id in self._domains.running:
            self._domains.running[domain.id].link.event(event, values, name)

    def _destroy(self, call: Call, capability: Capability, purge: int) -> Values:
        if capability.type is _CONTEXT or purge not in (0, 1):
            raise errors.Invalid("a scheduling context ends with its domain")
        self.destroy(capability.object_id, call, purge)
        return ()

    def destroy(self, number: int, call: Call | None = None, purge: int = 0) -> None:
        """End a domain or object; without a call, for reasons of our own."""
        self.commit("destroy", call, id=number, purge=purge)
        self._carry_out(call)

    # ---- what a record took out of the tables

    def _carry_out(self, call: Call | None = None) -> None:
        (domains, objects, _), caller = self.state.gone, call.caller if call else None
        for domain in domains:
            if domain.parent is not caller:
                self._tell(domain.parent, Event.DIED, (domain.wait_status,), domain.name)
        self._tell_revoked(caller)
        for ended in objects:
            self._domains.vault.drop(f"o{ended.id}")
            system.close_all(ended.descriptors, shut_down=ended.type is ObjectType.PORTAL)
        left = set(domains)

        def one_is_dead(domain: Domain) -> None:
            left.discard(domain)
            if not left and call:
                call.link.send(pack_answer(call.op, 0, call.sequence))

        if call:
            call.later = bool(left)
        for domain in domains:
            self._domains.end(domain, one_is_dead)

    def _tell_revoked(self, caller: Domain | None) -> None:
        domains, _, capabilities = self.state.gone
        ended = {number: d for d in domains for number in (d.id, d.context.id)}
        for lost in capabilities:
            holder, domain = self.state.domains.get(lost.holder), ended.get(lost.object_id)
            if holder is None or (domain is not None and domain.parent is holder):
                continue  # gone as well, or told by DIED
            if holder is not caller:
                self._tell(holder, Event.REVOKED, (lost.selector, lost.type), lost.name)
            if lost.taken and lost.parent and lost.type in KILLS:
                self._domains.kill(holder, f"{lost.type.name.lower()} {lost.name!r} was revoked")

    # ---- portals, memory, semaphores

    def _create_channel(self, call: Call, a: Domain, b: Domain, type_: int) -> Values:
        may_pass = a.kind.peers.get(b.kind.name)
        if a is b or may_pass is None:
            raise errors.Denied(f"a {a.kind.name} and a {b.kind.name} are no peers")
        if type_ not in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            raise errors.Invalid("a channel is a stream or seqpacket")
        entries = (call.caller.id, ""), (a.id, call.first), (b.id, call.second)  # first the whole
        ends = {"a": a.id, "b": b.id, "name_a": call.first, "name_b": call.second}
        values = self._make("portal", call, *entries, **ends, number=type_, descriptors=may_pass)
        for end, name, selector in ((a, call.first, values[1]), (b, call.second, values[2])):
            if end is not call.caller:
                self._tell(end, Event.ARRIVED, (selector, ObjectType.PORTAL), name)
        return values

    def _create_memory(self, call: Call, context: Context, size: int) -> Values:
        if not 0 < size <= tables.MAX_INT or size % PAGE_BYTES:
            raise errors.Invalid(f"the size must be a multiple of {PAGE_BYTES}")
        self.state.check_left(context, (size, 0, 0, 0))
        what, entry = {"name": call.first, "context": context.id}, (call.caller.id, call.first)
        return self._make("memory", call, entry, **what, number=size)

    def _create_semaphore(self, call: Call, value: int) -> Values:
        if not 0 <= value < 1 << 31:
            raise errors.Invalid("the value must be 0..2^31-1")
        entry = call.caller.id, call.first
        return self._make("semaphore", call, entry, name=call.first, number=value)

    def _make(self, op: str, call: Call, *entries: tuple[int, str], **what: Any) -> Values:
        """A new object with these entries, unless there is no room or the caller has enough."""
        self._graph.check_room(*entries)
        made = [o for o in self.state.objects.values() if o.maker is call.caller]
        if len(made) >= call.caller.kind.objects:
            raise errors.NoResources(f"{call.caller.name} has made as many objects as it may")
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
        made.descriptors = OPEN[made.type](made.number)
        self._domains.vault.put(f"o{made.id}", *made.descriptors)

    def _renew_channels(self, domain: Domain) -> None:
        """A dead domain's channels: end-of-file on the old ends, new ones for who takes them."""
        for portal in [o for o in self.state.objects.values() if domain in o.ends]:
            system.close_all(portal.descriptors, shut_down=True)
            self.open(portal)
            for end in self._graph.of_object(portal.id):
                holder = self.state.domains[end.holder]
                if end.end >= 0 and holder is not domain:
                    self._tell(holder, Event.RENEWED, (end.selector,), end.name)

    def _seal(self, call: Call, memory: Object) -> Values:
        call.payload, call.later = bytes.fromhex(memory.sha256), not memory.sha256
        if call.later:
            try:
                system.seal(memory.descriptors[0])
            except OSError as error:
                raise errors.Busy("it is mapped for writing somewhere") from error
            self._hashing.append((call, memory, hashlib.sha256(), 0))
            if len(self._hashing) == 1:
                self._domains.loop.later(0.0, self._hash)
        return ()

    def _hash(self) -> None:
        """One piece of one sealed memory in each round, so that no other domain waits for it."""
        call, memory, digest, offset = self._hashing.popleft()
        piece = os.pread(memory.descriptors[0], PIECE_BYTES, offset) if memory.descriptors else b""
        digest.update(piece)
        if piece:
            self._hashing.append((call, memory, digest, offset + len(piece)))
        if self._hashing:
            self._domains.loop.later(_NEXT_PIECE_S, self._hash)
        if piece:
            return
        process, status = self._domains.running.get(call.caller.id), 0
        if memory.descriptors and not memory.sha256:
            self._measured.extend("memory", digest.hexdigest(), f"{call.caller.name}/{memory.name}")
            by = call if process is not None and process.link is call.link else None
            self.commit("seal", by, id=memory.id, sha256=digest.hexdigest())
        if not memory.descriptors:
            status = frames.status_of(errors.NotFound("it was destroyed meanwhile"))
        payload = bytes.fromhex(memory.sha256)
        call.link.send(pack_answer(call.op, status, call.sequence, (), payload))

    # ---- capabilities

    def _delegate(self, call: Call, held: Capability, target: Domain, rights: int) -> Values:
        caller, ours, theirs = call.caller, call.caller.kind, target.kind.name
        if not 0 < rights < 128:
            raise errors.Invalid("no such rights")
        if target is not caller and not ours.peers.get(theirs):
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
        booked = self.state.booked(context)
        if any(limit < used for limit, used in zip(limits[2:], booked, strict=True)):
            raise errors.Busy(f"in use are {dict(zip(tables.SUMMED, booked, strict=True))}")
        if context.parent is not None:
            more = tuple(limit - was for limit, was in zip(limits[2:], old[2:], strict=True))
            self.state.check_left(context.parent, more, limits.cpu_permille)
        self.commit("limits", call, id=context.id, limits=new)
        try:
            groups.limit(context.path, limits)
        except OSError as error:
            self.commit("limits", id=context.id, limits=old)
            groups.limit(context.path, old)
            raise errors.Busy(f"more than that is in use: {error}") from error
        return ()

    def _charge(self, call: Call, context: Context, more: int) -> Values:
        if context.charges.get(call.caller.id, 0) + more < 0:
            raise errors.Invalid("more released than this domain has booked")
        self.state.check_left(context, (0, 0, 0, max(more, 0)))
        return self.commit("charge", call, id=context.id, bytes=more)
