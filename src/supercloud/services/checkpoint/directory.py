"""Objects as files of a directory, durable at return; any number of processes at a time.

A file appears whole under its name or not at all: it is written without one (O_TMPFILE), synced,
and then linked, which fails when the name is taken. A writer that dies leaves nothing behind. The
file system must know O_TMPFILE (ext4, XFS, Btrfs, tmpfs do).
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from supercloud.model.errors import Exists, NoResources, NotFound, Temporary, Unsupported
from supercloud.services.checkpoint.backend import Item, checked, checked_prefix

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Directory:
    """The objects below ``root``, which exists and is ours alone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kinds: set[str] = set()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        os.close(os.open(root / ".lock", flags, 0o600))
        _sync(root)

    def put(self, key: str, data: bytes | bytearray) -> None:
        """As Backend; NoResources when the disk is full."""
        path = self._path(key)
        self._make_kind(path.parent)
        try:
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
                raise Unsupported(f"{self._root}: its file system has no O_TMPFILE") from error
            raise _translated(error) from error
        try:
            _write(descriptor, data)
            self._link(descriptor, path)
        except FileExistsError:
            raise Exists(f"{key} is there already") from None
        except OSError as error:
            raise _translated(error) from error
        finally:
            os.close(descriptor)
        _sync(path.parent)

    def get(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """As Backend."""
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"no object {key}") from None
        with open(descriptor, "rb", buffering=0) as file:
            left = os.fstat(descriptor).st_size - offset
            wanted = max(0, left if size is None else min(left, size))
            file.seek(offset)
            return _read(file.fileno(), wanted)

    def list(self, prefix: str) -> Iterator[Item]:
        """As Backend: nothing is put or deleted while the names are read."""
        kind, _, start = checked_prefix(prefix).partition("/")
        directory = self._root / kind
        try:
            with self._locked(fcntl.LOCK_EX):
                names = os.listdir(directory)
        except FileNotFoundError:
            return
        for name in sorted(name for name in names if name.startswith(start)):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                yield Item(f"{kind}/{name}", os.stat(directory / name).st_size)

    def delete(self, key: str) -> None:
        """As Backend."""
        path = self._path(key)
        with self._locked(fcntl.LOCK_SH), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if path.parent.is_dir():
            _sync(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / checked(key)

    def _make_kind(self, directory: Path) -> None:
        if directory.name not in self._kinds:
            directory.mkdir(mode=0o700, exist_ok=True)
            _sync(self._root)
            self._kinds.add(directory.name)

    def _link(self, descriptor: int, path: Path) -> None:
        with self._locked(fcntl.LOCK_SH):
            # os.link follows links (linkat) only when it is also given a directory
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        descriptor = os.open(self._root / ".lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _read(descriptor: int, wanted: int) -> bytes:
    data = os.read(descriptor, wanted)
    if len(data) in (wanted, 0):
        return data
    pieces = [data]
    while data and (wanted := wanted - len(data)):
        data = os.read(descriptor, wanted)
        pieces.append(data)
    return b"".join(pieces)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError) -> Exception:
    if error.errno in _FULL:
        return NoResources(
            "the disk of the checkpoints is full", hint="keep fewer, or give it more room"
        )
    return Temporary(f"the directory of the checkpoints: {error.strerror}")
