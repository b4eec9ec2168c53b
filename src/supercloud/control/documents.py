"""What the control plane keeps of every object: one document a row of the store.

``ucloud/U`` holds the wish and what was decided once for it (placement, addresses, port slots), in
one row, so that a decision is taken whole or not at all. ``platform/U/P`` and ``environment/U/E``
follow from it and hold how far each object is; so does ``volume/U/V``, which outlives its U-Cloud
for as long as it has data, ``objects/U/objects``, its object store, ``checkpoints/U/NAME``, what is
kept of an EE or platform, and ``templates/U/templates``, which outlives it for the next one's sake.
A document is JSON; ``kind`` and the fields are stable names, and a field that was added later has a
default.
"""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from supercloud.control.kept import CheckpointsOf, KeptCheckpoint, Place, Restore, TakeTask
from supercloud.model.errors import Permanent
from supercloud.model.resources import (
    Bucket,
    Checkpointing,
    Environment,
    PlatformSize,
    Provider,
    UCloud,
    Volume,
)
from supercloud.wire.checkpoints import Head
from supercloud.wire.messages import EnvironmentSpec, ImageRef
from supercloud.wire.objects import STORE, Position
from supercloud.wire.volumes import Seal

Document = TypeVar("Document")
TEMPLATES = "templates"


@dataclass(slots=True, kw_only=True)
class Step:
    """One stage of an object's way to its wish; ``ended_s`` 0 is under way.

    Times are seconds since the epoch; ``error`` says why a stage failed.
    """

    name: str
    started_s: float
    ended_s: float = 0.0
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Assignment(Place):
    """What was allotted to one EE.

    ``slots`` maps ``PORT/PROTOCOL`` to a place in the platform's range of published ports.
    ``moved``: the address came with it from another platform, and stays.
    """

    platform: str
    slots: dict[str, int] = field(default_factory=dict)
    moved: bool = False


@dataclass(slots=True, kw_only=True)
class PlatformWish:
    """A platform that the U-Cloud is to have; ``index`` numbers its /24 of each network."""

    name: str
    provider: Provider
    host: str
    region: str
    jurisdiction: str
    index: int
    size: PlatformSize
    image: str


@dataclass(slots=True, kw_only=True)
class ReplicaWish:
    """Another host that a volume is to be kept on."""

    provider: Provider
    host: str


@dataclass(slots=True, kw_only=True)
class VolumeWish:
    """A volume that the U-Cloud is to have, and where: decided when it is first used.

    ``others``: the hosts that it is kept on beside ``host``, where it is used.
    """

    spec: Volume
    provider: Provider
    host: str
    others: list[ReplicaWish] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class StoreWish:
    """The object store that the U-Cloud is to have, and where: decided when it is first used."""

    provider: Provider
    host: str
    buckets: list[Bucket]


@dataclass(slots=True, kw_only=True)
class UCloudDocument:
    """A U-Cloud: the wish of ``generation``, and all that was decided for it."""

    name: str
    uid: str = field(default_factory=lambda: secrets.token_hex(8))
    generation: int = 1
    state: str = "applying"
    reason: str = ""
    deleting: bool = False
    manifest: str = ""
    file: str = ""
    directory: str = ""
    spec: UCloud
    networks: dict[str, str] = field(default_factory=dict)  # name -> range
    platforms: dict[str, PlatformWish] = field(default_factory=dict)
    assignments: dict[str, Assignment] = field(default_factory=dict)  # by EE
    volumes: dict[str, VolumeWish] = field(default_factory=dict)
    store: StoreWish | None = None
    restores: dict[str, Restore] = field(default_factory=dict)  # by EE or platform
    drop_volumes: bool = False  # going down, it takes its volumes and buckets with it
    marks: dict[str, str] = field(default_factory=dict)  # of images, by reference: their content
    providers: dict[str, Provider] = field(default_factory=dict)  # that may have platforms, by key
    applied_s: float = field(default_factory=time.time)


@dataclass(slots=True, kw_only=True)
class PlatformDocument:
    """An L1 platform. ``incarnation`` counts how often it was made; each has its own token."""

    ucloud: str
    name: str
    wish: PlatformWish
    state: str = "pending"
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    error: dict[str, Any] | None = None  # it will not get better without a change
    deleting: bool = False
    created_s: float = field(default_factory=time.time)
    incarnation: int = 1
    failures: int = 0
    token_sha256: str = ""
    token_expires_s: float = 0.0
    enrolled_pin: str = ""  # of the public key that used the token
    address: str = ""
    first_port: int = 0
    ports: int = 0
    accelerator: str = ""
    image: str = ""  # that it runs
    engines: dict[str, str] = field(default_factory=dict)
    restore: Restore | None = None
    restoring: int = 0  # the restore that this incarnation is made by
    restored: int = 0  # the last one that it came up from
    steps: list[Step] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class EnvironmentDocument:
    """An execution environment: one replica of one of the manifest's environments."""

    ucloud: str
    name: str
    spec: Environment
    assignment: Assignment
    mark: str = ""  # of the image's content
    state: str = "pending"
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    error: dict[str, Any] | None = None  # it will not get better without a change
    deleting: bool = False
    ready: EnvironmentSpec | None = None  # what its platform is told; host ports are added there
    ready_on: str = ""  # the platform that is told
    current: bool = False  # whether ``ready`` is of ``spec``, ``assignment`` and ``restore``
    restore: Restore | None = None
    restored: int = 0  # the last one that was seen running
    image: ImageRef | None = None
    image_of: str = ""  # reference and mark of what ``image`` was made from
    engine: str = ""
    restarts: int = 0
    exit_status: int | None = None
    started_s: float = 0.0
    created_s: float = field(default_factory=time.time)
    steps: list[Step] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Task:
    """Something that the user asked for once: ``snapshot``, ``revert``, ``forget``, ``backup``.

    ``done`` when it was tried; ``error`` says why it failed.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(8))
    what: str
    snapshot: str
    done: bool = False
    error: dict[str, Any] | None = None


@dataclass(slots=True, kw_only=True)
class ReplicaDocument:
    """A replica of a volume on another host than the one where it is used.

    ``replica`` is its name, which stays with it. ``in_sync``: whatever was answered is there too.
    ``kept``: since it was last in sync its device was not ended but in order. ``opened``: its host
    may have it open. ``refused`` says why it is not opened any more.
    """

    replica: str
    provider: Provider
    host: str
    wrapped_key: str = field(default="", repr=False)
    seal: Seal = field(default_factory=Seal)
    sealed_s: float = 0.0
    opened: bool = False
    in_sync: bool = True
    kept: bool = True
    reason: str = ""
    refused: str = ""


@dataclass(slots=True, kw_only=True)
class VolumeDocument:
    """A volume. ``state`` is one of ``model.states.KEPT_VOLUME``.

    ``seal`` is the newest one that is trusted; it never goes back. ``wrapped_key`` is the data key
    under the U-Cloud's wrapping key. ``opened``: its host may have it open. ``halted`` says why it
    is not opened any more until its user acts; ``found`` is the seal that the host showed then.
    ``slot`` is of its attachment to that ``incarnation`` of ``platform``. ``reverted`` is the mark
    of the restore for which it was last taken back to its snapshot, if no platform has had it and
    lost it since. ``copied`` is the number of the last copy into it that is done, ``copying`` of
    the last that was begun.

    One that is kept on several hosts has the ``others`` beside the replica that is where it is
    used, whose ``replica`` name, ``in_sync`` and ``kept`` are here. Its record: the ``generation``
    that was named last, the ``turns`` of it that were written down, by replica; ``mirroring``: a
    mirror of that generation may live on ``host``; ``clean``: those that are in sync are equal.
    """

    ucloud: str
    name: str
    spec: Volume
    provider: Provider
    host: str
    state: str = "pending"
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    error: dict[str, Any] | None = None  # it will not get better without a change
    deleting: bool = False
    wrapped_key: str = field(default="", repr=False)
    seal: Seal = field(default_factory=Seal)
    sealed_s: float = 0.0
    given: Volume | None = None  # what the host was last told
    waits: str = ""  # for what, when it is not as it is to be
    copied: int = 0
    copied_s: float = 0.0
    copying: int = 0
    opened: bool = False
    platform: str = ""
    incarnation: int = 0
    slot: int = 0
    mode: str = ""
    halted: str = ""
    found: Seal | None = None
    evidence: int = 0
    full: bool = False
    snapshots: list[str] = field(default_factory=list)
    reverted: str = ""
    stored_bytes: int = 0
    task: Task | None = None
    replica: str = ""
    in_sync: bool = True
    kept: bool = True
    others: list[ReplicaDocument] = field(default_factory=list)
    generation: int = 0
    mirroring: bool = False
    clean: bool = True
    turns: dict[str, int] = field(default_factory=dict)
    created_s: float = field(default_factory=time.time)
    steps: list[Step] = field(default_factory=list)

    @property
    def replicas(self) -> "list[VolumeDocument | ReplicaDocument]":
        """All of it, the one where it is used first."""
        return [self, *self.others]


@dataclass(slots=True, kw_only=True)
class KeptBucket:
    """A bucket of the store, in the manifest or kept; ``deleting``: with all that is in it."""

    spec: Bucket
    deleting: bool = False


@dataclass(slots=True, kw_only=True)
class Access:
    """An EE that may use ``buckets`` (``read`` or ``write``), and its keys there."""

    buckets: dict[str, str]
    access_key: str
    wrapped_secret: str = field(repr=False)
    region: str


@dataclass(slots=True, kw_only=True)
class StoreDocument:
    """The object store of a U-Cloud. ``state`` is one of ``model.states.KEPT_STORE``.

    ``position`` is how far its journal has come, as its host said; it never goes back.
    ``wrapped_key`` is its data key under the U-Cloud's wrapping key, ``wrapped_secret`` likewise
    what its checkpoints are sealed under. ``made``: its host may have it; ``running``: it may run
    there. ``given`` names what the host was last told and has made so.
    """

    ucloud: str
    name: str = STORE
    provider: Provider
    host: str
    buckets: dict[str, KeptBucket]
    state: str = "pending"
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    error: dict[str, Any] | None = None  # it will not get better without a change
    deleting: bool = False
    wrapped_key: str = field(default="", repr=False)
    wrapped_secret: str = field(default="", repr=False)
    csr_pem: str = ""
    cert_pem: str = ""
    position: Position = field(default_factory=Position)
    made: bool = False
    running: bool = False
    given: str = ""
    access: dict[str, Access] = field(default_factory=dict)  # by EE, and by who takes checkpoints
    created_s: float = field(default_factory=time.time)
    steps: list[Step] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class CheckpointsDocument:
    """The checkpoints of an EE or a platform. ``state`` is one of ``model.states.CHECKPOINTS``.

    ``kept`` has the oldest first; the last one vouches for all, and is never given up before them.
    ``stale`` are being removed from the store. ``policy`` None: it is no more, or is to have none.
    ``snapshot`` is what volumes may be given by that name for the one that is being taken.
    """

    ucloud: str
    name: str
    of: CheckpointsOf
    policy: Checkpointing | None
    state: str = "waiting"
    since_s: float = field(default_factory=time.time)
    reason: str = ""
    hint: str = ""  # what to do about the reason
    error: dict[str, Any] | None = None
    deleting: bool = False
    kept: list[KeptCheckpoint] = field(default_factory=list)
    stale: list[int] = field(default_factory=list)
    snapshot: str = ""
    task: TakeTask | None = None
    failures: int = 0  # since the last one that was taken
    tried_s: float = 0.0  # when the last failure was
    created_s: float = field(default_factory=time.time)
    steps: list[Step] = field(default_factory=list)

    @property
    def head(self) -> Head | None:
        """What the next one is taken after."""
        if not self.kept:
            return None
        return Head(sequence=self.kept[-1].sequence, root=self.kept[-1].root)


@dataclass(slots=True, kw_only=True)
class TemplateWish:
    """A template that the U-Cloud's platforms are to start from: their shape, and where.

    ``environments`` are to be ready in it, without their secrets; ``plain``: without them, since
    the host could not make one with them. ``state`` is what its host said last (``absent``,
    ``making``, ``ready``, ``refused``), or ``unsupported``.
    """

    provider: Provider
    host: str
    image: str
    cpus: int
    memory_bytes: int
    scratch_bytes: int
    environments: list[EnvironmentSpec] = field(default_factory=list)
    plain: bool = False
    state: str = ""
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class TemplatesDocument:
    """The templates of a U-Cloud, which are there for its next ``up`` too."""

    ucloud: str
    name: str = TEMPLATES
    wishes: list[TemplateWish]


Following = (
    PlatformDocument | EnvironmentDocument | VolumeDocument | StoreDocument | CheckpointsDocument
)
"""What is of a U-Cloud, and may fail."""

AnyDocument = UCloudDocument | Following | TemplatesDocument

KINDS: dict[type, str] = {
    UCloudDocument: "ucloud",
    PlatformDocument: "platform",
    EnvironmentDocument: "environment",
    VolumeDocument: "volume",
    StoreDocument: "objects",
    CheckpointsDocument: "checkpoints",
    TemplatesDocument: TEMPLATES,
}
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {cls: msgspec.json.Decoder(cls) for cls in KINDS}
_ENCODER = msgspec.json.Encoder()


def key_of(document: AnyDocument) -> str:
    """The document's key in the store."""
    if isinstance(document, UCloudDocument):
        return ucloud_key(document.name)
    return f"{KINDS[type(document)]}/{document.ucloud}/{document.name}"


def ucloud_key(ucloud: str) -> str:
    """The key of a U-Cloud."""
    return f"ucloud/{ucloud}"


def platform_key(ucloud: str, name: str) -> str:
    """The key of a platform."""
    return f"platform/{ucloud}/{name}"


def environment_key(ucloud: str, name: str) -> str:
    """The key of an EE."""
    return f"environment/{ucloud}/{name}"


def volume_key(ucloud: str, name: str) -> str:
    """The key of a volume."""
    return f"volume/{ucloud}/{name}"


def store_key(ucloud: str) -> str:
    """The key of a U-Cloud's object store."""
    return f"objects/{ucloud}/{STORE}"


def checkpoints_key(ucloud: str, name: str) -> str:
    """The key of the checkpoints of an EE or platform."""
    return f"checkpoints/{ucloud}/{name}"


def templates_key(ucloud: str) -> str:
    """The key of a U-Cloud's templates."""
    return f"{TEMPLATES}/{ucloud}/{TEMPLATES}"


def dump(document: object) -> bytes:
    """The document as JSON."""
    return _ENCODER.encode(document)


def load(cls: type[Document], key: str, value: bytes) -> Document:
    """The document in a row. Permanent when the row cannot be read: the state is damaged."""
    try:
        document: Document = _DECODERS[cls].decode(value)
    except msgspec.MsgspecError as error:
        raise Permanent(f"the state of {key} is damaged: {error}") from error
    return document


def step_begin(steps: list[Step], name: str) -> None:
    """Note that a stage begins, unless it is under way."""
    if not any(step.name == name and not step.ended_s for step in steps):
        steps[:] = [step for step in steps if step.name != name]
        steps.append(Step(name=name, started_s=time.time()))


def step_end(steps: list[Step], name: str, error: str = "") -> None:
    """Note that a stage ended, if it was under way."""
    for step in steps:
        if step.name == name and not step.ended_s:
            step.ended_s, step.error = time.time(), error
