"""Disks in the platform's slots, as the kernel shows them, and its word that some came or went.

A slot is a PCIe root port of the machine. Its number is in the port's Slot Capabilities register
(PCI Express Base Specification, 7.5.3.9), whatever the kernel's hot-plug driver makes of it: under
ACPI the names in ``/sys/bus/pci/slots`` do not have it.
"""

import asyncio
import contextlib
import os
import socket
import struct

from supercloud.model.records import dataclass

SECTOR_BYTES = 512
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_STATUS_AT, _HEADER_AT, _CAPABILITIES_AT = 0x06, 0x0E, 0x34
_HAS_CAPABILITIES, _BRIDGE, _EXPRESS = 0x10, 1, 0x10
_SLOT_IMPLEMENTED = 1 << 8
_SLOT_CAPABILITIES_AT = 0x14
_MAX_CAPABILITIES = 48  # of 4 bytes at least, behind the header: a longer chain is a ring


@dataclass(frozen=True, slots=True)
class Disk:
    """One plugging-in of a disk: names like ``vdb`` are used again, sequence numbers are not."""

    name: str
    sequence: int

    @property
    def device(self) -> str:
        """Its node."""
        return f"/dev/{self.name}"


def slot_number(config: bytes) -> int:
    """The physical slot of a bridge with that PCI configuration space; 0 when it has none."""
    if len(config) < 64 or config[_HEADER_AT] & 0x7F != _BRIDGE:
        return 0
    at = config[_CAPABILITIES_AT] & 0xFC if config[_STATUS_AT] & _HAS_CAPABILITIES else 0
    for _ in range(_MAX_CAPABILITIES):
        if not at or at + _SLOT_CAPABILITIES_AT + 4 > len(config):
            return 0
        if config[at] == _EXPRESS:
            flags = struct.unpack_from("<H", config, at + 2)[0]
            capabilities = struct.unpack_from("<I", config, at + _SLOT_CAPABILITIES_AT)[0]
            return capabilities >> 19 if flags & _SLOT_IMPLEMENTED else 0
        at = config[at + 1] & 0xFC
    return 0


class Disks:
    """``system`` is where sysfs is."""

    def __init__(self, system: str = "/sys") -> None:
        self._system = system
        self._ports: dict[int, str] = {}
        self._kernel: socket.socket | None = None
        self._change = asyncio.Event()

    def _listen(self) -> None:
        """To the kernel, from when somebody first waits: it tells of every module it loads too."""
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        self._kernel = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
        self._kernel.bind((0, _KERNEL_GROUP))
        asyncio.get_running_loop().add_reader(self._kernel, self._arrived)

    def _arrived(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._kernel:
                try:
                    message = self._kernel.recv(1 << 14)
                except BlockingIOError:
                    raise
                except OSError:  # ENOBUFS: some were lost, so look
                    message = b"SUBSYSTEM=block"
                if b"SUBSYSTEM=block" in message:
                    self.look_again()

    def look_again(self) -> None:
        """Wake all who wait in ``changed``."""
        change, self._change = self._change, asyncio.Event()
        change.set()

    async def changed(self, timeout_s: float) -> None:
        """Return when something about the disks may have changed, or the time is over.

        So it does at once when nobody has listened before: whoever waits has to look again.
        """
        if self._kernel is None:
            self._listen()
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._change.wait(), timeout_s)

    def at_slot(self, slot: int) -> Disk | None:
        """The disk that is in a slot now."""
        port = self._port(slot)
        for device in _entries(port, ":") if port else ():  # 0000:05:00.0
            for virtio in _entries(f"{port}/{device}", "virtio"):
                for name in _entries(f"{port}/{device}/{virtio}/block"):
                    if sequence := self._number(name, "diskseq"):
                        return Disk(name, sequence)
        return None

    def _port(self, slot: int) -> str:
        """The root port of a slot; all are there from the machine's start."""
        if not self._ports:
            devices = f"{self._system}/bus/pci/devices"
            for name in _entries(devices):
                with contextlib.suppress(OSError), open(f"{devices}/{name}/config", "rb") as file:
                    if number := slot_number(file.read(256)):
                        self._ports.setdefault(number, f"{devices}/{name}")
        return self._ports.get(slot, "")

    def is_present(self, disk: Disk) -> bool:
        """Whether that very disk is still plugged in."""
        return self._number(disk.name, "diskseq") == disk.sequence

    def size_bytes(self, disk: Disk) -> int:
        """Its size now: it may grow; 0 when it has gone."""
        return self._number(disk.name, "size") * SECTOR_BYTES

    def is_read_only(self, disk: Disk) -> bool:
        """Whether the disk itself refuses to be written."""
        return bool(self._number(disk.name, "ro"))

    def send_flushes(self, disk: Disk) -> None:
        """Have the kernel send what ``sync`` means to the disk, which then need not assume it.

        A vhost-user-blk disk of QEMU's shows no cache at first, and until the kernel says that it
        knows of one, all is written through. A disk without such a switch does as it always does.
        """
        path = f"{self._system}/block/{disk.name}/cache_type"
        with contextlib.suppress(OSError), open(path, "r+", encoding="ascii") as file:
            if file.read().strip() != "write back":
                file.write("write back")

    def errors(self, disk: Disk) -> int:
        """What the ext4 mounted from it has met since it was checked last; 0 when none is."""
        return self._number(disk.name, "errors_count", "fs/ext4")

    def _number(self, name: str, attribute: str, kind: str = "block") -> int:
        try:
            with open(f"{self._system}/{kind}/{name}/{attribute}") as file:
                return int(file.read())
        except OSError:
            return 0


def _entries(directory: str, part: str = "") -> list[str]:
    """Names in a directory that have ``part``; none when it is not there."""
    try:
        return sorted(name for name in os.listdir(directory) if part in name)
    except OSError:
        return []
