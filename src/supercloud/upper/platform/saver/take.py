"""Taking a checkpoint: what needs no pause, then what does, then what follows it."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial

from supercloud.model.errors import BadState
from supercloud.services.checkpoint.lists import Tree
from supercloud.services.checkpoint.manifest import Head, Manifest
from supercloud.services.checkpoint.pages import PAGE_BYTES, is_rebase_due
from supercloud.services.checkpoint.store import Checkpoint, Store
from supercloud.services.checkpoint.writer import Writer
from supercloud.upper.platform.saver.access import open_store
from supercloud.upper.platform.saver.lines import Lines
from supercloud.upper.platform.saver.requests import (
    DEVICE,
    FILES,
    MEMORY,
    Captured,
    Ready,
    Take,
    Write,
)
from supercloud.upper.platform.saver.tracking import Tracked
from supercloud.upper.platform.saver.trees import Copy
from supercloud.wire import checkpoints as wire
from supercloud.wire.codec import encode

_DISK = "disk-"


def serve(lines: Lines, take: Take) -> None:
    """The whole conversation after ``take``."""
    with contextlib.ExitStack() as opened:
        store = open_store(take.ucloud, take.store)
        opened.callback(store.close)
        job = (_Machine if take.pid else _Container)(store, take, opened)
        lines.say("ready", job.prepare())
        lines.next("capture")
        captured = job.capture()
        lines.say("captured", captured)
        wanted: Write = lines.next(Write)
        lines.say("taken", job.write(captured, {**take.details, **wanted.details}))


class _Job:
    def __init__(self, store: Store, take: Take, opened: contextlib.ExitStack) -> None:
        self._store, self._take, self._opened = store, take, opened
        self._head = Head(take.head.sequence, take.head.root) if take.head else None

    def _taken(
        self, head: Head, captured: Captured, *, base: bool, extra_bytes: int = 0
    ) -> wire.CheckpointTaken:
        manifest = self._store.open(self._take.ee, head).manifest
        parts = {part.name: part for part in manifest.parts}
        disks = [p.size_bytes for name, p in parts.items() if name.startswith("disk:")]
        return wire.CheckpointTaken(
            head=wire.Head(head.sequence, head.root),
            engine=self._take.engine,
            taken_ms=manifest.taken_ms,
            pause_ms=0.0,
            base=base,
            memory_bytes=parts[MEMORY].size_bytes,
            dirty_bytes=0 if base else captured.dirty_bytes,
            disk_bytes=sum(disks) + (parts[FILES].size_bytes if FILES in parts else 0),
            new_bytes=extra_bytes + sum(part.new_bytes for part in parts.values()),
            details=manifest.details,
        )


class _Machine(_Job):
    """A VM: pages since the base over the base, which is written anew when it is no good any more.

    The base is read while the machine runs: whatever of it changes meanwhile is dirty, and so in
    the increment, too. Alone it is no checkpoint; nobody is told of it, and it stays because the
    increment's manifest refers to it.
    """

    def prepare(self) -> Ready:
        """Have a base."""
        self._memory = Tracked(self._take.pid)
        self._opened.callback(self._memory.close)
        self._reuse: list[Checkpoint] = []
        self._base_bytes = 0
        self._tree = self._known()
        is_new = self._tree is None
        if self._tree is None:
            self._tree = self._new_base()
        self._buffer = bytearray()
        self._memory.kept(self._buffer)  # a rehearsal: the buffer is there when it counts
        return Ready(base=name_of(self._tree), is_new=is_new)

    def capture(self) -> Captured:
        """Copy the dirty pages."""
        self._kept = self._memory.kept(self._buffer)
        return Captured(dirty_bytes=self._kept.dirty_bytes)

    def write(self, captured: Captured, details: dict[str, str]) -> wire.CheckpointTaken:
        """Store all parts."""
        if self._tree is None:
            raise BadState("capture before prepare")
        kept, take = self._kept, self._take
        with Writer(self._store, take.ee, take.engine, self._head, self._reuse) as writer:
            writer.increment(MEMORY, self._tree, kept.runs, kept.read_at)
            for name, path in _files(take.directory):
                with open(path, "rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    writer.write_at(name, size, partial(_read_at, file.fileno()))
            head = writer.commit({**details, "captured_bytes": str(captured.dirty_bytes)})
        is_base = bool(self._reuse)
        return self._taken(head, captured, base=is_base, extra_bytes=self._base_bytes)

    def _known(self) -> Tree | None:
        """The base of the newest checkpoint, if pages have been tracked since that one."""
        if not self._take.base or self._head is None:
            return None
        manifest = self._store.open(self._take.ee, self._head).manifest
        tree = _base_of(manifest)
        if tree is None or name_of(tree) != self._take.base:
            return None
        dirty = sum(run.length for run in self._memory.dirty()) * PAGE_BYTES
        return None if is_rebase_due(dirty, _stored_bytes(self._store, tree)) else tree

    def _new_base(self) -> Tree:
        take, memory = self._take, self._memory
        memory.clear()
        with Writer(self._store, take.ee, take.engine, self._head) as writer:
            writer.write_at(MEMORY, memory.size_bytes, memory.read_at)
            head = writer.commit({"role": "base"})
        self._reuse = [self._store.open(take.ee, head)]
        part = self._reuse[0].manifest.part(MEMORY)
        self._base_bytes = part.new_bytes
        return part.tree


class _Container(_Job):
    """A container: CRIU's images, and the layer that it writes to."""

    def prepare(self) -> Ready:
        """Copy the layer while it is in use."""
        take = self._take
        self._layer = Copy(take.layer, f"{take.directory}/layer", take.owner)
        self._opened.callback(self._layer.close)
        self._layer.ahead()
        return Ready()

    def capture(self) -> Captured:
        """Copy what of the layer has changed."""
        return Captured(files_bytes=self._layer.finish())

    def write(self, captured: Captured, details: dict[str, str]) -> wire.CheckpointTaken:
        """Store both."""
        take = self._take
        images = Copy(f"{take.directory}/criu", f"{take.directory}/images", 0)
        self._opened.callback(images.close)
        images.finish()
        with Writer(self._store, take.ee, take.engine, self._head) as writer:
            writer.write(MEMORY, _reader(images.stream()))
            writer.write(FILES, _reader(self._layer.stream()))
            head = writer.commit(details)
        return self._taken(head, captured, base=True)


def name_of(tree: Tree) -> str:
    """What tells one base from another."""
    return hashlib.sha256(json.dumps(encode(tree), sort_keys=True).encode()).hexdigest()


def _base_of(manifest: Manifest) -> Tree | None:
    part = next((part for part in manifest.parts if part.name == MEMORY), None)
    return None if part is None else part.base


def _stored_bytes(store: Store, tree: Tree) -> int:
    """How much of a machine's memory its base holds: what is zero costs nothing to write anew."""
    return sum(1 for _ in store.entries(tree)) * 65536


def _files(directory: str) -> Iterator[tuple[str, str]]:
    """Parts that the engine wrote, and where."""
    yield DEVICE, f"{directory}/{DEVICE}"
    for name in sorted(os.listdir(directory)):
        if name.startswith(_DISK):
            yield f"disk:{name.removeprefix(_DISK)}", f"{directory}/{name}"


def _reader(pieces: Iterator[bytes]) -> Callable[[int], bytes]:
    """``read(size)`` over pieces."""
    left = memoryview(b"")

    def read(size: int) -> bytes:
        nonlocal left
        while not left:
            try:
                left = memoryview(next(pieces))
            except StopIteration:
                return b""
        data, left = bytes(left[:size]), left[size:]
        return data

    return read


def _read_at(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) != size:
        raise BadState("a file became shorter while it was read")
    return data
