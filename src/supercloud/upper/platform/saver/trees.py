"""A directory with all that is in it, as one image: for a container's layer and CRIU's files.

An index (zlib over JSON), then the contents of its regular files, each at a place that does not
move as long as the files before it keep their sizes: small ones on the next 4 KiB, others on the
next 64 KiB, so that what has not changed gives the same chunks again. Owners are numbered from the
first id of the container, also in access lists and capabilities; extended attributes and whiteouts
of the overlay are kept.

``Copy`` reads a directory twice: once while it is in use, then, with everything at rest, only what
may have changed since. A file counts as unchanged if its change time is older than the beginning of
the first pass, before which the file system was synchronised: writing to a page of it, mapped or
not, would have set that time. Source: how ext4 keeps i_ctime (page_mkwrite updates it).

The first pass reads what a hostile program may move about at the same time. So everything is
reached from the descriptor of the directory that it lies in, none of which was opened through a
link, and what was opened is what was looked at.
"""

import base64
import errno
import json
import os
import stat
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from supercloud.model.errors import Invalid, NoResources

MAGIC: Final = b"SCTREE\x00\x01"
SMALL_BYTES: Final = 4096
LARGE_BYTES: Final = 65536
MAX_ENTRIES: Final = 1 << 20
MAX_INDEX_BYTES: Final = 512 << 20
OWNERS: Final = 65536
CLOCK_MARGIN_NS: Final = 50_000_000  # a tick of the kernel's coarse clock, several times
_HEADER: Final = struct.Struct("<8sQ")
_PIECE_BYTES: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FILE: Final = (errno.ELOOP, errno.ENXIO)  # a link or a socket by now

# attributes with ids in them (include/uapi/linux/capability.h, posix_acl_xattr.h)
_CAPABILITY: Final = "security.capability"
_CAPABILITY_BYTES, _CAPABILITY_ROOT_AT = 24, 20  # of version 3
_LISTS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_LIST_HEADER_BYTES, _LIST_ENTRY_BYTES, _LIST_ID_AT = 4, 8, 4
_LIST_NAMED: Final = (0x02, 0x08)  # of a user, of a group
_SPECIAL: Final = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)

Entry = dict[str, Any]
"""path, mode, uid, gid, mtime_ns; by kind: size, target, rdev; link (to the path); xattrs."""


class Copy:
    """The copy of ``top`` in the file ``spool`` (made); ``owner`` is the first id of its owners."""

    def __init__(self, top: str, spool: str, owner: int) -> None:
        self._top, self._owner = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), owner
        self._spool = os.open(spool, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._places: dict[tuple[int, int, int, int], int] = {}  # inode, size, times -> offset
        self._since_ns = 0
        self._entries: list[Entry] = []
        self._bodies: list[tuple[int, int]] = []

    def close(self) -> None:
        """Give the descriptors back; the spool is its directory's to remove."""
        os.close(self._spool)
        os.close(self._top)

    def ahead(self) -> None:
        """The first pass; files that go or change meanwhile do no harm."""
        since_ns = time.time_ns() - CLOCK_MARGIN_NS
        _sync()
        self._pass(lenient=True)
        self._since_ns = since_ns

    def finish(self) -> int:
        """The pass that counts, of a directory at rest; the bytes that had to be copied."""
        before = self._end
        self._pass(lenient=False)
        return self._end - before

    def stream(self) -> Iterator[bytes]:
        """The image, in pieces."""
        text = json.dumps(self._entries, separators=(",", ":")).encode()
        packed = zlib.compress(text, 1)
        yield from _padded(_HEADER.pack(MAGIC, len(packed)) + packed, LARGE_BYTES)
        at = 0
        for offset, size in self._bodies:
            start = _aligned(at, size)
            yield bytes(start - at)
            for done in range(0, size, _PIECE_BYTES):
                yield _exactly(self._spool, min(_PIECE_BYTES, size - done), offset + done)
            at = start + size

    def _pass(self, *, lenient: bool) -> None:
        self._entries, self._bodies = [], []
        links: dict[tuple[int, int], str] = {}
        for at, name, path in _walk(self._top):
            try:
                self._add(at, name, path, links)
            except (FileNotFoundError, NotADirectoryError, Invalid):
                if not lenient:
                    raise

    def _add(self, at: int, name: str, path: str, links: dict[tuple[int, int], str]) -> None:
        status = os.stat(name, dir_fd=at, follow_symlinks=False)
        if len(self._entries) >= MAX_ENTRIES:
            raise NoResources(f"more than {MAX_ENTRIES} files", where=path)
        entry = self._entry(at, name, path, status)
        inode = status.st_dev, status.st_ino
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1 and inode in links:
            self._entries.append({"path": path, "link": links[inode]})
            return
        if stat.S_ISREG(status.st_mode):
            self._bodies.append(self._body(at, name, status))
            entry["size"] = self._bodies[-1][1]
        self._entries.append(entry)
        links.setdefault(inode, path)

    def _entry(self, at: int, name: str, path: str, status: os.stat_result) -> Entry:
        uid, gid = status.st_uid - self._owner, status.st_gid - self._owner
        if not (0 <= uid < OWNERS and 0 <= gid < OWNERS):
            raise Invalid(f"{path!r:.200} belongs to nobody of the environment")
        entry: Entry = {
            "path": path, "mode": status.st_mode, "uid": uid, "gid": gid,
            "mtime_ns": status.st_mtime_ns,
        }  # fmt: skip
        if stat.S_ISLNK(status.st_mode):
            entry["target"] = os.readlink(name, dir_fd=at)
        elif stat.S_IFMT(status.st_mode) in _SPECIAL:
            entry["rdev"] = status.st_rdev
        if found := _attributes(f"/proc/self/fd/{at}/{name}", self._owner):
            entry["xattrs"] = found
        return entry

    def _body(self, at: int, name: str, status: os.stat_result) -> tuple[int, int]:
        """Where the content is in the spool, and its length."""
        key = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        place = self._places.get(key)
        if place is not None and status.st_ctime_ns < self._since_ns:
            return place, status.st_size
        start, file = self._end, _opened(at, name, status)
        try:  # no more than it had: one that grows all the time has no end
            while data := os.read(file, min(_PIECE_BYTES, start + status.st_size - self._end)):
                _write_all(self._spool, data, self._end)
                self._end += len(data)
        finally:
            os.close(file)
        self._places[key] = start
        return start, self._end - start


def _opened(at: int, name: str, status: os.stat_result) -> int:
    """The file that ``status`` is of; Invalid when there is another one by now."""
    try:
        file = os.open(name, _READ, dir_fd=at)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise Invalid(f"{name!r:.200} is no file any more") from error
        raise
    found = os.fstat(file)
    if (found.st_dev, found.st_ino) != (status.st_dev, status.st_ino):
        os.close(file)
        raise Invalid(f"{name!r:.200} is another file by now")
    return file


def unpack(image: int, top: str, owner: int) -> None:
    """Make what an image holds, below the empty directory ``top``.

    The image is authentic, but another platform made it: no path leads out of ``top``.
    """
    magic, length = _HEADER.unpack(_exactly(image, _HEADER.size, 0))
    if magic != MAGIC or length > MAX_INDEX_BYTES:
        raise Invalid("this is no image of a directory")
    entries = _index(_exactly(image, length, _HEADER.size))
    root = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    directories: list[Entry] = []
    at, first = 0, -(-(_HEADER.size + length) // LARGE_BYTES) * LARGE_BYTES
    try:
        for entry in entries:
            size = int(entry.get("size", 0))
            if size < 0:
                raise Invalid("an image of a directory has a file of less than nothing")
            start = _aligned(at, size)
            _make(root, entry, image, first + start, owner)
            at = start + int(entry["size"]) if "size" in entry else at
            if stat.S_ISDIR(entry.get("mode", 0)):
                directories.append(entry)
        for entry in reversed(directories):  # what was made in them has changed their times
            with _Parent(root, entry["path"]) as (parent, name):
                times = entry["mtime_ns"], entry["mtime_ns"]
                os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise Invalid(f"an image of a directory makes no sense: {error!r:.200}") from error
    finally:
        os.close(root)


def _index(untrusted: bytes) -> list[Entry]:
    """The entries that an image names; what they are is looked at one by one."""
    reading = zlib.decompressobj()
    try:
        text = reading.decompress(untrusted, MAX_INDEX_BYTES)
        if not reading.eof or reading.unused_data:
            raise Invalid("an image of a directory has an index that is too large, or cut short")
        entries = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise Invalid(f"an image of a directory has no index: {error!r:.200}") from error
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise Invalid(f"an image of a directory has no list of {MAX_ENTRIES} files at most")
    return entries


class _Parent:
    """The directory of a path below ``root``, opened without following any link; and the name."""

    def __init__(self, root: int, path: str) -> None:
        self._parts = path.split("/")
        if path != "." and any(part in ("", ".", "..") or "\0" in part for part in self._parts):
            raise Invalid(f"{path!r:.200} is no path in an image")
        self._at = os.dup(root)

    def __enter__(self) -> tuple[int, str]:
        for part in self._parts[:-1]:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=self._at)
            except BaseException:
                os.close(self._at)
                raise
            os.close(self._at)
            self._at = below
        return self._at, self._parts[-1]

    def __exit__(self, *_: object) -> None:
        os.close(self._at)


def _make(root: int, entry: Entry, image: int, offset: int, owner: int) -> None:
    with _Parent(root, entry["path"]) as (parent, name):
        if "link" in entry:
            with _Parent(root, entry["link"]) as (there, old):
                os.link(old, name, src_dir_fd=there, dst_dir_fd=parent, follow_symlinks=False)
            return
        mode = entry["mode"]
        if stat.S_ISDIR(mode):
            if name != ".":
                os.mkdir(name, 0o700, dir_fd=parent)
        elif stat.S_ISLNK(mode):
            os.symlink(entry["target"], name, dir_fd=parent)
        elif stat.S_ISREG(mode):
            _fill(parent, name, image, offset, entry["size"])
        elif stat.S_IFMT(mode) in _SPECIAL:
            if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and entry["rdev"] != 0):
                raise Invalid(f"{entry['path']!r:.200} is a device")  # but a whiteout
            os.mknod(name, mode, entry["rdev"], dir_fd=parent)
        else:
            raise Invalid(f"{entry['path']!r:.200} is of no kind")
        _dress(parent, name, entry, owner)


def _fill(parent: int, name: str, image: int, offset: int, size: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        for done in range(0, size, _PIECE_BYTES):
            data = _exactly(image, min(_PIECE_BYTES, size - done), offset + done)
            _write_all(file, data, done)
    finally:
        os.close(file)


def _dress(parent: int, name: str, entry: Entry, owner: int) -> None:
    """Owner first: changing it clears bits of the mode and attributes."""
    uid, gid = entry["uid"], entry["gid"]
    if not (0 <= uid < OWNERS and 0 <= gid < OWNERS):
        raise Invalid(f"{entry['path']!r:.200} belongs to {uid}:{gid}")
    os.chown(name, owner + uid, owner + gid, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISLNK(entry["mode"]):
        os.chmod(name, entry["mode"] & 0o7777, dir_fd=parent)
    path = f"/proc/self/fd/{parent}/{name}"
    for attribute, value in entry.get("xattrs", {}).items():
        data = _renumbered(attribute, base64.b64decode(value), 0, owner)
        os.setxattr(path, attribute, data, follow_symlinks=False)
    times = entry["mtime_ns"], entry["mtime_ns"]
    os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


def _walk(root: int) -> Iterator[tuple[int, str, str]]:
    """(directory, name in it, path in the image), directories before what is in them.

    In order of names. The directory is open until the next one comes.
    """
    yield root, ".", "."
    todo = [""]
    while todo:
        below = todo.pop()
        try:
            at = _below(root, below)
        except (FileNotFoundError, NotADirectoryError):
            continue  # the pass that counts would not have found it gone
        try:
            names = sorted(os.listdir(at))
            paths = [f"{below}/{name}" if below else name for name in names]
            for name, path in zip(names, paths, strict=True):
                yield at, name, path
            both = zip(reversed(names), reversed(paths), strict=True)
            todo += [path for name, path in both if _is_directory(at, name)]
        finally:
            os.close(at)


def _below(root: int, path: str) -> int:
    """A directory, opened without following any link."""
    if not path:
        return os.dup(root)
    with _Parent(root, path) as (parent, name):
        return os.open(name, _DIRECTORY, dir_fd=parent)


def _is_directory(at: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _attributes(path: str, owner: int) -> dict[str, str]:
    """Extended attributes, in base64; not those that name inodes of this file system."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
        found = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return {}
        raise
    return {
        name: base64.b64encode(_renumbered(name, value, owner, 0)).decode()
        for name, value in found.items()
        if name not in ("trusted.overlay.origin", "trusted.overlay.uuid")
    }


def _renumbered(attribute: str, value: bytes, since: int, to: int) -> bytes:
    """With ids that count from ``to``, not ``since``: without that they would be other people's."""
    places: Sequence[int] = ()
    if attribute == _CAPABILITY and len(value) == _CAPABILITY_BYTES:
        places = [_CAPABILITY_ROOT_AT]
    elif attribute in _LISTS:
        entries = range(_LIST_HEADER_BYTES, len(value) - _LIST_ENTRY_BYTES + 1, _LIST_ENTRY_BYTES)
        places = [at + _LIST_ID_AT for at in entries if value[at] in _LIST_NAMED]
    data = bytearray(value)
    for place in places:
        (number,) = struct.unpack_from("<I", data, place)
        if not 0 <= number - since < OWNERS:
            raise Invalid(f"{attribute} names {number}, who is nobody of the environment")
        struct.pack_into("<I", data, place, number - since + to)
    return bytes(data)


def _sync() -> None:
    """Every dirty page is written and mapped read-only again, so that the next write shows."""
    os.sync()


def _aligned(at: int, size: int) -> int:
    unit = LARGE_BYTES if size >= LARGE_BYTES else SMALL_BYTES
    return -(-at // unit) * unit


def _padded(data: bytes, unit: int) -> Iterator[bytes]:
    yield data
    yield bytes(-len(data) % unit)


def _exactly(file: int, size: int, offset: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise Invalid("an image of a directory is cut short")
    return data


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
