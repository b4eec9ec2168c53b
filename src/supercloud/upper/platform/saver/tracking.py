"""The pages of a VM that were written since a moment of our choice, while it runs on.

The kernel sets a bit in a page table's entry when the page is written, and clears all of a process'
when asked to (``soft-dirty``); a nested machine's processor goes through the same entries. So
nothing of the machine need be built for it: its RAM is a memory file that QEMU alone has mapped,
shared, and is read through the file, which makes no page of what the guest never touched.

Source: Documentation/admin-guide/mm/soft-dirty.rst and pagemap.rst of Linux.
"""

import fcntl
import itertools
import mmap
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from ctypes import addressof, c_char
from typing import Final

from supercloud.model.errors import BadState, Invalid
from supercloud.services.checkpoint.pages import PAGE_BYTES, Mapping, Memory, Run
from supercloud.upper.platform.saver.requests import RAM_NAME

_CLEAR_SOFT_DIRTY: Final = "4"
_SOFT_DIRTY: Final = 1 << 7  # PAGE_IS_SOFT_DIRTY
_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARGUMENT: Final = struct.Struct("<12Q")
_REGION: Final = struct.Struct("<QQQ")
_REGIONS: Final = 4096
_LINE: Final = re.compile(
    rf"([0-9a-f]+)-([0-9a-f]+) \S{{4}} ([0-9a-f]+) \S+ \d+\s+/memfd:{RAM_NAME} \(deleted\)"
)


class Tracked(Memory):
    """The RAM of QEMU's process ``pid``; BadState unless it has one that can be tracked."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._mappings = _mappings(pid)
        first = self._mappings[0]
        # by this link, which needs privilege, the file is had without its descriptor
        name = f"{first.start:x}-{first.end:x}"
        self.file = os.open(f"/proc/{pid}/map_files/{name}", os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self.file).st_size
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._ram = mmap.mmap(self.file, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)

    def close(self) -> None:
        """Close what of the process is held open."""
        super().close()
        self._ram.close()
        os.close(self.file)

    def clear(self) -> None:
        """From now on a page is dirty when it is written; the machine may run."""
        clear(self._pid)

    def kept(self, buffer: bytearray) -> "Kept":
        """Copy the dirty pages into ``buffer``, which grows if it must."""
        runs = self.dirty()
        size = sum(run.length for run in runs) * PAGE_BYTES
        if len(buffer) < size:
            buffer.extend(bytes(size - len(buffer)))
        at = 0
        with memoryview(buffer) as view, memoryview(self._ram) as ram:
            for run in runs:
                start, length = run.page * PAGE_BYTES, run.length * PAGE_BYTES
                view[at : at + length] = ram[start : start + length]
                at += length
        return Kept(buffer, runs, size)

    def dirty(self) -> list[Run]:
        """The pages written since ``clear``, ascending; exact while nothing of it runs."""
        return self._joined(written)

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the RAM as they are now, zeros where there is nothing yet."""
        data = os.pread(self.file, size, offset)
        if len(data) != size:
            raise BadState("the machine's memory became smaller")
        return data


class Kept:
    """Pages copied while the machine stood still; ``dirty_bytes`` of them."""

    def __init__(self, buffer: bytearray, runs: list[Run], dirty_bytes: int) -> None:
        self._buffer, self.runs, self.dirty_bytes = buffer, runs, dirty_bytes
        self._starts = [run.page * PAGE_BYTES for run in runs]
        lengths = itertools.accumulate((run.length * PAGE_BYTES for run in runs), initial=0)
        self._places = list(lengths)

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the RAM that lie within one run."""
        number = bisect_right(self._starts, offset) - 1
        start = self._places[number] + offset - self._starts[number]
        if number < 0 or start + size > self._places[number + 1]:
            raise Invalid(f"{size} bytes at {offset} were not kept")
        return bytes(self._buffer[start : start + size])


def clear(pid: int | str) -> None:
    """Clear the bits of a process."""
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write(_CLEAR_SOFT_DIRTY)


def written(pagemap: int, start: int, end: int) -> Iterator[Run]:
    """The pages between two addresses that are soft-dirty, as page numbers (Linux 6.7)."""
    regions = bytearray(_REGIONS * _REGION.size)
    address = addressof((c_char * len(regions)).from_buffer(regions))
    while start < end:
        argument = _SCAN_ARGUMENT.pack(
            *(_SCAN_ARGUMENT.size, 0, start, end, 0, address, _REGIONS, 0),
            *(0, _SOFT_DIRTY, 0, _SOFT_DIRTY),
        )
        count = fcntl.ioctl(pagemap, _SCAN, bytearray(argument))
        for first, last, _ in _REGION.iter_unpack(regions[: count * _REGION.size]):
            yield Run(first // PAGE_BYTES, (last - first) // PAGE_BYTES)
            start = last
        if count < _REGIONS:
            return


def _mappings(pid: int) -> list[Mapping]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        matches = [match for line in lines if (match := _LINE.match(line))]
    if not matches:
        raise BadState("the machine was not started to be checkpointed", hint="restart it")
    numbers = ((int(text, 16) for text in match.groups()) for match in matches)
    return sorted((Mapping(*three) for three in numbers), key=lambda mapping: mapping.offset)
