"""An independent reader of a backing file: recovers, verifies and reads it as the engine should.

It shares no code with the engine, so that a test, or a user who doubts, has a second opinion. It
needs ``cryptography`` and therefore runs on the user's side. Memory: all entries of the device.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from supercloud.services.protection import format as fmt
from supercloud.services.protection.format import BLOCK, FANOUT, LEVELS, Entry

Read = Callable[[int, int], bytes]
"""``read(length, offset)`` of the backing file."""


class NotAuthentic(Exception):
    """Something on the backing file is not what was written there."""


@dataclass(slots=True)
class State:
    """What a backing file holds: after ``recover`` all entries, by level and index."""

    sequence: int
    epoch: int
    blocks: int
    chain: bytes
    root: Entry
    entries: dict[int, Entry] = field(default_factory=dict)
    slots: set[int] = field(default_factory=set)


class Audit:
    """A reader over one backing file."""

    def __init__(self, read: Read, key: bytes, device_id: bytes) -> None:
        self._read, self._gcm, self._id = read, AESGCM(key), device_id

    def recover(self) -> State:
        """The newest complete state; NotAuthentic when its tree is not what was written."""
        state = self._newest_superblock()
        self._walk(state, LEVELS, 0, state.root)
        self._replay(state)
        taken = [entry.slot for entry in state.entries.values()]
        if len(set(taken) | state.slots) != len(taken) + len(state.slots):
            raise NotAuthentic("a slot is used twice")
        return state

    def block(self, state: State, number: int) -> bytes:
        """The block's plaintext."""
        entry = state.entries.get(number)
        return self._open(0, number, entry) if entry else bytes(BLOCK)

    def _unseal(self, entry: Entry, sealed: bytes, kind: int, count: int, index: int,
                chain: bytes = fmt.NO_CHAIN) -> bytes:  # fmt: skip
        bound = fmt.BINDING.pack(self._id, kind, count, index, chain)
        try:
            return self._gcm.decrypt(entry.nonce, sealed + entry.tag, bound)
        except InvalidTag as error:
            raise NotAuthentic(f"kind {kind}, index {index}") from error

    def _open(self, level: int, index: int, entry: Entry) -> bytes:
        return self._unseal(entry, self._read(BLOCK, entry.slot * BLOCK), level, 0, index)

    def _newest_superblock(self) -> State:
        found = [state for which in range(fmt.SUPERBLOCKS) if (state := self._superblock(which))]
        if not found:
            raise NotAuthentic("no superblock")
        return max(found, key=lambda state: state.sequence)

    def _superblock(self, which: int) -> State | None:
        raw = self._read(BLOCK, which * BLOCK)
        magic, counter, epoch, version, tag = fmt.SUPER.unpack_from(raw)
        if (magic, version) != (fmt.SUPER_MAGIC, fmt.VERSION):
            return None
        entry = Entry(0, epoch, counter, tag)
        try:
            body = self._unseal(entry, raw[fmt.SUPER.size :], fmt.KIND_SUPER, version, which)
        except NotAuthentic:
            return None
        sequence, blocks, root, before = fmt.SUPER_BODY.unpack_from(body)
        chain = hashlib.sha256(before + raw).digest()
        return State(sequence, epoch, blocks, chain, Entry(*fmt.ENTRY.unpack(root)))

    def _walk(self, state: State, level: int, index: int, entry: Entry) -> None:
        if not entry.slot:
            return
        if entry.slot in state.slots:
            raise NotAuthentic("a slot is used twice")
        state.slots.add(entry.slot)
        page = self._open(level, index, entry)
        for position, values in enumerate(fmt.ENTRY.iter_unpack(page)):
            child, below = Entry(*values), index * FANOUT + position
            if level > 1:
                self._walk(state, level - 1, below, child)
            elif child.slot:
                state.entries[below] = child

    def _replay(self, state: State) -> None:
        records = list(self._records(state))
        for number, (epoch, changes, chain) in enumerate(records):
            if number == len(records) - 1 and not self._complete(changes):
                return  # cut off by a crash: nobody was told that it is durable
            for block, entry in changes:
                if entry.slot:
                    state.entries[block] = entry
                else:
                    state.entries.pop(block, None)
            state.sequence, state.epoch, state.chain = state.sequence + 1, epoch, chain

    def _records(self, state: State) -> Iterator[tuple[int, list[tuple[int, Entry]], bytes]]:
        at, sequence, chain = 0, state.sequence + 1, state.chain
        while at < fmt.JOURNAL_BLOCKS:
            place = (fmt.JOURNAL_AT + at) * BLOCK
            head = self._read(BLOCK, place)
            magic, found, counter, epoch, count, tag = fmt.RECORD.unpack_from(head)
            size = fmt.record_blocks(count)
            if (magic, found) != (fmt.RECORD_MAGIC, sequence) or at + size > fmt.JOURNAL_BLOCKS:
                return
            raw = self._read(size * BLOCK, place)
            sealed = raw[fmt.RECORD.size : fmt.RECORD.size + count * fmt.CHANGE.size]
            entry = Entry(0, epoch, counter, tag)
            try:
                body = self._unseal(entry, sealed, fmt.KIND_RECORD, count, sequence, chain)
            except NotAuthentic:
                return
            chain = hashlib.sha256(chain + raw).digest()
            yield epoch, [(c[0], Entry(*c[1:])) for c in fmt.CHANGE.iter_unpack(body)], chain
            at, sequence = at + size, sequence + 1

    def _complete(self, changes: list[tuple[int, Entry]]) -> bool:
        try:
            for block, entry in changes:
                if entry.slot:
                    self._open(0, block, entry)
        except NotAuthentic:
            return False
        return True
