"""The L1 image as one bootable disk (BIOS, qcow2), for providers that want a disk.

::

    sector 0     GRUB's boot.img and the partition table
    sector 1...  GRUB's core.img: reads tar, loads Linux, all that it should do built in
    partition 1  a plain tar with vmlinuz and initrd
    partition 2  the erofs root, the same file as for direct boot

Nothing is installed or mounted: every part is put at its place.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.tools import ToolTree

_SECTOR_BYTES = 512
_ALIGNMENT = 2048  # sectors
_BOOT_CODE_BYTES = 440
_TYPE_DATA, _TYPE_LINUX = 0xDA, 0x83
_GRUB = "usr/lib/grub/i386-pc"
_MODULES = ("biosdisk", "part_msdos", "tar", "linux", "boot")
_PREFIX = "(,msdos1)/"  # of the disk that was booted from
_CONFIG = """\
linux /vmlinuz console=tty0 console=ttyS0 quiet panic=-1
initrd /initrd
boot
"""


@dataclass(frozen=True)
class _Partition:
    kind: int
    start: int  # sectors
    sectors: int

    @property
    def end(self) -> int:
        return self.start + self.sectors

    def entry(self, *, active: bool) -> bytes:
        """Sixteen bytes of the partition table; the geometry fields say "use the sectors"."""
        chs = b"\xfe\xff\xff"
        head = bytes([0x80 if active else 0]) + chs + bytes([self.kind]) + chs
        return head + struct.pack("<II", self.start, self.sectors)


def make(out: Path, vmlinuz: bytes, initrd: bytes, root: Path, tools: ToolTree) -> None:
    """Write ``out``, a qcow2 file. Equal input gives equal output."""
    raw = out.with_suffix(".raw")
    boot = {"vmlinuz": trees.file(vmlinuz), "initrd": trees.file(initrd)}
    tar = trees.to_tar(boot) + trees.TAR_END
    core = _core(out.parent, tools)
    first = _partition(_TYPE_DATA, 0, len(tar))
    second = _partition(_TYPE_LINUX, first.end, root.stat().st_size)
    code = (tools.root / _GRUB / "boot.img").read_bytes()[:_BOOT_CODE_BYTES]
    signature = hashlib.sha256(tar).digest()[:4]
    try:
        with raw.open("wb") as disk:
            disk.write(_table(code, signature, first, second))
            disk.write(core)
            disk.seek(first.start * _SECTOR_BYTES)
            disk.write(tar)
            disk.seek(second.start * _SECTOR_BYTES)
            for chunk in _chunks(root):
                disk.write(chunk)
            disk.truncate((second.end + _ALIGNMENT) * _SECTOR_BYTES)
        tools.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, out)
    finally:
        raw.unlink(missing_ok=True)


def _core(scratch: Path, tools: ToolTree) -> bytes:
    config, made = scratch / "grub.cfg", scratch / "core.img"
    config.write_text(_CONFIG)
    options = ("-O", "i386-pc", "-p", _PREFIX, "-d", tools.root / _GRUB)
    try:
        tools.run("grub-mkimage", *options, "-c", config, "-o", made, *_MODULES)
        core = made.read_bytes()
    finally:
        config.unlink()
        made.unlink(missing_ok=True)
    if len(core) > (_ALIGNMENT - 1) * _SECTOR_BYTES:
        raise Permanent("GRUB's core does not fit before the first partition")
    return core


def _partition(kind: int, after: int, size_bytes: int) -> _Partition:
    start = max(-(-after // _ALIGNMENT), 1) * _ALIGNMENT
    return _Partition(kind, start, -(-size_bytes // _SECTOR_BYTES))


def _table(code: bytes, signature: bytes, first: _Partition, second: _Partition) -> bytes:
    entries = first.entry(active=True) + second.entry(active=False) + bytes(32)
    return code + signature + bytes(2) + entries + b"\x55\xaa"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk
