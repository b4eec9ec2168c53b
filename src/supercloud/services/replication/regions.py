"""Which regions of 64 KiB a replica lacks: bitmaps in a memory file of the owner's side.

The file outlives this process, not the host: what it says is written without any sync, and would be
older than the replicas after a crash of the host. So it must be a memory file (``memfd_create``),
and whoever has none, or one of another generation than the last, copies everything.

Layout: a header of 4096 bytes (length, CRC-32, JSON), then four bitmaps of one bit a region:
``unsettled`` (written since the last flush that all replicas answered: they may differ there after
a crash), and one for each replica of what it lacks.
"""

import fcntl
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from supercloud.model.errors import Invalid

REGION_BYTES: Final = 64 << 10
MOST_REPLICAS: Final = 3
_HEADER_BYTES: Final = 4096
_PAGE_BYTES: Final = 4096
_HEAD: Final = struct.Struct("<II")
_NOT_EMPTY: Final = re.compile(rb"[^\0]")


def count_of(size_bytes: int) -> int:
    """How many regions a volume of that size has."""
    return -(-size_bytes // REGION_BYTES)


def covering(offset: int, length: int) -> range:
    """The regions that these bytes touch."""
    return range(offset // REGION_BYTES, count_of(offset + length))


def map_bytes(size_bytes: int) -> int:
    """How large the memory file for a volume of that size is: whole pages."""
    size = _HEADER_BYTES + (1 + MOST_REPLICAS) * _stride(count_of(size_bytes))
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def _stride(count: int) -> int:
    return -(-count // 8)


class Regions:
    """A set of regions: ``count`` bits at ``at`` of the map."""

    def __init__(self, memory: mmap.mmap, at: int, count: int) -> None:
        self._memory, self._at, self.count = memory, at, count
        self._end = at + _stride(count)

    def __contains__(self, region: int) -> bool:
        return bool(self._memory[self._at + (region >> 3)] & 1 << (region & 7))

    def add(self, regions: range | set[int]) -> None:
        """These too."""
        for region in regions:
            self._memory[self._at + (region >> 3)] |= 1 << (region & 7)

    def remove(self, regions: range | set[int]) -> None:
        """No longer these."""
        for region in regions:
            self._memory[self._at + (region >> 3)] &= ~(1 << (region & 7)) & 0xFF

    def fill(self) -> None:
        """All."""
        self._memory[self._at : self._end] = b"\xff" * (self._end - self._at)
        for region in range(self.count, 8 * (self._end - self._at)):
            self._memory[self._at + (region >> 3)] &= ~(1 << (region & 7)) & 0xFF

    def clear(self) -> None:
        """None."""
        self._memory[self._at : self._end] = bytes(self._end - self._at)

    def join(self, other: "Regions") -> None:
        """Those of ``other`` too."""
        whole = self.bits() | other.bits()
        self._memory[self._at : self._end] = whole.to_bytes(self._end - self._at, "little")

    def bits(self) -> int:
        """All of them as one number."""
        return int.from_bytes(self._memory[self._at : self._end], "little")

    def __bool__(self) -> bool:
        return self.first() is not None

    def first(self, start: int = 0) -> int | None:
        """The first region from ``start`` on."""
        for region in range(start, min(self.count, (start | 7) + 1)):
            if region in self:
                return region
        found = _NOT_EMPTY.search(self._memory, self._at + (start >> 3) + 1, self._end)
        if found is None:
            return None
        byte = self._memory[found.start()]
        return 8 * (found.start() - self._at) + (byte & -byte).bit_length() - 1

    def __iter__(self) -> Iterator[int]:
        region = self.first()
        while region is not None:
            yield region
            region = self.first(region + 1) if region + 1 < self.count else None

    def __len__(self) -> int:
        return self.bits().bit_count()


@dataclass(frozen=True, slots=True)
class Before:
    """What the map said when it was opened: which replica has which place in it."""

    generation: int
    places: dict[str, int]


class Map:
    """The bitmaps of one volume. Invalid when the descriptor is no memory file of that size."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        _check(descriptor, size_bytes)
        self._memory = mmap.mmap(descriptor, map_bytes(size_bytes))
        self._size_bytes = size_bytes
        count = count_of(size_bytes)
        places = [_HEADER_BYTES + i * _stride(count) for i in range(1 + MOST_REPLICAS)]
        self.unsettled, *self._lacking = (Regions(self._memory, at, count) for at in places)

    def lacking(self, place: int) -> Regions:
        """What the replica at that place lacks."""
        return self._lacking[place]

    def before(self) -> Before | None:
        """What is written in the header; None when it is of no use."""
        length, crc = _HEAD.unpack_from(self._memory)
        data = self._memory[_HEAD.size : _HEAD.size + length]
        if not 0 < length <= _HEADER_BYTES - _HEAD.size or zlib.crc32(data) != crc:
            return None
        found = json.loads(data)
        if found["size_bytes"] != self._size_bytes:
            return None
        return Before(found["generation"], found["places"])

    def write(self, generation: int, places: dict[str, int]) -> None:
        """From now on it is of that generation; a header that was cut off is of no use."""
        found: dict[str, Any] = {
            "generation": generation, "size_bytes": self._size_bytes, "places": places,
        }  # fmt: skip
        data = json.dumps(found).encode()
        self._memory[: _HEAD.size] = bytes(_HEAD.size)
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        self._memory[: _HEAD.size] = _HEAD.pack(len(data), zlib.crc32(data))

    def empty(self) -> None:
        """Nobody lacks anything, as far as this map knows."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        """The memory file stays as it is."""
        self._memory.close()


def _check(descriptor: int, size_bytes: int) -> None:
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise Invalid("the map is not a memory file: it would outlive its host") from error
    if os.fstat(descriptor).st_size != map_bytes(size_bytes):
        raise Invalid(f"the map of this volume has {map_bytes(size_bytes)} bytes")
