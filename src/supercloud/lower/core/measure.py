"""Logs of the core: grants and measurements, both JSON lines chained by SHA-256, and its own words.

A line of the grant log is written before the record takes effect. It reaches the page cache at
once, which is all that recovery from the core's own death needs; it is put on the disk by
:meth:`Chain.sync` once a second, since a host that loses power loses its domains anyway.

The measurement log is what an attestation replays: each event extends a register
``SHA-256(register || digest)``; a TPM's register will be extended alike (field ``pcr``).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from supercloud.lower.core.manifest import Sealed
from supercloud.model.errors import Invalid

_CHUNK_BYTES, _PIECE_BYTES, _MAX_FILE_BYTES, ZERO = 1 << 20, 1 << 23, 1 << 21, "0" * 64


class Chain:
    """An append-only file of JSON lines; ``h`` of each is the hash over the one before and it."""

    def __init__(self, path: str, *, fresh: bool) -> None:
        """Go on with a file, or with ``fresh`` put the old one aside and begin a new one."""
        self._head, self._dirty, flags = ZERO, False, os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        with open(path, "rb") as file:
            whole = [line for line in file if line.endswith(b"\n")]
        if whole:
            self._head = json.loads(whole[-1])["h"]
        os.ftruncate(self._descriptor, sum(map(len, whole)))  # a last line that was torn
        if fresh and whole:
            os.close(self._descriptor)
            os.replace(path, f"{path}.1")
            self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        body = json.dumps(record, separators=(",", ":"))
        self._head = hashlib.sha256(f"{self._head}{body}".encode()).hexdigest()
        line = f'{{"h":"{self._head}","r":{body}}}\n'.encode()
        if os.write(self._descriptor, line) != len(line):
            raise OSError("short write to a log")
        self._dirty = True

    def sync(self) -> None:
        """Put what was appended on the disk."""
        if self._dirty:
            os.fdatasync(self._descriptor)
            self._dirty = False


def read_chain(path: str) -> Iterator[dict[str, Any]]:
    """The records of a chain; :class:`Invalid` where it does not hold. The start is trusted."""
    head = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                body = json.dumps(entry["r"], separators=(",", ":"))
            except (ValueError, KeyError, TypeError) as error:
                raise Invalid("a damaged line", where=f"{path}:{number}") from error
            if head and entry["h"] != hashlib.sha256(f"{head}{body}".encode()).hexdigest():
                raise Invalid("the chain is broken", where=f"{path}:{number}")
            head = entry["h"]
            yield entry["r"]


class Measurements:
    """The event log of what this host runs; ``fresh`` as for a chain."""

    def __init__(self, path: str, *, fresh: bool) -> None:
        known = [] if fresh else list(read_chain(path))
        self._register = known[-1]["register"] if known else ZERO
        self._count, self._chain = len(known), Chain(path, fresh=fresh)

    def extend(self, event: str, digest: str, subject: str) -> None:
        """Note that ``subject`` of that SHA-256 is in use from now on."""
        self._register = hashlib.sha256(bytes.fromhex(self._register + digest)).hexdigest()
        what = {"index": self._count, "event": event, "subject": subject, "digest": digest}
        self._chain.append({**what, "register": self._register, "pcr": None})
        self._count += 1
        self._chain.sync()


def hash_descriptor(descriptor: int) -> str:
    """SHA-256 of a whole file."""
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def hash_in_rounds(
    descriptors: list[int],
    later: Callable[[Callable[[], None]], None],
    done: Callable[[str], None],
) -> None:
    """SHA-256 of the file ``descriptors[0]``, a piece in each round, so that nobody waits long.

    ``done`` gets it, or an empty text when the list was emptied meanwhile: the file is gone.
    """
    digest, offset = hashlib.sha256(), 0

    def piece() -> None:
        nonlocal offset
        data = os.pread(descriptors[0], _PIECE_BYTES, offset) if descriptors else b""
        digest.update(data)
        offset += len(data)
        if len(data) == _PIECE_BYTES:
            later(piece)
        else:
            done(digest.hexdigest() if descriptors else "")

    piece()


def hash_tree(directory: str) -> str:
    """SHA-256 over names and hashes of the Python files below a directory."""
    found = [os.path.join(d, name) for d, _, names in os.walk(directory) for name in names]
    digest = hashlib.sha256()
    for path in sorted(path for path in found if path.endswith((".py", ".pyc"))):
        with open(path, "rb") as file:
            line = f"{os.path.relpath(path, directory)} {hash_descriptor(file.fileno())}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def read_sealed(sealed: Sealed) -> bytes:
    """A file's content, if it has the hash that is expected of it."""
    with open(sealed.path, "rb") as file:
        content = file.read(_MAX_FILE_BYTES)
    if sealed.sha256 and hashlib.sha256(content).hexdigest() != sealed.sha256:
        raise Invalid(f"{sealed.path} is not what the manifest says")
    return content


def say(event: str, **what: Any) -> None:
    """One line of the core's own log, on stderr."""
    line = {"t": round(time.time(), 3), "event": f"core.{event}", **what}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)
