"""The protection service: what the user's domain may ask about its devices, and what it is told.

Opening has two steps, because an epoch must be written down before anything is written in it:
``device.prepare`` reads and judges the backing file against the seal that the user keeps, and names
the next epoch; the control plane keeps that; ``device.open`` begins it. From then on seals are told
(``device.seal``) at most ``SEAL_EVERY_S`` after they changed: how far back a provider could go
unnoticed, after a crash. ``device.flush`` (before a snapshot) and ``device.close`` answer theirs.
What the provider did not keep is told as ``device.evidence``; ``device.full`` and ``device.room``:
its disk is full, and nothing waits for room any more; ``device.dead``: a sync of it failed;
``device.discarded``: a crash cut off the last commit, which nobody had been told of.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from supercloud.model.errors import BadState, Exists, Invalid, NotFound, SupercloudError
from supercloud.services.base import Tell
from supercloud.services.protection import engine
from supercloud.services.protection.engine import KEY_BYTES, Device
from supercloud.wire.codec import decode
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.reactor import Reactor
from supercloud.wire.volumes import Seal

SEAL_EVERY_S: Final = 2.0
MAX_DEVICES: Final = 64
MAX_CACHE_BYTES: Final = 1 << 30
MAX_REACH_BYTES: Final = 1 << 44
_BUFFER_BYTES: Final = 1 << 20

TOLD: Final[Mapping[str, str]] = {
    "block": "evidence", "page": "evidence", "dead": "dead", "discarded": "discarded",
    "space": "full", "room": "room",
}  # fmt: skip
"""What came up in a device, and as what it is told."""

Phase = Literal["prepared", "open"]
# method -> the phases in which it is legal
_LEGAL: Final[Mapping[str, tuple[Phase, ...]]] = {
    "device.open": ("prepared", "open"),
    "device.connect": ("open",),
    "device.flush": ("open",),
    "device.grow": ("open",),
    "device.hold": ("open",),
    "device.state": ("prepared", "open"),
    "device.close": ("prepared", "open"),
}


@dataclass(slots=True)
class _Held:
    device: Device
    phase: Phase
    told: Seal
    epoch: int = 0


class ProtectionService:
    """Devices by name. See ``handlers`` for the calls; all bytes are multiples of 4096."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._reactor, self._tell = reactor, tell
        self._held: dict[str, _Held] = {}
        reactor.every(SEAL_EVERY_S, self._tell_seals)

    def handlers(self) -> Mapping[str, Handler]:
        """Method -> what serves it."""
        return {
            "device.create": self.create,
            "device.prepare": self.prepare,
            "device.open": self.open,
            "device.connect": self.connect,
            "device.flush": self.flush,
            "device.grow": self.grow,
            "device.hold": self.hold,
            "device.state": self.state,
            "device.list": self.list,
            "device.close": self.close_one,
        }

    # -- what may be asked

    def create(self, request: Request) -> dict[str, Any]:
        """``{device, size_bytes}`` and [backing file, key]: make it; the seal to keep.

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
        """``{device, epoch, sequence, root}`` and [backing, key]: read it, judge it by that seal.

        Answers the seal to keep before ``device.open``: its epoch is for that opening alone.
        Denied, with ``details.evidence``, when the backing file is not what it should be. Optional
        are ``cache_bytes`` and ``direct`` (past the host's page cache; true if not said).
        """
        name = request.name("device")
        seal = decode(Seal, _only(request, "epoch", "sequence", "root"), "seal")
        cache = engine.DEFAULT_CACHE_BYTES
        if "cache_bytes" in request.untrusted:
            cache = request.number("cache_bytes", 1, MAX_CACHE_BYTES)
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
            device = Device(backing, key, name, seal, cache)
        finally:
            _wipe(key)
        self._held[name] = _Held(device, "prepared", device.found)
        self._reactor.watch(device, lambda: self._tell_evidence(name))
        return asdict(replace(device.found, epoch=device.next_epoch))

    def open(self, request: Request) -> dict[str, Any]:
        """``{device, epoch}``: serve it, in the epoch that was kept; the seal to keep.

        It may be repeated: one that is open in that epoch stays so.
        """
        held = self._legal(request)
        epoch = request.number("epoch", held.device.next_epoch, engine.LAST_EPOCH)
        if held.phase == "open" and epoch != held.epoch:
            raise BadState(f"the device is open in epoch {held.epoch}")
        if held.phase == "prepared":
            held.told = held.device.serve(epoch)
            held.phase, held.epoch = "open", epoch
        figures = held.device.figures()
        return {
            **asdict(held.told), "size_bytes": figures["blocks"] * 4096,
            "read_only": bool(figures["damaged"]),
        }  # fmt: skip

    def connect(self, request: Request) -> Reply:
        """``{device, reach_bytes?}``: a connected NBD socket of its own.

        It announces ``reach_bytes``, if those are more than there are: see ``engine.connect``.
        """
        held, reach = self._legal(request), 0
        if "reach_bytes" in request.untrusted:
            reach = request.number("reach_bytes", 0, MAX_REACH_BYTES)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        try:
            held.device.connect(ours.detach(), reach)
        except SupercloudError:
            theirs.close()
            raise
        return Reply({}, [theirs.detach()])

    def flush(self, request: Request) -> dict[str, Any]:
        """``{device}``: all that was written is durable; the seal to keep."""
        held = self._legal(request)
        held.device.flush()
        held.told = held.device.seal
        return asdict(held.told)

    def grow(self, request: Request) -> dict[str, Any]:
        """``{device, size_bytes}``: its backing file has grown; the seal to keep."""
        held = self._legal(request)
        held.device.grow(request.number("size_bytes", 4096))
        held.told = held.device.seal
        return asdict(held.told)

    def hold(self, request: Request) -> dict[str, Any]:
        """``{device, hold}``: whether requests wait for room on a full disk, or are refused.

        They are refused at first. Not held any more, those that wait are refused, too.
        """
        held, hold = self._legal(request), request.untrusted.get("hold")
        if not isinstance(hold, bool):
            raise Invalid("hold must be true or false", where="hold")
        held.device.hold(hold)
        return {}

    def state(self, request: Request) -> dict[str, Any]:
        """``{device}``: phase, seal, and figures since it was opened."""
        held = self._legal(request)
        return {
            "phase": held.phase, **asdict(held.device.seal), **held.device.figures(),
            "seal_every_s": SEAL_EVERY_S,
        }  # fmt: skip

    def list(self, _request: Request) -> dict[str, Any]:
        """Name -> phase."""
        return {name: held.phase for name, held in self._held.items()}

    def close_one(self, request: Request) -> dict[str, Any]:
        """``{device}``: connections end, all is durable, the key is forgotten; the seal to keep."""
        held = self._legal(request)
        del self._held[request.name("device")]
        self._reactor.forget(held.device)
        return asdict(held.device.close() or held.told)

    def close(self) -> None:
        """All devices are closed, as well as their backing files let them; their seals are told."""
        for name in list(self._held):
            held = self._held.pop(name)
            self._reactor.forget(held.device)
            with contextlib.suppress(SupercloudError):
                seal = held.device.close()
                if seal and held.phase == "open":
                    self._tell("device.seal", {"device": name, **asdict(seal)})

    # -- what is told

    def _tell_seals(self) -> None:
        for name, held in self._held.items():
            seal = held.device.seal
            if held.phase == "open" and seal != held.told:
                held.told = seal
                self._tell("device.seal", {"device": name, **asdict(seal)})

    def _tell_evidence(self, name: str) -> None:
        device = self._held[name].device
        device.drain()
        for found in device.evidence():
            self._tell(f"device.{TOLD[found.kind]}", {"device": name, **asdict(found)})

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


def _only(request: Request, *names: str) -> dict[str, Any]:
    return {name: request.untrusted[name] for name in names if name in request.untrusted}


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
