"""Kernel modules: decompress, close over their dependencies, index them with depmod."""

import lzma
import posixpath
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from supercloud.upper.platform.image import elf
from supercloud.upper.platform.image.tree import Tree, file, unpack

_INDEX = [
    "modules.alias",
    "modules.alias.bin",
    "modules.builtin",
    "modules.builtin.alias.bin",
    "modules.builtin.bin",
    "modules.builtin.modinfo",
    "modules.dep",
    "modules.dep.bin",
    "modules.softdep",
    "modules.symbols",
    "modules.symbols.bin",
]


_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_BYTES = 12  # of the structure before that mark; its end is the signature's length


class Runs(Protocol):
    """Runs a tool of the tool tree."""

    def run(self, tool: str, *arguments: str | Path) -> bytes:
        """Standard output; raises ``Permanent``."""


@dataclass(frozen=True)
class Modules:
    """The modules of one kernel: canonical name -> path of the compressed file."""

    tree: Tree
    base: str
    paths: Mapping[str, str]

    def closure(self, wanted: Iterable[str]) -> tuple[Tree, list[str]]:
        """Uncompressed modules with all that they depend on; and the names that do not exist.

        Those are built in, or not in this kernel.
        """
        found: Tree = {}
        absent: list[str] = []
        todo, seen = [(name, True) for name in wanted], set()
        while todo:
            name, asked = todo.pop()
            name = name.replace("-", "_")
            if name in seen:
                continue
            seen.add(name)
            if name not in self.paths:
                absent += [name] if asked else []
                continue
            path, data = self._load(name)
            found[path] = file(data)
            todo += [(needed, False) for needed in _dependencies(data)]
        return found, sorted(absent)

    def _load(self, name: str) -> tuple[str, bytes]:
        path = self.paths[name]
        data = self.tree[path].data
        data = lzma.decompress(data) if path.endswith(".xz") else data
        return path.removesuffix(".xz"), unsigned(data)

    def indexed(self, found: Tree, tools: Runs) -> Tree:
        """``found`` with the files that modprobe reads."""
        base = self.base
        lists = {
            path: self.tree[path]
            for name in ("builtin", "order", "builtin.modinfo")
            if (path := f"{base}/modules.{name}") in self.tree
        }
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            unpack(found | lists, root)
            (root / "lib").symlink_to("usr/lib")
            tools.run("depmod", "-b", root, posixpath.basename(base))
            index = {
                f"{base}/{name}": file((root / base / name).read_bytes())
                for name in _INDEX
                if (root / base / name).exists()
            }
        return found | index


def unsigned(module: bytes) -> bytes:
    """A module without the signature that is appended to it (kernel, ``module_signature.h``).

    The image is measured as a whole, so a signature says nothing more; checking it takes an
    emulated platform 16 ms for each module, half a second of its start.
    """
    if not module.endswith(_SIGNED):
        return module
    end = len(module) - len(_SIGNED)
    (size,) = struct.unpack_from(">I", module, end - 4)
    if size > end - _SIGNATURE_BYTES:
        raise ValueError("a kernel module whose signature is longer than itself")
    return module[: end - _SIGNATURE_BYTES - size]


def of_kernel(tree: Tree, version: str) -> Modules:
    """The modules that ``tree`` has for the kernel ``version``."""
    base = f"usr/lib/modules/{version}"
    paths = {
        posixpath.basename(path).split(".ko")[0].replace("-", "_"): path
        for path in tree
        if path.startswith(base) and path.endswith((".ko", ".ko.xz"))
    }
    return Modules(tree, base, paths)


def _dependencies(data: bytes) -> list[str]:
    names: list[str] = []
    for entry in elf.section(data, ".modinfo").split(b"\0"):
        key, _, value = entry.decode("latin-1").partition("=")
        if key == "depends":
            names += [name for name in value.split(",") if name]
        if key == "softdep":
            names += [word for word in value.split() if not word.endswith(":")]
    return names
