"""Files of a small ISO 9660 disk, read past the kernel's cache (ECMA-119 with Joliet names).

A clone's config disk has other content than what its template's kernel may have cached, and to
mount it costs a kernel that has done little yet several times as much. Everything on the disk is
untrusted: places and sizes are checked, and names are only compared.
"""

import mmap
import os
from collections.abc import Iterator
from typing import Final

from supercloud.model.errors import Invalid, NotFound

SECTOR_BYTES: Final = 2048
MAX_FILE_BYTES: Final = 1 << 20
_FIRST_DESCRIPTOR, _MAX_DESCRIPTORS = 16, 16
_SUPPLEMENTARY, _LAST = 2, 255
_JOLIET: Final = (b"%/@", b"%/C", b"%/E")
_ROOT_RECORD: Final = 156
_DIRECT_BYTES: Final = 4096
_HEAD_BYTES: Final = 128 << 10
"""Read at once: a small disk is all in it."""
NAME_ENCODING: Final = "utf-16-be"


class Iso:
    """An open disk; ``read`` gives a whole file."""

    def __init__(self, device: str) -> None:
        self._descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._head = b""
        try:
            self._head = self._read(0, _HEAD_BYTES)
            self._root = self._find_root()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the disk."""
        os.close(self._descriptor)

    def read(self, path: str) -> bytes:
        """The file of that path (``a/b/c``, as Joliet has the names). NotFound, Invalid."""
        place = self._root
        for name in path.split("/"):
            entries = dict(_entries(self._extent(*place)))
            if name not in entries:
                raise NotFound(f"the config disk has no {path}")
            place = entries[name]
        return self._extent(*place)

    def _find_root(self) -> tuple[int, int]:
        for number in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + _MAX_DESCRIPTORS):
            descriptor = self._extent(number, SECTOR_BYTES)
            if descriptor[1:6] != b"CD001" or descriptor[0] == _LAST:
                break
            if descriptor[0] == _SUPPLEMENTARY and descriptor[88:91] in _JOLIET:
                return _place(descriptor[_ROOT_RECORD:])
        raise Invalid("the config disk is no ISO 9660 with Joliet names")

    def _extent(self, sector: int, size: int) -> bytes:
        if size > MAX_FILE_BYTES:
            raise Invalid(f"something of {size} bytes on the config disk")
        start = sector * SECTOR_BYTES
        if start + size <= len(self._head):
            return self._head[start : start + size]
        data = self._read(start, size)
        if len(data) < size:
            raise Invalid("something beyond the end of the config disk")
        return data

    def _read(self, start: int, size: int) -> bytes:
        """As much as there is. The kernel wants whole blocks into a page-aligned buffer."""
        first, skip = divmod(start, _DIRECT_BYTES)
        length = -(-(skip + size) // _DIRECT_BYTES) * _DIRECT_BYTES
        with mmap.mmap(-1, max(length, _DIRECT_BYTES)) as buffer:
            got = os.preadv(self._descriptor, [buffer], first * _DIRECT_BYTES)
            return buffer[skip : min(got, skip + size)]


def _entries(untrusted: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names, without versions, and places in a directory."""
    at = 0
    while at < len(untrusted):
        length = untrusted[at]
        if length == 0:  # no record crosses into the next sector
            at += SECTOR_BYTES - at % SECTOR_BYTES
            continue
        record = untrusted[at : at + length]
        if len(record) < 34:
            raise Invalid("a directory of the config disk is damaged")
        name = record[33 : 33 + record[32]].decode(NAME_ENCODING, "replace")
        yield name.partition(";")[0], _place(record)
        at += length


def _place(record: bytes) -> tuple[int, int]:
    """Sector and size; both are there in either byte order."""
    return int.from_bytes(record[2:6], "little"), int.from_bytes(record[10:14], "little")
