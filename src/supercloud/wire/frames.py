"""The core's protocol: fixed frames over one SEQPACKET socketpair per domain.

Every request is one ``REQUEST``: version, op, zero, sequence number, eight signed 64-bit arguments
and two 64-byte names (zero-padded). Every answer is one ``ANSWER`` (version, op, status, sequence,
eight values) and at most ``MAX_PAYLOAD_BYTES``; what they hold is said at each :class:`Op`. An
event is an answer with sequence 0 whose op is an :class:`Event`. Integers are little-endian.

A sequence number is the client's: it counts up from 1. After :attr:`Event.RESTARTED` the client
sends the request that it is waiting for once more, *unchanged*: the core tells by the sequence
number whether it had done it already. The other half of this is ``lower.client``.
"""

import re
import struct
from enum import IntEnum

from supercloud.model.refusals import ALL, Invalid, UserError

VERSION = 1
CORE_DESCRIPTOR = 3  # where every domain that speaks to the core finds its socket
REQUEST = struct.Struct("<BBHI8q64s64s")
ANSWER = struct.Struct("<BBHI8q")
ENTRY = struct.Struct("<IIBBbB64s")  # selector, object id, type, rights, end, zero, name
MAX_PAYLOAD_BYTES = 4096
ENTRIES_PER_PAGE = MAX_PAYLOAD_BYTES // ENTRY.size
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/+-]{0,62}\Z")
DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,54}\Z")
NO_VALUES, _NO_NAME = (0,) * 8, bytes(64)
CODES = tuple(error.code for error in ALL)  # status n is the n-th of these errors; 0 is none
BUG_STATUS = 99


class Op(IntEnum):
    """Requests: ``arguments / names -> values / payload``. Unused arguments must be zero."""

    PING = 1  # -> nothing
    LOOKUP = 2  # / name -> 1 / ENTRY
    LIST = 3  # first selector -> count, next selector (0: no more) / ENTRY each
    CREATE_DOMAIN = 4  # scheduling context, the six Limits (all zero: the kind's) / kind, name
    #                    -> domain, its scheduling context
    START = 5  # domain, up to 7 numbers for {0}.. of the kind's argv: it has been executed
    DESTROY = 6  # selector, 1 to remove a domain's private state directory too
    CREATE_CHANNEL = 7  # domain a, domain b, SOCK_STREAM or SOCK_SEQPACKET / name in a, name in b
    #                     -> selector of the whole (CONTROL), selector in a, selector in b
    CREATE_MEMORY = 8  # scheduling context, bytes / name -> selector
    SEAL = 9  # memory -> / SHA-256
    CREATE_SEMAPHORE = 10  # value / name -> selector
    DELEGATE = 11  # selector, domain, rights / name -> selector in that domain's table
    REVOKE = 12  # selector -> number of capabilities that are gone
    TAKE = 13  # selector -> type, and one descriptor
    SET_LIMITS = 14  # scheduling context, the six Limits
    USAGE = 15  # scheduling context -> memory now (bytes), cpu (microseconds), pids now;
    #             booked: memory, pids, domains, disk (bytes)
    LIMITS = 16  # scheduling context -> the six Limits
    CHARGE = 17  # scheduling context, disk bytes (signed) -> disk bytes booked now
    STATE = 18  # domain -> DomainState, starts so far, last wait status


class Event(IntEnum):
    """Frames that the core sends unasked: ``values / name``."""

    RESTARTED = 200  # the core was replaced: send again what you wait for; events may be lost: LIST
    DIED = 201  # a domain that you made is gone: wait status
    ARRIVED = 202  # a capability is new in your table: selector, type
    REVOKED = 203  # a capability is gone from your table: selector that it had, type
    RENEWED = 204  # a channel's far domain was started again: TAKE the new end: selector
    OVERFLOW = 205  # you did not read and events were dropped: LIST


class DomainState(IntEnum):
    """Life of a domain, as ``Op.STATE`` answers."""

    CREATED = 1
    RUNNING = 2
    WAITING = 3  # died, will be started again


def unpack_request(untrusted: bytes) -> tuple[int, int, tuple[int, ...], str, str]:
    """(op, sequence, eight arguments, two names) of a frame; :class:`Invalid` if it is none."""
    if len(untrusted) != REQUEST.size:
        raise Invalid("a request of the wrong size")
    version, op, zero, sequence, *args, first, second = REQUEST.unpack(untrusted)
    if version != VERSION or zero or not sequence:
        raise Invalid("a request of another version")
    return op, sequence, tuple(args), unpack_name(first), unpack_name(second)


def unpack_name(untrusted: bytes) -> str:
    """A zero-padded name: empty, or as ``NAME``; :class:`Invalid` otherwise."""
    if untrusted == _NO_NAME:
        return ""
    text, _, padding = untrusted.partition(b"\0")
    name = text.decode("ascii", "replace")
    if padding.strip(b"\0") or not NAME.match(name):
        raise Invalid("a name with a character that is not allowed")
    return name


def pack_answer(
    op: int, status: int, sequence: int, values: tuple[int, ...] = (), payload: bytes = b""
) -> bytes:
    """The frame; fewer than eight values are filled up with zeros."""
    values += NO_VALUES[len(values) :]
    return ANSWER.pack(VERSION, op, status, sequence, *values) + payload[:MAX_PAYLOAD_BYTES]


def status_of(error: UserError) -> int:
    """The answer status of an error."""
    return 1 + CODES.index(error.code) if error.code in CODES else BUG_STATUS
