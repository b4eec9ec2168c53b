"""Blobs that a template is to have ready: held until it is made, or nobody asks for it any more.

They are the user's own images. What holds them is memory of this domain, so there is a limit
(``MAX_CONTENT_BYTES``) for all of them together.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from supercloud.model.errors import Busy, Invalid
from supercloud.wire.content import MAX_CONTENT_BYTES, blobs_of, lay_out, to_header
from supercloud.wire.messages import Blob, EnvironmentSpec
from supercloud.wire.peer import Stream

KEPT_S: Final = 300.0


@dataclass(slots=True)
class _Held:
    """``descriptor`` is a file in memory; whole once it was verified."""

    descriptor: int
    size_bytes: int
    whole: bool = False
    since_s: float = field(default_factory=time.monotonic)


class Contents:
    """By digest."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def missing(self, environments: Sequence[EnvironmentSpec]) -> list[str]:
        """Digests of the blobs that are to be sent first."""
        self._forget_old()
        whole = {digest for digest, held in self._held.items() if held.whole}
        return sorted(blobs_of(environments).keys() - whole)

    async def take(self, blob: Blob, stream: Stream) -> None:
        """A blob as it comes. Busy: there is no room now, or somebody else sends it; Invalid."""
        self._forget_old()
        used = sum(held.size_bytes for held in self._held.values())
        if blob.digest in self._held or used + blob.size_bytes > MAX_CONTENT_BYTES:
            raise Busy("it is held already, or there is no room for it now")
        held = _Held(os.memfd_create("blob", os.MFD_CLOEXEC), blob.size_bytes)
        self._held[blob.digest] = held
        try:
            await _receive(blob, stream, held.descriptor)
            held.whole = True
        finally:
            if not held.whole:
                self._drop(blob.digest)

    def disk(self, environments: Sequence[EnvironmentSpec], size_bytes: int) -> int:
        """A disk of that size with all of it: a descriptor, the caller's. The blobs are given up.

        Invalid: they do not fit, or are not all here.
        """
        content = lay_out(environments)
        end = max((b.offset_bytes + b.size_bytes for b in content.blobs), default=0)
        if self.missing(environments) or end > size_bytes:
            raise Invalid("not all blobs are here, or the scratch disk is too small for them")
        disk = os.memfd_create("scratch", os.MFD_CLOEXEC)
        try:
            os.ftruncate(disk, size_bytes)
            os.pwrite(disk, to_header(content), 0)
            for placed in content.blobs:
                os.lseek(disk, placed.offset_bytes, os.SEEK_SET)
                _copy(self._held[placed.digest].descriptor, disk, placed.size_bytes)
                self._drop(placed.digest)
        except BaseException:
            os.close(disk)
            raise
        return disk

    def _forget_old(self) -> None:
        for digest, held in list(self._held.items()):
            if held.whole and time.monotonic() - held.since_s > KEPT_S:
                self._drop(digest)

    def _drop(self, digest: str) -> None:
        with contextlib.suppress(KeyError):
            os.close(self._held.pop(digest).descriptor)


async def _receive(blob: Blob, stream: Stream, descriptor: int) -> None:
    hasher, count = hashlib.sha256(), 0
    async for data in stream.chunks():
        count += len(data)
        if count > blob.size_bytes:
            raise Invalid(f"{blob.digest} has more than {blob.size_bytes} bytes")
        hasher.update(data)
        os.write(descriptor, data)
    if count < blob.size_bytes or f"sha256:{hasher.hexdigest()}" != blob.digest:
        raise Invalid(f"what came as {blob.digest} is something else")


def _copy(source: int, target: int, size_bytes: int) -> None:
    done = 0
    while done < size_bytes:
        done += os.sendfile(target, source, done, size_bytes - done)
