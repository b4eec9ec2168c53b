"""The compiled engine, bound by ctypes: one ``Device`` over one backing file.

Calls may block for as long as the backing file does; the interpreter goes on meanwhile. The answers
beyond errno are those of ``native/engine.h``.
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from supercloud.model.errors import (
    BadState,
    Busy,
    Denied,
    Invalid,
    NoResources,
    Permanent,
    SupercloudError,
    Temporary,
)
from supercloud.wire.volumes import Seal

LIBRARY: Final = Path(__file__).with_name("libprotection.so")
KEY_BYTES: Final = 32
ID_BYTES: Final = 16
CHAIN_BYTES: Final = 32
_KEPT_BYTES: Final = 28
LAST_EPOCH: Final = (1 << 32) - 1
DEFAULT_CACHE_BYTES: Final = 64 << 20


class _Root(Structure):
    _fields_: ClassVar = [
        ("sequence", c_uint64), ("epoch", c_uint32), ("promised", c_uint32),
        ("chain", c_uint8 * CHAIN_BYTES),
    ]  # fmt: skip


class _Backing(Structure):
    READ: ClassVar = ctypes.CFUNCTYPE(c_int, pointer, pointer, c_size_t, c_uint64)
    WRITE: ClassVar = ctypes.CFUNCTYPE(c_int, pointer, pointer, c_size_t, c_uint64)
    SYNC: ClassVar = ctypes.CFUNCTYPE(c_int, pointer)
    SIZE: ClassVar = ctypes.CFUNCTYPE(c_uint64, pointer)
    _fields_: ClassVar = [
        ("read", READ), ("write", WRITE), ("sync", SYNC), ("size", SIZE), ("context", pointer),
    ]  # fmt: skip


class _Evidence(Structure):
    _fields_: ClassVar = [
        ("kind", c_uint32), ("level", c_uint32), ("index", c_uint64),
        ("slot", c_uint32), ("epoch", c_uint32), ("counter", c_uint64), ("sequence", c_uint64),
    ]  # fmt: skip


_FIGURES: Final = (
    "blocks", "slots", "free_slots", "cached_pages", "dirty_pages", "uncommitted",
    "reads", "read_bytes", "read_ns", "writes", "write_bytes", "write_ns", "flushes",
    "zeroed_bytes", "commits", "checkpoints", "evidence", "connections", "failed_requests",
)  # fmt: skip


_FLAGS: Final = ("dead", "damaged", "full")


class _State(Structure):
    _fields_: ClassVar = [
        ("root", _Root), *((name, c_uint64) for name in _FIGURES),
        *((name, c_uint32) for name in _FLAGS),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that the provider's side did not give back as it was, or could not take.

    ``kind``: ``block``, ``page`` (of the tree): what was read was not what had been written.
    ``dead``: a sync failed. ``discarded``: a last commit that was cut off by a crash. ``space``,
    ``room``: its disk is full; nothing waits for room any more. ``index`` is of a block, page or
    count.
    """

    kind: str
    level: int
    index: int
    slot: int
    epoch: int
    counter: int
    sequence: int


EVIDENCE: Final = ("", "block", "page", "dead", "space", "discarded", "room")

_CONTRADICTED: Final = (1001, 1002, 1005)  # answers to a device that is not the one that is meant

# the answers of engine.h, and errno where a caller can do something about it
_ERRORS: Final[dict[int, Callable[[], SupercloudError]]] = {
    1001: lambda: Denied(
        "the backing file is older than the root that you keep: it was rolled back",
        hint="ask the provider for the newest copy, or restore from a checkpoint or a replica",
        details={"evidence": "rolled_back"},
    ),
    1002: lambda: Denied(
        "the backing file has another history than the root that you keep",
        hint="it is not the device that was last closed; restore from a checkpoint or a replica",
        details={"evidence": "forked"},
    ),
    1003: lambda: Denied(
        "the backing file holds no device that this key opens",
        hint="the key or the device's name is another's, or both superblocks were destroyed",
        details={"evidence": "not_a_device"},
    ),
    1004: lambda: NoResources(
        "the backing file is shorter than the device needs",
        hint="see backing_bytes(); a file that was long enough before was truncated",
        details={"evidence": "truncated"},
    ),
    1005: lambda: Denied(
        "this epoch was used before, or the backing file is of one that nobody promised",
        details={"evidence": "epoch"},
    ),
    1006: lambda: BadState("the device is being closed"),
    errno.EINVAL: lambda: Invalid("out of the device's range, or not a multiple of 4096"),
    errno.EBUSY: lambda: Busy("the device has as many connections as it may have"),
    errno.ENOSPC: lambda: NoResources("the provider's disk is full"),
    errno.EDQUOT: lambda: NoResources("the provider's quota is used up"),
    errno.EROFS: lambda: BadState("the device's tree is damaged: it can be read only"),
    errno.ENOMEM: lambda: Temporary("no memory"),
}


def check(answer: int) -> None:
    """Raise what the engine answered, unless it is 0."""
    if answer:
        made = _ERRORS.get(answer)
        name = errno.errorcode.get(answer, str(answer))
        raise made() if made else Permanent(f"the backing file failed: {name}")


@functools.cache
def library() -> ctypes.CDLL:
    """The engine; Permanent when it was not compiled."""
    try:
        engine = ctypes.CDLL(str(LIBRARY), use_errno=False)
    except OSError as error:
        raise Permanent(f"the protection engine is missing (scripts/engine.py): {error}") from error
    root, backing, data = POINTER(_Root), POINTER(_Backing), pointer
    signatures: dict[str, list[Any]] = {
        "format": [c_int, backing, data, c_char_p, c_uint64, c_uint32, root],
        "prepare": [
            c_int, backing, data, c_char_p, root, c_uint64, POINTER(pointer), root,
        ],
        "serve": [pointer, c_uint32, root],
        "connect": [pointer, c_int, c_uint64],
        "read": [pointer, c_uint64, data, c_uint64],
        "write": [pointer, c_uint64, data, c_uint64],
        "zero": [pointer, c_uint64, c_uint64],
        "flush": [pointer, c_int],
        "hold": [pointer, c_int],
        "grow": [pointer, c_uint64],
        "state": [pointer, POINTER(_State)],
        "evidence": [pointer, POINTER(_Evidence)],
        "event_fd": [pointer],
        "close": [pointer, c_int, root],
        "backing_bytes": [c_uint64],
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(engine, f"sc_{name}")
        function.argtypes, function.restype = arguments, c_int
    engine.sc_backing_bytes.restype = c_uint64
    return engine


def backing_bytes(device_bytes: int) -> int:
    """How large the backing file of a device of that size must be; Invalid."""
    found = int(library().sc_backing_bytes(device_bytes)) if device_bytes >= 0 else 0
    if not found:
        raise Invalid("a device has a multiple of 4096 bytes, at least 4096 and at most 8 TiB")
    return found


class Backing(Protocol):
    """A backing file of a test's own. Each method may raise OSError."""

    def read(self, length: int, offset: int) -> bytes:
        """Exactly so many bytes."""

    def write(self, data: bytes, offset: int) -> None:
        """Write, which may be cached."""

    def sync(self) -> None:
        """What was written before is durable."""

    def size(self) -> int:
        """Bytes."""


def _copy(target: int, data: bytes, length: int) -> None:
    if len(data) != length:
        raise OSError(errno.EIO, "short")
    ctypes.memmove(target, data, length)


def _bound(backing: Backing) -> _Backing:
    def errno_of(action: Callable[[], None]) -> int:
        try:
            action()
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def read(_: Any, data: int, length: int, offset: int) -> int:
        return errno_of(lambda: _copy(data, backing.read(length, offset), length))

    def write(_: Any, data: int, length: int, offset: int) -> int:
        return errno_of(lambda: backing.write(ctypes.string_at(data, length), offset))

    return _Backing(
        _Backing.READ(read),
        _Backing.WRITE(write),
        _Backing.SYNC(lambda _: errno_of(backing.sync)),
        _Backing.SIZE(lambda _: backing.size()),
        None,
    )


def device_id(device: str) -> bytes:
    """What is bound into all that belongs to the device of that name."""
    return hashlib.sha256(b"supercloud device " + device.encode()).digest()[:ID_BYTES]


def _seal(found: _Root) -> Seal:
    """``root``: most of the chain's hash, and the epoch that it was made in (8 digits)."""
    kept = bytes(found.chain)[:_KEPT_BYTES].hex()
    return Seal(epoch=found.epoch, sequence=found.sequence, root=f"{kept}{found.epoch:08x}")


def _kept(seal: Seal) -> _Root:
    """What a seal says: it may promise an epoch that nothing was written in yet."""
    if len(seal.root) != 2 * CHAIN_BYTES or not 0 < seal.epoch < LAST_EPOCH:
        raise Invalid("a seal without a root or with an epoch out of bounds", where="root")
    kept = _Root(seal.sequence, int(seal.root[2 * _KEPT_BYTES :], 16), seal.epoch)
    kept.chain[:_KEPT_BYTES] = bytes.fromhex(seal.root[: 2 * _KEPT_BYTES])
    return kept


def _target(backing: int | Backing) -> tuple[int, Any]:
    return (backing, None) if isinstance(backing, int) else (-1, _bound(backing))


def format_device(
    backing: int | Backing, key: bytes | bytearray, device: str, device_bytes: int, epoch: int = 1
) -> Seal:
    """Make an empty device on a descriptor (it stays the caller's); the seal to keep."""
    descriptor, bound = _target(backing)
    root = _Root()
    identity = device_id(device)
    with _key(key) as held:
        check(
            library().sc_format(descriptor, bound, held, identity, device_bytes, epoch, byref(root))
        )
    return _seal(root)


@contextlib.contextmanager
def _key(key: bytes | bytearray) -> Iterator[Any]:
    """The key where the engine can read it, and afterwards nowhere."""
    if len(key) != KEY_BYTES:
        raise Invalid(f"a device's key has {KEY_BYTES} bytes")
    held = (c_uint8 * KEY_BYTES).from_buffer_copy(key)
    try:
        yield held
    finally:
        ctypes.memset(held, 0, KEY_BYTES)


class Device:
    """A device that was found to be no older than ``seal``; nothing is written before ``serve``.

    Denied when it is older or another one; ``details["found"]`` is what its own seal would be then.
    ``seal`` is the last that its user kept. Its epoch may be one that was kept for an opening that
    came to nothing: ``next_epoch`` is always a new one.
    """

    def __init__(
        self,
        backing: int | Backing,
        key: bytes | bytearray,
        device: str,
        seal: Seal,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        descriptor, self._bound = _target(backing)
        self._engine, self._handle = library(), pointer()
        keep, found = _kept(seal), _Root()
        with _key(key) as held:
            answer = self._engine.sc_prepare(
                descriptor, self._bound, held, device_id(device), byref(keep),
                cache_bytes // 4096, byref(self._handle), byref(found),
            )  # fmt: skip
        try:
            check(answer)
        except Denied as error:
            if answer in _CONTRADICTED:
                error.details["found"] = asdict(_seal(found))
            raise
        self.found = _seal(found)
        self.next_epoch = max(self.found.epoch, seal.epoch) + 1

    def serve(self, epoch: int) -> Seal:
        """Take writes, in an epoch that was written down for this opening alone; the seal."""
        root = _Root()
        check(self._engine.sc_serve(self._handle, epoch, byref(root)))
        return _seal(root)

    def connect(self, descriptor: int, reach_bytes: int = 0) -> None:
        """Serve NBD on a connected stream socket, which is the engine's from then on.

        NBD tells a size only once. Told ``reach_bytes``, which may be more than there is, the
        client can follow when the device grows; what is behind the device's end is refused.
        """
        check(self._engine.sc_connect(self._handle, descriptor, reach_bytes))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the device; Permanent (EIO) where the provider did not keep them."""
        data = ctypes.create_string_buffer(max(1, length))
        check(self._engine.sc_read(self._handle, offset, data, length))
        return data.raw[:length]

    def write(self, offset: int, data: bytes) -> None:
        """Visible at once, durable after ``flush``."""
        check(self._engine.sc_write(self._handle, offset, data, len(data)))

    def zero(self, offset: int, length: int) -> None:
        """Make it zeros, which are not stored."""
        check(self._engine.sc_zero(self._handle, offset, length))

    def flush(self, *, checkpoint: bool = False) -> None:
        """Make durable what was written; with ``checkpoint`` the tree is written too."""
        check(self._engine.sc_flush(self._handle, checkpoint))

    def hold(self, hold: bool) -> None:
        """Whether clients' requests that find no room on the provider's disk wait until there is.

        If not, which is so at first, they are refused, and so are those that wait.
        """
        check(self._engine.sc_hold(self._handle, hold))

    def grow(self, device_bytes: int) -> None:
        """Use a backing file that has grown; connections see it as far as they reach."""
        check(self._engine.sc_grow(self._handle, device_bytes))

    @property
    def seal(self) -> Seal:
        """The newest durable state."""
        return _seal(self._state().root)

    def figures(self) -> dict[str, int]:
        """Counters since the opening (bytes, ns); sizes in blocks of 4096."""
        state = self._state()
        return {name: int(getattr(state, name)) for name in (*_FIGURES, *_FLAGS)}

    def _state(self) -> _State:
        state = _State()
        if not self._handle:
            raise BadState("the device is closed")
        self._engine.sc_state(self._handle, byref(state))
        return state

    def evidence(self) -> list[Evidence]:
        """What came up since the last call."""
        found, one = [], _Evidence()
        while self._engine.sc_evidence(self._handle, byref(one)):
            values = (one.level, one.index, one.slot, one.epoch, one.counter, one.sequence)
            found.append(Evidence(EVIDENCE[one.kind], *values))
        return found

    def fileno(self) -> int:
        """An eventfd that is readable when there is evidence; reading it is the caller's."""
        return int(self._engine.sc_event_fd(self._handle))

    def drain(self) -> None:
        """Make ``fileno`` unreadable again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fileno(), 8)

    def close(self, *, commit: bool = True) -> Seal | None:
        """End all connections and make everything durable; the last seal. None if closed before."""
        if not self._handle:
            return None
        root, handle = _Root(), self._handle
        self._handle = pointer()
        check(self._engine.sc_close(handle, commit, byref(root)))
        return _seal(root)
