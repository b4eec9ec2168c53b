"""Every message that crosses a layer, declared once: name, parameters, result, who may call it.

Dispatch (``handlers``), checking of parameters, the table in the documentation and the policy of
which method needs an enrolled peer all come from these declarations. Versions: each side says
``PROTOCOL`` in its hello and accepts the one before it; unknown fields of a newer peer are ignored.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Literal

from supercloud.model.errors import Denied
from supercloud.model.records import dataclass, field
from supercloud.wire.checkpoints import (
    CheckpointSnapshot,
    CheckpointTake,
    CheckpointTaken,
    RestoreFrom,
)
from supercloud.wire.codec import Limit, Name, Sha256, Text, decode, encode
from supercloud.wire.peer import Call, Detach, Handler
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.quota import Bytes

PROTOCOL = 1

Port = Annotated[int, Limit(ge=1, le=65535)]
Pem = Annotated[str, Limit(max_length=65536)]
Base64 = Annotated[str, Limit(max_length=2 << 20)]
Address = Annotated[str, Limit(max_length=64)]


@dataclass(frozen=True, slots=True)
class Empty:
    """No parameters, or nothing to say."""


# ---------------------------------------------- host wire: control plane -> user domain


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrResult:
    """A certificate request made inside the platform or user domain."""

    csr_pem: Pem


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A leaf certificate and the chain up to, without, the user's root."""

    cert_pem: Pem
    chain_pem: Pem


@dataclass(frozen=True, slots=True, kw_only=True)
class ByName:
    """Just a name."""

    name: Name


# ---------------------------------------------------------------- agent link


@dataclass(frozen=True, slots=True, kw_only=True)
class Enroll:
    """A platform's request for its certificate, against the one-time token of its boot data."""

    ucloud: Name
    platform: Name
    token: Annotated[str, Limit(min_length=32, max_length=128)]
    csr_pem: Pem


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first call on an enrolled connection. ``engines`` maps engine -> version or why not."""

    ucloud: Name
    platform: Name
    protocol: int
    version: str
    boot_id: str
    engines: dict[str, str]
    accelerator: str  # of nested VMs: kvm | tcg, empty while it is being probed
    memory_bytes: int
    cpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The control plane's answer."""

    protocol: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A content-addressed file, pulled by the platform over the link."""

    digest: Sha256
    size_bytes: Bytes
    offset_bytes: Bytes = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposited:
    """Bytes of a blob that lie at ``places.deposit_at`` of the platform's scratch disk.

    Encrypted by AES-256-CTR, from a counter block of zeros, under a key of its own.
    """

    size_bytes: Bytes
    key_base64: Annotated[str, Limit(max_length=64)] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """What to run in a container. Empty ``argv`` takes the image's."""

    argv: list[Text] = field(default_factory=list)
    env: dict[str, Text] = field(default_factory=dict)
    workdir: Text = ""
    user: Text = ""  # uid[:gid] or a name of the image's /etc/passwd


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """What an EE runs from. ``erofs`` for containers; ``disk`` (qcow2|raw) or ``kernel`` for VMs.

    ``blobs`` maps role -> blob: erofs: {root}; qcow2, raw: {disk}; kernel: {kernel, initrd}, or
    {root}, an erofs file with files of these names. ``identity``: the guest waits at the port
    ``supercloud.identity``, before it has any random numbers of its own, to be told who it is.
    """

    format: Literal["erofs", "qcow2", "raw", "kernel"]
    blobs: dict[str, Blob]
    process: Process = field(default_factory=Process)  # the image's own defaults
    append: Text = ""  # kernel command line
    identity: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMap:
    """An EE's port; ``host_port`` 0 is not published."""

    port: Port
    protocol: Literal["tcp", "udp"] = "tcp"
    host_port: Annotated[int, Limit(ge=0, le=65535)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """An EE's place on a network of the platform. ``address`` is an IPv4 address/prefix length."""

    network: Name
    address: Address
    gateway: Address
    mac: Address


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMount:
    """A volume of an EE. ``slot`` is where the platform's machine has it (0: not attached yet).

    ``path`` is where a container sees its file system; a VM has it as a disk whose serial is its
    name.
    """

    volume: Name
    path: Text = ""
    read_only: bool = False
    slot: Annotated[int, Limit(ge=0, le=VOLUME_SLOTS)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAccess:
    """An EE's way to its U-Cloud's object store: a container's environment, a VM's credentials.

    ``server_name`` is in the store's certificate, which ``ca_pem`` vouches for.
    """

    server_name: Annotated[str, Limit(max_length=253, pattern=r"[a-z0-9.-]+")]
    ca_pem: Pem
    access_key: Annotated[str, Limit(max_length=128)] = ""
    secret_key: Annotated[str, Limit(max_length=128)] = field(default="", repr=False)
    region: Annotated[str, Limit(max_length=64)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSpec:
    """One EE as its platform's agent is to run it."""

    name: Name
    uid: Name  # changes when the EE is to be made anew; names its cgroup, disk, processes
    kind: Literal["container", "vm"]
    image: ImageRef
    process: Process = field(default_factory=Process)
    cpus: Annotated[float, Limit(ge=0.01, le=64)] = 1.0
    memory_bytes: Annotated[int, Limit(ge=4 << 20, le=1 << 42)] = 128 << 20
    restart: Literal["always", "on-failure", "never"] = "always"
    ports: list[PortMap] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    volumes: list[VolumeMount] = field(default_factory=list)
    objects: ObjectAccess | None = None
    checkpoints: bool = False  # it must be possible to take some; chosen at its start
    restore: RestoreFrom | None = None  # for its first start only


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """The whole of what a platform is to run: what is not in it goes. Level-triggered.

    ``names`` is the DNS of the U-Cloud: EE name -> IPv4 addresses.
    """

    generation: int
    environments: list[EnvironmentSpec]
    names: dict[str, list[Address]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeUsage:
    """The file system of a volume, as its EE sees it."""

    volume: str
    size_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentStatus:
    """An EE as its agent sees it. ``state`` is one of ``model.states.ENVIRONMENT``."""

    name: str
    uid: str
    kind: str
    state: str
    engine: str = ""  # crun, runc, qemu/kvm, qemu/tcg
    pid: int = 0
    exit_status: int | None = None
    restarts: int = 0
    started_s: float = 0.0
    reason: str = ""
    memory_bytes: int = 0
    cpu_s: float = 0.0
    volumes: list[VolumeUsage] = field(default_factory=list)  # of containers that run
    started_from: str = ""  # of VMs: boot, memory, checkpoint; empty where nobody says


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformReport:
    """The agent's view of everything: notified on every change, and the answer to ee.list."""

    generation: int
    environments: list[EnvironmentStatus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exec:
    """Run a program in a container; the call's stream is its terminal or its stdin/stdout.

    Bytes to the handler are stdin; signals {"resize": [rows, columns]}, {"signal": "INT"},
    {"eof": true}. Bytes back are the output; without a terminal stderr comes as {"stderr": base64}.
    The trailer is {"exit_status": n}.
    """

    name: Name
    argv: Annotated[list[Text], Limit(min_length=1, max_length=256)]
    tty: bool = False
    rows: Annotated[int, Limit(ge=1, le=1000)] = 24
    columns: Annotated[int, Limit(ge=1, le=1000)] = 80
    env: dict[str, Text] = field(default_factory=dict)
    workdir: Text = ""
    user: Text = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logs:
    """An EE's output. ``tail`` last lines (-1 all); ``follow`` keeps the stream open."""

    name: Name
    follow: bool = False
    tail: int = -1


# ---------------------------------------------------------------- declarations


@dataclass(frozen=True, slots=True)
class Method:
    """One declared method. ``enrolled``: the peer must have shown a certificate of this U-Cloud."""

    name: str
    params: type
    result: type
    stream: bool = False
    enrolled: bool = True
    idempotent: bool = True
    doc: str = ""


AGENT_TO_CONTROL = {
    m.name: m
    for m in (
        Method("agent.enroll", Enroll, Certificate, enrolled=False, idempotent=False),
        Method("agent.hello", Hello, Welcome),
        Method("agent.renew", CsrResult, Certificate, doc="anew over the same key, before the end"),
        Method("checkpoint.snapshot", CheckpointSnapshot, Empty, doc="amid ee.checkpoint only"),
        Method("blob.get", Blob, Empty, doc="the only call of a connection; then raw: the bytes"),
        Method("blob.deposit", Blob, Deposited, doc="as much as fits, on its disk, by its host"),
    )
}  # and the notifications: agent.report (PlatformReport), agent.event (Event)

CONTROL_TO_AGENT = {
    m.name: m
    for m in (
        Method("ee.apply", Apply, PlatformReport, doc="returns at once; progress is reported"),
        Method("ee.list", Empty, PlatformReport),
        Method("ee.exec", Exec, Empty, stream=True, idempotent=False),
        Method("ee.logs", Logs, Empty, stream=True),
        Method("ee.console", ByName, Empty, stream=True, doc="a VM's serial console"),
        Method("ee.restart", ByName, Empty, idempotent=False),
        Method("ee.checkpoint", CheckpointTake, CheckpointTaken, doc="answers when it is stored"),
        Method("platform.shutdown", Empty, Empty, doc="stop all EEs, sync, power off"),
    )
}

Implementation = Callable[[Call, Any], Awaitable[Any]]


def handlers(
    declared: Mapping[str, Method], implemented: Mapping[str, Implementation]
) -> dict[str, Handler]:
    """Dispatch for a Peer: decode parameters by the declaration, check enrolment, encode results.

    A peer counts as enrolled when ``peer.context["enrolled"]`` is true. Raises KeyError for an
    implementation that is not declared.
    """
    return {name: _bind(declared[name], function) for name, function in implemented.items()}


def _bind(method: Method, function: Implementation) -> Handler:
    async def handle(call: Call) -> Any:
        if method.enrolled and not call.peer.context.get("enrolled"):
            raise Denied(f"{method.name} needs a certificate of this U-Cloud")
        untrusted = {} if call.untrusted_params is None else call.untrusted_params
        params: Any = decode(method.params, untrusted, method.name, ignore_unknown=True)
        result = await function(call, params)
        return result if isinstance(result, Detach) else encode(result)

    return handle
