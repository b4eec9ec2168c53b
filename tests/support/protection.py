"""A disk that may lose power, and devices over it."""

import errno
import random
from collections.abc import Iterable

from supercloud.services.protection.audit import Audit
from supercloud.services.protection.engine import Device, backing_bytes, device_id, format_device
from supercloud.wire.volumes import Seal

BLOCK, SECTOR = 4096, 512
KEY = bytes(range(32))
NAME = "volume"


class Disk:
    """A backing file in memory that knows what is durable.

    ``fuse`` writes and syncs succeed, then the power is off. ``survivor`` is what the next boot
    finds: everything that was synced, and of the rest any sectors in any order.
    """

    def __init__(self, size: int, durable: dict[int, bytes] | None = None, fuse: int = 1 << 60):
        self._size, self.durable, self.fuse = size, dict(durable or {}), fuse
        self.now = dict(self.durable)
        self.pending: list[tuple[int, bytes]] = []
        self.operations = 0

    def _burn(self) -> None:
        self.operations += 1
        if self.operations > self.fuse:
            raise OSError(errno.EIO, "the power is off")

    def read(self, length: int, offset: int) -> bytes:
        first, count = offset // BLOCK, length // BLOCK
        return b"".join(self.now.get(n, bytes(BLOCK)) for n in range(first, first + count))

    def write(self, data: bytes, offset: int) -> None:
        cut = self.operations + 1 > self.fuse
        if self.operations <= self.fuse:  # the write that was under way may have come to anything
            for at in range(0, len(data), BLOCK):
                self.now[(offset + at) // BLOCK] = data[at : at + BLOCK]
                self.pending.append(((offset + at) // BLOCK, data[at : at + BLOCK]))
        self._burn()
        assert not cut

    def sync(self) -> None:
        self._burn()
        self.durable, self.pending = dict(self.now), []

    def size(self) -> int:
        return self._size

    def survivor(self, rnd: random.Random, kept: float) -> "Disk":
        """The disk after the power came back; ``kept`` is how likely an unsynced sector is there."""
        found = dict(self.durable)
        written = list(self.pending)
        rnd.shuffle(written)
        for number, data in written:
            old, torn = found.get(number, bytes(BLOCK)), rnd.random() < 0.5
            if not torn:
                found[number] = data if rnd.random() < kept else old
                continue
            parts = [
                (data if rnd.random() < kept else old)[at : at + SECTOR]
                for at in range(0, BLOCK, SECTOR)
            ]
            found[number] = b"".join(parts)
        return Disk(self._size, found)

    def grow_to(self, size: int) -> None:
        self._size = size

    def copy(self) -> "Disk":
        return Disk(self._size, self.now)


def new_disk(device_bytes: int) -> tuple[Disk, Seal]:
    """A disk with an empty device, and its seal."""
    disk = Disk(backing_bytes(device_bytes))
    seal = format_device(disk, KEY, NAME, device_bytes)
    return disk, seal


def prepared(disk: Disk, seal: Seal, key: bytes = KEY, name: str = NAME) -> Device:
    return Device(disk, key, name, seal, cache_bytes=64 * BLOCK)


def audit(disk: Disk, key: bytes = KEY, name: str = NAME) -> Audit:
    return Audit(disk.read, key, device_id(name))


def content(number: int, blocks: int = 1) -> bytes:
    """Blocks that are like no others."""
    return b"".join(
        (number * 1000 + at).to_bytes(8, "little") * (BLOCK // 8) for at in range(blocks)
    )


def differing(device: Device, wanted: dict[int, Iterable[bytes]]) -> list[int]:
    """Blocks that read as none of what they may be."""
    return [n for n, may in wanted.items() if device.read(n * BLOCK, BLOCK) not in set(may)]
