"""Messages about checkpoints: of EEs on the agent link, of platforms on the host wire.

Who takes one streams it into the U-Cloud's object store by itself, under keys that are derived from
``StoreAccess.secret``; what is kept of it at the control plane is its ``Head``, without which
nothing is restored. A call that was cut off may have taken its checkpoint: asked again with the
same ``head``, another one is taken in its place, and a collection removes what nobody remembers.
"""

from typing import Annotated, Final, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Name, Text
from supercloud.wire.places import VOLUME_SLOTS

BUCKET: Final = "supercloud-checkpoints"
"""The bucket of all checkpoints of a U-Cloud; no manifest may name it."""

Pem = Annotated[str, Limit(max_length=65536)]
Sequence = Annotated[int, Limit(ge=1, le=(1 << 48) - 1)]
Root = Annotated[str, Limit(pattern=r"[0-9a-f]{64}")]
Count = Annotated[int, Limit(ge=0, le=1 << 62)]
SnapshotName = Annotated[str, Limit(pattern=r"(supercloud-[0-9a-f]{16})?")]
"""Of the snapshots that belong to a checkpoint; nobody else's may be called so."""
Slot = Annotated[int, Limit(ge=1, le=VOLUME_SLOTS)]


@dataclass(frozen=True, slots=True)
class Head:
    """A checkpoint that its control plane remembers: it vouches for those before it."""

    sequence: Sequence
    root: Root


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAccess:
    """Where a U-Cloud's checkpoints are, and the secret that they are sealed under."""

    secret: Annotated[str, Limit(pattern=r"[0-9a-f]{64}")] = field(repr=False)
    server_name: Annotated[str, Limit(max_length=253, pattern=r"[a-z0-9.-]+")]
    ca_pem: Pem
    access_key: Annotated[str, Limit(max_length=128)]
    secret_key: Annotated[str, Limit(max_length=128)] = field(repr=False)
    region: Annotated[str, Limit(max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTake:
    """Take one of EE (or platform) ``name``, after ``head``. BadState unless it runs.

    ``uid`` is the EE's; another one than is running is refused (NotFound). ``snapshot`` is what the
    volumes that it writes to are to have by that name: asked for by ``CheckpointSnapshot``; those
    that are attached to a platform get it from its host, in the same pause.
    """

    name: Name
    uid: Name
    store: StoreAccess
    head: Head | None = None
    snapshot: SnapshotName = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSnapshot:
    """EE ``name`` stands still, and what it wrote is on the disks of its volumes: snapshot them.

    Once, amid the ``CheckpointTake`` that named ``snapshot``; Denied otherwise. The EE goes on
    after the answer, and without one there is no checkpoint.
    """

    name: Name
    uid: Name
    snapshot: SnapshotName


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTaken:
    """A whole checkpoint, in the store. ``new_bytes`` is what the store grew by.

    ``dirty_bytes``: memory written since the base, 0 where the whole memory was written
    (``base``). ``pause_ms``: how long its processes stood still. ``slots``: the volumes that were
    attached to the platform, each of which has the snapshot that was asked for.
    """

    head: Head
    engine: str
    taken_ms: Count  # since 1970
    pause_ms: float
    base: bool
    memory_bytes: Count
    dirty_bytes: Count
    disk_bytes: Count
    new_bytes: Count
    details: dict[str, Text] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoesBack:
    """A volume that a platform is restored with: it goes back to ``snapshot``, into ``slot``."""

    volume: Name
    slot: Slot
    snapshot: SnapshotName


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreFrom:
    """In an EE's or platform's specification: it starts as that checkpoint left it.

    ``ee`` is whose it was. ``sequence`` None is that of ``head``; else an older one. ``volumes``
    are a platform's: served, and attached to nobody, whenever it is made from that.
    """

    ee: Name
    store: StoreAccess
    head: Head
    sequence: Sequence | None = None
    volumes: Annotated[list[GoesBack], Limit(max_length=VOLUME_SLOTS)] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is to stay of an EE: its newest, and ``sequences`` of those that it vouches for."""

    head: Head
    sequences: Annotated[list[Sequence], Limit(max_length=1024)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCollect:
    """Remove what is not to stay; the EEs of ``forget`` lose all of theirs.

    An EE that is in neither is left as it is.
    """

    store: StoreAccess
    keep: dict[str, Kept] = field(default_factory=dict)
    forget: list[Name] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCollected:
    """What a collection did. ``busy``: another one was at work, ask later."""

    removed_bytes: Count = 0
    removed: Count = 0
    state: Literal["done", "busy"] = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointVerified:
    """All of a checkpoint was read and is what was taken: so many bytes, zeros not counted."""

    read_bytes: Count = 0
