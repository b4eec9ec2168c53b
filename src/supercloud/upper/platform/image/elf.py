"""The little of ELF64 (little-endian) that the closure needs."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


def is_elf(data: bytes) -> bool:
    """Whether it is a 64-bit little-endian ELF file."""
    return data.startswith(_MAGIC)


def needed(data: bytes) -> list[str]:
    """Library names (DT_NEEDED), and the loader's absolute path when there is one."""
    if not is_elf(data):
        return []
    segments = list(_segments(data))
    names = [_string(data, s.offset) for s in segments if s.kind == _PT_INTERP]
    for segment in segments:
        if segment.kind == _PT_DYNAMIC:
            names += _libraries(data, segments, segment)
    return names


def _segments(data: bytes) -> Iterator[_Segment]:
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    for number in range(count):
        kind, _, offset, address, _, size = struct.unpack_from(
            "<IIQQQQ", data, table + number * entry_size
        )
        yield _Segment(kind, offset, address, size)


def _libraries(data: bytes, segments: list[_Segment], dynamic: _Segment) -> list[str]:
    offsets, strings = [], 0
    for place in range(dynamic.offset, dynamic.offset + dynamic.size, 16):
        tag, value = struct.unpack_from("<QQ", data, place)
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED:
            offsets.append(value)
        if tag == _DT_STRTAB:
            strings = _file_offset(segments, value)
    return [_string(data, strings + offset) for offset in offsets]


def _file_offset(segments: list[_Segment], address: int) -> int:
    for segment in segments:
        if segment.kind == _PT_LOAD and 0 <= address - segment.address < segment.size:
            return segment.offset + address - segment.address
    raise ValueError(f"address {address:#x} is in no segment")


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def section(data: bytes, wanted: str) -> bytes:
    """The content of a named section; empty when there is none."""
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 58)
    (names,) = struct.unpack_from("<Q", data, table + names_index * entry_size + 24)
    for number in range(count):
        name, _, _, _, offset, size = struct.unpack_from(
            "<IIQQQQ", data, table + number * entry_size
        )
        if _string(data, names + name) == wanted:
            return data[offset : offset + size]
    return b""
