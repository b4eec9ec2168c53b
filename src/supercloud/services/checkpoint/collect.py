"""Retention and garbage collection; any number at a time, beside any number of writers.

Nothing is moved or rewritten, so a collection may stop at any effect and be run again. That no live
chunk is lost rests on four things, none of them a clock:

1. A pack belongs to the lease of its writer (same nonce) until the writer has ended.
2. Dropping a checkpoint: put the mark ``condemned``, then look for leases that name it, and only if
   there is none delete manifest and mark. A writer puts its lease, then looks for the mark, then
   for the manifest. One of the two sees the other.
3. A writer is given up (its lease is old) by a ``Void`` in the place of its manifest: its commit
   fails from then on, and if it was faster, it is no longer a writer but a checkpoint.
4. Packs are listed first, leases second, manifests last and in ascending order. A checkpoint that
   uses a pack of another one has a higher sequence and was there before that one could go; so a
   listing that misses the one, deleted ahead of it, comes to the other. If one that was listed is
   gone when it is read, the whole is done again. Hence a pack of none of the three is in nobody's
   use, and never will be again.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

from supercloud.model.errors import Busy, Exists, NotFound
from supercloud.services.checkpoint.chunks import pack_key
from supercloud.services.checkpoint.keys import Ref
from supercloud.services.checkpoint.lists import from_uses
from supercloud.services.checkpoint.manifest import (
    MAX_HISTORY,
    MAX_MANIFEST_BYTES,
    Head,
    Known,
    Lease,
    Manifest,
    Record,
    Sequence,
    Void,
    from_record,
    to_record,
)
from supercloud.services.checkpoint.retention import DAY_MS, Retention
from supercloud.services.checkpoint.store import Store
from supercloud.wire.codec import Limit

VOID_KEPT_MS: Final = 7 * DAY_MS
"""A commit under way for longer than this arrives nowhere."""
_MARK: Final = b"\0"
_ATTEMPTS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What is to stay of an EE: its newest checkpoint, and others by sequence or retention."""

    head: Head
    retention: Retention = field(default_factory=Retention)
    sequences: Annotated[list[Sequence], Limit(max_length=MAX_HISTORY)] | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """What a collection found and did. ``missing``: packs that live checkpoints lack."""

    dropped: list[tuple[str, int]] = field(default_factory=list)
    given_up: int = 0
    live_bytes: int = 0
    freed_bytes: int = 0
    freed_packs: int = 0
    missing: list[str] = field(default_factory=list)


def collect(
    store: Store,
    keep: Mapping[str, Keep],
    forget: Collection[str] = (),
    *,
    abandoned: Callable[[Ref, Lease], bool] | None = None,
) -> Report:
    """Drop what ``keep`` (by EE) does not want and all of the EEs to ``forget``; free the space.

    EEs in neither keep all they have. ``abandoned`` says whether a writer is to be given up; by
    default when its lease has run out. Refused, and nothing freed, when a record in the store is
    not authentic: what cannot be read may be in use. Busy when others drop too much meanwhile.
    """
    return _Collection(store, abandoned).run(keep, forget)


class _Collection:
    def __init__(self, store: Store, abandoned: Callable[[Ref, Lease], bool] | None) -> None:
        self._store, self._backend = store, store.backend
        self._abandoned = abandoned or self._has_run_out
        self._records: dict[str, Record] = {}
        self.report = Report()

    def run(self, keep: Mapping[str, Keep], forget: Collection[str]) -> Report:
        wanted = {self._store.keys.ee_id(ee): self._wanted(ee, k) for ee, k in keep.items()}
        wanted |= {self._store.keys.ee_id(ee): ({}, 1 << 48) for ee in forget}
        self._give_up()
        self._drop(wanted)
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(NotFound):
                self._sweep()
                return self.report
        raise Busy("too many checkpoints are being dropped at the same time")

    def _wanted(self, ee: str, keep: Keep) -> tuple[Collection[int], int]:
        """The sequences to keep, and that of the newest: what is above it is newer than we know."""
        newest = self._store.open(ee, keep.head)
        own = newest.manifest
        if keep.sequences is not None:
            return {own.sequence, *keep.sequences}, own.sequence
        known = Known(sequence=own.sequence, root=newest.root, taken_ms=own.taken_ms)
        return keep.retention.wanted([known, *own.history]), own.sequence

    def _has_run_out(self, _ref: Ref, lease: Lease) -> bool:
        return lease.expires_ms < self._store.clock_ms()

    def _give_up(self) -> None:
        for ref, lease in self._leases().items():
            if self._abandoned(ref, lease):
                key = ref.key("manifests")
                with contextlib.suppress(Exists):
                    void = Void(self._store.clock_ms())
                    self._backend.put(key, to_record(self._store.keys, key, void))
                    self.report.given_up += 1
                self._backend.delete(ref.key("leases"))

    def _drop(self, wanted: Mapping[str, tuple[Collection[int], int]]) -> None:
        marked = [Ref.of(item.key) for item in self._backend.list("condemned/")]
        for item in [*self._backend.list("manifests/")]:
            ref = Ref.of(item.key)
            kept, newest = wanted.get(ref.ee_id, ((), 0))
            if ref.sequence < newest and ref.sequence not in kept and self._may_go(item.key):
                with contextlib.suppress(Exists):
                    self._backend.put(ref.key("condemned"), _MARK)
                marked.append(ref)
        held = {key for lease in self._leases().values() for key in lease.reuses}
        for ref in sorted({ref for ref in marked if ref.key("manifests") not in held}):
            self._backend.delete(ref.key("manifests"))
            self._backend.delete(ref.key("condemned"))
            self.report.dropped.append((ref.ee_id, ref.sequence))

    def _may_go(self, key: str) -> bool:
        """Whether it is a checkpoint, or a void old enough; one that is not authentic may."""
        try:
            data = self._backend.get(key, 0, MAX_MANIFEST_BYTES + 1)
        except NotFound:
            return False
        record = from_record(self._store.keys, key, data)
        if isinstance(record, Void):
            return record.voided_ms + VOID_KEPT_MS < self._store.clock_ms()
        return True

    def _sweep(self) -> None:
        """Free the packs of nobody; NotFound when a checkpoint went away under us."""
        packs = {item.key: item.size_bytes for item in self._backend.list("packs/")}
        writers = {ref.nonce for ref in self._leases()}
        live: set[str] = set()
        for item in [*self._backend.list("manifests/")]:
            record = self._record(item.key)
            if isinstance(record, Manifest):
                uses = [from_uses(tree.packs) for tree in record.trees()]
                live.update(pack_key(pack) for use in uses for pack in use)
        self.report.missing = [key for key in sorted(live - packs.keys()) if self._is_gone(key)]
        self.report.live_bytes = sum(packs[key] for key in live & packs.keys())
        for key, size in packs.items():
            if key not in live and key.partition("/")[2].partition("-")[0] not in writers:
                self._backend.delete(key)
                self.report.freed_packs += 1
                self.report.freed_bytes += size

    def _is_gone(self, key: str) -> bool:
        """Whether a pack is not there, nor came after the listing."""
        try:
            return not self._backend.get(key, 0, 1)
        except NotFound:
            return True

    def _leases(self) -> dict[Ref, Lease]:
        found = {}
        for item in [*self._backend.list("leases/")]:
            with contextlib.suppress(NotFound):  # it has ended meanwhile
                record = self._record(item.key)
                if isinstance(record, Lease):
                    found[Ref.of(item.key)] = record
        return found

    def _record(self, key: str) -> Record:
        """What is at a key, which never changes there."""
        data = self._backend.get(key, 0, MAX_MANIFEST_BYTES + 1)
        if key not in self._records:
            self._records[key] = from_record(self._store.keys, key, data)
        return self._records[key]
