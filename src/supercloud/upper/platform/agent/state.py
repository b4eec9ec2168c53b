"""Small files in memory, replaced atomically: what the next agent must know. Sparse ones."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any


def read_json(path: str, default: Any) -> Any:
    """The value in ``path``, or ``default`` when there is no such file."""
    try:
        with open(path, "rb") as file:
            return json.loads(file.read())
    except FileNotFoundError:
        return default


def write_json(path: str, value: Any) -> None:
    """Readable by us alone: environments hold secrets."""
    write_private(path, json.dumps(value, separators=(",", ":")))


def write_private(path: str, text: str, mode: int = 0o600) -> None:
    """Replace ``path``; readers see the old text or the new one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    file, data = os.open(f"{path}.part", flags, mode), text.encode()
    try:
        while data:
            data = data[os.write(file, data) :]
    finally:
        os.close(file)
    os.replace(f"{path}.part", path)


def remove_tree(path: str) -> None:
    """Delete a directory with all that is in it; nothing happens when it is not there."""
    import shutil  # noqa: PLC0415 -- it loads three compression libraries, which start-up need not

    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def extents(file: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has anything: starts and ends, in bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end
