"""A file tree in memory: read from .debs, written as tar or cpio, always in the same order."""

import io
import posixpath
import re
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Permanent

EPOCH_S = 1_735_689_600  # of every file in every product: 2025-01-01, so that builds are equal
_MERGED = ("bin", "sbin", "lib", "lib64")
_LINKS_MAX = 40


@dataclass(frozen=True, slots=True)
class Node:
    """A file (``data``), directory, or symbolic link (``data`` is the target)."""

    mode: int
    data: bytes = b""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)

    @property
    def target(self) -> str:
        """Of a symbolic link."""
        return self.data.decode()


Tree = dict[str, Node]  # path without leading slash -> node


def file(data: bytes | str, permissions: int = 0o644) -> Node:
    """A regular file."""
    return Node(stat.S_IFREG | permissions, data.encode() if isinstance(data, str) else data)


def directory(permissions: int = 0o755) -> Node:
    """A directory."""
    return Node(stat.S_IFDIR | permissions)


def link(target: str) -> Node:
    """A symbolic link."""
    return Node(stat.S_IFLNK | 0o777, target.encode())


def merged(path: str) -> str:
    """The path with /bin, /sbin, /lib and /lib64 in /usr, as Debian has it."""
    path = posixpath.normpath(path).lstrip("/")
    return f"usr/{path}" if path.split("/", 1)[0] in _MERGED else path


def from_debs(paths: Iterable[Path], skip: re.Pattern[str]) -> Tree:
    """The union of the packages' files, less what ``skip`` matches."""
    tree: Tree = {}
    with ThreadPoolExecutor(2) as pool:
        for data in pool.map(_fsys_tar, paths):
            _add_tar(tree, data, lambda name: not skip.match(name))
    return tree


def _fsys_tar(path: Path) -> bytes:
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=False)
    if done.returncode != 0:
        raise Permanent(f"dpkg-deb {path.name}: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout


def _add_tar(tree: Tree, data: bytes, wanted: Callable[[str], bool]) -> None:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            name = merged(member.name)
            if name != "." and wanted(name):
                _add_member(tree, tar, member, name)


def _add_member(tree: Tree, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
    # Set-uid bits have no place in the images: nothing in them gains privilege by exec.
    permissions = member.mode & 0o777
    if member.isdir():
        tree[name] = directory(permissions)
    elif member.issym():
        tree[name] = link(member.linkname)
    elif member.islnk():
        tree[name] = tree[merged(member.linkname)]
    elif member.isreg() and (source := tar.extractfile(member)):
        tree[name] = file(source.read(), permissions)


def resolve(tree: Tree, path: str) -> tuple[list[str], str | None]:
    """Follow links: (the links passed through, the real path or None when it leads nowhere)."""
    passed: list[str] = []
    parts, here = merged(path).split("/"), ""
    while parts:
        step = merged(posixpath.join(here, parts.pop(0)))
        node = tree.get(step)
        if node is None or not node.is_link:
            here = step
            continue
        passed.append(step)
        if len(passed) > _LINKS_MAX:
            return passed, None
        target = posixpath.join("/", posixpath.dirname(step), node.target)
        parts, here = [*merged(target).split("/"), *parts], ""
    return passed, here if here in tree else None


def with_parents(tree: Tree) -> Tree:
    """The same tree with every missing parent directory."""
    whole = dict(tree)
    for path in tree:
        while path := posixpath.dirname(path):
            whole.setdefault(path, directory())
    return whole


def size_bytes(tree: Tree) -> int:
    """Of all the files."""
    return sum(len(node.data) for node in tree.values() if node.is_file)


def to_tar(tree: Tree) -> bytes:
    """A tar without its end-of-archive blocks, so that two can be joined."""
    out = io.BytesIO()
    tar = tarfile.TarFile(fileobj=out, mode="w", format=tarfile.PAX_FORMAT)
    for path in sorted(tree):
        tar.addfile(*_tar_entry(path, tree[path]))
    return out.getvalue()


TAR_END = bytes(1024)


def _tar_entry(path: str, node: Node) -> tuple[tarfile.TarInfo, io.BytesIO | None]:
    info = tarfile.TarInfo(path)
    info.mtime, info.mode = EPOCH_S, stat.S_IMODE(node.mode)
    if node.is_link:
        info.type, info.linkname = tarfile.SYMTYPE, node.target
        return info, None
    if not node.is_file:
        info.type = tarfile.DIRTYPE
        return info, None
    info.size = len(node.data)
    return info, io.BytesIO(node.data)


def to_cpio(tree: Tree) -> bytes:
    """An uncompressed newc archive for the kernel's initramfs."""
    out = io.BytesIO()
    for number, path in enumerate(sorted(tree), 1):
        _cpio_entry(out, number, path, tree[path])
    _cpio_entry(out, 0, "TRAILER!!!", Node(0))
    return out.getvalue()


def _cpio_entry(out: io.BytesIO, number: int, path: str, node: Node) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(node.mode) else 1
    fields = (number, node.mode, 0, 0, links, EPOCH_S, len(node.data), 0, 0, 0, 0, len(name), 0)
    out.write(b"070701" + b"".join(b"%08X" % value for value in fields))
    for part in (name, node.data):
        out.write(part)
        out.write(bytes(-out.tell() % 4))


def unpack(tree: Tree, root: Path) -> None:
    """Write the tree to disk; absolute links are made relative to stay inside."""
    for path in sorted(with_parents(tree)):
        node, place = tree.get(path, directory()), root / path
        if node.is_link:
            target = node.target
            if target.startswith("/"):
                target = posixpath.relpath(merged(target), posixpath.dirname(path))
            place.symlink_to(target)
        elif node.is_file:
            place.write_bytes(node.data)
            place.chmod(stat.S_IMODE(node.mode) | 0o400)
        else:
            place.mkdir(exist_ok=True)
