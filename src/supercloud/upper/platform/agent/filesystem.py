"""The ext4 file system of a volume: made when the disk is blank, checked when it was left open.

Nothing else is ever formatted. That a file system is being made is written into the last block
of the disk before, and taken away after: when it is still there, and no file system that was ever
mounted, then the making was cut off, and begins anew.
"""

import asyncio
import errno
import os
import struct
from collections.abc import Collection
from typing import BinaryIO

from supercloud.model.errors import Invalid, Permanent, Temporary
from supercloud.model.records import dataclass
from supercloud.upper.platform.agent import syscalls
from supercloud.upper.platform.agent.processes import run

BLANK_BYTES = 1 << 20
CHECK_TIMEOUT_S = 3600.0
MAKE_TIMEOUT_S = 900.0
_BLOCK_BYTES = 4096
MARK = b"supercloud: a file system is being made on this disk\n".ljust(_BLOCK_BYTES, b"\0")
_SUPERBLOCK_AT, _SUPERBLOCK_BYTES, _MAGIC = 1024, 1024, 0xEF53
_IS_CLEAN, _HAS_ERRORS, _NEEDS_RECOVERY, _64BIT = 1, 2, 4, 0x80
_IN_USE = (" in use", "resource busy")
_CORRECTED = 1  # e2fsck's exit status: it found something and mended it


class InUse(Temporary):
    """Somebody has the disk for himself: a tool, the kernel, or a child that is just starting."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """What the kernel's documentation of ext4 calls so, as far as we care."""

    size_bytes: int
    is_clean: bool
    was_mounted: bool


def superblock(untrusted: bytes) -> Superblock | None:
    """Read a superblock (1024 bytes); None when it is none."""
    if len(untrusted) < _SUPERBLOCK_BYTES:
        return None
    blocks, log_block_size = struct.unpack_from("<I16xI", untrusted, 4)
    (mounted_s,) = struct.unpack_from("<I", untrusted, 0x2C)
    magic, state = struct.unpack_from("<HH", untrusted, 0x38)
    (incompatible,) = struct.unpack_from("<I", untrusted, 0x60)
    if magic != _MAGIC or log_block_size > 6:
        return None
    if incompatible & _64BIT:
        blocks |= struct.unpack_from("<I", untrusted, 0x150)[0] << 32
    is_clean = state & (_IS_CLEAN | _HAS_ERRORS) == _IS_CLEAN
    return Superblock(
        size_bytes=blocks << (10 + log_block_size),
        is_clean=is_clean and not incompatible & _NEEDS_RECOVERY,
        was_mounted=mounted_s != 0,
    )


def look(device: str) -> Superblock | None:
    """The file system on a disk; None when one is to be made there.

    Invalid for a disk that has something else; InUse while somebody has it open for himself.
    """
    with _open(device, os.O_RDONLY) as file:
        head = file.read(BLANK_BYTES)
        file.seek(_tail_at(file))
        tail = file.read(_BLOCK_BYTES)
    found = superblock(head[_SUPERBLOCK_AT : _SUPERBLOCK_AT + _SUPERBLOCK_BYTES])
    if tail == MARK and not (found and found.was_mounted):
        return None
    if found:
        return found
    if any(head) or any(tail):
        raise Invalid(
            "the disk has something on it that is no ext4 file system, and is left as it is",
            hint="use another volume, or give this one to a VM",
        )
    return None


def _open(device: str, flags: int) -> BinaryIO:
    """For ourselves alone: fails while it is mounted, or a tool works on it."""
    try:
        return open(os.open(device, flags | os.O_EXCL | os.O_CLOEXEC), "r+b" if flags else "rb")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InUse("the disk is still in use") from error


def is_free(device: str) -> bool:
    """Whether nothing has it mounted, here or in any container."""
    try:
        _open(device, os.O_RDONLY).close()
    except InUse:
        return False
    return True


def mount(device: str, place: str, flags: int, options: str) -> None:
    """InUse as for ``look``; OSError for the rest."""
    try:
        syscalls.mount(device, place, "ext4", flags, options)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InUse("the disk is still in use") from error


async def _tool(*argv: str, timeout_s: float, accept: Collection[int] = (0,)) -> None:
    """InUse when it says so: their exit status does not."""
    try:
        await run(*argv, timeout_s=timeout_s, accept=accept)
    except Permanent as error:
        if any(words in str(error) for words in _IN_USE):
            raise InUse("the disk is still in use") from error
        raise


def _tail_at(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END) // _BLOCK_BYTES * _BLOCK_BYTES - _BLOCK_BYTES


def _write_mark(device: str) -> None:
    with _open(device, os.O_RDWR) as file:
        file.seek(_tail_at(file))
        file.write(MARK)
        file.flush()
        os.fsync(file.fileno())


def _erase_mark(device: str) -> None:
    """Unless the file system has put something of its own there."""
    with _open(device, os.O_RDWR) as file:
        file.seek(_tail_at(file))
        if file.read(_BLOCK_BYTES) == MARK:
            file.seek(-_BLOCK_BYTES, os.SEEK_CUR)
            file.write(bytes(_BLOCK_BYTES))
            file.flush()
            os.fsync(file.fileno())


async def make(device: str, owner: tuple[int, int]) -> None:
    """A new file system; ``owner`` (uid, gid) is whom its root directory belongs to."""
    await asyncio.to_thread(_write_mark, device)
    options = f"nodiscard,root_owner={owner[0]}:{owner[1]}"
    await _tool("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", options, device,
                timeout_s=MAKE_TIMEOUT_S)  # fmt: skip
    await asyncio.to_thread(_erase_mark, device)


async def check(device: str) -> None:
    """Replay its journal and mend what can be mended without asking; Permanent for the rest."""
    try:
        await _tool("e2fsck", "-p", device, timeout_s=CHECK_TIMEOUT_S, accept=(0, _CORRECTED))
    except Permanent as error:
        raise Permanent(
            f"its file system is damaged; go back to a snapshot, or repair it from a VM: {error}"
        ) from error


def _superblock_of(device: str) -> Superblock | None:
    with open(device, "rb") as file:
        file.seek(_SUPERBLOCK_AT)
        return superblock(file.read(_SUPERBLOCK_BYTES))


async def grow(device: str, place: str, size_bytes: int) -> bool:
    """Make the file system mounted at ``place`` as big as its disk; whether it has grown."""
    before = os.statvfs(place).f_blocks
    found = await asyncio.to_thread(_superblock_of, device)
    if found is None or found.size_bytes > size_bytes - BLANK_BYTES:
        return False
    await run("resize2fs", device, timeout_s=MAKE_TIMEOUT_S)
    return os.statvfs(place).f_blocks > before
