"""Ranges of published host ports: which platform has which, kept in a file."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable

from supercloud.model.errors import NoResources

Range = tuple[int, int]
"""First port and count."""


def is_free(address: str, port: int) -> bool:
    """Whether TCP and UDP can be bound there now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    return False
                raise
    return True


class PortRanges:
    """Ranges out of ``first..last``, by the name of their holder; saved at each change."""

    def __init__(self, path: str, first: int, last: int, usable: Callable[[int], bool]) -> None:
        self._path, self._first, self._last, self._usable = path, first, last, usable
        self.held: dict[str, Range] = {}
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            self.held = {name: (start, count) for name, (start, count) in json.load(file).items()}

    @property
    def size(self) -> int:
        """How many ports there are in all."""
        return self._last - self._first + 1

    def allot(self, holder: str, count: int) -> Range:
        """The holder's range; made when there is none of this size. NoResources."""
        if self.held.get(holder, (0, -1))[1] == count:
            return self.held[holder]
        others = {name: value for name, value in self.held.items() if name != holder}
        start = self._find(others, count) if count else 0
        self.held = {**others, holder: (start, count)}
        self._save()
        return start, count

    def release(self, holder: str) -> None:
        """Give the holder's range back."""
        if self.held.pop(holder, None) is not None:
            self._save()

    def _find(self, others: dict[str, Range], count: int) -> int:
        taken = {port for start, size in others.values() for port in range(start, start + size)}
        start = self._first
        for port in range(self._first, self._last + 1):
            if port in taken or not self._usable(port):
                start = port + 1
            elif port - start + 1 == count:
                return start
        raise NoResources(
            f"no {count} host ports in a row are free in {self._first}-{self._last}",
            hint="ask for fewer ports, or the provider for a larger range (--ports)",
        )

    def _save(self) -> None:
        part = f"{self._path}.part"
        with open(part, "w", encoding="ascii") as file:
            json.dump(self.held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
