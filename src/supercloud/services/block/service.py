"""The calls of the block service: which there are, when each is legal, what each answers.

``volume.create`` and ``volume.open`` come with one descriptor, a connected NBD socket: the device.
Told unasked: ``volume.lost`` (its daemon has ended; open it again with a new descriptor),
``volume.copied`` (a backup or clone has ended), ``volume.damaged`` (qcow2 found its own tables
inconsistent and takes no more writes).
"""

import os
import socket
import stat
from collections.abc import Mapping
from typing import Any, Final

from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    Invalid,
    NotFound,
    SupercloudError,
    Unsupported,
)
from supercloud.services.base import Service, Tell
from supercloud.services.block import copies, names
from supercloud.services.block.copies import Copy
from supercloud.services.block.daemon import Daemon, Programs
from supercloud.services.block.volume import Attachment, Volume
from supercloud.wire.children import Children
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.reactor import Reactor
from supercloud.wire.volumes import LIMITS, SIZE_UNIT_BYTES

MAX_VOLUMES: Final = 64
FORMATS: Final = ("qcow2", "raw")
MODES: Final = ("vhost-user-blk", "nbd")
MIN_SIZE_BYTES: Final = 1 << 20
MAX_SIZE_BYTES: Final = 1 << 44

# method -> what must not be: a machine has it ("attached"), it is being copied ("copied")
LEGAL: Final[Mapping[str, tuple[str, ...]]] = {
    "volume.close": ("attached", "copied"),
    "volume.delete": ("attached", "copied"),
    "volume.grow": ("copied",),
    "volume.snapshot": ("copied",),
    "volume.snapshots": (),
    "volume.revert": ("attached", "copied"),
    "volume.snapshot-delete": ("copied",),
    "volume.attach": (),
    "volume.detach": (),
    "volume.throttle": (),
    "volume.stats": (),
    "volume.backup": ("copied",),
    "volume.clone": ("copied",),
}


class BlockService:
    """All open volumes of a U-Cloud on this host."""

    def __init__(self, reactor: Reactor, tell: Tell, programs: Programs | None = None) -> None:
        self._reactor, self._tell = reactor, tell
        self._programs = programs or Programs()
        self._children = Children(reactor)
        self._volumes: dict[str, Volume] = {}
        self._copies: dict[str, Copy] = {}  # by the source

    def handlers(self) -> Mapping[str, Handler]:
        """See ``services.base``."""
        return {
            "volume.create": self.create,
            "volume.open": self.open,
            "volume.close": self.close_volume,
            "volume.delete": self.close_volume,
            "volume.list": self.list,
            "volume.grow": self.grow,
            "volume.snapshot": self.snapshot,
            "volume.snapshots": self.snapshots,
            "volume.revert": self.revert,
            "volume.snapshot-delete": self.delete_snapshot,
            "volume.clone": self.clone,
            "volume.attach": self.attach,
            "volume.detach": self.detach,
            "volume.throttle": self.throttle,
            "volume.backup": self.backup,
            "volume.stats": self.stats,
        }

    def close(self) -> None:
        """End all daemons in order: what was acknowledged is on the devices."""
        for volume in [*self._volumes.values()]:
            volume.close()
        self._volumes.clear()
        self._children.close()

    # -- opening and closing

    def create(self, request: Request) -> dict[str, Any]:
        """``{volume, format, size_bytes, export?, device_bytes?}`` + device: make and open it.

        Asked again it opens what it made. Exists when the device holds another volume. The device
        has ``device_bytes``, if what it announces is more: then it can grow while it is open.
        """
        size_bytes = _size(request)
        volume = self._start(request)
        made = self._opened(volume, lambda: volume.create(size_bytes))
        return {"created": made, **volume.status()}

    def open(self, request: Request) -> dict[str, Any]:
        """``{volume, format, export?, device_bytes?}`` + device: check the image and open it."""
        volume = self._start(request)
        self._opened(volume, volume.open)
        return volume.status()

    def _start(self, request: Request) -> Volume:
        name, image_format = request.name("volume"), _one_of(request, "format", FORMATS)
        export = request.text("export", most=255) if "export" in request.untrusted else ""
        if name in self._volumes:
            raise Exists(f"volume {name} is open already")
        if len(self._volumes) >= MAX_VOLUMES:
            raise Busy(f"{MAX_VOLUMES} volumes are open", hint="close one")
        device = _device(request)
        daemon = Daemon(
            self._reactor,
            self._children,
            self._programs,
            lambda number: names.wire(number, export),
            device,
            lambda why: self._lost(name, why),
        )
        daemon.on_event = lambda event, data: self._on_event(name, event, data)
        try:
            return Volume(name, image_format, daemon, self._programs, _device_bytes(request))
        except SupercloudError:
            daemon.quit()
            raise

    def _opened(self, volume: Volume, how: Any) -> Any:
        try:
            result = how()
        except SupercloudError:
            volume.close()
            raise
        self._volumes[volume.name] = volume
        return result

    def close_volume(self, request: Request) -> dict[str, Any]:
        """``{volume}``: what was acknowledged is on the device, which may be closed then.

        So may it be destroyed, for ``volume.delete``: the device's key goes, and all with it.
        """
        volume = self._legal(request)
        del self._volumes[volume.name]
        volume.close()
        return {}

    def list(self, _request: Request) -> dict[str, Any]:
        """``{volumes: {name: status}}``."""
        return {"volumes": {name: volume.status() for name, volume in self._volumes.items()}}

    # -- what it holds

    def grow(self, request: Request) -> dict[str, Any]:
        """``{volume, size_bytes, device_bytes?}``; by vhost-user a machine sees it at once.

        ``device_bytes`` is what the device has grown to before. Done already is done.
        """
        volume = self._legal(request)
        volume.grow(_size(request), _device_bytes(request))
        return volume.status()

    def snapshot(self, request: Request) -> dict[str, Any]:
        """``{volume, snapshot}``: keep what it holds now."""
        volume, snapshot = self._legal(request), request.name("snapshot")
        volume.snapshot(snapshot)
        return {"snapshots": volume.snapshots()}

    def snapshots(self, request: Request) -> dict[str, Any]:
        """``{snapshots: [{snapshot, taken_s}]}``."""
        return {"snapshots": self._legal(request).snapshots()}

    def delete_snapshot(self, request: Request) -> dict[str, Any]:
        """``{volume, snapshot}``."""
        volume, snapshot = self._legal(request), request.name("snapshot")
        volume.delete_snapshot(snapshot)
        return {"snapshots": volume.snapshots()}

    def revert(self, request: Request) -> dict[str, Any]:
        """``{volume, snapshot, size_bytes?}``: as it was then, but not smaller than that.

        ``lost_bitmaps`` begin with a full backup.
        """
        volume, snapshot = self._legal(request), request.name("snapshot")
        size_bytes = _size(request) if "size_bytes" in request.untrusted else 0
        return {"lost_bitmaps": volume.revert(snapshot, size_bytes), **volume.status()}

    # -- copies

    def backup(self, request: Request) -> dict[str, Any]:
        """``{volume, to, bitmap}``: ``{full, reason, bytes}`` at its start; ``volume.copied``."""
        volume, bitmap = self._legal(request), request.name("bitmap")
        copy = self._copy(request, volume, f"backup to {request.name('to')}")
        begun: dict[str, Any] = self._started(copy, lambda: copies.backup(copy, bitmap))
        return begun

    def clone(self, request: Request) -> dict[str, Any]:
        """``{volume, to, snapshot?}``: its content, or a snapshot's, into an open volume.

        With a snapshot comes another connection to the volume's device, of which only that is read.
        """
        volume = self._legal(request)
        if "snapshot" not in request.untrusted:
            copy = self._copy(request, volume, f"clone to {request.name('to')}")
            return self._started(copy, lambda: copies.clone(copy)) or {}
        snapshot, device = request.name("snapshot"), _device(request)
        export = request.text("export", most=255) if "export" in request.untrusted else ""
        volume.need_snapshot(snapshot)
        copy = self._copy(request, volume, f"clone of {snapshot} to {request.name('to')}")
        options = names.image_on(device, export)
        programs, children = self._programs, self._children

        def start() -> None:
            copies.clone_snapshot(copy, snapshot, options, device, programs, children)

        return self._started(copy, start) or {}

    def _copy(self, request: Request, volume: Volume, words: str) -> Copy:
        target = self._named(request, "to")
        if target is volume:
            raise Invalid("a volume is not copied to itself", where="to")
        _refuse(target, ("attached", "copied"))

        def done(error: str) -> None:
            self._copies.pop(volume.name, None)
            self._tell("volume.copied", {"volume": volume.name, "to": target.name, "error": error})

        return Copy(volume, target, words, done)

    def _started(self, copy: Copy, start: Any) -> Any:
        self._copies[copy.source.name] = copy
        try:
            return start()
        except SupercloudError:
            del self._copies[copy.source.name]
            copy.abandon()
            raise

    # -- use

    def attach(self, request: Request) -> Reply:
        """``{volume, machine, mode, ram_shared, read_only?}``: a socket for the machine's QEMU.

        Asked again for the same machine, the export is made anew: the old socket is of no use then.
        """
        volume, machine = self._legal(request), request.name("machine")
        mode, read_only = _one_of(request, "mode", MODES), _flag(request, "read_only", given=False)
        if mode == "vhost-user-blk" and not _flag(request, "ram_shared"):
            raise Unsupported(
                f"machine {machine} has private RAM, which vhost-user-blk cannot reach: it would "
                "read and write copies that the machine does not see",
                hint="attach it by mode nbd",
            )
        have = volume.attachment
        if have is not None and have.machine != machine:
            raise BadState(f"volume {volume.name} is attached to {have.machine}")
        if have is None and volume.receiving:
            raise Busy(f"volume {volume.name}: {volume.copying} is under way")
        sock: socket.socket = volume.attach(Attachment(machine, mode, read_only))
        return Reply({"export": volume.name, **volume.status()}, [sock.detach()])

    def detach(self, request: Request) -> dict[str, Any]:
        """``{volume}``: exported no more; done already is done."""
        volume = self._legal(request)
        volume.detach()
        return volume.status()

    def throttle(self, request: Request) -> dict[str, Any]:
        """``{volume, iops, bytes_per_s}`` from now on, for reads and writes together; 0: none."""
        volume = self._legal(request)
        limits = {name: _limit(request, name, *between) for name, between in LIMITS.items()}
        volume.throttle(limits)
        return volume.status()

    def stats(self, request: Request) -> dict[str, Any]:
        """``{volume}``: sizes, limits, who has it, how far a copy is.

        The storage daemon's exports count nothing (``query-blockstats`` is empty): operations and
        latency are counted by the device's service, where each request of a volume ends.
        """
        volume = self._legal(request)
        job = volume.daemon.job(names.COPY) if volume.name in self._copies else {}
        progress = {key: job.get(f"{key}-progress", 0) for key in ("current", "total")}
        return {"copied_bytes": progress["current"], "copy_bytes": progress["total"]} | (
            volume.status()
        )

    # -- what happens by itself

    def _on_event(self, name: str, event: str, data: dict[str, Any]) -> None:
        if event == "JOB_STATUS_CHANGE" and data.get("id") == names.COPY:
            copy = self._copies.get(name)
            if copy is not None and data.get("status") == "concluded":
                self._reactor.after(0, lambda: copies.concluded(copy))  # not amid another question
        elif event == "BLOCK_IMAGE_CORRUPTED":
            self._tell("volume.damaged", {"volume": name, "reason": str(data.get("msg"))})

    def _lost(self, name: str, why: str) -> None:
        volume = self._volumes.pop(name, None)
        if volume is None:
            return  # it was never open, or is being closed
        for copy in [*self._copies.values()]:
            if volume in (copy.source, copy.target):
                copy.trouble = f"the storage daemon of volume {name} has ended: {why}"
            if volume is copy.source:  # else its job ends with an error by itself
                copy.finish(copy.trouble)
        have = volume.attachment
        machine = have.machine if have else ""
        self._tell("volume.lost", {"volume": name, "reason": why, "machine": machine})

    # -- what a request names

    def _named(self, request: Request, where: str) -> Volume:
        name = request.name(where)
        if name not in self._volumes:
            raise NotFound(f"volume {name} is not open", where=where)
        return self._volumes[name]

    def _legal(self, request: Request) -> Volume:
        volume = self._named(request, "volume")
        _refuse(volume, LEGAL[request.method])
        return volume


def _refuse(volume: Volume, conditions: tuple[str, ...]) -> None:
    if "copied" in conditions and volume.copying:
        raise Busy(f"volume {volume.name}: {volume.copying} is under way")
    if "attached" in conditions and volume.attachment is not None:
        machine = volume.attachment.machine
        raise BadState(f"volume {volume.name} is attached to {machine}", hint="detach it first")


def _one_of(request: Request, name: str, allowed: tuple[str, ...]) -> str:
    value = request.text(name, most=64)
    if value not in allowed:
        raise Invalid(f"{name} must be one of {', '.join(allowed)}", where=name)
    return value


def _flag(request: Request, name: str, *, given: bool = True) -> bool:
    value = request.untrusted.get(name, None if given else False)
    if not isinstance(value, bool):
        raise Invalid(f"{name} must be true or false", where=name)
    return value


def _size(request: Request) -> int:
    size_bytes = request.number("size_bytes", MIN_SIZE_BYTES, MAX_SIZE_BYTES)
    if size_bytes % SIZE_UNIT_BYTES:
        raise Invalid(f"size_bytes must be a multiple of {SIZE_UNIT_BYTES}", where="size_bytes")
    return size_bytes


def _device_bytes(request: Request) -> int:
    """0: as much as it announces."""
    if "device_bytes" not in request.untrusted:
        return 0
    return request.number("device_bytes", SIZE_UNIT_BYTES, MAX_SIZE_BYTES)


def _limit(request: Request, name: str, least: int, most: int) -> int:
    value = request.number(name, 0, most)
    if 0 < value < least:
        raise Invalid(f"{name} must be 0 (no limit) or at least {least}", where=name)
    return value


def _device(request: Request) -> int:
    """The one descriptor that came; it stays the request's, and is closed with it."""
    if len(request.descriptors) != 1:
        raise Invalid("the device's descriptor is missing, or there are several")
    if not stat.S_ISSOCK(os.fstat(request.descriptors[0]).st_mode):
        raise Invalid("the device must be a connected NBD socket")
    return request.descriptors[0]


def make(reactor: Reactor, tell: Tell) -> Service:
    """See ``services.base``."""
    return BlockService(reactor, tell)
