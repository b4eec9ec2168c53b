"""A journal of sealed records in segment files: what its reader gets is what its writer made sure.

A segment is ``<number>.log``: a magic and a random salt, from which with the user's key follows a
key that nothing else was ever sealed under; then records of a length (4 bytes) and a sealed body.
The nonce is the record's index, so nothing can be left out, moved or repeated. A new segment is
begun at every start: its first record says how many records of the one before count (what lies
behind them is a torn end) and which segment is the oldest. So the last segment vouches for all.
What the journal cannot see is that all of its end was cut off: ``position`` is for that, which
whoever keeps the key compares (``Journal(least=)``).
"""

import hashlib
import hmac
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final

from supercloud.model.errors import Invalid, Permanent
from supercloud.services.objects.aead import NONCE_BYTES, TAG_BYTES, Aead

SEGMENT_BYTES: Final = 16 << 20
MAX_RECORD_BYTES: Final = 8 << 20
_MAGIC: Final = b"SCOBJ-J1"
_SALT_BYTES: Final = 32
_NAME: Final = re.compile(r"([0-9a-f]{16})\.log")
_LENGTH: Final = struct.Struct(">I")
_DATA, _DROPPED = b"d", b"o"

Position = tuple[int, int]
"""(segment, records in it): later ones compare as greater."""


class Journal:
    """Appends to the newest segment; ``replay`` gives what was there before, once, at the start.

    ``directory`` is a descriptor, the caller's. Permanent when the journal was altered.
    """

    def __init__(self, directory: int, key: bytes, *, least: Position = (0, 0)) -> None:
        self._directory, self._key, self._least = directory, key, least
        self._file, self._written_bytes = -1, 0
        self._aead = Aead(bytes(32))  # until a segment is begun
        self.sizes: dict[int, int] = {}
        self.segment, self.records = 0, 0
        self.position: Position = (0, 0)  # the end of what was flushed
        self._oldest = 1

    @property
    def size_bytes(self) -> int:
        """Of all segments."""
        return sum(self.sizes.values())

    @property
    def oldest(self) -> int:
        """The oldest segment that counts."""
        return self._oldest

    def replay(self, take: Callable[[bytes], None]) -> None:
        """``take(record)`` for all that counts, in order; then begin a new segment."""
        numbers = self._numbers()
        last = numbers[-1] if numbers else 0
        newest = list(self._bodies(last, None)) if last else []
        if newest:
            self._make_sure(last)
            dropped = [int(body[1:]) for body in newest if body[:1] == _DROPPED]
            self._oldest = max([json.loads(newest[0])["oldest"], *dropped])
        if (last, len(newest)) < self._least:
            raise Permanent(
                f"the journal ends at {(last, len(newest))}, but had reached {self._least}:"
                " it was rolled back"
            )
        for number in range(self._oldest, last):
            for record in self.read(number):
                take(record)
        for body in newest:
            if body[:1] == _DATA:
                take(body[1:])
        self._begin(last + 1, len(newest))
        for number in numbers:  # what a crash left of a drop
            if number < self._oldest:
                self._unlink(number)

    def append(self, record: bytes) -> None:
        """Write a record; it is safe from a crash of the machine after ``flush``."""
        if self._written_bytes > SEGMENT_BYTES:
            self.flush()
            self._begin(self.segment + 1, self.records)
        self._append(_DATA + record)

    def flush(self) -> None:
        """All that was appended is on the disk when this returns."""
        reached = (self.segment, self.records)
        os.fdatasync(self._file)
        self.position = reached

    def read(self, number: int) -> Iterator[bytes]:
        """The records of a finished segment that count."""
        for body in self._bodies(number, self._claims(number + 1)["before"]):
            if body[:1] == _DATA:
                yield body[1:]

    def drop_oldest(self) -> None:
        """Forget the oldest segment: all of it that matters was appended again and flushed."""
        number = self._oldest
        if number >= self.segment:
            raise Invalid("the newest segment is in use")
        self._oldest = number + 1
        self._append(_DROPPED + str(self._oldest).encode())
        self.flush()
        self._unlink(number)

    def close(self) -> None:
        """Flush and end."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1

    def _unlink(self, number: int) -> None:
        os.unlink(_file(number), dir_fd=self._directory)
        self.sizes.pop(number, None)

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(name) for name in os.listdir(self._directory))
        return sorted(int(match[1], 16) for match in found if match)

    def _begin(self, number: int, before: int) -> None:
        salt = os.urandom(_SALT_BYTES)
        part = f"{_file(number)}.part"  # seen under its name only with its first record
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(part, flags, 0o600, dir_fd=self._directory)
        self.close()
        self._file, self.segment, self.records = file, number, 0
        self._aead = self._cipher(number, salt)
        self._written_bytes = os.write(file, _MAGIC + salt)
        claims = {"before": before, "oldest": self._oldest}
        self._append(json.dumps(claims).encode())
        self.flush()
        where = {"src_dir_fd": self._directory, "dst_dir_fd": self._directory}
        os.rename(part, _file(number), **where)
        os.fsync(self._directory)

    def _append(self, body: bytes) -> None:
        sealed = self._aead.seal(_nonce(self.records), body, b"")
        data = memoryview(_LENGTH.pack(len(sealed)) + sealed)
        self._written_bytes += len(data)
        while data:
            data = data[os.write(self._file, data) :]
        self.records += 1
        self.sizes[self.segment] = self._written_bytes

    def _cipher(self, number: int, salt: bytes) -> Aead:
        return Aead(hmac.digest(self._key, b"segment %d " % number + salt, hashlib.sha256))

    def _claims(self, number: int) -> dict[str, Any]:
        body = next(self._bodies(number, 1))
        claims: dict[str, Any] = json.loads(body)
        return claims

    def _bodies(self, number: int, limit: int | None) -> Iterator[bytes]:
        """The first ``limit`` records, all there; without a limit those up to a torn end."""
        untrusted = self._read_file(number)
        place = len(_MAGIC) + _SALT_BYTES
        if untrusted[: len(_MAGIC)] != _MAGIC or len(untrusted) < place:
            raise Permanent(f"{_file(number)} is no segment of the journal")
        aead, index = self._cipher(number, untrusted[len(_MAGIC) : place]), 0
        while index != limit:
            head = untrusted[place : place + _LENGTH.size]
            size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
            place += _LENGTH.size
            sealed = untrusted[place : place + size]
            try:
                if not TAG_BYTES < size <= MAX_RECORD_BYTES or len(sealed) < size:
                    raise Invalid("not a whole record")
                body = aead.open(_nonce(index), sealed, b"")
            except Invalid as error:
                if limit is None and index:
                    return  # never flushed: the end of what counts
                raise Permanent(
                    f"{_file(number)}, record {index}: {error}: altered, or another key"
                ) from error
            yield body
            place, index = place + size, index + 1

    def _read_file(self, number: int) -> bytes:
        try:
            file = os.open(_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError as error:
            raise Permanent(f"{_file(number)} of the journal is missing") from error
        with open(file, "rb") as reading:
            data = reading.read()
        self.sizes[number] = len(data)
        return data

    def _make_sure(self, number: int) -> None:
        """What was read of the last segment may not be on the disk yet; it counts from now on."""
        file = os.open(_file(number), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _file(number: int) -> str:
    return f"{number:016x}.log"


def _nonce(index: int) -> bytes:
    return index.to_bytes(NONCE_BYTES, "big")
