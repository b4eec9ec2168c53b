"""Logs of the core: grants and measurements, both JSON lines chained by SHA-256, and its own words.

A grant is written before it takes effect, and is in the page cache then: enough to recover from
the core's death. Once a second it is put on the disk; who loses power loses the domains anyway.
An attestation replays the measurements: each event extends a register ``SHA-256(register ||
digest)``; a TPM's register will be extended alike (field ``pcr``).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from supercloud.model.refusals import Invalid

ZERO = "0" * 64


class Chain:
    """An append-only file of JSON lines; ``h`` of each is the hash over the one before and it."""

    def __init__(self, path: str, *, fresh: bool) -> None:
        """Go on with a file, or with ``fresh`` put the old one aside and begin a new one."""
        whole: list[bytes] = []
        if os.path.exists(path):
            with open(path, "rb") as file:
                whole = [line for line in file if line.endswith(b"\n")]
            os.truncate(path, sum(map(len, whole)))  # a last line that was torn
            if fresh:
                os.replace(path, f"{path}.1")
        self._head = json.loads(whole[-1])["h"] if whole else ZERO
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        body = json.dumps(record, separators=(",", ":"))
        self._head = hashlib.sha256(f"{self._head}{body}".encode()).hexdigest()
        line = f'{{"h":"{self._head}","r":{body}}}\n'.encode()
        if os.write(self._descriptor, line) != len(line):
            raise OSError("short write to a log")

    def sync(self) -> None:
        """Put what was appended on the disk."""
        os.fdatasync(self._descriptor)


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


def hash_file(path: str) -> str:
    """SHA-256 of a whole file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(directory: str) -> str:
    """SHA-256 over names and hashes of the Python files below a directory."""
    found = [os.path.join(d, name) for d, _, names in os.walk(directory) for name in names]
    code = sorted(path for path in found if path.endswith((".py", ".pyc")))
    lines = [f"{os.path.relpath(path, directory)} {hash_file(path)}\n" for path in code]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def say(event: str, **what: Any) -> None:
    """One line of the core's own log, on stderr."""
    line = {"t": round(time.time(), 3), "event": f"core.{event}", **what}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)
