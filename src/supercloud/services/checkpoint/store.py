"""The checkpoints of one U-Cloud: begin one, open one.

Names in the store: ``manifests``, ``leases`` and ``condemned`` by ``Ref`` (sequence, EE's id, a
nonce), ``packs`` by the writer's nonce. Sequences ascend over the whole store: a checkpoint has a
higher one than all that it reuses, on which ``collect`` relies.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from supercloud.model.errors import Busy, NotFound
from supercloud.services.checkpoint.backend import Backend
from supercloud.services.checkpoint.chunks import PACK_BYTES, opened, pack_key
from supercloud.services.checkpoint.keys import Keys, Ref, Refused
from supercloud.services.checkpoint.lists import Entry, Tree, from_table, unpack_entries
from supercloud.services.checkpoint.manifest import (
    MAX_HISTORY,
    MAX_MANIFEST_BYTES,
    Head,
    Known,
    Lease,
    Manifest,
    from_record,
    root_of,
    to_record,
)
from supercloud.services.checkpoint.pipeline import Pipeline

PATIENCE_S: Final = 6 * 3600.0
"""How long a writer may take before a collection may give it up."""
_MAX_FORKS: Final = 16
_MAX_WORKERS: Final = 6
"""Each may hold a pack, and what comes of it; a service's memory does not grow with its host."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An authentic one."""

    ref: Ref
    root: str
    manifest: Manifest

    @property
    def head(self) -> Head:
        """What is to be kept of it."""
        return Head(self.ref.sequence, self.root)


@dataclass(frozen=True, slots=True)
class Begun:
    """What a writer starts from; its lease is in the store."""

    ref: Ref
    parent: Checkpoint | None
    reuses: list[Checkpoint]
    history: list[Known]


def _workers() -> int:
    return min((os.cpu_count() or 1) + 1, _MAX_WORKERS)


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Store:
    """A backend under the keys of a U-Cloud. ``workers``: threads for chunks, at most one call."""

    def __init__(
        self,
        backend: Backend,
        keys: Keys,
        *,
        workers: int | None = None,
        pack_bytes: int = PACK_BYTES,
        clock_ms: Callable[[], int] = now_ms,
    ) -> None:
        self.pack_bytes = pack_bytes
        self.backend, self.keys, self.clock_ms = backend, keys, clock_ms
        self.pipeline = Pipeline(_workers() if workers is None else workers)

    def close(self) -> None:
        """End the threads."""
        self.pipeline.close()

    def open(self, ee: str, head: Head, sequence: int | None = None) -> Checkpoint:
        """The newest checkpoint of an EE, or the older one that it vouches for.

        Refused unless it is the one that ``head`` names; NotFound for a sequence that it does not
        know (dropped, or never there).
        """
        newest = self._load(ee, head)
        if sequence is None or sequence == head.sequence:
            return newest
        for known in newest.manifest.history:
            if known.sequence == sequence:
                return self._load(ee, Head(known.sequence, known.root))
        raise NotFound(f"{ee} has no checkpoint {sequence}", hint="supercloud checkpoints")

    def begin(
        self,
        ee: str,
        head: Head | None,
        reuse: Sequence[Checkpoint] = (),
        patience_s: float = PATIENCE_S,
    ) -> Begun:
        """A lease for the next checkpoint, deduplicated against the newest and ``reuse``.

        Busy when one of those is just being dropped. See ``writer.Writer``.
        """
        parent = self._load(ee, head) if head is not None else None
        reuses = [*([parent] if parent else []), *reuse]
        ref = self._next_ref(ee, [checkpoint.ref.sequence for checkpoint in reuses])
        lease = Lease(
            self.clock_ms() + int(patience_s * 1000),
            [checkpoint.ref.key("manifests") for checkpoint in reuses],
        )
        key = ref.key("leases")
        self.backend.put(key, to_record(self.keys, key, lease))
        try:
            for checkpoint in reuses:
                self._hold(checkpoint.ref)
        except BaseException:
            self.backend.delete(key)
            raise
        return Begun(ref, parent, reuses, self._history(parent))

    def segments(self, tree: Tree) -> list[Entry]:
        """The table of a tree's segments."""
        return from_table(tree.table)

    def segment(self, entry: Entry) -> list[Entry]:
        """The entries of one segment."""
        data = self.range(pack_key(entry.place.pack), entry.place.offset, entry.place.stored)
        return unpack_entries(opened(self.keys.pack(entry.place.pack), entry, data, None))

    def entries(self, tree: Tree) -> Iterator[Entry]:
        """All entries of a tree, in ascending order of blocks."""
        for entry in self.segments(tree):
            yield from self.segment(entry)

    def range(self, key: str, offset: int, size: int) -> bytes:
        """Bytes of a pack; Refused when it is not there."""
        try:
            return self.backend.get(key, offset, size)
        except NotFound:
            raise Refused("missing", f"{key} is not in the store") from None

    def _load(self, ee: str, head: Head) -> Checkpoint:
        prefix = f"manifests/{head.sequence:012x}-{self.keys.ee_id(ee)}-"
        reason = Refused("missing", f"checkpoint {head.sequence} of {ee} is not in the store")
        for number, item in enumerate(self.backend.list(prefix)):
            if number == _MAX_FORKS:
                break
            data = self.backend.get(item.key, 0, MAX_MANIFEST_BYTES + 1)
            try:
                record = from_record(self.keys, item.key, data)
            except Refused as error:
                reason = error
                continue
            if root_of(data) == head.root and isinstance(record, Manifest):
                return Checkpoint(Ref.of(item.key), head.root, record)
            text = f"checkpoint {head.sequence} of {ee} in the store is not the one that was taken"
            reason = Refused("replayed", text)
        raise reason

    def _next_ref(self, ee: str, above: list[int]) -> Ref:
        for kind in ("leases/", "manifests/"):
            above = [
                max(above, default=0),
                *(Ref.of(i.key).sequence for i in self.backend.list(kind)),
            ]
        sequence = max(above, default=0) + 1
        ee_id = self.keys.ee_id(ee)
        return Ref(sequence, ee_id, self.keys.new_nonce(ee_id, sequence))

    def _hold(self, ref: Ref) -> None:
        """What our lease names is really there, and stays: the order of the two questions counts.

        Whoever drops it puts the mark, looks for leases, deletes it, and then the mark.
        """
        for kind, there in (("condemned", False), ("manifests", True)):
            if self._is_there(ref.key(kind)) is not there:
                raise Busy(f"checkpoint {ref.sequence} is just being dropped")

    def _is_there(self, key: str) -> bool:
        with contextlib.suppress(NotFound):
            self.backend.get(key, 0, 1)
            return True
        return False

    def _history(self, parent: Checkpoint | None) -> list[Known]:
        if parent is None:
            return []
        own = parent.manifest
        known = Known(sequence=own.sequence, root=parent.root, taken_ms=own.taken_ms)
        kept = {
            Ref.of(i.key).sequence
            for i in self.backend.list("manifests/")
            if parent.ref.ee_id in i.key
        }
        return [known, *(k for k in own.history if k.sequence in kept)][:MAX_HISTORY]
