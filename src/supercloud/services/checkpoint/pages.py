"""The pages of a machine that differ from its template, found and copied while it is paused.

A clone maps its template's memory privately, so a page that it wrote is anonymous: in the page
table present or swapped, and not of the file. ``Memory.capture`` lists those pages (PAGEMAP_SCAN,
or by reading /proc/PID/pagemap before Linux 6.7) and copies them into a memory file; the machine
goes on, and ``Captured`` reads the copy at leisure, in another process if need be.

Standard library only: the monitor in the machine's domain does the first half, since nobody else
may touch that process. Source: Documentation/admin-guide/mm/pagemap.rst of Linux.
"""

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from supercloud.model.errors import BadState, Invalid, NoResources

PAGE_BYTES: Final = 4096
MAX_IMAGE_BYTES: Final = 1 << 42
REBASE_PART: Final = 0.25
"""An increment larger than this part of its base costs more than a new base would."""

_MAGIC: Final = b"SCDIRTY\x01"
_HEADER: Final = struct.Struct("<8sQQQ")  # magic, pages of the image, runs, pages captured
_RUN_BYTES: Final = 8

_ENTRY_BYTES: Final = 8  # of /proc/PID/pagemap
_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARGUMENT: Final = struct.Struct("<12Q")
_REGION_BYTES: Final = 24
_REGIONS: Final = 4096
_SPARE_PAGES: Final = 1024
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_MAPPING: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+)"
)


class Run(NamedTuple):
    """Neighbouring 4 KiB pages, numbered within the image."""

    page: int
    length: int


class Mapping(NamedTuple):
    """Where a part of the image is in the process."""

    start: int
    end: int
    offset: int


def is_rebase_due(dirty_bytes: int, base_bytes: int) -> bool:
    """Whether the whole is to be written as a new base, rather than what differs from the old."""
    return dirty_bytes > REBASE_PART * base_bytes


class Memory:
    """The memory of a process that maps an open file privately; made before the pause.

    The caller needs the right to trace the process. BadState when the file is not mapped.
    """

    def __init__(self, pid: int, file: int) -> None:
        self.size_bytes = os.fstat(file).st_size
        self._mappings = mappings(pid, file)
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._pagemap)
            raise

    def close(self) -> None:
        """Close what of the process is held open."""
        os.close(self._pagemap)
        os.close(self._memory)

    def dirty(self) -> list[Run]:
        """The pages that it wrote, ascending; reliable while nothing of it runs."""
        try:
            return self._joined(scanned)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        return self._joined(listed)

    def make_room(self, into: int, most_bytes: int = MAX_IMAGE_BYTES) -> mmap.mmap:
        """Memory for a capture, before the pause: to get it takes most of a capture's time.

        For what is dirty by now and an eighth more, at most ``most_bytes`` of pages.
        """
        runs = self.dirty()
        pages = sum(run.length for run in runs)
        wanted = min(pages + pages // 8 + _SPARE_PAGES, most_bytes // PAGE_BYTES)
        size = _data_offset(2 * len(runs) + _SPARE_PAGES) + wanted * PAGE_BYTES
        os.ftruncate(into, size)
        return mmap.mmap(into, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def capture(
        self, into: int, most_bytes: int = MAX_IMAGE_BYTES, room: mmap.mmap | None = None
    ) -> int:
        """Copy the dirty pages into an empty memory file, for ``Captured``; how many bytes.

        ``room`` is what ``make_room`` made in the file; it is closed. NoResources, before any page
        is copied, when they are more than ``most_bytes``.
        """
        runs = self.dirty()
        pages = sum(run.length for run in runs)
        if pages * PAGE_BYTES > most_bytes:
            raise NoResources(f"{pages * PAGE_BYTES} bytes were written, {most_bytes} have room")
        data = _data_offset(len(runs))
        size = data + pages * PAGE_BYTES
        if room is None or len(room) < size:
            os.ftruncate(into, size)
            room = mmap.mmap(into, size)
        header = _HEADER.pack(_MAGIC, self.size_bytes // PAGE_BYTES, len(runs), pages)
        with room, memoryview(room) as view:
            self._copy(runs, view[data:size])
            _begin(view, header, runs)
        os.ftruncate(into, size)
        return pages * PAGE_BYTES

    def _joined(self, find: Callable[[int, int, int], Iterator[Run]]) -> list[Run]:
        """What is found in all mappings, as pages of the image."""
        runs: list[Run] = []
        for start, end, offset in self._mappings:
            shift = (offset - start) // PAGE_BYTES
            runs += [Run(r.page + shift, r.length) for r in find(self._pagemap, start, end)]
        return runs

    def _copy(self, runs: list[Run], view: memoryview) -> None:
        at = 0
        with view:
            for address, length in self._places(runs):
                with view[at : at + length] as piece:
                    if os.preadv(self._memory, [piece], address) != length:
                        raise BadState("the machine's memory went away while it was copied")
                at += length

    def _places(self, runs: list[Run]) -> Iterator[tuple[int, int]]:
        """Address and length of each run; none lies in two mappings."""
        mappings_ = iter(self._mappings)
        start, end, offset = next(mappings_, Mapping(0, 0, 0))
        for run in runs:
            where = run.page * PAGE_BYTES
            while where >= offset + end - start:
                start, end, offset = next(mappings_)
            yield start + where - offset, run.length * PAGE_BYTES


def capture_of(image: int, offset: int, size_bytes: int, runs: list[Run], into: int) -> int:
    """As ``capture``, of the pages of an image that lies in a file from ``offset`` on."""
    pages = sum(run.length for run in runs)
    data = _data_offset(len(runs))
    os.ftruncate(into, data + pages * PAGE_BYTES)
    header = _HEADER.pack(_MAGIC, size_bytes // PAGE_BYTES, len(runs), pages)
    with mmap.mmap(into, data + pages * PAGE_BYTES) as room, memoryview(room) as view:
        at = data
        for run in runs:
            length = run.length * PAGE_BYTES
            with view[at : at + length] as piece:
                if os.preadv(image, [piece], offset + run.page * PAGE_BYTES) != length:
                    raise BadState("an image of memory is cut short")
            at += length
        _begin(view, header, runs)
    return pages * PAGE_BYTES


class Captured:
    """The copy that ``capture`` made, in a file that stays open; Invalid unless it makes sense."""

    def __init__(self, untrusted_file: int) -> None:
        self._file = untrusted_file
        head = os.pread(self._file, _HEADER.size, 0)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise Invalid("this is no capture of dirty pages")
        _, image_pages, count, pages = _HEADER.unpack(head)
        if count > pages or pages > image_pages or image_pages > MAX_IMAGE_BYTES // PAGE_BYTES:
            raise Invalid(f"{count} runs of {pages} pages in an image of {image_pages}")
        self.size_bytes, self.dirty_bytes = image_pages * PAGE_BYTES, pages * PAGE_BYTES
        self._data = _data_offset(count)
        if os.fstat(self._file).st_size < self._data + self.dirty_bytes:
            raise Invalid("a capture of dirty pages is cut short")
        self._load(os.pread(self._file, count * _RUN_BYTES, _HEADER.size), image_pages, pages)

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the image that lie within one run."""
        place = self._place(offset)
        data = os.pread(self._file, size, place)
        if len(data) != size:
            raise Invalid("a capture of dirty pages is cut short")
        return data

    def over(self, base: Callable[[int, int], bytes]) -> Callable[[int, int], bytes]:
        """``read_at`` of the whole image: the pages captured, over those of the base."""

        def read_at(offset: int, size: int) -> bytes:
            image = bytearray(base(offset, size))
            for start, end in self._within(offset, offset + size):
                image[start - offset : end - offset] = self.read_at(start, end - start)
            return bytes(image)

        return read_at

    def _load(self, table: bytes, image_pages: int, pages: int) -> None:
        numbers = array("I", table)
        self.runs = [Run(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
        self._starts = [run.page * PAGE_BYTES for run in self.runs]
        self._places: list[int] = []
        last, before = 0, 0
        for page, length in self.runs:
            if page < last or not length or page + length > image_pages:
                raise Invalid(f"a run of {length} dirty pages from {page} makes no sense")
            self._places.append(self._data + before * PAGE_BYTES)
            last, before = page + length, before + length
        if before != pages:
            raise Invalid(f"{before} dirty pages, where {pages} were announced")

    def _place(self, offset: int) -> int:
        number = bisect_right(self._starts, offset) - 1
        if number < 0 or offset >= self._starts[number] + self.runs[number].length * PAGE_BYTES:
            raise Invalid(f"the page at {offset} was not captured")
        return self._places[number] + offset - self._starts[number]

    def _within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The captured ranges between two offsets."""
        first = max(0, bisect_right(self._starts, start) - 1)
        for at, run in zip(self._starts[first:], self.runs[first:], strict=True):
            if at >= end:
                return
            low, high = max(at, start), min(at + run.length * PAGE_BYTES, end)
            if low < high:
                yield low, high


def mappings(pid: int, file: int) -> list[Mapping]:
    """Where the process maps the file privately, ascending by offset; BadState when nowhere."""
    status = os.fstat(file)
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match = _MAPPING.match(line)
            if match and _identity(match) == wanted and match[3].endswith("p"):
                found.append(Mapping(int(match[1], 16), int(match[2], 16), int(match[4], 16)))
    found.sort(key=lambda mapping: mapping.offset)
    if not found:
        raise BadState(f"process {pid} does not map its memory's file privately")
    for one, other in itertools.pairwise(found):
        if other.offset < one.offset + one.end - one.start:
            raise BadState(f"process {pid} maps a part of its memory's file twice")
    return found


def scanned(pagemap: int, start: int, end: int) -> Iterator[Run]:
    """The pages written between two addresses, by PAGEMAP_SCAN (Linux 6.7); as page numbers."""
    regions = bytearray(_REGIONS * _REGION_BYTES)
    address = _address_of(regions)
    while start < end:
        argument = _SCAN_ARGUMENT.pack(
            *(_SCAN_ARGUMENT.size, 0, start, end, 0, address, _REGIONS, 0),
            *(_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_FILE),
        )
        count = fcntl.ioctl(pagemap, _SCAN, bytearray(argument))
        for first, last, _ in struct.iter_unpack("<QQQ", regions[: count * _REGION_BYTES]):
            yield Run(first // PAGE_BYTES, (last - first) // PAGE_BYTES)
            start = last  # what the kernel says it came to (walk_end) may be an earlier stop
        if count < _REGIONS:
            return


def listed(pagemap: int, start: int, end: int) -> Iterator[Run]:
    """As ``scanned``, from the page table's entries: eight bytes a page, the flags in the last."""
    first, count = start // PAGE_BYTES, (end - start) // PAGE_BYTES
    data = os.pread(pagemap, count * _ENTRY_BYTES, first * _ENTRY_BYTES)
    if len(data) != count * _ENTRY_BYTES:
        raise BadState("the process' page table is gone")
    for match in re.finditer(rb"\x01+", data[7::8].translate(_DIRTY)):
        yield Run(first + match.start(), match.end() - match.start())


def _flags(byte: int) -> int:
    """1 for present (0x80) or swapped (0x40) and not of the file (0x20)."""
    return int(bool(byte & 0xC0) and not byte & 0x20)


_DIRTY: Final = bytes(map(_flags, range(256)))


def _identity(match: re.Match[str]) -> tuple[int, int, int]:
    return int(match[5], 16), int(match[6], 16), int(match[7])


def _begin(view: memoryview, header: bytes, runs: list[Run]) -> None:
    """Header and table: last of all, so that what is cut short has none."""
    table = array("I", [number for run in runs for number in run]).tobytes()
    view[: len(header) + len(table)] = header + table


def _data_offset(runs: int) -> int:
    """Where the pages begin in a capture: whole pages after header and table."""
    return -(-(_HEADER.size + runs * _RUN_BYTES) // PAGE_BYTES) * PAGE_BYTES


def _address_of(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
