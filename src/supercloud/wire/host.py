"""The host wire: what a control plane may ask of a user domain, and its messages about platforms.

Apart from ``messages``, which a platform's agent carries: a module less that it has to load.
"""

from typing import Annotated

from supercloud.model.records import dataclass, field
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    RestoreFrom,
)
from supercloud.wire.codec import Limit, Name, Sha256
from supercloud.wire.content import Environments
from supercloud.wire.messages import Base64, Blob, ByName, Certificate, CsrResult, Empty, Method
from supercloud.wire.mirrors import MirrorStatus, VolumeFence, VolumeLease, VolumeRejoin
from supercloud.wire.objects import (
    ObjectsApply,
    ObjectsCredentials,
    ObjectsDelete,
    ObjectsSecret,
    ObjectsStatus,
    ServiceList,
)
from supercloud.wire.places import DEPOSIT_BYTES
from supercloud.wire.quota import Bytes, Quota
from supercloud.wire.tunnel import TunnelApply
from supercloud.wire.volumes import (
    VolumeAttach,
    VolumeCopy,
    VolumeList,
    VolumeOpen,
    VolumeServe,
    VolumeSnapshot,
    VolumeSpec,
    VolumeStatus,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """What a host says of itself to a user. ``images`` are digests of L1 images that it holds."""

    instance: str
    protocol: int
    region: str
    jurisdiction: str
    accelerator: str
    kernel: str
    runtime_sha256: str
    images: list[str]
    quota: Quota
    used: Quota
    cpus: int
    features: dict[str, str] = field(default_factory=dict)  # feature -> "" or why not


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSpec:
    """An L1 platform to run. ``config_base64`` is the config disk (ISO 9660), at most 1 MiB.

    ``image`` is the digest of an L1 image that the host holds (its manifest's sha256).
    """

    name: Name
    image: Sha256
    cpus: Annotated[int, Limit(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Limit(ge=128 << 20, le=1 << 42)] = 1 << 30
    scratch_bytes: Bytes = 4 << 30
    ports: Annotated[int, Limit(ge=0, le=1024)] = 32
    config_base64: Base64 = ""
    tag: Annotated[str, Limit(max_length=256)] = ""  # whose it is; given back in its status
    restore: RestoreFrom | None = None  # it goes on as it was, instead of booting


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformStatus:
    """A platform as its user domain sees it. Published host ports are first_port .. +ports-1.

    ``state`` is one of ``model.states.MACHINE``.
    """

    name: str
    state: str
    image: str
    cpus: int
    memory_bytes: int
    scratch_bytes: int
    address: str
    first_port: int
    ports: int
    accelerator: str
    created_s: float
    reason: str = ""
    tag: str = ""
    spec_sha256: str = (
        ""  # of the PlatformSpec without config_base64, restore: same name, other spec = Exists
    )
    cut_off: bool = False  # its agent can never be reached again, though it runs
    started_from: str = ""  # boot | memory | checkpoint; empty from a host that does not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposit:
    """Bytes that are to lie at ``places.deposit_at`` of a running platform's scratch disk.

    They follow as a stream, encrypted by whoever sends them: that disk is the provider's. Only an
    agent that leaves the end of its disk alone asks for them.
    """

    platform: Name
    size_bytes: Annotated[int, Limit(ge=0, le=DEPOSIT_BYTES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """Platforms of this shape are to start from memory, as soon as that can be had.

    An older host has no such method (NotFound), and its platforms boot. ``environments`` (see
    ``wire.content``) are to be ready in it; an older host does not look at them.
    """

    image: Sha256
    cpus: Annotated[int, Limit(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Limit(ge=128 << 20, le=1 << 42)] = 1 << 30
    scratch_bytes: Bytes = 4 << 30
    environments: Environments = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateStatus:
    """``state`` is absent (with what it lacked), making, ready or refused (with the reason).

    ``missing`` are digests of blobs that are to be sent before it can be made.

    ``ram_sha256`` and ``state_sha256`` are the host core's measurements of a ready one, and
    ``booked_bytes`` what it takes of the quota, unless a platform needs the room.
    """

    state: str
    reason: str = ""
    booked_bytes: Bytes = 0
    ram_sha256: str = ""
    state_sha256: str = ""
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformList:
    """All platforms of the user on this host."""

    platforms: list[PlatformStatus]


HOST = {
    m.name: m
    for m in (
        Method("host.info", Empty, HostInfo, doc="what the host is, holds and allows"),
        Method("identity.request", Empty, CsrResult, doc="the user domain's certificate request"),
        Method("identity.install", Certificate, Empty, doc="the certificate signed over it"),
        Method("platform.create", PlatformSpec, PlatformStatus, doc="make and start a platform"),
        Method("platform.list", Empty, PlatformList),
        Method("platform.delete", ByName, Empty, doc="stop it and give everything back"),
        Method("platform.deposit", Deposit, Empty, stream=True, doc="bytes for its agent"),
        Method(
            "platform.checkpoint",
            CheckpointTake,
            CheckpointTaken,
            doc="its nested VMs stopped by its agent first; answers when it is stored",
        ),
        Method("checkpoint.collect", CheckpointCollect, CheckpointCollected),
        Method("checkpoint.verify", RestoreFrom, CheckpointVerified, doc="all is read, none used"),
        Method(
            "template.prepare",
            TemplateSpec,
            TemplateStatus,
            doc="begin to make a template, or see how far it is; ask again",
        ),
        Method("template.blob", Blob, Empty, stream=True, doc="of an environment; its bytes come"),
        Method("platform.console", ByName, Empty, stream=True, doc="its serial console"),
        Method("rendezvous.accept", Empty, ByName, doc="park; then raw: one agent's connection"),
        Method("events.watch", Empty, Empty, stream=True, doc="events as JSON lines"),
        Method("volume.open", VolumeOpen, VolumeStatus, doc="have it, and its next epoch"),
        Method("volume.serve", VolumeServe, VolumeStatus, doc="let it be used"),
        Method("volume.attach", VolumeAttach, VolumeStatus, doc="to a running platform"),
        Method("volume.detach", ByName, VolumeStatus, doc="from its platform"),
        Method("volume.close", ByName, VolumeStatus, doc="what was written is on the disk"),
        Method("volume.delete", ByName, Empty, doc="with all that is in it"),
        Method("volume.lease", VolumeLease, MirrorStatus, doc="let a mirror answer; its state"),
        Method("volume.rejoin", VolumeRejoin, MirrorStatus, doc="a replica is there again"),
        Method("volume.fence", VolumeFence, Empty, doc="older generations never answer again"),
        Method("volume.list", Empty, VolumeList),
        Method("volume.change", VolumeSpec, VolumeStatus, doc="grow it, or throttle it otherwise"),
        Method("volume.snapshot", VolumeSnapshot, VolumeStatus),
        Method("volume.revert", VolumeSnapshot, VolumeStatus, doc="while it is not attached"),
        Method("volume.forget", VolumeSnapshot, VolumeStatus, doc="delete a snapshot"),
        Method("volume.copy", VolumeCopy, VolumeStatus, doc="have it hold what another one holds"),
        Method("objects.apply", ObjectsApply, ObjectsStatus, doc="what the store is to be"),
        Method("objects.state", Empty, ObjectsStatus),
        Method("objects.credentials", ObjectsCredentials, ObjectsSecret, doc="of one who uses it"),
        Method("objects.delete", ObjectsDelete, ObjectsStatus, doc="a bucket, or all of it"),
        Method("objects.stop", Empty, ObjectsStatus, doc="nobody uses it; its data is kept"),
        Method("tunnel.apply", TunnelApply, Empty, doc="what it asks of other hosts, and gives"),
        Method("service.list", Empty, ServiceList, doc="the user's services on this host"),
    )
}
