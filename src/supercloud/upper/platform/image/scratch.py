"""Scratch directories that a killed process does not leave behind for good, and a cache's age."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SETTLED_S = 60  # between making a directory and locking it nobody else may take it for stale
_UNUSED_S = 14 * 24 * 3600


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory in ``parent``, removed at the end; also what killed processes left of those."""
    for stale in parent.glob(f"{prefix}*"):
        _remove_if_stale(stale)
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)


def _remove_if_stale(place: Path) -> None:
    """Whoever still works in it holds its lock."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if time.time() - os.fstat(descriptor).st_ctime > _SETTLED_S:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def used(path: Path) -> Path:
    """Note that a cached thing was used now; what is another user's is for that one to keep."""
    with suppress(PermissionError):
        os.utime(path)
    return path


def expire(paths: Iterable[Path], *, unused_s: float = _UNUSED_S) -> list[Path]:
    """Remove what was not ``used`` for so long; what was removed."""
    now_s, gone = time.time(), []
    for path in paths:
        if now_s - path.stat().st_mtime > unused_s:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            gone.append(path)
    return gone
