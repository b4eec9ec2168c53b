"""The format on the backing file, as data. ``native/engine.h`` says the same in C.

The file is an array of blocks of 4096 bytes; all numbers are little-endian::

    0, 1          two superblocks; the one with the higher sequence counts
    2 .. 2049     the journal: records, from its start, since the superblock that counts
    2050 ..       slots: sealed blocks of the device and sealed pages of the tree, in any order

An *entry* (32 bytes) says where a block lies and what it must be: slot, epoch, counter, tag. Slot
0 is nowhere: it reads as zeros. A *page* of the tree is 128 entries. Five levels of pages lead from
the root, whose entry is in the superblock, to the blocks: page ``(level, index)`` has the entries
of ``(level - 1, 128 * index ..)``, level 0 being the device's blocks. So every tag is authenticated
by the tag of the page that holds it, up to the superblock.

All sealing is AES-256-GCM under the device's one key. The nonce is epoch and counter: an epoch is
promised to one opening only, by the user's control plane, and a counter is taken once in it.
The associated data is the *binding*: the device's id, the kind (level, or record or superblock), a
count, an index, and for records the chain so far.

A *record* is one commit: the new entries of the blocks that changed. A *superblock* is one too: the
root of a tree written anew. The *chain* of a state is SHA-256 over the chain before it and the
record or superblock that made it, as they lie on the disk. The seal that the user keeps is the last
promised epoch, the sequence, and 28 bytes of the chain with the state's epoch.
"""

import struct
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 4096
FANOUT: Final = 128
LEVELS: Final = 5
SUPERBLOCKS: Final = 2
JOURNAL_AT: Final = 2
JOURNAL_BLOCKS: Final = 2048
FIRST_SLOT: Final = JOURNAL_AT + JOURNAL_BLOCKS
CHAIN_BYTES: Final = 32
VERSION: Final = 1

ENTRY: Final = struct.Struct("<IIQ16s")  # slot, epoch, counter, tag
CHANGE: Final = struct.Struct("<IIIxxxxQ16s")  # block, slot, epoch, counter, tag
BINDING: Final = struct.Struct("<16sIIQ32s")  # device's id, kind, count, index, chain
RECORD: Final = struct.Struct("<8sQQII16s16x")  # magic, sequence, counter, epoch, changes, tag
SUPER: Final = struct.Struct("<8sQII16s24x")  # magic, counter, epoch, version, tag
SUPER_BODY: Final = struct.Struct("<QQ32s32s")  # sequence, blocks, root's entry, chain before

KIND_RECORD: Final = 0x80
KIND_SUPER: Final = 0x81
RECORD_MAGIC: Final = b"scpjrnl1"
SUPER_MAGIC: Final = b"scprote1"
NO_CHAIN: Final = bytes(CHAIN_BYTES)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where something sealed lies, its nonce's two parts, and its tag."""

    slot: int
    epoch: int
    counter: int
    tag: bytes

    @property
    def nonce(self) -> bytes:
        """The 96 bits that GCM gets."""
        return struct.pack("<IQ", self.epoch, self.counter)


def tree_pages(blocks: int) -> int:
    """Pages of the whole tree over so many blocks."""
    total = 0
    for _ in range(LEVELS):
        blocks = -(-blocks // FANOUT)
        total += blocks
    return total


def backing_blocks(blocks: int) -> int:
    """Blocks of the backing file: every page of the tree twice, and some slots to spare."""
    spare = min(max(blocks // 16, 1024), 262144)
    return FIRST_SLOT + blocks + 2 * tree_pages(blocks) + spare


def record_blocks(changes: int) -> int:
    """Blocks of the journal that a record takes."""
    return -(-(RECORD.size + changes * CHANGE.size) // BLOCK)
