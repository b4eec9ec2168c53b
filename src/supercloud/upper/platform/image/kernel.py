"""From Debian's vmlinuz (bzImage) to the ELF kernel inside, which starts faster by PVH."""

import bz2
import lzma
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import elf
from supercloud.upper.platform.image.modules import Runs

_SETUP_MAGIC = b"HdrS"


def vmlinux(vmlinuz: bytes, tools: Runs) -> bytes:
    """The uncompressed kernel. Raises ``Permanent``."""
    if vmlinuz[0x202:0x206] != _SETUP_MAGIC:
        raise Permanent("the kernel is not a bzImage")
    setup_sectors = vmlinuz[0x1F1] or 4
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the size that the kernel's own unpacker wants.
    data = _decompress(vmlinuz[begin : begin + length - 4], tools)
    if not elf.is_elf(data):
        raise Permanent("the kernel's payload is not an ELF file")
    return _trimmed(data)


def _trimmed(data: bytes) -> bytes:
    """Without section table, relocations and the zeros that end the last segment (.bss).

    A boot by PVH neither relocates nor reads sections, and a quarter of the file is these.
    """
    (table,) = struct.unpack_from("<Q", data, 32)
    entry_size, count = struct.unpack_from("<HH", data, 54)
    headers = [
        (place, *struct.unpack_from("<IIQQQQ", data, place))
        for place in range(table, table + entry_size * count, entry_size)
    ]
    place, _, _, offset, _, _, size = max(headers, key=lambda header: header[3])
    kept_bytes = len(data[offset : offset + size].rstrip(b"\0"))
    trimmed = bytearray(data[: offset + kept_bytes])
    struct.pack_into("<Q", trimmed, place + 32, kept_bytes)  # p_filesz
    struct.pack_into("<Q", trimmed, 40, 0)  # e_shoff
    struct.pack_into("<HHH", trimmed, 58, 0, 0, 0)  # e_shentsize, e_shnum, e_shstrndx
    return bytes(trimmed)


def _decompress(payload: bytes, tools: Runs) -> bytes:
    known: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
        (b"\x1f\x8b", lambda data: zlib.decompressobj(31).decompress(data)),
        (b"\xfd7zXZ\0", lambda data: lzma.LZMADecompressor().decompress(data)),
        (b"\x5d\0\0", lambda data: lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data)),
        (b"BZh", lambda data: bz2.BZ2Decompressor().decompress(data)),
        (b"\x28\xb5\x2f\xfd", lambda data: _by_tool(tools, "zstd", data)),
        (b"\x02\x21\x4c\x18", lambda data: _by_tool(tools, "lz4", data)),
    )
    for magic, unpack in known:
        if payload.startswith(magic):
            return unpack(payload)
    raise Permanent(f"the kernel is compressed in an unknown way: {payload[:6].hex()}")


def _by_tool(tools: Runs, tool: str, data: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as packed:
        packed.write(data)
        packed.flush()
        return tools.run(tool, "-d", "-c", Path(packed.name))
