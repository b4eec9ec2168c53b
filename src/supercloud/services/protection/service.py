"""The protection service: what the user's domain may ask about its devices, and what it is told.

Opening has two steps, because the epoch must be written down before anything is written in it:
``device.prepare`` reads and judges the backing file against the root that the user keeps, and names
the next epoch; the control plane keeps that; ``device.open`` begins it. From then on roots are told
(``device.root``) at most ``ROOT_EVERY_S`` after they changed: how far back a provider could go
unnoticed, after a crash. ``device.flush`` (before a snapshot) and ``device.close`` answer with theirs.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from supercloud.model.errors import BadState, Exists, Invalid, NotFound, SupercloudError
from supercloud.services.base import Tell
from supercloud.services.protection import engine
from supercloud.services.protection.engine import KEY_BYTES, Device, Root
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.reactor import Reactor

ROOT_EVERY_S: Final = 2.0
MAX_DEVICES: Final = 64
MAX_CACHE_BYTES: Final = 1 << 30
_BUFFER_BYTES: Final = 1 << 20

Phase = Literal["prepared", "open"]
# method -> the phases in which it is legal
_LEGAL: Final[Mapping[str, tuple[Phase, ...]]] = {
    "device.open": ("prepared",),
    "device.connect": ("open",),
    "device.flush": ("open",),
    "device.grow": ("open",),
    "device.state": ("prepared", "open"),
    "device.close": ("prepared", "open"),
}


@dataclass(slots=True)
class _Held:
    device: Device
    phase: Phase
    told: Root


class ProtectionService:
    """Devices by name. See ``handlers`` for the calls; all bytes are multiples of 4096."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._reactor, self._tell = reactor, tell
        self._held: dict[str, _Held] = {}
        reactor.every(ROOT_EVERY_S, self._tell_roots)

    def handlers(self) -> Mapping[str, Handler]:
        """Method -> what serves it."""
        return {
            "device.create": self.create,
            "device.prepare": self.prepare,
            "device.open": self.open,
            "device.connect": self.connect,
            "device.flush": self.flush,
            "device.grow": self.grow,
            "device.state": self.state,
            "device.list": self.list,
            "device.close": self.close_one,
        }

    # -- what may be asked

    def create(self, request: Request) -> dict[str, Any]:
        """``{device, size_bytes}`` and [backing file, key]: make it; the root to keep.

        The backing file has ``engine.backing_bytes(size_bytes)``. What was in it is lost.
        """
        name, size_bytes = request.name("device"), request.number("size_bytes", 4096)
        if name in self._held:
            raise Exists(f"device {name} is in use")
        backing, key = _descriptors(request)
        try:
            return asdict(engine.format_device(backing, key, name, size_bytes))
        finally:
            _wipe(key)

    def prepare(self, request: Request) -> dict[str, Any]:
        """``{device, epoch, sequence, chain, promised?, cache_bytes?, direct?}`` and [backing, key].

        The first three are the root that the user keeps, ``promised`` the last epoch that was kept
        for an opening. Answers the root that was found, and ``next_epoch`` to keep before ``open``.
        Denied with ``details.evidence`` when the backing file is not what it should be.
        """
        name, trusted = request.name("device"), _root(request)
        promised = (
            request.number("promised", 1, (1 << 32) - 2)
            if "promised" in request.untrusted
            else None
        )
        cache = request.untrusted.get("cache_bytes", engine.DEFAULT_CACHE_BYTES)
        if not isinstance(cache, int) or not 0 < cache <= MAX_CACHE_BYTES:
            raise Invalid(f"cache_bytes must be 1..{MAX_CACHE_BYTES}", where="cache_bytes")
        held = self._held.get(name)
        if held is not None and held.phase == "open":
            raise BadState(f"device {name} is open", hint="close it first")
        if held is None and len(self._held) >= MAX_DEVICES:
            raise BadState(f"a service has at most {MAX_DEVICES} devices")
        backing, key = _descriptors(request)
        if request.untrusted.get("direct", True) is True:
            _go_direct(backing)
        self._forget(name)
        try:
            device = Device(backing, key, name, trusted, promised, cache)
        finally:
            _wipe(key)
        self._held[name] = _Held(device, "prepared", device.found)
        self._reactor.watch(device, lambda: self._tell_evidence(name))
        return {**asdict(device.found), "next_epoch": device.next_epoch}

    def open(self, request: Request) -> dict[str, Any]:
        """``{device, epoch}``: serve it, in the epoch that was kept; the root to keep."""
        held = self._legal(request)
        epoch = request.number("epoch", held.device.next_epoch, (1 << 32) - 1)
        held.told = held.device.serve(epoch)
        held.phase = "open"
        figures = held.device.figures()
        return {
            **asdict(held.told), "size_bytes": figures["blocks"] * 4096,
            "read_only": bool(figures["damaged"]),
        }  # fmt: skip

    def connect(self, request: Request) -> Reply:
        """``{device}``: a connected NBD socket of its own."""
        held = self._legal(request)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        try:
            held.device.connect(ours.detach())
        except SupercloudError:
            theirs.close()
            raise
        return Reply({}, [theirs.detach()])

    def flush(self, request: Request) -> dict[str, Any]:
        """``{device}``: all that was written is durable; the root to keep."""
        held = self._legal(request)
        held.device.flush()
        held.told = held.device.root
        return asdict(held.told)

    def grow(self, request: Request) -> dict[str, Any]:
        """``{device, size_bytes}``: its backing file has grown; the root to keep."""
        held = self._legal(request)
        held.device.grow(request.number("size_bytes", 4096))
        held.told = held.device.root
        return asdict(held.told)

    def state(self, request: Request) -> dict[str, Any]:
        """``{device}``: phase, root, and figures since it was opened."""
        held = self._legal(request)
        return {
            "phase": held.phase, **asdict(held.device.root), **held.device.figures(),
            "root_every_s": ROOT_EVERY_S,
        }  # fmt: skip

    def list(self, _request: Request) -> dict[str, Any]:
        """Name -> phase."""
        return {name: held.phase for name, held in self._held.items()}

    def close_one(self, request: Request) -> dict[str, Any]:
        """``{device}``: connections end, all is durable, the key is forgotten; the root to keep."""
        held = self._legal(request)
        del self._held[request.name("device")]
        self._reactor.forget(held.device)
        root = held.device.close()
        return asdict(root or held.told)

    def close(self) -> None:
        """All devices are closed, as well as their backing files let them; their roots are told."""
        for name in list(self._held):
            held = self._held.pop(name)
            self._reactor.forget(held.device)
            with contextlib.suppress(SupercloudError):
                root = held.device.close()
                if root and held.phase == "open":
                    self._tell("device.root", {"device": name, **asdict(root)})

    # -- what is told

    def _tell_roots(self) -> None:
        for name, held in self._held.items():
            root = held.device.root
            if held.phase == "open" and root != held.told:
                held.told = root
                self._tell("device.root", {"device": name, **asdict(root)})

    def _tell_evidence(self, name: str) -> None:
        device = self._held[name].device
        device.drain()
        for found in device.evidence():
            self._tell("device.evidence", {"device": name, **asdict(found)})

    # --

    def _legal(self, request: Request) -> _Held:
        name = request.name("device")
        held = self._held.get(name)
        if held is None:
            raise NotFound(f"no device {name} here", hint="device.prepare comes first")
        if held.phase not in _LEGAL[request.method]:
            raise BadState(f"device {name} is {held.phase}: {request.method} is not legal")
        return held

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            self._reactor.forget(held.device)
            held.device.close(commit=False)


def make(reactor: Reactor, tell: Tell) -> ProtectionService:
    """For the launcher."""
    return ProtectionService(reactor, tell)


def _root(request: Request) -> Root:
    chain = request.text("chain", most=64)
    if len(chain) != 64 or set(chain) - set("0123456789abcdef"):
        raise Invalid("chain must be 64 hexadecimal digits", where="chain")
    return Root(request.number("epoch", 1, (1 << 32) - 2), request.number("sequence", 1), chain)


def _descriptors(request: Request) -> tuple[int, bytearray]:
    """The backing file, which stays the request's (the engine duplicates it), and the key."""
    if len(request.descriptors) != 2:
        raise Invalid("two descriptors are wanted: the backing file and the key")
    backing, key = request.descriptors
    if not stat.S_ISREG(os.fstat(backing).st_mode):
        raise Invalid("the backing file is not a regular file")
    if fcntl.fcntl(backing, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise Invalid("the backing file is not open for reading and writing")
    return backing, _read_key(key)


def _read_key(descriptor: int) -> bytearray:
    """Exactly one key, from a memory file or out of a pipe that holds it already."""
    key = bytearray(KEY_BYTES + 1)
    try:
        count = os.preadv(descriptor, [key], 0)
    except OSError:
        os.set_blocking(descriptor, False)
        try:
            count = os.readv(descriptor, [key])
        except OSError as error:
            raise Invalid("the key's descriptor holds no key") from error
    if count != KEY_BYTES:
        _wipe(key)
        raise Invalid(f"a device's key has {KEY_BYTES} bytes")
    del key[KEY_BYTES:]
    return key


def _wipe(key: bytearray) -> None:
    key[:] = bytes(len(key))


def _go_direct(backing: int) -> None:
    """Past the host's page cache where the file system can: ciphertext is of no use in it."""
    flags = fcntl.fcntl(backing, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(backing, fcntl.F_SETFL, flags | os.O_DIRECT)
