"""Merging an image's layers into one tree, as OCI's layer specification says.

The tree lives in memory and never touches the building machine's file system, so that names,
links and whiteouts of a hostile layer can only ever point at other nodes of it; contents stay in
the layers' files until the result is written.
"""

import posixpath
import stat
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from supercloud.model.errors import Invalid, NoResources
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.tars import Members, opened

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."
_XATTR = "SCHILY.xattr."
# What overlayfs, SELinux of the building machine, or nobody but the host's kernel may say.
_XATTRS_KEPT = ("user.", "security.capability", "system.posix_acl_")
_XATTRS_REFUSED = ("user.overlay.",)
_MAX_ID = (1 << 32) - 2
_MAX_TIME_S = 1 << 40


@dataclass(slots=True, eq=False)
class Inode:
    """Anything but a directory. Hard links share one. ``content`` is where a file's bytes are."""

    kind: int  # stat.S_IFREG, S_IFLNK or S_IFIFO
    mode: int
    uid: int
    gid: int
    mtime_s: int
    xattrs: Mapping[str, str]
    target: str = ""
    content: tuple[tarfile.TarFile, tarfile.TarInfo] | None = None


@dataclass(slots=True, eq=False)
class Directory:
    """``layer`` that last named it; ``touched``: that last put something below it."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0
    xattrs: Mapping[str, str] = field(default_factory=dict)
    children: "dict[str, Directory | Leaf]" = field(default_factory=dict)
    layer: int = -1
    touched: int = -1


@dataclass(slots=True, eq=False)
class Leaf:
    """A name for an inode, given by ``layer``."""

    inode: Inode
    layer: int


@contextmanager
def merge(layers: Sequence[Path], limits: Limits, *, where: str) -> Iterator[Directory]:
    """The root directory of the merged layers (uncompressed tars, bottom first).

    Inodes read from the layers' files while the context is open. Raises ``Invalid``,
    ``NoResources``.
    """
    merger = _Merger(limits, where)
    with ExitStack() as stack:
        for number, path in enumerate(layers):
            tar = stack.enter_context(opened(path, limits, where))
            merger.apply(tar, number)
        yield merger.root


class _Merger:
    def __init__(self, limits: Limits, where: str) -> None:
        self.limits, self.where = limits, where
        self.root = Directory()
        self.entries, self.content_bytes = 0, 0
        self.layer = 0

    def apply(self, tar: tarfile.TarFile, layer: int) -> None:
        self.layer = layer
        for member in Members(tar, self.limits, self.where):
            self._count(member)
            parts = self._parts(member.name)
            if not parts:
                self._describe(self.root, member)
            elif parts[-1].startswith(_WHITEOUT):
                self._white_out(parts)
            else:
                self._add(tar, member, parts)

    def _count(self, member: tarfile.TarInfo) -> None:
        self.entries += 1
        self.content_bytes += member.size if member.isreg() else 0
        if self.entries > self.limits.entries:
            raise NoResources("the image has too many entries", where=self.where)
        if self.content_bytes > self.limits.total_bytes:
            raise NoResources("the image is too large when unpacked", where=self.where)

    # names

    def _parts(self, untrusted_name: str) -> list[str]:
        """The components of a name; refuses what no honest image has."""
        shown = repr(untrusted_name[:200])
        parts = [part for part in untrusted_name.split("/") if part not in {"", "."}]
        if ".." in parts:
            raise Invalid(f"the entry {shown} climbs out of its directory", where=self.where)
        if "\0" in untrusted_name or len(_bytes(untrusted_name)) > self.limits.path_bytes:
            raise Invalid(f"the entry {shown} has an impossible name", where=self.where)
        if len(parts) > self.limits.depth or any(
            len(_bytes(part)) > self.limits.name_bytes for part in parts
        ):
            raise Invalid(f"the entry {shown} has an impossible name", where=self.where)
        return parts

    def _directory(self, parts: Sequence[str], *, make: bool) -> Directory | None:
        """The directory at a path of the merged tree, links followed inside of it."""
        trail, todo, hops = [self.root], list(reversed(parts)), 0
        while todo:
            part = todo.pop()
            if part == "..":  # of a link's target: never above the root
                del trail[max(1, len(trail) - 1) :]
                continue
            child = trail[-1].children.get(part)
            if isinstance(child, Leaf):
                hops += 1
                todo += reversed(self._target(child, trail, hops, parts))
                continue
            if child is None:
                if not make:
                    return None
                child = trail[-1].children[part] = Directory(layer=self.layer)
            trail.append(child)
            if len(trail) > self.limits.depth:
                raise Invalid("the image's directories are nested too deep", where=self.where)
        if make:
            for directory in trail:
                directory.touched = self.layer
        return trail[-1]

    def _target(
        self, leaf: Leaf, trail: list[Directory], hops: int, parts: Sequence[str]
    ) -> list[str]:
        """The components to follow instead of a link; shortens ``trail`` for absolute ones."""
        shown = "/".join(parts)[:200]
        if leaf.inode.kind != stat.S_IFLNK:
            raise Invalid(f"{shown!r}: a part of it is no directory", where=self.where)
        if hops > self.limits.link_hops:
            raise Invalid(f"{shown!r}: too many symbolic links", where=self.where)
        if leaf.inode.target.startswith("/"):
            del trail[1:]
        return [part for part in leaf.inode.target.split("/") if part not in {"", "."}]

    # entries

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str]) -> None:
        if member.ischr() or member.isblk():
            return  # devices come from the engine, never from an image
        parent = self._directory(parts[:-1], make=True)
        assert parent is not None  # noqa: S101 -- it was made
        name = parts[-1]
        if member.isdir():
            present = parent.children.get(name)
            if not isinstance(present, Directory):
                present = parent.children[name] = Directory()
            self._describe(present, member)
        else:
            inode = self._linked(member) if member.islnk() else self._inode(tar, member)
            parent.children[name] = Leaf(inode, self.layer)

    def _describe(self, directory: Directory, member: tarfile.TarInfo) -> None:
        directory.mode, directory.layer = stat.S_IMODE(member.mode), self.layer
        directory.touched = self.layer
        directory.uid, directory.gid = self._id(member.uid), self._id(member.gid)
        directory.mtime_s, directory.xattrs = _time_s(member), _xattrs(member)

    def _inode(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Inode:
        kind = _kind(member)
        if kind is None:
            kind_name = repr(member.type)
            raise Invalid(f"an entry has the unknown type {kind_name}", where=self.where)
        if kind == stat.S_IFLNK and not 0 < len(_bytes(member.linkname)) <= self.limits.path_bytes:
            raise Invalid("a symbolic link has an impossible target", where=self.where)
        return Inode(
            kind,
            stat.S_IMODE(member.mode),
            self._id(member.uid),
            self._id(member.gid),
            _time_s(member),
            _xattrs(member),
            member.linkname if kind == stat.S_IFLNK else "",
            (tar, member) if kind == stat.S_IFREG else None,
        )

    def _linked(self, member: tarfile.TarInfo) -> Inode:
        """The inode that a hard link names: there already, in this layer or below."""
        parts = self._parts(member.linkname)
        parent = self._directory(parts[:-1], make=False) if parts else None
        leaf = parent.children.get(parts[-1]) if parent else None
        if not isinstance(leaf, Leaf):
            shown = repr(member.linkname[:200])
            raise Invalid(f"a hard link names {shown}, which is no file", where=self.where)
        return leaf.inode

    def _id(self, untrusted: int) -> int:
        if not 0 <= untrusted <= _MAX_ID:
            raise Invalid(f"an entry has the owner {untrusted}", where=self.where)
        return untrusted

    # whiteouts

    def _white_out(self, parts: list[str]) -> None:
        """Hide what lower layers have; what this layer adds stays, whatever the order."""
        parent = self._directory(parts[:-1], make=False)
        if parent is None:
            return
        if parts[-1] == _OPAQUE:
            self._purge(parent)
        elif not parts[-1].startswith(_AUFS):
            self._hide(parent, parts[-1].removeprefix(_WHITEOUT))

    def _purge(self, directory: Directory) -> None:
        for name in list(directory.children):
            self._hide(directory, name)

    def _hide(self, parent: Directory, name: str) -> None:
        child = parent.children.get(name)
        if isinstance(child, Directory) and self.layer in {child.layer, child.touched}:
            self._purge(child)
        elif child is not None and child.layer != self.layer:
            del parent.children[name]


def _kind(member: tarfile.TarInfo) -> int | None:
    if member.issym():
        return stat.S_IFLNK
    if member.isfifo():
        return stat.S_IFIFO
    return stat.S_IFREG if member.isreg() else None


def _time_s(member: tarfile.TarInfo) -> int:
    return min(max(int(member.mtime), 0), _MAX_TIME_S)


def _xattrs(member: tarfile.TarInfo) -> dict[str, str]:
    """The extended attributes that mean something in a container."""
    found = {}
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        kept = name.startswith(_XATTRS_KEPT) and not name.startswith(_XATTRS_REFUSED)
        if key.startswith(_XATTR) and kept:
            found[name] = value
    return found


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def walk(root: Directory) -> Iterator[tuple[str, "Directory | Inode"]]:
    """Every path and node below ``root``, sorted, a directory before what is in it."""
    todo: list[tuple[str, Directory | Leaf]] = [("", root)]
    while todo:
        path, node = todo.pop()
        if path:
            yield path, node.inode if isinstance(node, Leaf) else node
        if isinstance(node, Directory):
            names = sorted(node.children, reverse=True)
            todo += [(posixpath.join(path, name), node.children[name]) for name in names]
