"""Writing a merged tree as erofs: a tar stream into the tool tree's mkfs.erofs."""

import hashlib
import stat
import subprocess
import tarfile
import tempfile
import uuid
from pathlib import Path
from typing import IO

from supercloud.model.errors import Invalid, Permanent
from supercloud.upper.environments.layers import Directory, Inode, walk
from supercloud.upper.environments.tars import MEMBER_ERRORS
from supercloud.upper.platform.image.tools import ToolTree

_NAMESPACE = uuid.UUID("0d9a3f7e-58b7-5f7e-9a9e-5a8f0c2b6d11")
_BUILD_TIME_S = 0  # of the file system itself; every file keeps its own
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def write_erofs(root: Directory, out: Path, key: str, tools: ToolTree) -> None:
    """Write the tree to ``out``. Equal trees and ``key`` give equal files."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    command = [
        *tools.argv("mkfs.erofs"),
        "--quiet",
        "--tar=f",
        f"-T{_BUILD_TIME_S}",
        "--mkfs-time",
        f"-U{uuid.uuid5(_NAMESPACE, digest)}",
        str(out),
    ]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as process:
            assert process.stdin is not None  # noqa: S101 -- asked for above
            broken = _feed(root, process.stdin)
        if process.returncode != 0 or broken:
            said.seek(0)
            text = said.read(4096).decode(errors="replace").strip()
            raise Permanent(f"mkfs.erofs failed with status {process.returncode}: {text}")


def _feed(root: Directory, pipe: IO[bytes]) -> bool:
    """Write the tar; whether the reader went away early."""
    try:
        _write_tar(root, pipe)
        pipe.close()
    except BrokenPipeError:
        return True
    return False


def _write_tar(root: Directory, out: IO[bytes]) -> None:
    with tarfile.open(
        fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as tar:
        tar.addfile(_entry("", root))
        named: dict[int, str] = {}
        for path, node in walk(root):
            tar.members.clear()  # type: ignore[attr-defined]
            if isinstance(node, Directory):
                tar.addfile(_entry(path, node))
            elif first := named.get(id(node)):
                tar.addfile(_hard_link(path, first))
            else:
                named[id(node)] = path
                _add_inode(tar, path, node)


def _entry(path: str, node: Directory | Inode) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{path}")
    info.type = tarfile.DIRTYPE
    info.mode, info.uid, info.gid, info.mtime = node.mode, node.uid, node.gid, node.mtime_s
    info.pax_headers = {f"SCHILY.xattr.{name}": value for name, value in node.xattrs.items()}
    return info


def _hard_link(path: str, first: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"./{path}")
    info.type, info.linkname = tarfile.LNKTYPE, f"./{first}"
    return info


def _add_inode(tar: tarfile.TarFile, path: str, inode: Inode) -> None:
    info = _entry(path, inode)
    info.type, info.linkname = _TYPES[inode.kind], inode.target
    if inode.content is None:
        tar.addfile(info)
        return
    layer, member = inode.content
    try:
        source = layer.extractfile(member)
    except MEMBER_ERRORS as error:
        raise Invalid(f"{path!r} cannot be read from its layer: {error}") from error
    info.size = member.size
    tar.addfile(info, source)
