"""Messages about volumes on the host wire: control plane -> user domain.

A volume is opened in two steps, so that a copy of it from before the last opening never passes:
``volume.open`` judges the device and says the epoch of this opening; the control plane keeps that;
only then ``volume.serve`` writes it to the disk and lets the volume be used. What is kept of a
device there, and is compared at every opening, is its ``Seal``.
"""

from typing import Annotated, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Name
from supercloud.wire.mirrors import Mirror, MirrorStatus, Shared
from supercloud.wire.quota import Bytes

SIZE_UNIT_BYTES = 4096
LIMITS = {"iops": (10, 10_000_000), "bytes_per_s": (64 << 10, 1 << 40)}
"""What a volume may be throttled to, least and most, where it is not 0."""

Root = Annotated[str, Limit(pattern=r"([0-9a-f]{64})?")]
Key = Annotated[str, Limit(min_length=44, max_length=44)]  # 32 bytes, base64
SnapshotName = Annotated[str, Limit(pattern=r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The trusted root of a protected device: ``root`` (hex) covers every block of it.

    ``epoch`` counts openings, ``sequence`` the states that were made durable in all of them;
    serving makes one. An empty ``root`` is of a device that was never opened.
    """

    epoch: Annotated[int, Limit(ge=0, le=1 << 62)] = 0
    sequence: Annotated[int, Limit(ge=0, le=1 << 62)] = 0
    root: Root = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    """A volume to have. ``iops`` and ``bytes_per_s`` 0: as fast as it goes."""

    name: Name
    size_bytes: Annotated[int, Limit(ge=1 << 20, le=1 << 44)]
    format: Literal["qcow2", "raw"] = "qcow2"
    iops: Annotated[int, Limit(ge=0, le=1 << 31)] = 0
    bytes_per_s: Bytes = 0
    tag: Annotated[str, Limit(max_length=256)] = ""  # whose it is; given back in its status


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeOpen:
    """Open a volume, or make it when ``seal`` has no root. ``key_base64`` is its data key.

    Its epoch becomes greater than the seal's, which the volume may not have seen: in a copy that
    its owner gave up it was used with this key. NotFound when ``seal`` has a root and there is no
    such volume; Denied when it is not the one that is meant: ``details["found"]`` is its seal.
    """

    spec: VolumeSpec
    key_base64: Key = field(repr=False)
    seal: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeServe:
    """Let an opened volume be used: ``epoch``, which ``volume.open`` said, is kept by now.

    With a ``mirror`` it is one of several replicas, and the others are used through this host;
    ``shared``, it is used through another one. See ``wire.mirrors``.
    """

    name: Name
    epoch: Annotated[int, Limit(ge=1, le=1 << 62)]
    mirror: Mirror | None = None
    shared: Shared | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeAttach:
    """Give a volume that is served to a running platform.

    ``restorable``: as a disk that the platform has again when it goes on from a checkpoint.
    """

    name: Name
    platform: Name
    restorable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSnapshot:
    """A snapshot of a volume, by name."""

    name: Name
    snapshot: SnapshotName


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeCopy:
    """Have a volume that nobody uses hold what ``of``, open on the same host, holds.

    With a ``snapshot`` that; without one a backup, of which every one but the first copies what has
    changed since the one before. Answered at once: asked again with the same ``number`` it
    says how far it is (``VolumeStatus.copied`` and ``copying``), and is begun anew if it was cut
    off. A volume that is copied into holds neither the old nor the new before that is done.
    """

    name: Name
    of: Name
    number: Annotated[int, Limit(ge=1, le=1 << 31)]
    snapshot: Annotated[str, Limit(pattern=r"([a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?)?")] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeFigures:
    """What went through it since it was opened; ``*_latency_us`` are means.

    ``flushes`` has also the writes that were to be durable before they were answered.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    read_latency_us: float = 0.0
    write_latency_us: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeStatus:
    """A volume as its user domain sees it. ``state`` is one of ``model.states.VOLUME``.

    ``slot`` (1..) and ``mode`` are of its attachment to ``platform``; ``evidence`` counts blocks
    that were refused since it was opened, because they were not what was written. ``full``: its
    host's disk is, and what writes to it waits.
    """

    name: str
    state: str
    size_bytes: int
    format: str
    platform: str = ""
    slot: int = 0
    mode: str = ""  # vhost-user-blk | nbd
    seal: Seal = field(default_factory=Seal)
    stored_bytes: int = 0  # on the provider's disk
    snapshots: list[str] = field(default_factory=list)
    figures: VolumeFigures = field(default_factory=VolumeFigures)
    evidence: int = 0
    full: bool = False
    reason: str = ""
    tag: str = ""
    mirror: MirrorStatus | None = None  # of the source
    shared: Shared | None = None  # of another replica
    copied: int = 0  # the number of the last copy into it that is done
    copying: str = ""  # in words, what is being copied into it; told by ``volume.copy``


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeList:
    """All volumes of the user on this host."""

    volumes: list[VolumeStatus]
