"""Chunks in packs: cut, named, deduplicated, compressed, encrypted; and the way back.

A pack is the chunks one after another, each zstd-1 under AES-256-GCM: nonce its offset, associated
data its name. Chunks of 64 KiB travel in packs of 8 MiB since an object costs the service more
than its bytes. A pack never changes; what is worth keeping of a mostly dead one is written anew by
later checkpoints (``REUSE_FROM``), so that it dies as a whole.
"""

import threading
from collections.abc import Callable
from typing import Final

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from supercloud.services.checkpoint.keys import TAG_BYTES, Keys, Refused
from supercloud.services.checkpoint.lists import MAX_STORED_BYTES, Entry, Place

PACK_BYTES: Final = 8 << 20
LEVEL: Final = 1
MAX_INDEX: Final = 1 << 20
"""Names remembered while writing: 64 GiB of chunks, some 200 MiB of memory at the very most."""
REUSE_FROM: Final = 0.5
"""The part of a pack that must still be in use for its chunks to be used again."""

_local: Final = threading.local()


def pack_key(pack: bytes) -> str:
    """The object of a pack."""
    return f"packs/{pack[:16].hex()}-{int.from_bytes(pack[16:], 'big'):08x}"


def _compressor() -> zstandard.ZstdCompressor:
    try:
        found: zstandard.ZstdCompressor = _local.compressor
    except AttributeError:
        found = _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    try:
        found: zstandard.ZstdDecompressor = _local.decompressor
    except AttributeError:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found


class Pack:
    """One being filled, by one thread at a time."""

    def __init__(self, keys: Keys, name: bytes) -> None:
        self.name, self.data = name, bytearray()
        self._cipher = keys.pack(name)

    def next_place(self, stored: int) -> Place:
        """Where the next chunk will be."""
        return Place(self.name, len(self.data), stored)

    def add(self, name: bytes, compressed: bytes) -> None:
        """Append a chunk."""
        nonce = len(self.data).to_bytes(12, "big")
        self.data += self._cipher.encrypt(nonce, compressed, name)


class Packs:
    """The packs of one writer, filled by several threads, each its own; ``put`` stores one."""

    def __init__(
        self, keys: Keys, nonce: bytes, put: Callable[[str, bytearray], None], pack_bytes: int
    ) -> None:
        self._keys, self._nonce, self._put = keys, nonce, put
        self._pack_bytes = pack_bytes
        self._open: list[Pack] = []
        self._count = 0
        self._lock = threading.Lock()
        self.index: dict[bytes, Place] = {}
        self.sizes: dict[bytes, int] = {}

    def take(self) -> Pack:
        """One for this thread alone; ``give`` it back."""
        with self._lock:
            if self._open:
                return self._open.pop()
            name = self._nonce + self._count.to_bytes(4, "big")
            self._count += 1
        return Pack(self._keys, name)

    def give(self, pack: Pack) -> None:
        """Store it if it is full, else keep it for the next."""
        if len(pack.data) >= self._pack_bytes:
            self._store(pack)
        else:
            with self._lock:
                self._open.append(pack)

    def finish(self) -> None:
        """Store what is still open."""
        while self._open:
            pack = self._open.pop()
            if pack.data:
                self._store(pack)

    def _store(self, pack: Pack) -> None:
        self.sizes[pack.name] = len(pack.data)
        self._put(pack_key(pack.name), pack.data)

    def add(
        self, pack: Pack, data: bytes | memoryview, near: dict[bytes, Place]
    ) -> tuple[bytes, Place, int]:
        """The chunk's name and place, and how many bytes it cost: 0 when there already."""
        name = self._keys.chunk_name(data)
        place = self.index.get(name) or near.get(name)
        if place is not None:
            return name, place, 0
        compressed = _compressor().compress(data)
        place = pack.next_place(len(compressed) + TAG_BYTES)
        if len(self.index) < MAX_INDEX:
            first = self.index.setdefault(name, place)
            if first is not place:  # another thread was faster with the same one
                return name, first, 0
        pack.add(name, compressed)
        return name, place, place.stored


def opened(cipher: AESGCM, entry: Entry, untrusted: bytes | memoryview, size: int | None) -> bytes:
    """A chunk's plaintext of that size (None: a segment's, any); Refused with the reason.

    ``cipher`` is that of its pack (``Keys.pack``).
    """
    pack, offset, stored = entry.place
    where = f"{pack_key(pack)} at {offset}"
    if len(untrusted) < stored:
        raise Refused("truncated", f"{where} is cut short: {len(untrusted)} of {stored} bytes")
    nonce = offset.to_bytes(12, "big")
    try:
        compressed = cipher.decrypt(nonce, untrusted, entry.name)
        data = _decompressor().decompress(compressed, max_output_size=MAX_STORED_BYTES)
    except (InvalidTag, zstandard.ZstdError):
        raise Refused("tampered", f"{where} was altered, or is of another key") from None
    if size is not None and len(data) != size:
        raise Refused("tampered", f"{where} holds {len(data)} bytes, not {size}")
    return data
