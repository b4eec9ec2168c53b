"""Writing one checkpoint: parts stream in, blocks go through the pipeline, ``commit`` names it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, NamedTuple, Self

from supercloud.model.errors import BadState, Exists, Invalid, SupercloudError
from supercloud.services.checkpoint.chunks import MAX_INDEX, REUSE_FROM, Packs
from supercloud.services.checkpoint.lists import (
    ALL_PAGES,
    BLOCK_BYTES,
    BLOCKS_OF_SEGMENT,
    MAX_PART_BYTES,
    PAGE_BYTES,
    PAGES_OF_BLOCK,
    Entry,
    Place,
    Tree,
    Use,
    from_uses,
    pack_entries,
    to_table,
    to_uses,
)
from supercloud.services.checkpoint.manifest import (
    MAX_PARTS,
    Head,
    Manifest,
    Part,
    Void,
    root_of,
    to_record,
)
from supercloud.services.checkpoint.pages import Run
from supercloud.services.checkpoint.store import Checkpoint, Store
from supercloud.wire.codec import decode, encode

BATCH_BLOCKS: Final = 16
BATCH_BYTES: Final = BATCH_BLOCKS * BLOCK_BYTES
_ZEROS: Final = bytes(BLOCK_BYTES)

Read = Callable[[int], bytes]
"""``read(size)``: the next bytes of a stream, at most that many; none at its end."""
ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, size)``: exactly these bytes; called by several threads at a time."""


class Piece(NamedTuple):
    """Some pages of a block, and how to get them."""

    block: int
    pages: int
    read: Callable[[], bytes]


@dataclass(slots=True)
class _Pending:
    """A part that is written, until the sizes of its packs are known."""

    name: str
    size_bytes: int
    base: Tree | None
    segments: list[Entry] = field(default_factory=list)
    uses: dict[bytes, int] = field(default_factory=dict)
    new_bytes: int = 0

    def used(self, place: Place) -> None:
        self.uses[place.pack] = self.uses.get(place.pack, 0) + place.stored


class Writer:
    """One checkpoint being written; as a context manager it is given up unless committed.

    ``reuse``: checkpoints beside the newest whose chunks may be used and whose parts may be bases.
    """

    def __init__(
        self,
        store: Store,
        ee: str,
        engine: str,
        head: Head | None = None,
        reuse: Iterable[Checkpoint] = (),
    ) -> None:
        begun = store.begin(ee, head, [*reuse])
        self._store, self._ee, self._engine, self._begun = store, ee, engine, begun
        self.ref, self.parent = begun.ref, begun.parent
        self._parts: list[_Pending] = []
        nonce = bytes.fromhex(begun.ref.nonce)
        self._packs = Packs(store.keys, nonce, store.backend.put, store.pack_bytes)
        self._sizes: dict[bytes, int] = {}
        self._attempted = self._ended = False
        try:
            self._reusable = self._worth_reusing()
            self._is_index_whole = self._remember()
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._ended:
            self.abort()

    def write(self, name: str, read: Read) -> None:
        """A whole part from a stream of any length; runs of zeros cost nothing."""
        part = self._new_part(name, None)

        def batches() -> Iterator[list[Piece]]:
            while data := _filled(read, BATCH_BYTES):
                yield [*_cut(part.size_bytes // BLOCK_BYTES, data)]
                part.size_bytes += len(data)
                if part.size_bytes > MAX_PART_BYTES:
                    raise Invalid(f"{name} is larger than {MAX_PART_BYTES} bytes")

        self._fill(part, batches(), is_base=True)

    def write_at(
        self, name: str, size_bytes: int, read_at: ReadAt, offsets: Iterable[int] | None = None
    ) -> None:
        """A whole part of known size, read by several threads at once.

        ``offsets``: of the batches of ``BATCH_BYTES`` that are not all zeros, ascending.
        """
        part = self._new_part(name, None, size_bytes)
        offsets = range(0, size_bytes, BATCH_BYTES) if offsets is None else offsets
        self._fill(
            part,
            ([*_at(offset, min(BATCH_BYTES, size_bytes - offset), read_at)] for offset in offsets),
            is_base=True,
        )

    def increment(self, name: str, base: Tree, runs: Iterable[Run], read_at: ReadAt) -> None:
        """A part as the pages that differ from ``base``, an image of this or a reused checkpoint.

        ``runs`` ascend. Invalid when the base is not held by this writer's lease.
        """
        if not any(base == tree for held in self._begun.reuses for tree in held.manifest.trees()):
            raise Invalid(f"the base of {name} is not of a checkpoint that this one reuses")
        if base.size_bytes % PAGE_BYTES:
            raise Invalid(f"{name}: {base.size_bytes} bytes are not whole pages")
        part = self._new_part(name, base, base.size_bytes)
        pieces = _gathered(runs, read_at, base.size_bytes // PAGE_BYTES)
        self._fill(part, _grouped(pieces), is_base=False)

    def commit(self, details: Mapping[str, str] | None = None) -> Head:
        """Make it a checkpoint: durable, and the newest once its Head is kept.

        BadState when a collection gave this writer up meanwhile.
        """
        if self._ended or not self._parts:
            raise BadState("a checkpoint of nothing" if not self._ended else "it has ended")
        self._packs.finish()
        self._sizes |= self._packs.sizes
        begun, key = self._begun, self.ref.key("manifests")
        manifest = Manifest(
            ucloud=self._store.keys.ucloud,
            ee=self._ee,
            sequence=self.ref.sequence,
            engine=self._engine,
            taken_ms=self._store.clock_ms(),
            parent=begun.parent.head if begun.parent else None,
            history=begun.history,
            parts=[self._finished(part) for part in self._parts],
            details=dict(details or {}),
        )
        data = to_record(self._store.keys, key, decode(Manifest, encode(manifest)))
        self._attempted = True
        try:
            self._store.backend.put(key, data)
        except Exists:
            self.abort()
            raise BadState(
                f"checkpoint {self.ref.sequence} took too long and was given up",
                hint="take it again",
            ) from None
        self._ended = True
        with contextlib.suppress(SupercloudError):  # else it runs out by itself
            self._store.backend.delete(self.ref.key("leases"))
        return Head(self.ref.sequence, root_of(data))

    def abort(self) -> None:
        """Give it up; what was stored for it is the next collection's."""
        self._ended = True
        with contextlib.suppress(SupercloudError):  # else the lease runs out by itself
            if self._attempted:  # it may still arrive: stand in its place
                key = self.ref.key("manifests")
                void = to_record(self._store.keys, key, Void(self._store.clock_ms()))
                with contextlib.suppress(Exists):
                    self._store.backend.put(key, void)
            self._store.backend.delete(self.ref.key("leases"))

    def _worth_reusing(self) -> set[bytes]:
        """The packs of which the reused checkpoints still use enough."""
        used: dict[bytes, int] = {}
        for held in self._begun.reuses:
            for tree in held.manifest.trees():
                for pack, use in from_uses(tree.packs).items():
                    self._sizes[pack] = use.size_bytes
                    used[pack] = used.get(pack, 0) + use.used_bytes
        return {pack for pack, bytes_ in used.items() if bytes_ >= REUSE_FROM * self._sizes[pack]}

    def _remember(self) -> bool:
        """Load the names of the chunks there are; False when they are too many."""
        for held in self._begun.reuses:
            for tree in held.manifest.trees():
                for segment in self._store.segments(tree):
                    if len(self._packs.index) > MAX_INDEX // 2:
                        return False
                    self._packs.index.update(self._names([segment]))
                    self._packs.index.update(self._names(self._store.segment(segment)))
        return True

    def _names(self, entries: list[Entry]) -> dict[bytes, Place]:
        return {e.name: e.place for e in entries if e.place.pack in self._reusable}

    def _near(self, part: _Pending) -> Callable[[int], dict[bytes, Place]]:
        """The names in the parent's segment of that number, when the index could not hold all."""
        parent = self._begun.parent
        if self._is_index_whole or parent is None:
            return lambda _number: {}
        trees = [p.tree for p in parent.manifest.parts if p.name == part.name]
        segments = {e.block: e for tree in trees for e in self._store.segments(tree)}

        def names(number: int) -> dict[bytes, Place]:
            entry = segments.get(number)
            return self._names(self._store.segment(entry)) if entry else {}

        return names

    def _new_part(self, name: str, base: Tree | None, size_bytes: int = 0) -> _Pending:
        if self._ended:
            raise BadState("this checkpoint has ended")
        if size_bytes > MAX_PART_BYTES or len(self._parts) == MAX_PARTS:
            raise Invalid(f"{name}: a checkpoint has at most {MAX_PARTS} parts of bounded size")
        if any(part.name == name for part in self._parts):
            raise Invalid(f"{name} is written already")
        part = _Pending(name, size_bytes, base)
        self._parts.append(part)
        return part

    def _fill(self, part: _Pending, batches: Iterable[list[Piece]], *, is_base: bool) -> None:
        tasks = self._tasks(batches, self._near(part), is_base)
        waiting: list[Entry] = []
        for entries, new_bytes in self._store.pipeline.ordered(tasks):
            part.new_bytes += new_bytes
            for entry in entries:
                if waiting and _segment_of(waiting[0]) != _segment_of(entry):
                    self._close_segment(part, waiting)
                    waiting = []
                waiting.append(entry)
                part.used(entry.place)
        if waiting:
            self._close_segment(part, waiting)

    def _tasks(
        self,
        batches: Iterable[list[Piece]],
        near_of: Callable[[int], dict[bytes, Place]],
        is_base: bool,
    ) -> Iterator[Callable[[], tuple[list[Entry], int]]]:
        number, near = -1, {}
        for batch in batches:
            if batch and batch[0].block // BLOCKS_OF_SEGMENT != number:
                number = batch[0].block // BLOCKS_OF_SEGMENT
                near = near_of(number)
            yield lambda batch=batch, near=near: self._stored(batch, near, is_base)  # type: ignore[misc]

    def _stored(
        self, batch: list[Piece], near: dict[bytes, Place], is_base: bool
    ) -> tuple[list[Entry], int]:
        """On a worker: the entries of a batch, and what they cost."""
        pack, entries, new_bytes = self._packs.take(), [], 0
        try:
            for block, pages, read in batch:
                data = read()
                if is_base and data == _ZEROS[: len(data)]:
                    continue
                name, place, cost = self._packs.add(pack, data, near)
                entries.append(Entry(block, pages, name, place))
                new_bytes += cost
        finally:
            self._packs.give(pack)
        return entries, new_bytes

    def _close_segment(self, part: _Pending, entries: list[Entry]) -> None:
        pack = self._packs.take()
        try:
            name, place, cost = self._packs.add(pack, pack_entries(entries), {})
        finally:
            self._packs.give(pack)
        part.segments.append(Entry(_segment_of(entries[0]), ALL_PAGES, name, place))
        part.used(place)
        part.new_bytes += cost

    def _finished(self, part: _Pending) -> Part:
        uses = {
            pack: Use(self._sizes[pack], min(used, self._sizes[pack]))
            for pack, used in part.uses.items()
        }
        tree = Tree(size_bytes=part.size_bytes, table=to_table(part.segments), packs=to_uses(uses))
        return Part(name=part.name, tree=tree, base=part.base, new_bytes=part.new_bytes)


def _segment_of(entry: Entry) -> int:
    return entry.block // BLOCKS_OF_SEGMENT


def _filled(read: Read, size: int) -> bytes:
    data = read(size)
    if len(data) == size or not data:
        return data
    pieces, left = [data], size - len(data)
    while left and (data := read(left)):
        pieces.append(data)
        left -= len(data)
    return b"".join(pieces)


def _cut(first: int, data: bytes) -> Iterator[Piece]:
    """The blocks of a batch that was read."""
    for number, start in enumerate(range(0, len(data), BLOCK_BYTES), first):
        piece = data[start : start + BLOCK_BYTES]
        yield Piece(number, ALL_PAGES, lambda piece=piece: piece)  # type: ignore[misc]


def _at(offset: int, size: int, read_at: ReadAt) -> Iterator[Piece]:
    """The blocks of a batch that is to be read by whoever works on it."""
    for start in range(offset, offset + size, BLOCK_BYTES):
        length = min(BLOCK_BYTES, offset + size - start)
        yield Piece(
            start // BLOCK_BYTES,
            ALL_PAGES,
            lambda start=start, length=length: read_at(start, length),  # type: ignore[misc]
        )


def _gathered(runs: Iterable[Run], read_at: ReadAt, page_count: int) -> Iterator[Piece]:
    """One piece for each block that has pages in the runs."""
    parts: list[Run] = []
    block, pages, last = -1, 0, 0
    for run in runs:
        if run.page < last or run.length < 1 or run.page + run.length > page_count:
            raise Invalid(f"run of {run.length} pages from {run.page} of {page_count} after {last}")
        last = run.page + run.length
        for part in _by_block(run):
            if part.page // PAGES_OF_BLOCK != block:
                if parts:
                    yield _piece(block, pages, parts, read_at)
                block, pages, parts = part.page // PAGES_OF_BLOCK, 0, []
            pages |= ((1 << part.length) - 1) << part.page % PAGES_OF_BLOCK
            parts.append(part)
    if parts:
        yield _piece(block, pages, parts, read_at)


def _by_block(run: Run) -> Iterator[Run]:
    page, end = run.page, run.page + run.length
    while page < end:
        stop = min(end, (page // PAGES_OF_BLOCK + 1) * PAGES_OF_BLOCK)
        yield Run(page, stop - page)
        page = stop


def _piece(block: int, pages: int, parts: list[Run], read_at: ReadAt) -> Piece:
    def read() -> bytes:
        return b"".join(read_at(r.page * PAGE_BYTES, r.length * PAGE_BYTES) for r in parts)

    return Piece(block, pages, read)


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == BATCH_BLOCKS:
            yield batch
            batch = []
    if batch:
        yield batch
