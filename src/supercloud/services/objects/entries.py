"""What an entry of weed's metadata store says about space: its protocol buffer, read sparingly.

Source: ``filer.proto`` of SeaweedFS, message ``Entry`` (chunks = 3, content = 9) and ``FileChunk``
(size = 3). The rest is skipped.
"""

import zlib
from collections.abc import Iterator
from typing import Final

from supercloud.model.errors import Invalid

_CHUNKS, _CONTENT, _CHUNK_SIZE = 3, 9, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GZIP: Final = b"\x1f\x8b"  # how entries with many chunks are kept
_MOST_BYTES: Final = 64 << 20


def size_bytes(untrusted: bytes) -> int:
    """Bytes of content that an entry has, in its chunks and in itself; Invalid."""
    if untrusted[:2] == _GZIP:
        untrusted = _unzipped(untrusted)
    total = 0
    for field, value in _fields(untrusted):
        if field == _CHUNKS and isinstance(value, bytes):
            total += sum(v for f, v in _fields(value) if f == _CHUNK_SIZE and isinstance(v, int))
        elif field == _CONTENT and isinstance(value, bytes):
            total += len(value)
    return total


def _unzipped(untrusted: bytes) -> bytes:
    reading = zlib.decompressobj(wbits=31)
    try:
        data = reading.decompress(untrusted, _MOST_BYTES)
    except zlib.error as error:
        raise Invalid("an entry that is not gzip") from error
    if reading.unconsumed_tail:
        raise Invalid("an entry too large")
    return data


def _fields(untrusted: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message."""
    place, end = 0, len(untrusted)
    while place < end:
        tag, place = _varint(untrusted, place)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            number, place = _varint(untrusted, place)
            yield tag >> 3, number
            continue
        if kind == _BYTES:
            size, place = _varint(untrusted, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise Invalid("an entry that is no protocol buffer")
        if place + size > end:
            raise Invalid("an entry that ends early")
        yield tag >> 3, untrusted[place : place + size]
        place += size


def _varint(untrusted: bytes, place: int) -> tuple[int, int]:
    result = shift = 0
    while shift < 64:
        if place >= len(untrusted):
            raise Invalid("an entry that ends early")
        byte = untrusted[place]
        result |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return result, place
    raise Invalid("a number too long")
