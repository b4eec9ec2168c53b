"""Words that are not to be on a disk: looked for in all that there is below a directory."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

PIECE_BYTES = 4 << 20


def shown(
    place: Path, words: Sequence[bytes], piece_bytes: int = PIECE_BYTES
) -> dict[bytes, list[str]]:
    """Which of the words are in files below a directory, whatever is in them, or in their names."""
    found: dict[bytes, list[str]] = {}
    for path in place.rglob("*"):
        name = os.fsencode(path.relative_to(place))
        there = {word for word in words if word in name}
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                there |= _shown_in(path, words, piece_bytes)
        for word in there:
            found.setdefault(word, []).append(os.fsdecode(name))
    return found


def _shown_in(path: Path, words: Sequence[bytes], piece_bytes: int) -> set[bytes]:
    """Piece by piece, each with the end of the one before: a word may lie over their border."""
    found, overlap = set(), max(map(len, words)) - 1
    with path.open("rb", buffering=0) as file:
        for at, end in _written(file.fileno()):
            file.seek(at)
            data = b""
            while piece := file.read(min(piece_bytes, end - file.tell())):
                data = data[max(0, len(data) - overlap) :] + piece
                found |= {word for word in words if word in data}
    return found


def _written(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where the file is no hole: disks are much larger than what is on them."""
    end = 0
    with contextlib.suppress(OSError):  # nothing more is written behind it
        while True:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, end
