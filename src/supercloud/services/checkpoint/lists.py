"""Lists of chunks: what the blocks of a part are, and where.

A part is cut into blocks of 64 KiB by offset. An *entry* says which of a block's sixteen 4 KiB
pages its chunk holds (all, in a full image; the dirty ones, in an increment) and the chunk's name
and place. 2,048 entries of neighbouring blocks make a *segment* (128 MiB of the part), which is a
chunk itself; the table of segments is a segment again and is kept in the manifest. A block without
entry is that of the base, or zeros where there is no base.

All numbers little-endian. Segment: count of packs, count of entries (u32 each), the packs' names,
entries of 32 bytes.
"""

import base64
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

from supercloud.services.checkpoint.keys import NAME_BYTES, TAG_BYTES, Refused
from supercloud.wire.codec import Limit

PAGE_BYTES: Final = 4096
BLOCK_BYTES: Final = 64 << 10
PAGES_OF_BLOCK: Final = BLOCK_BYTES // PAGE_BYTES
ALL_PAGES: Final = (1 << PAGES_OF_BLOCK) - 1
BLOCKS_OF_SEGMENT: Final = 2048
MAX_SEGMENTS: Final = 16384
MAX_PART_BYTES: Final = MAX_SEGMENTS * BLOCKS_OF_SEGMENT * BLOCK_BYTES
MAX_STORED_BYTES: Final = 256 << 10
"""Of one chunk, a segment included."""
PACK_NAME_BYTES: Final = 20
"""16 random ones of the writer, then the number among its packs (u32, big-endian)."""

_USES_OF_TEXT: Final = 16384
_COUNTS: Final = struct.Struct("<II")
_ENTRY: Final = struct.Struct(f"<{NAME_BYTES}sIHHII")
_USE: Final = struct.Struct(f"<{PACK_NAME_BYTES}sII")


class Place(NamedTuple):
    """Where a chunk is: ``stored`` bytes (its tag with them) at ``offset`` of ``pack``."""

    pack: bytes
    offset: int
    stored: int


class Entry(NamedTuple):
    """The chunk of a block (or, in a table, the segment of that number)."""

    block: int
    pages: int
    name: bytes
    place: Place


class Use(NamedTuple):
    """How many bytes of a pack a tree refers to, and how many there are."""

    size_bytes: int
    used_bytes: int


Table = Annotated[str, Limit(max_length=1 << 20)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A stored image: its table of segments and all the packs it needs (base64 of binary)."""

    size_bytes: Annotated[int, Limit(ge=0, le=MAX_PART_BYTES)]
    table: Table
    packs: Annotated[list[Table], Limit(max_length=64)]


def pack_entries(entries: Iterable[Entry]) -> bytes:
    """The segment of these entries, which are in ascending order."""
    packs: dict[bytes, int] = {}
    body = bytearray()
    count = 0
    for block, pages, name, (pack, offset, stored) in entries:
        number = packs.setdefault(pack, len(packs))
        body += _ENTRY.pack(name, block, pages, number, offset, stored)
        count += 1
    return _COUNTS.pack(len(packs), count) + b"".join(packs) + body


def unpack_entries(untrusted: bytes, most: int = BLOCKS_OF_SEGMENT) -> list[Entry]:
    """The entries of a segment; Refused unless it is whole, bounded and in order.

    It has been authenticated before: this guards against faults of ours, not against attacks.
    """
    try:
        return _unpacked(untrusted, most)
    except (struct.error, IndexError, ValueError) as error:
        raise Refused("tampered", f"a list of chunks makes no sense: {error}") from None


def _unpacked(data: bytes, most: int) -> list[Entry]:
    pack_count, count = _COUNTS.unpack_from(data)
    body = _COUNTS.size + pack_count * PACK_NAME_BYTES
    if count > most or pack_count > count or len(data) != body + count * _ENTRY.size:
        raise ValueError(f"{count} entries in {len(data)} bytes")
    starts = range(_COUNTS.size, body, PACK_NAME_BYTES)
    packs = [data[start : start + PACK_NAME_BYTES] for start in starts]
    entries, last = [], -1
    for name, block, pages, pack, offset, stored in _ENTRY.iter_unpack(data[body:]):
        if block <= last or not TAG_BYTES < stored <= MAX_STORED_BYTES or not pages:
            raise ValueError(f"block {block} after {last}, {stored} bytes, pages {pages:x}")
        last = block
        entries.append(Entry(block, pages, name, Place(packs[pack], offset, stored)))
    return entries


def to_table(entries: Iterable[Entry]) -> str:
    """The table of a tree's segments, as it stands in the manifest."""
    return base64.b64encode(pack_entries(entries)).decode()


def from_table(untrusted: str) -> list[Entry]:
    """The segments of a tree: ``block`` is the segment's number."""
    return unpack_entries(_binary(untrusted), MAX_SEGMENTS)


def to_uses(uses: dict[bytes, Use]) -> list[str]:
    """The packs of a tree, as they stand in the manifest: a text for each 16,384."""
    rows = [_USE.pack(pack, *use) for pack, use in uses.items()]
    starts = range(0, len(rows), _USES_OF_TEXT)
    return [base64.b64encode(b"".join(rows[s : s + _USES_OF_TEXT])).decode() for s in starts]


def from_uses(untrusted: list[str]) -> dict[bytes, Use]:
    """The packs of a tree by name."""
    try:
        rows = [row for text in untrusted for row in _USE.iter_unpack(_binary(text))]
    except struct.error as error:
        raise Refused("tampered", f"a table of packs makes no sense: {error}") from None
    return {pack: Use(size_bytes, used_bytes) for pack, size_bytes, used_bytes in rows}


def _binary(untrusted: str) -> bytes:
    try:
        return base64.b64decode(untrusted, validate=True)
    except ValueError:
        raise Refused("tampered", "a table of the manifest is not base64") from None


def chunk_bytes(size_bytes: int, entry: Entry) -> int:
    """How long the chunk of an entry is, in a part of that size."""
    left = size_bytes - entry.block * BLOCK_BYTES
    if entry.pages == ALL_PAGES:
        return max(0, min(BLOCK_BYTES, left))
    return entry.pages.bit_count() * PAGE_BYTES
