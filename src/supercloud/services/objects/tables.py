"""Weed's metadata in memory: values by key, sorted sets, and what each bucket has of them.

Keys are as weed's ``redis2`` store makes them: ``/buckets/B/dir/name`` is an entry,
``/buckets/B/dir`` and a zero byte the sorted set of the names in it. ``Change`` is the record of
the journal: an operation, a key and a value or member.
"""

import struct
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from supercloud.model.errors import Invalid
from supercloud.services.objects.entries import size_bytes

SET, DELETE, ADD, REMOVE = b"s", b"x", b"+", b"-"
RECORD_BYTES: Final = 1024
"""What an entry is charged at least, beside its content."""
_OVERHEAD_BYTES: Final = 512  # of a key and a value in memory and journal
_KEY_LENGTH: Final = struct.Struct(">cI")
_BUCKETS: Final = b"/buckets/"


class Change(NamedTuple):
    """One change of the tables."""

    operation: bytes
    key: bytes
    value: bytes = b""

    def to_bytes(self) -> bytes:
        """The journal's record."""
        return _KEY_LENGTH.pack(self.operation, len(self.key)) + self.key + self.value


def from_bytes(record: bytes) -> Change:
    """The change that a record says; Invalid."""
    if len(record) < _KEY_LENGTH.size:
        raise Invalid("a record too short")
    operation, size = _KEY_LENGTH.unpack_from(record)
    place = _KEY_LENGTH.size + size
    return Change(operation, record[_KEY_LENGTH.size : place], record[place:])


@dataclass(slots=True)
class Usage:
    """Of one bucket, all versions and unfinished uploads with it."""

    content_bytes: int = 0
    entries: int = 0
    charged_bytes: int = 0  # content and records: what the quota is held against


class Tables:
    """The state; ``changed(bucket)`` is called when a bucket's usage has changed."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.usage: dict[str, Usage] = {}
        self.live_bytes = 0
        self.changed: Callable[[str], None] = lambda _bucket: None
        self._sets: dict[bytes, list[bytes]] = {}

    def apply(self, change: Change) -> bool:
        """Make a change; whether it was one."""
        if change.operation == SET:
            return self._put(change.key, change.value)
        if change.operation == DELETE:
            return self._put(change.key, None) | self._clear(change.key)
        if change.operation in (ADD, REMOVE):
            return self._member(change)
        raise Invalid(f"no operation {change.operation!r}")

    def current(self, change: Change) -> Change | None:
        """The change that brings about what is now at the place of an earlier one, if anything."""
        if change.operation == SET and change.key in self.values:
            return Change(SET, change.key, self.values[change.key])
        if change.operation == ADD and self._has(change.key, change.value):
            return change
        return None

    def between(self, key: bytes, low: bytes, high: bytes, count: int) -> list[bytes]:
        """Members of a set from ``low`` to ``high``, as ``ZRANGEBYLEX`` words its bounds."""
        members = self._sets.get(key, [])
        begin, end = _place(members, low, upper=False), _place(members, high, upper=True)
        return members[begin : min(end, begin + count) if count >= 0 else end]

    def content_bytes(self, path: bytes) -> int:
        """The size of the entry of that path, or of the largest of its versions; 0 if none."""
        paths = [
            path,
            *(path + b".versions/" + m for m in self._sets.get(path + b".versions\0", [])),
        ]
        return max(size_bytes(self.values[p]) if p in self.values else 0 for p in paths)

    def _put(self, key: bytes, value: bytes | None) -> bool:
        old = self.values.get(key)
        if value == old:
            return False
        self._account(key, old, value)
        if value is None:
            del self.values[key]
        else:
            self.values[key] = value
        return True

    def _account(self, key: bytes, old: bytes | None, new: bytes | None) -> None:
        for value, sign in ((old, -1), (new, 1)):
            if value is not None:
                self.live_bytes += sign * (len(key) + len(value) + _OVERHEAD_BYTES)
        bucket = _bucket_of(key)
        if not bucket:
            return
        usage = self.usage.setdefault(bucket, Usage())
        for value, sign in ((old, -1), (new, 1)):
            if value is not None:
                size = size_bytes(value)
                record = max(RECORD_BYTES, len(key) + len(value) + _OVERHEAD_BYTES)
                usage.content_bytes += sign * size
                usage.charged_bytes += sign * (size + record)
                usage.entries += sign
        if not usage.entries:
            del self.usage[bucket]
        self.changed(bucket)

    def _clear(self, key: bytes) -> bool:
        members = self._sets.pop(key, [])
        self.live_bytes -= sum(self._member_bytes(key, member) for member in members)
        return bool(members)

    def _member(self, change: Change) -> bool:
        adding = change.operation == ADD
        if self._has(change.key, change.value) is adding:
            return False
        members = self._sets.setdefault(change.key, [])
        place = bisect_left(members, change.value)
        if adding:
            members.insert(place, change.value)
        else:
            del members[place]
            if not members:
                del self._sets[change.key]
        size = self._member_bytes(change.key, change.value)
        self.live_bytes += size if adding else -size
        return True

    def _has(self, key: bytes, member: bytes) -> bool:
        members = self._sets.get(key, [])
        place = bisect_left(members, member)
        return place < len(members) and members[place] == member

    @staticmethod
    def _member_bytes(key: bytes, member: bytes) -> int:
        return len(key) + len(member) + _OVERHEAD_BYTES // 4


def _bucket_of(key: bytes) -> str:
    """The bucket that an entry is in; none for buckets themselves and weed's own."""
    if not key.startswith(_BUCKETS):
        return ""
    name, _, rest = key[len(_BUCKETS) :].partition(b"/")
    return name.decode(errors="replace") if rest and not name.startswith(b".") else ""


def _place(members: list[bytes], bound: bytes, *, upper: bool) -> int:
    """The index at which a bound of ``ZRANGEBYLEX`` cuts."""
    if bound in (b"-", b"+"):
        return 0 if bound == b"-" else len(members)
    if bound[:1] not in (b"[", b"("):
        raise Invalid("a bound begins with [ or (")
    after = (bound[:1] == b"[") is upper  # just behind that very name
    return bisect_left(members, bound[1:] + (b"\0" if after else b""))
