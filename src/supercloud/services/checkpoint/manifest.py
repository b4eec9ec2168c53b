"""What a checkpoint is made of, as one record: sealed JSON under the checkpoint's name.

``history`` names the checkpoints of this EE that were kept when it was taken, so that the newest
one vouches for all before it and the control plane needs to keep but one ``Head`` per EE.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from supercloud.model.errors import Invalid
from supercloud.services.checkpoint.keys import Keys, Ref, Refused
from supercloud.services.checkpoint.lists import Tree
from supercloud.wire.codec import Limit, Name, Text, decode, encode

VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 << 20
MAX_PARTS: Final = 64
MAX_HISTORY: Final = 1024
PART_NAME: Final = r"memory|device|fs|disk:[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"

Sequence = Annotated[int, Limit(ge=1, le=(1 << 48) - 1)]
Root = Annotated[str, Limit(pattern=r"[0-9a-f]{64}")]


@dataclass(frozen=True, slots=True)
class Head:
    """The newest checkpoint of an EE, as its control plane remembers it."""

    sequence: Sequence
    root: Root


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An older checkpoint as a newer one vouches for it; ``taken_ms`` since 1970."""

    sequence: Sequence
    root: Root
    taken_ms: Annotated[int, Limit(ge=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One image. With a ``base``, ``tree`` holds only the pages that differ from it."""

    name: Annotated[str, Limit(pattern=PART_NAME)]
    tree: Tree
    base: Tree | None = None
    new_bytes: Annotated[int, Limit(ge=0)] = 0

    @property
    def size_bytes(self) -> int:
        """Of the image when restored."""
        return self.tree.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One checkpoint. ``details`` is the engine's own, e.g. the machine's command line."""

    version: Literal[1] = VERSION
    ucloud: Name
    ee: Name
    sequence: Sequence
    engine: Name
    taken_ms: Annotated[int, Limit(ge=0)]
    parent: Head | None = None
    history: Annotated[list[Known], Limit(max_length=MAX_HISTORY)] = field(default_factory=list)
    parts: Annotated[list[Part], Limit(max_length=MAX_PARTS)] = field(default_factory=list)
    details: dict[str, Text] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """The part of that name; Invalid."""
        for part in self.parts:
            if part.name == name:
                return part
        have = ", ".join(part.name for part in self.parts)
        raise Invalid(f"checkpoint {self.sequence} of {self.ee} has no {name}, but {have}")

    def trees(self) -> list[Tree]:
        """All images that it refers to, bases included."""
        bases = [part.base for part in self.parts if part.base is not None]
        return [*(part.tree for part in self.parts), *bases]


@dataclass(frozen=True, slots=True)
class Void:
    """Stands in a manifest's place: its writer was given up, and cannot commit any more."""

    voided_ms: int


@dataclass(frozen=True, slots=True)
class Lease:
    """A writer at work: what it refers to stays (keys of manifests), until ``expires_ms``."""

    expires_ms: int
    reuses: list[str]


Record = Manifest | Void | Lease
_KINDS: Final[dict[str, type[Record]]] = {"manifest": Manifest, "void": Void, "lease": Lease}
_KIND_OF: Final = {cls: kind for kind, cls in _KINDS.items()}


def to_record(keys: Keys, key: str, record: Record) -> bytes:
    """The object to be put at ``key``."""
    wire = {"kind": _KIND_OF[type(record)], **encode(record)}
    return keys.seal(key, zlib.compress(json.dumps(wire).encode(), 1))


def from_record(keys: Keys, key: str, untrusted: bytes) -> Record:
    """What stands at ``key``; Refused with the reason."""
    if len(untrusted) > MAX_MANIFEST_BYTES:
        raise Refused("tampered", f"{key} is larger than a manifest may be")
    data = _inflated(key, keys.open(key, untrusted))
    try:
        wire = json.loads(data)
        record: Record = decode(_KINDS[wire.pop("kind")], wire)
    except (ValueError, KeyError, AttributeError, Invalid) as error:
        raise Refused("newer", f"{key} is not understood here: {error}") from None
    if isinstance(record, Manifest):
        _check_place(keys, key, record)
    return record


def root_of(data: bytes) -> str:
    """What the control plane remembers of a manifest's object."""
    return hashlib.sha256(data).hexdigest()


def _inflated(key: str, data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MAX_MANIFEST_BYTES)
    except zlib.error:
        text = b""
    if not unpacker.eof:
        raise Refused("tampered", f"{key} does not unpack")
    return text


def _check_place(keys: Keys, key: str, manifest: Manifest) -> None:
    ref = Ref.of(key)
    if manifest.sequence != ref.sequence or keys.ee_id(manifest.ee) != ref.ee_id:
        raise Refused("foreign", f"{key} holds checkpoint {manifest.sequence} of {manifest.ee}")
