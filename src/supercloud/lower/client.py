"""A domain's side of the core's protocol: plain blocking calls over descriptor 3.

A call takes some ten microseconds (``start`` and ``destroy`` some milliseconds), so that an
asyncio program may simply call. Events that come in between are kept: watch :meth:`Core.fileno`
for reading (``loop.add_reader``) and drain :meth:`Core.events` then *and after calls*, since a
call may have read an event off the socket.

When the core is replaced while a call waits, the call is sent again; the core does nothing twice.
A closed socket means that this host is going down: :class:`CoreGone`.
"""

import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self

from supercloud.model.capability import SCHEDULING, SELF, Limits, ObjectType, Rights
from supercloud.model.errors import BY_CODE, Invalid, NotFound, Permanent, SupercloudError
from supercloud.wire import frames
from supercloud.wire.frames import DomainState, Event, Op

_MAX_ANSWER_BYTES = frames.ANSWER.size + frames.MAX_PAYLOAD_BYTES
_MAX_NAME_BYTES = 63

__all__ = [
    "SCHEDULING",
    "SELF",
    "Answer",
    "Channel",
    "Core",
    "CoreGone",
    "Domain",
    "Entry",
    "Event",
    "Status",
    "Usage",
]


class Answer(NamedTuple):
    """One answer or event; ``values`` always has eight numbers."""

    op: int
    status: int
    sequence: int
    values: tuple[int, ...]
    payload: bytes

    @property
    def name(self) -> str:
        """The payload as text (events)."""
        return self.payload.decode("utf-8", "replace")


class CoreGone(Permanent):
    """The core has closed this domain's socket."""


class Entry(NamedTuple):
    """One capability of this domain's table; ``end`` is 0 or 1 for an end of a channel."""

    selector: int
    type: ObjectType
    rights: Rights
    object_id: int
    end: int
    name: str


class Domain(NamedTuple):
    """A domain that was made: selectors of it and of its scheduling context."""

    selector: int
    scheduling: int


class Channel(NamedTuple):
    """A channel that was made: selector of the whole (CONTROL), and of each end in its table."""

    selector: int
    in_a: int
    in_b: int


class Status(NamedTuple):
    """What a domain is doing; ``wait_status`` as of ``os.waitpid`` for its last end (or 0)."""

    state: DomainState
    starts: int
    wait_status: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a scheduling context uses now, and what is booked on it."""

    memory_bytes: int
    cpu_us: int
    pids: int
    booked_memory_bytes: int
    booked_pids: int
    booked_domains: int
    booked_disk_bytes: int


class Core:
    """The core, as one domain sees it. Every call raises the ``UserError`` that the core says."""

    def __init__(self, descriptor: int = frames.CORE_DESCRIPTOR) -> None:
        """Take over the socket at ``descriptor``."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.settimeout(None)
        os.set_inheritable(self._socket.fileno(), False)
        self._sequence = 0
        self._events: deque[Answer] = deque()

    def fileno(self) -> int:
        """The descriptor to watch for events."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; the core takes it as the end of the domain's interest in calls."""
        self._socket.close()

    def __enter__(self) -> Self:
        """Use it in ``with``."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def events(self, timeout_s: float = 0.0) -> Iterator[Answer]:
        """All events that have come, waiting at most ``timeout_s`` for the first."""
        while self._events or select.select([self._socket], [], [], timeout_s)[0]:
            if not self._events:
                self._keep_event(self._receive())
            timeout_s = 0.0
            while self._events:
                yield self._events.popleft()

    def ping(self) -> None:
        """Nothing, there and back."""
        self._call(Op.PING)

    def lookup(self, name: str) -> Entry:
        """The capability of that name; NotFound."""
        return _entry(*frames.ENTRY.unpack(self._call(Op.LOOKUP, first=name).payload))

    def entries(self) -> list[Entry]:
        """The whole table, by selector."""
        found: list[Entry] = []
        following = 0
        while True:
            answer = self._call(Op.LIST, following)
            found += [_entry(*raw) for raw in frames.ENTRY.iter_unpack(answer.payload)]
            following = answer.values[1]
            if not following:
                return found

    def create_domain(
        self,
        kind: str,
        name: str,
        limits: Limits | None = None,
        scheduling: int = SCHEDULING,
    ) -> Domain:
        """Make a domain (not started) out of what is left of a scheduling context.

        ``limits`` None: the kind's own. The domain gets an entry ``name`` in this table, its
        scheduling context one named ``sched:NAME``. Invalid, Exists, Denied (this kind may not
        make that kind), NoResources.
        """
        figures = limits or (0,) * 6
        answer = self._call(Op.CREATE_DOMAIN, scheduling, *figures, first=kind, second=name)
        return Domain(*answer.values[:2])

    def start(self, domain: int, *numbers: int) -> None:
        """Start it: it has been executed. ``numbers`` fill the placeholders of the kind's argv."""
        self._call(Op.START, domain, *numbers)

    def state(self, domain: int) -> Status:
        """What a domain is doing."""
        state, starts, wait_status, *_ = self._call(Op.STATE, domain).values
        return Status(DomainState(state), starts, wait_status)

    def destroy(self, selector: int, *, purge: bool = False) -> None:
        """End an object (CONTROL) and all capabilities to it; a domain with all its children.

        ``purge`` removes the domain's private state directory as well.
        """
        self._call(Op.DESTROY, selector, int(purge))

    def destroy_named(self, name: str) -> None:
        """As ``destroy``; nothing when there is none, or it ends by itself at this moment."""
        with suppress(NotFound):
            self.destroy(self.lookup(name).selector)

    def create_channel(
        self,
        a: int,
        b: int,
        name_a: str,
        name_b: str,
        kind: socket.SocketKind = socket.SOCK_SEQPACKET,
    ) -> Channel:
        """Join two domains (SELF may be one); each finds its end under the name given for it."""
        answer = self._call(Op.CREATE_CHANNEL, a, b, int(kind), first=name_a, second=name_b)
        return Channel(*answer.values[:3])

    def create_memory(self, size_bytes: int, name: str, scheduling: int = SCHEDULING) -> int:
        """A memory object of fixed size, booked on a scheduling context. Its selector."""
        return self._call(Op.CREATE_MEMORY, scheduling, size_bytes, first=name).values[0]

    def seal(self, memory: int) -> bytes:
        """No more writing, by anybody; its SHA-256, which is in the event log. Busy when mapped."""
        return self._call(Op.SEAL, memory).payload

    def create_semaphore(self, name: str, value: int = 0) -> int:
        """An eventfd in semaphore mode. Its selector."""
        return self._call(Op.CREATE_SEMAPHORE, value, first=name).values[0]

    def delegate(self, selector: int, domain: int, rights: Rights, name: str) -> int:
        """Give ``domain`` (CONNECT) a capability (GRANT), never wider. Selector in its table."""
        return self._call(Op.DELEGATE, selector, domain, int(rights), first=name).values[0]

    def revoke(self, selector: int) -> int:
        """Take back all that was derived from this capability. How many are gone."""
        return self._call(Op.REVOKE, selector).values[0]

    def take(self, selector: int) -> int:
        """The descriptor behind a capability (USE, READ or WRITE); close-on-exec, yours to close.

        A memory object that is not sealed yet is given to holders of WRITE only.
        """
        taken: list[int] = []
        self._exchange(pack_request(Op.TAKE, self._next(), (selector,)), taken)
        if len(taken) != 1:
            message = f"TAKE brought {len(taken)} descriptors"
            raise Permanent(message)
        return taken[0]

    def take_socket(self, name: str) -> socket.socket:
        """The end of a channel by its name, as a socket."""
        return socket.socket(fileno=self.take(self.lookup(name).selector))

    def set_limits(self, scheduling: int, limits: Limits) -> None:
        """Change the limits of a scheduling context (CONTROL) within its parent's."""
        self._call(Op.SET_LIMITS, scheduling, *limits)

    def limits(self, scheduling: int = SCHEDULING) -> Limits:
        """The limits of a scheduling context (READ)."""
        return Limits(*self._call(Op.LIMITS, scheduling).values[:6])

    def usage(self, scheduling: int = SCHEDULING) -> Usage:
        """What a scheduling context uses (READ)."""
        return Usage(*self._call(Op.USAGE, scheduling).values[:7])

    def charge(self, scheduling: int, disk_bytes: int) -> int:
        """Book (or with a negative number release) disk space (CHARGE). What is booked then."""
        return self._call(Op.CHARGE, scheduling, disk_bytes).values[0]

    def _call(self, op: Op, *args: int, first: str = "", second: str = "") -> Answer:
        return self._exchange(pack_request(op, self._next(), args, first, second), None)

    def _next(self) -> int:
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return self._sequence

    def _exchange(self, frame: bytes, taken: list[int] | None) -> Answer:
        """Send and wait for the answer; a descriptor with it goes into ``taken``."""
        self._send(frame)
        while (answer := self._receive(taken)).sequence != self._sequence:
            self._keep_event(answer)
            while taken:  # a TAKE before was sent twice and is answered twice
                os.close(taken.pop())
            if answer.op == Event.RESTARTED:
                self._send(frame)
        if answer.status:
            raise error_of(answer.status, answer.payload)
        return answer

    def _keep_event(self, answer: Answer) -> None:
        if answer.sequence == 0:  # else a second answer to a call that was sent twice
            self._events.append(answer)

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise CoreGone("the core has closed the socket") from error

    def _receive(self, taken: list[int] | None = None) -> Answer:
        """One frame; without ``taken`` the kernel drops a descriptor that comes with it."""
        size = _MAX_ANSWER_BYTES + 1
        try:
            if taken is None:
                data = self._socket.recv(size)
            else:
                flags = socket.MSG_CMSG_CLOEXEC
                data, descriptors, _, _ = socket.recv_fds(self._socket, size, 1, flags)
                taken += descriptors
        except ConnectionResetError:
            data = b""
        if not data:
            raise CoreGone("the core has closed the socket")
        return unpack_answer(data)


def pack_request(
    op: int, sequence: int, args: tuple[int, ...], first: str = "", second: str = ""
) -> bytes:
    """A frame for the core; :class:`Invalid` when something does not fit."""
    names = (first.encode(), second.encode())
    if any(len(name) > _MAX_NAME_BYTES for name in names):
        raise Invalid(f"a name is longer than {_MAX_NAME_BYTES} bytes")
    args += frames.NO_VALUES[len(args) :]
    try:
        return frames.REQUEST.pack(frames.VERSION, op, 0, sequence, *args, *names)
    except struct.error as error:
        raise Invalid(f"bad argument: {error}") from error


def unpack_answer(untrusted: bytes) -> Answer:
    """Check and take apart an answer; :class:`Permanent` when it is not one."""
    head = frames.ANSWER.size
    if not head <= len(untrusted) <= _MAX_ANSWER_BYTES or untrusted[0] != frames.VERSION:
        raise Permanent("the core answered in another version")
    _, op, status, sequence, *values = frames.ANSWER.unpack_from(untrusted)
    return Answer(op, status, sequence, tuple(values), untrusted[head:])


def error_of(status: int, payload: bytes) -> SupercloudError:
    """The error that an answer of a non-zero status carries."""
    message = payload.decode("utf-8", "replace")
    if 1 <= status <= len(frames.CODES):
        return BY_CODE[frames.CODES[status - 1]](message)
    return Permanent(f"the core failed: {message}")


def _entry(
    selector: int, object_id: int, type_: int, rights: int, end: int, _: int, name: bytes
) -> Entry:
    text = name.rstrip(b"\0").decode()
    return Entry(selector, ObjectType(type_), Rights(rights), object_id, end, text)
