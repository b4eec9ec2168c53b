"""The resources of a U-Cloud as a user wishes for them: what a manifest becomes.

A manifest that was parsed is complete: paths of images are absolute, every provider has its user,
every environment its network, and there is at least one network (``control.manifest``).
Numbers are in the units of their names; ``cpus`` are processors, 0.5 is half of one.
"""

from dataclasses import dataclass
from typing import Literal

from supercloud.model.copies import Backup, Clone
from supercloud.model.rules import NAME, SHORT_LABEL, SHORT_NAME, Rule, declared
from supercloud.model.services import Services

API_VERSION = "supercloud.dev/v1"
KIND = "UCloud"
MIB, GIB = 1 << 20, 1 << 30
DEFAULT_NETWORK = "default"

# Words that later versions give a meaning to; now they are refused, rather than ignored.
RESERVED = ("isolation", "mobility", "survive")

# The forms of an image. A path is relative to the manifest's directory.
TRANSPORTS = ("oci", "docker-archive", "docker")

LABEL = "lower case letters, digits and '-', at most 63, not '-' at either end"
BUCKET_NAME = r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]"
BUCKET_LABEL = "3 to 63 lower case letters, digits and '-', not '-' at either end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Somebody's machines that platforms of the U-Cloud may run on."""

    name: str = declared(Rule(doc="how this manifest calls it", pattern=NAME, wanted=LABEL))
    kind: Literal["lower_layer", "fake"] = declared(
        Rule(
            doc="`lower_layer`: a host that runs our Lower Layer. `fake`: nothing runs, "
            "everything is pretended; for trying placement wishes"
        )
    )
    endpoint: str = declared(
        Rule(
            doc="where the host listens, `ADDRESS:PORT` (lower_layer only)",
            pattern=r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):[0-9]{1,5}",
            wanted="ADDRESS:PORT",
            max_length=300,
        ),
        "127.0.0.1:7443",
    )
    user: str = declared(
        Rule(
            doc="the name that this provider enrolled; the U-Cloud's own if not given",
            pattern=f"({NAME})?",
            wanted=LABEL,
        ),
        "",
    )
    region: str = declared(
        Rule(
            doc="where it is; what `placement.region` asks for", pattern=f"({NAME})?", wanted=LABEL
        ),
        "",
    )
    jurisdiction: str = declared(
        Rule(doc="whose law it is under; what `placement.jurisdiction` asks for", max_length=63),
        "",
    )
    options: dict[str, str] = declared(
        Rule(
            doc="of the fake provider: `hosts`, `cpus`, `memory_gib`, `regions`; delays "
            "(`boot_ms`, `start_ms`, `latency_ms`), failures (`fail_create`, `fail_delete`), "
            "`volumes`, `objects`, `checkpoints` and `tunnel` (0: it has none)",
            key_pattern=r"[a-z][a-z0-9_]{0,62}",
            max_length=256,
            max_items=64,
        ),
        factory=dict,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network of the U-Cloud, the same on all its platforms."""

    name: str = declared(Rule(doc="its name", pattern=SHORT_NAME, wanted=SHORT_LABEL))
    range: str = declared(
        Rule(
            doc="its addresses, an IPv4 network of a prefix length from 8 to 24; "
            "allotted out of 10.64.0.0/10 if not given",
            pattern=r"([0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2})?",
            wanted="an IPv4 network such as 10.70.0.0/16",
            max_length=18,
            example="10.70.0.0/16",
        ),
        "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port that an environment serves. In a manifest the bare number is enough."""

    port: int = declared(Rule(doc="where it listens inside", ge=1, le=65535))
    protocol: Literal["tcp", "udp"] = declared(Rule(doc="of the transport layer"), "tcp")
    publish: bool = declared(
        Rule(doc="reachable from outside, under the URL that `ps` prints"), default=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Wishes about where an environment runs. All of them are conditions; none given: anywhere."""

    provider: str = declared(
        Rule(doc="only at the provider of this name", pattern=f"({NAME})?", wanted=LABEL), ""
    )
    region: str = declared(Rule(doc="only in this region", pattern=f"({NAME})?", wanted=LABEL), "")
    jurisdiction: str = declared(Rule(doc="only under this law", max_length=63), "")
    spread: Literal["none", "host", "provider", "region"] = declared(
        Rule(doc="no two replicas on the same one of these"), "none"
    )
    anti_affinity: list[str] = declared(
        Rule(
            doc="names of environments that must not be on the same host",
            pattern=SHORT_NAME,
            wanted=SHORT_LABEL,
            max_items=256,
        ),
        factory=list,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A disk of the U-Cloud that outlives what uses it, protected from the provider that holds it.

    It is made on the host of the first environment that uses it, and stays there: what uses it
    later is placed where it is. One that is kept on several hosts goes from one of them to another
    with what uses it when a host is lost. `down`, and leaving it out of the manifest, keep it with
    its data; `supercloud volumes delete` does not.
    """

    name: str = declared(
        Rule(
            doc="its name; for virtual machines at most 20 characters: it is their disk's serial",
            pattern=SHORT_NAME,
            wanted=SHORT_LABEL,
        )
    )
    size_bytes: int = declared(
        Rule(
            doc="how large it is; may be raised later, not lowered",
            key="size",
            size=True,
            ge=MIB,
            le=1 << 44,
        )
    )
    format: Literal["qcow2", "raw"] = declared(
        Rule(doc="how it is stored; `qcow2` can have snapshots, `raw` is quicker"), "qcow2"
    )
    iops: int = declared(
        Rule(doc="reads and writes a second, at most; 10 or more, 0 is no limit", ge=0, le=1 << 31),
        0,
    )
    bytes_per_s: int = declared(
        Rule(
            doc="bytes read and written a second, at most; 64KiB or more, 0 is no limit",
            key="bandwidth",
            size=True,
            ge=0,
            le=1 << 44,
        ),
        0,
    )
    replicas: int = declared(
        Rule(
            doc="on how many hosts it is kept, each with all of it and a key of its own; what uses "
            "it is started on another of them when its host is lost, with all that was answered. "
            "Cannot be changed later",
            ge=1,
            le=3,
        ),
        1,
    )
    clone: Clone | None = declared(Rule(doc="what it begins as; if not given it is empty"), None)
    backup: Backup | None = declared(Rule(doc="what it is a backup of"), None)

    @property
    def copy_of(self) -> str:
        """The volume that it is copied from, if any."""
        origin = self.clone or self.backup
        return origin.of if origin else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeUse:
    """A volume in an environment. Only one environment may use it, unless all only read it."""

    name: str = declared(
        Rule(doc="the volume's name in this manifest", pattern=SHORT_NAME, wanted=SHORT_LABEL)
    )
    path: str = declared(
        Rule(
            doc="where a container has its file system: absolute; not for a vm, which has a disk",
            max_length=1024,
            example="/var/lib/data",
        ),
        "",
    )
    read_only: bool = declared(Rule(doc="it cannot be written to here"), default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A bucket of the U-Cloud's object store, which speaks S3; it outlives what uses it.

    The store is made on the host of the first environment that uses a bucket, and stays there with
    all buckets of the U-Cloud: what uses one is placed there. The provider sees ciphertext, and no
    names. `down`, and leaving it out of the manifest, keep it with its objects; `supercloud buckets
    delete` does not.
    """

    name: str = declared(
        Rule(doc="its name in S3", pattern=BUCKET_NAME, wanted=BUCKET_LABEL, example="photos")
    )
    quota_bytes: int = declared(
        Rule(
            doc="what it may hold: objects, all their versions, unfinished uploads; nothing is "
            "stored beyond",
            key="quota",
            size=True,
            ge=MIB,
            le=1 << 43,
        )
    )
    versioning: bool = declared(
        Rule(doc="what is overwritten or deleted is kept as an older version"), default=False
    )
    expire_days: int = declared(
        Rule(
            doc="objects are deleted so many days after they were put, or up to a day later; "
            "0: never",
            ge=0,
            le=3650,
        ),
        0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketUse:
    """A bucket in an environment, which is told where it is and with which keys it gets in.

    A container finds that in its environment variables: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
    `AWS_SECRET_ACCESS_KEY`, `AWS_REGION` and `AWS_CA_BUNDLE`, a file with the root certificate that
    vouches for the endpoint. A virtual machine gets the same lines, and that certificate, as the
    systemd credentials `supercloud.objects` and `supercloud.ca`, which are in its SMBIOS table as
    OEM strings; systemd (252 and newer) makes `/etc/supercloud-objects.env` and
    `/etc/supercloud-ca.pem` of them.
    """

    name: str = declared(
        Rule(doc="the bucket's name in this manifest", pattern=BUCKET_NAME, wanted=BUCKET_LABEL)
    )
    access: Literal["read", "write"] = declared(
        Rule(doc="`read`: get and list; `write`: put and delete as well"), "write"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """Checkpoints of an environment, or of platforms: whole states, to be restored from.

    They are taken from the outside, while what is in them stands still for a moment, and go into
    the U-Cloud's object store under keys of the user alone. `supercloud checkpoint` takes one at
    once, `supercloud restore` goes back to one. They outlive what they are of. Volumes that are
    written to go back with it: make them twice as large as what is in them, for what checkpoints
    keep of a volume takes room in it.
    """

    every_s: int = declared(
        Rule(
            doc="how often one is taken; if not given only when `supercloud checkpoint` asks",
            key="every",
            duration=True,
            ge=10,
            le=30 * 86400,
            example="10m",
        ),
        0,
    )
    keep: int = declared(Rule(doc="how many are kept, the newest ones", ge=1, le=100), 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointStore:
    """Where checkpoints are kept: a bucket of their own in the U-Cloud's object store."""

    capacity_bytes: int = declared(
        Rule(
            doc="what it has room for; if not given three times the memory of all that is to be "
            "checkpointed, and 1GiB at least",
            key="capacity",
            size=True,
            ge=64 * MIB,
            le=1 << 43,
        ),
        0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An execution environment: a container or a virtual machine."""

    name: str = declared(
        Rule(
            doc="its name, and its name in the U-Cloud's DNS",
            pattern=SHORT_NAME,
            wanted=SHORT_LABEL,
        )
    )
    kind: Literal["container", "vm"] = declared(Rule(doc="what runs it"))
    image: str = declared(
        Rule(
            doc="container: `oci:PATH[:TAG]`, `docker-archive:PATH` or `docker://REFERENCE`; "
            "vm: the path of a disk image (qcow2, raw) or of a directory with `kernel` and "
            "`initrd`. Paths are relative to the manifest",
            min_length=1,
            example="docker://docker.io/library/nginx:1.27",
        )
    )
    command: list[str] = declared(
        Rule(doc="instead of what the image says; containers only", max_items=256), factory=list
    )
    cpus: float = declared(Rule(doc="processors, at most; 0.5 is half of one", ge=0.01, le=64), 1.0)
    memory_bytes: int = declared(
        Rule(doc="memory, at most", key="memory", size=True, ge=4 * MIB, le=1 << 42), 128 * MIB
    )
    env: dict[str, str] = declared(
        Rule(
            doc="environment variables; containers only",
            key_pattern=r"[A-Za-z_][A-Za-z0-9_]{0,254}",
            max_items=256,
        ),
        factory=dict,
    )
    ports: list[Port] = declared(Rule(doc="what it serves", max_items=64), factory=list)
    replicas: int = declared(Rule(doc="how many of it", ge=0, le=1000), 1)
    restart: Literal["always", "on-failure", "never"] = declared(
        Rule(doc="when it is started again after it ended"), "always"
    )
    placement: Placement = declared(Rule(doc="where it runs"), factory=Placement)
    network: str = declared(
        Rule(
            doc="the network that it is on; the first one if not given",
            pattern=f"({SHORT_NAME})?",
            wanted=SHORT_LABEL,
        ),
        "",
    )
    volumes: list[VolumeUse] = declared(
        Rule(doc="the volumes that it uses; it has no replicas then", max_items=8), factory=list
    )
    buckets: list[BucketUse] = declared(
        Rule(doc="the buckets that it uses", max_items=64), factory=list
    )
    checkpoint: Checkpointing | None = declared(
        Rule(
            doc="checkpoints can be taken of it, with what it has on volumes (not on raw ones), "
            "and it can be restored from them"
        ),
        None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSize:
    """How large each L1 platform is: the virtual machine that environments run in."""

    cpus: int = declared(Rule(doc="virtual processors", ge=1, le=64), 1)
    memory_bytes: int = declared(
        Rule(
            doc="memory, for all that runs in it", key="memory", size=True, ge=256 * MIB, le=1 << 42
        ),
        GIB,
    )
    scratch_bytes: int = declared(
        Rule(
            doc="disk for images and writable layers, encrypted",
            key="scratch",
            size=True,
            ge=64 * MIB,
            le=1 << 50,
        ),
        4 * GIB,
    )
    ports: int = declared(Rule(doc="how many ports it can publish", ge=0, le=1024), 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform(PlatformSize):
    """How large each L1 platform is: the virtual machine that environments run in."""

    checkpoint: Checkpointing | None = declared(
        Rule(
            doc="checkpoints are taken of whole platforms, with all that runs in them, and with "
            "what they have on volumes (not with raw ones)"
        ),
        None,
    )

    @property
    def size(self) -> PlatformSize:
        """Without what does not make it another machine."""
        return PlatformSize(
            cpus=self.cpus,
            memory_bytes=self.memory_bytes,
            scratch_bytes=self.scratch_bytes,
            ports=self.ports,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UCloud:
    """One user's cloud."""

    name: str = declared(Rule(doc="its name", pattern=SHORT_NAME, wanted=SHORT_LABEL))
    providers: list[Provider] = declared(Rule(doc="where it may run", min_items=1, max_items=256))
    environments: list[Environment] = declared(
        Rule(doc="what runs in it", max_items=1000), factory=list
    )
    networks: list[Network] = declared(
        Rule(doc="its networks; one called `default` if none is given", max_items=64), factory=list
    )
    volumes: list[Volume] = declared(Rule(doc="its volumes", max_items=256), factory=list)
    buckets: list[Bucket] = declared(Rule(doc="its buckets", max_items=256), factory=list)
    platform: Platform = declared(Rule(doc="its platforms: their size"), factory=Platform)
    checkpoint: CheckpointStore = declared(
        Rule(doc="the store of all checkpoints"), factory=CheckpointStore
    )
    services: Services = declared(Rule(doc="its infrastructure services"), factory=Services)


def replica_names(environment: Environment) -> list[str]:
    """The names of its EEs: ``web``, ``web-2``, ``web-3``: one that stands keeps its name."""
    name = environment.name
    return [
        name if number == 1 else f"{name}-{number}" for number in range(1, environment.replicas + 1)
    ]


def split_image(image: str) -> tuple[str, str, str]:
    """Transport (``""`` is a path), path or reference, and tag (of ``oci:`` only) of an image.

    >>> split_image("oci:images/web:v1"), split_image("docker://registry/web:v1")
    (('oci', 'images/web', 'v1'), ('docker', 'registry/web:v1', ''))
    """
    transport, colon, rest = image.partition(":")
    if not colon or transport not in TRANSPORTS:
        return "", image, ""
    if transport == "docker":
        return transport, rest.removeprefix("//"), ""
    if transport == "oci":
        path, colon, tag = rest.rpartition(":")
        if colon and "/" not in tag:
            return transport, path, tag
    return transport, rest, ""
