"""A file system that is soon full: a tmpfs of its own, mounted nowhere or where a test says."""

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from supercloud.services.protection.engine import Device, backing_bytes, format_device
from support.guardian import Guardian
from support.protection import KEY, NAME

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same numbers on all machines
_SET_STRING, _CREATE = 1, 6
_CALL = ctypes.CDLL(None, use_errno=True).syscall


def _call(number: int, *arguments: object) -> int:
    result = int(_CALL(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class SmallDisk:
    """A directory by ``path`` on a disk of so many bytes, and a file there that takes the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self._rest = path, path / "rest"

    def fill(self) -> None:
        """There is no room any more."""
        with open(self._rest, "ab", buffering=0) as rest, contextlib.suppress(OSError):
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        rest.write(bytes(size))

    def make_room(self) -> None:
        """There is."""
        self._rest.unlink(missing_ok=True)


class SmallDevice:
    """The engine's device on such a disk, whose requests wait for room."""

    def __init__(self, disk: SmallDisk, size_bytes: int) -> None:
        self.disk = disk
        self.file = os.open(disk.path / "backing", os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self.file, backing_bytes(size_bytes))
        self.seal = format_device(self.file, KEY, NAME, size_bytes)
        self.device = Device(self.file, KEY, NAME, self.seal)
        self.seal = self.device.serve(self.device.next_epoch)
        self.device.hold(True)

    @property
    def is_full(self) -> bool:
        return bool(self.device.figures()["full"])

    def descriptor(self) -> int:
        """A connection."""
        ours, theirs = socket.socketpair()
        self.device.connect(theirs.detach())
        return ours.detach()

    def close(self) -> None:
        self.disk.make_room()
        self.device.close()
        os.close(self.file)


@contextlib.contextmanager
def small_disk(size_bytes: int) -> Iterator[SmallDisk]:
    """Nowhere in the tree of directories; gone with the last that has something of it open."""
    context = _call(_FSOPEN, b"tmpfs", 1)
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"size", str(size_bytes).encode(), 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        mount = _call(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)
    try:
        yield SmallDisk(Path(f"/proc/self/fd/{mount}"))
    finally:
        os.close(mount)


def small_disk_at(place: Path, size_bytes: int, guardian: Guardian) -> SmallDisk:
    """Mounted at a directory until the guardian cleans up."""
    options = ("-t", "tmpfs", "-o", f"size={size_bytes},mode=0755")
    subprocess.run(["mount", *options, "tmpfs", str(place)], check=True)
    guardian.command(["umount", "-l", str(place)])
    return SmallDisk(place)
