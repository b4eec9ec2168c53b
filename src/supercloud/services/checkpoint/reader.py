"""Reading a checkpoint: blocks in order, or into a file, every byte authenticated.

What an object service does for a few bytes of an object is most of what it does for all of it
(it decrypts whole chunks), and what was deduplicated lies here and there in the packs of many
checkpoints. So a file, where any order will do, is filled pack by pack.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Final, NamedTuple

from supercloud.model.errors import Invalid
from supercloud.services.checkpoint.chunks import opened, pack_key
from supercloud.services.checkpoint.keys import Refused
from supercloud.services.checkpoint.lists import (
    ALL_PAGES,
    BLOCK_BYTES,
    PAGE_BYTES,
    PAGES_OF_BLOCK,
    Entry,
    chunk_bytes,
)
from supercloud.services.checkpoint.manifest import Part
from supercloud.services.checkpoint.store import Checkpoint, Store

BATCH_BLOCKS: Final = 32
WINDOW_BLOCKS: Final = 1 << 15
"""Blocks that are sorted by where they are stored: 2 GiB, with some 10 MiB of entries."""
_MAX_GAP_BYTES: Final = 256 << 10
"""Bytes that nobody wants, read since another request would cost more."""
_ZEROS: Final = bytes(BLOCK_BYTES)


class _Block(NamedTuple):
    """A block's chunks: that of the whole, then the pages over it; one of them may be absent."""

    number: int
    base: Entry | None
    over: Entry | None


class Reader:
    """The parts of an authentic checkpoint. Refused, with the reason, at the first bad byte."""

    def __init__(self, store: Store, checkpoint: Checkpoint) -> None:
        self._store, self._manifest = store, checkpoint.manifest

    def blocks(self, name: str) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the blocks of a part, ascending; what is left out is zeros."""
        part = self._manifest.part(name)
        batches = _grouped(self._merged(part), BATCH_BLOCKS)
        tasks = (self._task(batch, part.size_bytes) for batch in batches)
        for found in self._store.pipeline.ordered(tasks):
            yield from found

    def copy(self, name: str, descriptor: int) -> int:
        """A part into a regular file, made empty before and sparse where zero; its size."""
        size = self._manifest.part(name).size_bytes
        os.ftruncate(descriptor, 0)
        os.ftruncate(descriptor, size)
        return self._write(name, descriptor)

    def fill(self, name: str, descriptor: int) -> int:
        """A part into a file of its size that has nothing in it yet (Invalid); its size."""
        size, found = self._manifest.part(name).size_bytes, os.fstat(descriptor)
        if found.st_size != size or found.st_blocks:
            raise Invalid(f"{name} has {size} bytes, its file {found.st_size}, or it is not empty")
        return self._write(name, descriptor)

    def _write(self, name: str, descriptor: int) -> int:
        part = self._manifest.part(name)
        for window in _grouped(self._merged(part), WINDOW_BLOCKS):
            whole = [entry for block in window if (entry := _whole(block))]
            self._lay(whole, part.size_bytes, descriptor)
            over = [b.over for b in window if b.over and b.over.pages != ALL_PAGES]
            self._lay(over, part.size_bytes, descriptor)
        return part.size_bytes

    def _lay(self, entries: list[Entry], size_bytes: int, descriptor: int) -> None:
        """Write chunks where they belong, which need not be in order; done when this returns."""

        def written(extent: list[Entry]) -> None:
            for entry, chunk in self._fetched(extent, size_bytes):
                for offset, data in _pieces(entry, chunk, size_bytes):
                    _write_at(descriptor, offset, data)

        tasks = (partial(written, extent) for extent in _extents(entries))
        for _ in self._store.pipeline.ordered(tasks):
            pass

    def stream(self, name: str, write: Callable[[bytes], object]) -> int:
        """A part in order, zeros included, to whatever takes bytes; its size."""
        at, size = 0, self._manifest.part(name).size_bytes
        for offset, data in self.blocks(name):
            _write_zeros(write, offset - at)
            write(data)
            at = offset + len(data)
        _write_zeros(write, size - at)
        return size

    def verify(self) -> int:
        """Read everything; how many bytes were stored for it, zeros not counted."""
        return sum(len(d) for part in self._manifest.parts for _, d in self.blocks(part.name))

    def _merged(self, part: Part) -> Iterator[_Block]:
        """The blocks of base and increment, ascending."""
        base = self._store.entries(part.base) if part.base else self._store.entries(part.tree)
        over = self._store.entries(part.tree) if part.base else iter(())
        below, above = next(base, None), next(over, None)
        while below or above:
            number = min(entry.block for entry in (below, above) if entry)
            found = _Block(
                number,
                below if below and below.block == number else None,
                above if above and above.block == number else None,
            )
            yield found
            below = next(base, None) if found.base else below
            above = next(over, None) if found.over else above

    def _task(self, batch: list[_Block], size_bytes: int) -> Callable[[], list[tuple[int, bytes]]]:
        return lambda: self._read(batch, size_bytes)

    def _read(self, batch: list[_Block], size_bytes: int) -> list[tuple[int, bytes]]:
        """On a worker: fetch, authenticate and compose the blocks of a batch."""
        entries = [entry for block in batch for entry in (_whole(block), block.over) if entry]
        chunks: dict[Entry, bytes] = {}
        for extent in _extents(entries):
            chunks.update(self._fetched(extent, size_bytes))
        return [_composed(block, chunks, size_bytes) for block in batch]

    def _fetched(self, extent: list[Entry], size_bytes: int) -> Iterator[tuple[Entry, bytes]]:
        """On a worker: the chunks of an extent, authenticated."""
        first, last = extent[0].place, extent[-1].place
        length = last.offset + last.stored - first.offset
        data = memoryview(self._store.range(pack_key(first.pack), first.offset, length))
        cipher = self._store.keys.pack(first.pack)
        for entry in extent:
            start = entry.place.offset - first.offset
            piece = data[start : start + entry.place.stored]
            yield entry, opened(cipher, entry, piece, chunk_bytes(size_bytes, entry))


def _whole(block: _Block) -> Entry | None:
    """The chunk of all of a block; not the base's where nothing of it is left."""
    return block.over if block.over and block.over.pages == ALL_PAGES else block.base


def _pieces(entry: Entry, chunk: bytes, size_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Where in its part the bytes of a chunk belong: all of a block, or some of its pages."""
    view, start = memoryview(chunk), entry.block * BLOCK_BYTES
    if entry.pages == ALL_PAGES:
        _check_length(entry.block, len(view), size_bytes)
        yield start, view
        return
    for number, page in enumerate(p for p in range(PAGES_OF_BLOCK) if entry.pages >> p & 1):
        piece = view[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
        offset = start + page * PAGE_BYTES
        if offset + len(piece) > size_bytes:
            raise Refused("tampered", f"block {entry.block} lies beyond the end of its part")
        yield offset, piece


def _check_length(number: int, found: int, size_bytes: int) -> None:
    length = min(BLOCK_BYTES, size_bytes - number * BLOCK_BYTES)
    if found != length or length <= 0:
        raise Refused("tampered", f"block {number} lies beyond the end of its part")


def _composed(block: _Block, chunks: dict[Entry, bytes], size_bytes: int) -> tuple[int, bytes]:
    offset = block.number * BLOCK_BYTES
    length = min(BLOCK_BYTES, size_bytes - offset)
    if block.over is None or block.over.pages == ALL_PAGES:
        whole = block.over or block.base
        data = chunks[whole] if whole else b""
        _check_length(block.number, len(data), size_bytes)
        return offset, data
    image = bytearray(chunks[block.base] if block.base else _ZEROS[:length])
    pages, at = chunks[block.over], 0
    for page in range(PAGES_OF_BLOCK):
        if block.over.pages >> page & 1:
            start = page * PAGE_BYTES
            image[start : start + PAGE_BYTES] = pages[at : at + PAGE_BYTES]
            at += PAGE_BYTES
    _check_length(block.number, len(image), size_bytes)
    return offset, bytes(image)


def _extents(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries by pack and place, together where they lie together; the same one once."""
    extent: list[Entry] = []
    end = 0
    for entry in sorted(set(entries), key=lambda e: e.place):
        place = entry.place
        if extent and (place.pack != extent[0].place.pack or place.offset > end + _MAX_GAP_BYTES):
            yield extent
            extent = []
        extent.append(entry)
        end = (
            max(end, place.offset + place.stored)
            if len(extent) > 1
            else (place.offset + place.stored)
        )
    if extent:
        yield extent


def _grouped(blocks: Iterator[_Block], size: int) -> Iterator[list[_Block]]:
    while batch := list(islice(blocks, size)):
        yield batch


def _write_at(descriptor: int, offset: int, view: memoryview) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _write_zeros(write: Callable[[bytes], object], length: int) -> None:
    for start in range(0, length, BLOCK_BYTES):
        write(_ZEROS[: min(BLOCK_BYTES, length - start)])
