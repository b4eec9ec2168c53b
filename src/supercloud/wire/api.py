"""What the control plane's HTTP API answers with, as dataclasses; JSON by ``wire.codec.encode``.

The command line reads the same fields from plain JSON, without decoding: it starts faster so.
Times are seconds since the epoch, 0 when it has not happened.
"""

from typing import Any, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.objects import Position
from supercloud.wire.volumes import Seal, VolumeFigures

API_PROTOCOL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentRow:
    """One EE, a row of ``ps``: the answer to ``GET /v1/environments`` is a list of these.

    ``name`` is the EE's (``web-2``), ``environment`` the manifest's (``web``). ``state`` is one of
    ``model.states.ENVIRONMENT``; ``urls`` are its published ports', in the manifest's order.
    ``checkpoint`` is the number of its last one, taken at ``checkpoint_s``; 0: there is none.
    """

    ucloud: str
    name: str
    environment: str
    kind: Literal["container", "vm"]
    state: str
    reason: str = ""
    provider: str = ""
    host: str = ""
    platform: str = ""
    address: str = ""
    urls: list[str] = field(default_factory=list)
    restarts: int = 0
    created_s: float = 0.0
    started_s: float = 0.0
    engine: str = ""
    image: str = ""
    checkpoint: int = 0
    checkpoint_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRow:
    """One L1 platform. ``state`` is one of ``model.states.PLATFORM``."""

    name: str
    provider: str
    host: str
    state: str
    reason: str = ""
    region: str = ""
    jurisdiction: str = ""
    accelerator: str = ""
    created_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    """A replica of a volume. ``state``: in_sync, stale, syncing, or as its mirror says it.

    ``lacks_bytes`` are to be copied yet, -1 when that is not known now.
    """

    replica: str
    provider: str
    host: str
    state: str
    source: bool = False  # the volume is used there
    connected: bool = False
    lacks_bytes: int = -1
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRates:
    """What went through a volume in the last ``interval_s``, as its protected device counts it.

    ``*_latency_us`` are means of the requests of that time; 0 when there were none.
    """

    interval_s: float
    read_bytes_per_s: float = 0.0
    write_bytes_per_s: float = 0.0
    reads_per_s: float = 0.0
    writes_per_s: float = 0.0
    read_latency_us: float = 0.0
    write_latency_us: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRow:
    """One volume, a row of ``volumes``: the answer to ``GET /v1/volumes`` is a list of these.

    ``state`` is one of ``model.states.KEPT_VOLUME``; ``used_by`` are EEs. ``seal_age_s`` is how
    long ago its host showed its seal, -1 when it is not open; ``stored_bytes`` are on the
    provider's disk, ``evidence`` blocks that were not what had been written. ``replicas`` is empty
    for one that is kept on one host, ``rates`` None while nobody knows what goes through it.
    """

    ucloud: str
    name: str
    state: str
    size_bytes: int
    format: str
    provider: str
    host: str
    reason: str = ""
    platform: str = ""
    slot: int = 0
    mode: str = ""
    used_by: list[str] = field(default_factory=list)
    stored_bytes: int = 0
    snapshots: list[str] = field(default_factory=list)
    seal_age_s: float = -1.0
    evidence: int = 0
    created_s: float = 0.0
    replicas: list[ReplicaRow] = field(default_factory=list)
    rates: VolumeRates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeView(VolumeRow):
    """A volume in all detail. ``found`` is the seal of a volume that was refused for it.

    ``purposes`` says of snapshots that belong to checkpoints of which.
    """

    iops: int = 0
    bytes_per_s: int = 0
    figures: VolumeFigures = field(default_factory=VolumeFigures)
    seal: Seal = field(default_factory=Seal)
    undetected_rollback: str = ""
    halted: str = ""
    found: Seal | None = None
    purposes: dict[str, str] = field(default_factory=dict)
    wrapping_key: str = ""  # its name
    generation: int = 0  # of its mirror
    waits_for: str = ""  # why its mirror answers nothing now
    copy_of: str = ""  # the volume that it began as a clone of, or is a backup of
    copied_s: float = 0.0  # when that was last copied
    steps: list["Step"] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted:
    """A volume of an EE, as ``inspect`` shows it; ``slot`` 0 is not attached."""

    name: str
    path: str
    read_only: bool
    state: str
    size_bytes: int
    slot: int = 0
    mode: str = ""
    seal_age_s: float = -1.0
    undetected_rollback: str = ""
    replicas: list[ReplicaRow] = field(default_factory=list)
    rates: VolumeRates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRow:
    """One bucket, a row of ``buckets``: the answer to ``GET /v1/buckets`` is a list of these.

    ``state`` is its store's, one of ``model.states.KEPT_STORE``; ``used_by`` are EEs, and ``read``
    or ``write``. ``used_bytes`` count against the quota; they and ``entries`` are -1 while its
    host has not told.
    """

    ucloud: str
    name: str
    state: str
    quota_bytes: int
    provider: str
    host: str
    reason: str = ""
    versioning: bool = False
    expire_days: int = 0
    used_by: dict[str, str] = field(default_factory=dict)
    used_bytes: int = -1
    entries: int = -1
    created_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketView(BucketRow):
    """A bucket in all detail. ``store_*`` are of the store with all buckets of the U-Cloud.

    ``store_booked_bytes`` are taken of the disk quota, ``store_disk_bytes`` of the provider's disk.
    An older state of the store than ``position`` is refused; ``position_age_s`` is how long ago its
    host said it, -1 while it does not run.
    """

    store_capacity_bytes: int = 0
    store_booked_bytes: int = 0
    store_disk_bytes: int = 0
    position: Position = field(default_factory=Position)
    position_age_s: float = -1.0
    undetected_rollback: str = ""
    wrapping_key: str = ""  # its name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """One checkpoint; ``number`` is what ``restore`` is told. The figures are of its taking.

    ``dirty_bytes`` of memory were written since the base, or all of it (``base``); ``new_bytes`` is
    what the store grew by. ``restorable`` is "" or why it is not now. ``snapshots`` are of
    its volumes, by volume.
    """

    number: int
    taken_s: float
    engine: str
    provider: str
    host: str
    pause_ms: float
    base: bool
    memory_bytes: int
    dirty_bytes: int
    disk_bytes: int
    new_bytes: int
    details: dict[str, str] = field(default_factory=dict)
    restorable: str = ""
    snapshots: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsRow:
    """The checkpoints of an EE or a platform: ``GET /v1/checkpoints`` is a list of these.

    ``state`` is one of ``model.states.CHECKPOINTS``. ``every_s`` 0: they are taken when asked for;
    ``next_s`` is when the next one is due. ``keep`` 0: no more are taken. ``restoring`` is the
    number of the one that it is being restored from. ``hint``: what to do about the ``reason``.
    """

    ucloud: str
    name: str
    of: Literal["environment", "platform"]
    state: str
    reason: str = ""
    hint: str = ""
    every_s: int = 0
    keep: int = 0
    kept: int = 0
    last: int = 0
    last_s: float = 0.0
    next_s: float = 0.0
    new_bytes: int = 0
    failures: int = 0
    restoring: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointsView(CheckpointsRow):
    """Likewise, in all detail: the newest comes first. ``task`` is what was asked for last."""

    checkpoints: list[CheckpointRow] = field(default_factory=list)
    task: "CheckpointTask | None" = None
    steps: list["Step"] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointTask:
    """``POST .../take`` answers with this at once; ``done`` with a ``number`` or an ``error``."""

    id: str
    done: bool = False
    number: int = 0
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoring:
    """``POST .../restore``: that was decided, and is worked on. ``volumes`` go back with it."""

    ucloud: str
    name: str
    number: int
    platform: str
    generation: int
    volumes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRow:
    """One of a U-Cloud's services on a host: ``GET /v1/services`` is a list of these.

    ``state`` is ``running``, ``not running`` or ``unknown``: its host does not answer.
    ``started_s`` 0: it does not run, or has run for longer than its host knows.
    """

    ucloud: str
    provider: str
    host: str
    kind: str
    state: str
    reason: str = ""
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    started_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """``POST /v1/uclouds/U/rotate-key``: how many data keys are wrapped under the new key."""

    ucloud: str
    wrapping_key: str
    volumes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Something that is being done or has been done for the present generation, in order of start.

    ``subject`` is ``platform/NAME``, ``volume/NAME``, ``environment/NAME`` or ``objects`` (the
    store of all buckets); ``message`` what is being done, in words. ``fraction`` is from 0 to 1
    where it is known, else -1.
    """

    subject: str
    message: str
    state: Literal["waiting", "running", "done", "failed"]
    started_s: float = 0.0
    ended_s: float = 0.0
    fraction: float = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UCloudView:
    """A U-Cloud: ``GET /v1/uclouds/U``, and each item of the list ``GET /v1/uclouds``.

    ``state`` is one of ``model.states.UCLOUD``: ``ready`` when all of ``generation`` serves.
    ``error`` (``model.errors.to_wire``) is there when it will not become so without a change;
    what may yet succeed is only a failed step.
    """

    name: str
    state: str
    generation: int
    platforms: list[PlatformRow]
    environments: list[EnvironmentRow]
    steps: list[Step] = field(default_factory=list)
    error: dict[str, Any] | None = None
    volumes: list[VolumeRow] = field(default_factory=list)
    buckets: list["BucketRow"] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference between what is and what is wanted. ``details``: ``memory 64MiB -> 1GiB``."""

    action: Literal["create", "change", "delete"]
    subject: str  # as in Step, and network/NAME
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``POST /v1/plan``; no ``changes``: all is as wanted. ``warnings``: what is not covered."""

    ucloud: str
    changes: list[Change]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """``POST /v1/name``: the U-Cloud that a manifest is of."""

    ucloud: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """``POST /v1/up``: the desired state is stored; it is being worked on."""

    ucloud: str
    generation: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of ``GET /v1/doctor`` (a list of these): ``fix`` is what to do when not ``ok``."""

    name: str
    ok: bool
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """``GET /v1/version``."""

    version: str
    protocol: int = API_PROTOCOL
    pid: int = 0
