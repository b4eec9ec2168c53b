"""Where checkpoints are kept: one small protocol, and the one in memory that tests compare with."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from supercloud.model.errors import Exists, Invalid, NotFound

_KEY: Final = re.compile(r"[a-z]{1,16}/[0-9a-z-]{1,200}")
_PREFIX: Final = re.compile(r"[a-z]{1,16}/[0-9a-z-]{0,200}")


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a listing."""

    key: str
    size_bytes: int


class Backend(Protocol):
    """Objects by key (``kind/name``), written once. Used by several threads at a time.

    A failure that may pass is raised as Temporary.
    """

    def put(self, key: str, data: bytes | bytearray) -> None:
        """Make the object, durable and whole at return; Exists when the key is taken."""

    def get(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """Its bytes from ``offset`` on, at most ``size``; fewer when it ends before. NotFound."""

    def list(self, prefix: str) -> Iterator[Item]:
        """All whose key starts so, in ascending order of keys.

        Ordered also in time: when an object ahead of what was listed so far is deleted after one
        with a higher key was put, that one is listed.
        """

    def delete(self, key: str) -> None:
        """The object is gone, durably; nothing happens when there is none."""


def checked(key: str) -> str:
    """The key, if it is one; Invalid."""
    if not _KEY.fullmatch(key):
        raise Invalid(f"{key!r:.80} is not an object's key")
    return key


def checked_prefix(prefix: str) -> str:
    """The prefix, if it is one of keys; Invalid."""
    if not _PREFIX.fullmatch(prefix):
        raise Invalid(f"{prefix!r:.80} is not a prefix of keys")
    return prefix


class Memory:
    """Objects in this process."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | bytearray) -> None:
        """As Backend."""
        with self._lock:
            if checked(key) in self.objects:
                raise Exists(f"{key} is there already")
            self.objects[key] = bytes(data)

    def get(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """As Backend."""
        try:
            data = self.objects[checked(key)]
        except KeyError:
            raise NotFound(f"no object {key}") from None
        return data[offset:] if size is None else data[offset : offset + size]

    def list(self, prefix: str) -> Iterator[Item]:
        """As Backend; a copy of the moment."""
        with self._lock:
            found = sorted(k for k in self.objects if k.startswith(checked_prefix(prefix)))
            items = [Item(key, len(self.objects[key])) for key in found]
        yield from items

    def delete(self, key: str) -> None:
        """As Backend."""
        with self._lock:
            self.objects.pop(checked(key), None)
