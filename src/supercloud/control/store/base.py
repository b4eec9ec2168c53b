"""What a store of the control plane is: versioned rows, changed one at a time, watched by prefix.

A *revision* counts every change of the whole store, from 1. A row's *version* is the revision of
its last change; version 0 means "not there". All changes are compare-and-set on that version, so
that two writers never overwrite each other unseen. A change that returned is on the disk.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from supercloud.model.errors import Invalid, Temporary

MAX_KEY_CHARS = 512
MAX_VALUE_BYTES = 4 << 20


class Conflict(Temporary):
    """The row has another version than the caller thought: read again, decide again."""

    def __init__(self, key: str, expected: int, found: int) -> None:
        """``expected`` and ``found`` are versions; 0 is a row that is not there."""
        super().__init__(f"{key} has version {found}, not {expected}", delay_s=0.02)
        self.key, self.expected, self.found = key, expected, found


class Compacted(Temporary):
    """The changes asked for are no longer known: list, then watch from that revision."""

    def __init__(self, message: str) -> None:
        """A compacted watch can be started anew at once."""
        super().__init__(message, delay_s=0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """A row as of its last change."""

    key: str
    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Change:
    """One change, in the order of revisions; ``row`` is None when the row was deleted."""

    revision: int
    key: str
    row: Row | None


class Watch(Protocol):
    """Changes as they become durable; ends with Compacted when the reader fell too far behind."""

    def __aiter__(self) -> AsyncIterator[Change]:
        """Iterate over the changes."""
        ...

    async def __anext__(self) -> Change:
        """The next change; waits for it."""
        ...

    def close(self) -> None:
        """Stop watching; a pending ``__anext__`` ends the iteration."""
        ...


class Store(Protocol):
    """The store protocol. Keys are texts with ``/`` between their parts; values are bytes."""

    async def get(self, key: str) -> Row | None:
        """The row, or None."""
        ...

    async def list(self, prefix: str) -> tuple[list[Row], int]:
        """The rows whose key starts with ``prefix``, by key, and the store's revision then."""
        ...

    async def put_if_version(self, key: str, value: bytes, version: int) -> int:
        """Write the row if its version is ``version``; its new version. Raises Conflict."""
        ...

    async def delete_if_version(self, key: str, version: int) -> int:
        """Delete the row if its version is ``version``; the revision. Raises Conflict."""
        ...

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Changes under ``prefix`` with a revision above ``from_revision``. Raises Compacted."""
        ...

    async def close(self) -> None:
        """Finish what was asked for, and let go of the storage."""
        ...


def check(key: str, value: bytes = b"") -> None:
    """Raise Invalid for a key or a value beyond the store's limits."""
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable():
        raise Invalid(f"not a key for the store: {key!r:.80}")
    if len(value) > MAX_VALUE_BYTES:
        raise Invalid(
            f"{key}: {len(value)} bytes are more than a row holds ({MAX_VALUE_BYTES})",
            hint="make two U-Clouds of one that is so large",
        )
