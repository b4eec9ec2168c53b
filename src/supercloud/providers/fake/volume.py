"""A pretended volume: what is on it, and whether it is the one that its owner means."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from supercloud.model.errors import BadState, Denied, Invalid, NotFound
from supercloud.providers.fake.mirrors import Mirrored
from supercloud.wire.codec import encode
from supercloud.wire.mirrors import Shared
from supercloud.wire.volumes import (
    Seal,
    VolumeCopy,
    VolumeFigures,
    VolumeOpen,
    VolumeSpec,
    VolumeStatus,
)

OPEN = ("opened", "served", "attached")


@dataclass(slots=True, kw_only=True)
class Volume:
    """A volume; ``used`` once it was served. ``words`` is what is on it."""

    host: str
    spec: VolumeSpec
    key_sha256: str
    state: str = "closed"
    epoch: int = 0
    sequence: int = 0
    used: bool = False
    platform: str = ""
    slot: int = 0
    mode: str = ""
    words: list[str] = field(default_factory=list)
    snapshots: dict[str, list[Any]] = field(default_factory=dict)
    evidence: int = 0
    full: bool = False
    reason: str = ""
    copied: int = 0
    filling: list[str] | None = None  # with what, while a copy is under way
    shared: Shared | None = None
    streamed: bool = False
    in_order: bool = False  # it was closed so, and not opened since
    mirror: Mirrored | None = None

    @property
    def seal(self) -> Seal:
        """Covers all that is on it; the epoch is beside it."""
        content = json.dumps([self.spec.name, self.sequence, self.words, self.snapshots])
        root = hashlib.sha256(content.encode()).hexdigest()
        return Seal(epoch=self.epoch, sequence=self.sequence, root=root)

    def status(self) -> VolumeStatus:
        """As its host shows it."""
        written = sum(map(len, self.words))
        return VolumeStatus(
            name=self.spec.name, state=self.state, size_bytes=self.spec.size_bytes,
            format=self.spec.format, platform=self.platform, slot=self.slot,
            mode=self.mode if self.slot else "", seal=self.seal,
            stored_bytes=written, snapshots=list(self.snapshots),
            figures=VolumeFigures(written_bytes=written, writes=len(self.words)),
            evidence=self.evidence, full=self.full, reason=self.reason, tag=self.spec.tag,
            shared=self.shared, copied=self.copied,
            mirror=self.mirror.status() if self.mirror else None,
        )  # fmt: skip


def check(volume: Volume, asked: VolumeOpen) -> None:
    """Whether it is the one that its owner means: the state kept, or a later one."""
    if volume.key_sha256 != hash_of(asked.key_base64):
        message = f"volume {volume.spec.name} was made with another key"
        raise Denied(message, details={"evidence": "not_a_device"})
    kept, found = asked.seal, volume.seal
    if not kept.root:
        if volume.used:
            raise Denied(f"volume {volume.spec.name} was used, which its owner does not know")
        return
    if found.sequence < kept.sequence:
        raise Denied(
            f"volume {volume.spec.name} is at epoch {found.epoch}, state {found.sequence}, and was "
            f"at epoch {kept.epoch}, state {kept.sequence} already: it was rolled back",
            details={"found": encode(found)},
        )
    if found.sequence == kept.sequence and found.root != kept.root:
        raise Denied(
            f"volume {volume.spec.name} has another state {found.sequence} than it had",
            details={"found": encode(found)},
        )


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(b"pretended" + key.encode()).hexdigest()


def fill(target: Volume, source: Volume, asked: VolumeCopy) -> VolumeStatus:
    """Copy it, in two steps: what the source holds at the first is there after the second."""
    if source.state not in OPEN[1:] or target.state != "served":
        raise BadState(f"volume {asked.of} is {source.state}, {asked.name} {target.state}")
    if source.spec.size_bytes != target.spec.size_bytes:
        raise Invalid(f"volume {asked.of} has {source.spec.size_bytes} bytes")
    if target.copied == asked.number:
        return target.status()
    if target.filling is None:
        if asked.snapshot and asked.snapshot not in source.snapshots:
            raise NotFound(f"volume {asked.of} has no snapshot {asked.snapshot}")
        target.filling = list(source.snapshots[asked.snapshot] if asked.snapshot else source.words)
        return replace(target.status(), copying=f"a copy of {asked.of}")
    target.words, target.filling, target.copied = target.filling, None, asked.number
    target.sequence += 1
    return target.status()
