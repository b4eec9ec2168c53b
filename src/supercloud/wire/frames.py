"""The core's protocol: fixed frames over one SEQPACKET socketpair per domain.

Every request is one frame of ``REQUEST_BYTES``: version, op, zero, sequence number, eight signed
64-bit arguments and two 64-byte names (zero-padded). Every answer is a head of
``ANSWER_HEAD_BYTES`` (version, op, status, sequence, eight values) and at most
``MAX_PAYLOAD_BYTES``; what they hold is said at each :class:`Op`. An event is an answer with
sequence 0 whose op is an :class:`Event`. Integers are little-endian.

A sequence number is the client's: it counts up from 1. After :attr:`Event.RESTARTED` the client
sends the request that it is waiting for once more, *unchanged*: the core tells by the sequence
number whether it had done it already.
"""

import re
import struct
from enum import IntEnum
from typing import NamedTuple

from supercloud.model.errors import BY_CODE, Invalid, Permanent, SupercloudError, UserError

VERSION = 1
CORE_DESCRIPTOR = 3
"""Where every domain that speaks to the core finds its socket."""

_REQUEST = struct.Struct("<BBHI8q64s64s")
_ANSWER = struct.Struct("<BBHI8q")
ENTRY = struct.Struct("<IIBBbB64s")  # selector, object id, type, rights, end, zero, name
REQUEST_BYTES, ANSWER_HEAD_BYTES = _REQUEST.size, _ANSWER.size
MAX_PAYLOAD_BYTES = 4096
MAX_ANSWER_BYTES = ANSWER_HEAD_BYTES + MAX_PAYLOAD_BYTES
ENTRIES_PER_PAGE = MAX_PAYLOAD_BYTES // ENTRY.size
MAX_NAME_BYTES = 63
NO_VALUES = (0,) * 8
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,62}\Z")
DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,54}\Z")
_NO_NAME = bytes(64)


class Op(IntEnum):
    """Requests: ``arguments / names -> values / payload``. Unused arguments must be zero."""

    PING = 1  # -> nothing
    LOOKUP = 2  # name -> selector, type, rights, object id, end
    LIST = 3  # first selector -> count, next selector (0: no more) / ENTRY each
    CREATE_DOMAIN = 4
    """scheduling context, the six ``Limits`` (all zero: the kind's) / kind, name
    -> domain, its scheduling context"""
    START = 5  # domain, up to 7 numbers for {0}.. of the kind's argv -> process id on the host
    DESTROY = 6  # selector, 1 to remove a domain's private state directory too
    CREATE_CHANNEL = 7
    """domain a, domain b, socket type (SOCK_STREAM, SOCK_SEQPACKET) / name in a, name in b
    -> selector of the whole channel (CONTROL), selector in a, selector in b"""
    CREATE_MEMORY = 8  # scheduling context, bytes / name -> selector
    SEAL = 9  # memory -> / SHA-256
    CREATE_SEMAPHORE = 10  # value / name -> selector
    DELEGATE = 11  # selector, domain, rights / name -> selector in that domain's table
    REVOKE = 12  # selector -> number of capabilities that are gone
    TAKE = 13  # selector -> type, and one descriptor
    SET_LIMITS = 14  # scheduling context, the six Limits
    USAGE = 15
    """scheduling context -> memory now (bytes), cpu (microseconds), pids now; booked: memory,
    pids, domains, disk (bytes)"""
    LIMITS = 16  # scheduling context -> the six Limits
    CHARGE = 17  # scheduling context, disk bytes (signed) -> disk bytes booked now
    STATE = 18  # domain -> DomainState, starts so far, last wait status


class Event(IntEnum):
    """Frames that the core sends unasked."""

    RESTARTED = 200
    """the core was replaced: send what you wait for again; events may have been lost: LIST"""
    DIED = 201
    """a domain that you made is gone: selector that it had, wait status, selector of its
    scheduling context / its name"""
    ARRIVED = 202  # a capability is new in your table: selector, type / its name
    REVOKED = 203  # a capability is gone from it: selector that it had, type / its name
    RENEWED = 204
    """the far domain of a channel was started again: the old descriptor shows end-of-file,
    TAKE the new one: selector / its name"""
    OVERFLOW = 205  # you did not read and events were dropped: LIST
    STARTED = 206  # a domain that you made was started again: selector, starts so far / its name


class DomainState(IntEnum):
    """Life of a domain, as ``Op.STATE`` answers."""

    CREATED = 1
    RUNNING = 2
    WAITING = 3  # died, will be started again


_CODES = tuple(BY_CODE)
INTERNAL_STATUS = 99


def status_of(error: BaseException) -> int:
    """The answer status of an error: 1.. for a user error, ``INTERNAL_STATUS`` for a bug."""
    known = isinstance(error, UserError) and error.code in _CODES
    return 1 + _CODES.index(error.code) if known else INTERNAL_STATUS  # type: ignore[attr-defined]


def error_of(status: int, payload: bytes) -> SupercloudError:
    """The error that an answer of a non-zero status carries."""
    message = payload.decode("utf-8", "replace")
    if 1 <= status <= len(_CODES):
        return BY_CODE[_CODES[status - 1]](message)
    return Permanent(f"the core failed: {message}")


class Request(NamedTuple):
    """One request; ``args`` has eight numbers when it comes from :func:`unpack_request`."""

    op: int
    sequence: int
    args: tuple[int, ...]
    first: str = ""
    second: str = ""

    def pack(self) -> bytes:
        """The frame."""
        args = self.args + NO_VALUES[len(self.args) :]
        names = (self.first.encode(), self.second.encode())
        if any(len(name) > MAX_NAME_BYTES for name in names):
            raise Invalid(f"a name is longer than {MAX_NAME_BYTES} bytes")
        try:
            return _REQUEST.pack(VERSION, self.op, 0, self.sequence, *args, *names)
        except struct.error as error:
            raise Invalid(f"bad argument: {error}") from error


def unpack_request(untrusted: bytes) -> Request:
    """Check size, version, padding and names of a frame; :class:`Invalid` otherwise."""
    if len(untrusted) != REQUEST_BYTES:
        raise Invalid("a request of the wrong size")
    version, op, zero, sequence, *args, first, second = _REQUEST.unpack(untrusted)
    if version != VERSION or zero or not sequence:
        raise Invalid("a request of another version")
    return Request(op, sequence, tuple(args), unpack_name(first), unpack_name(second))


def unpack_name(untrusted: bytes) -> str:
    """A zero-padded name: empty, or as ``NAME``; :class:`Invalid` otherwise."""
    if untrusted == _NO_NAME:
        return ""
    text, _, padding = untrusted.partition(b"\0")
    name = text.decode("ascii", "replace")
    if padding.strip(b"\0") or not NAME.match(name):
        raise Invalid("a name with a character that is not allowed")
    return name


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


def pack_answer(
    op: int, status: int, sequence: int, values: tuple[int, ...] = (), payload: bytes = b""
) -> bytes:
    """The frame; fewer than eight values are filled up with zeros."""
    values += NO_VALUES[len(values) :]
    return _ANSWER.pack(VERSION, op, status, sequence, *values) + payload[:MAX_PAYLOAD_BYTES]


def unpack_answer(untrusted: bytes) -> Answer:
    """Check and take apart an answer; :class:`Permanent` when it is not one."""
    if not ANSWER_HEAD_BYTES <= len(untrusted) <= MAX_ANSWER_BYTES or untrusted[0] != VERSION:
        raise Permanent("the core answered in another version")
    _, op, status, sequence, *values = _ANSWER.unpack_from(untrusted)
    return Answer(op, status, sequence, tuple(values), untrusted[ANSWER_HEAD_BYTES:])
