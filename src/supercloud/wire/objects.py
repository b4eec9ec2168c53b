"""Messages about a U-Cloud's object store on the host wire: control plane -> user domain.

One store a U-Cloud and host. ``objects.apply`` says all that it is to be, and may be repeated: the
answer says how far it is. What is kept of it at the control plane, against a roll-back, is the
``position`` of its journal; it never goes back. The store's TLS key is made in the user domain,
which shows a certificate request until ``apply`` brings a certificate over it.
"""

from typing import Annotated, Literal

from supercloud.model.records import dataclass, field
from supercloud.wire.codec import Limit, Name
from supercloud.wire.volumes import Key

STORE = "objects"
"""The name of a U-Cloud's store, in its certificate and in the control plane's records."""

MAX_BUCKETS = 256
MAX_EXPIRE_DAYS = 3650
MIN_QUOTA_BYTES = 1 << 20
MAX_CAPACITY_BYTES = 16 << 40
VOLUME_BYTES = 256 << 20
SPARE_VOLUMES = 3

Pem = Annotated[str, Limit(max_length=65536)]
BucketName = Annotated[str, Limit(pattern=r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")]
Access = Literal["read", "write"]
Count = Annotated[int, Limit(ge=0, le=1 << 62)]
Capacity = Annotated[int, Limit(ge=MIN_QUOTA_BYTES, le=MAX_CAPACITY_BYTES)]


def booked_bytes(capacity_bytes: int) -> int:
    """What a store of that capacity takes of the disk quota, whatever is in it.

    Its volumes, which are half as large again (what is deleted is there until it is vacuumed) and
    come whole, and as much again as a quarter of the capacity for the journal of names and keys.
    """
    volumes = -(-capacity_bytes * 3 // 2 // VOLUME_BYTES) + SPARE_VOLUMES
    journal = (64 << 20) + capacity_bytes // 4
    return volumes * VOLUME_BYTES + -(-journal // 4096) * 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a journal is: its segment, and the records in that."""

    segment: Count = 0
    records: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSpec:
    """A bucket to have. ``expire_days`` 0: nothing in it expires."""

    name: BucketName
    quota_bytes: Annotated[int, Limit(ge=MIN_QUOTA_BYTES, le=MAX_CAPACITY_BYTES)]
    versioning: bool = False
    expire_days: Annotated[int, Limit(ge=0, le=MAX_EXPIRE_DAYS)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsApply:
    """The whole store: it is made, started, changed. A bucket that is not named stays as it is.

    ``users`` are those whose credentials go on being good. ``least``: an older journal is refused.
    ``cert_pem`` and ``chain_pem`` "": the certificate that is there. NoResources when
    ``booked_bytes`` of ``capacity_bytes`` do not fit in the quota; nothing is done then.
    """

    capacity_bytes: Capacity
    key_base64: Key = field(repr=False)
    buckets: list[BucketSpec]
    users: list[Name] = field(default_factory=list)
    least: Position = field(default_factory=Position)
    cert_pem: Pem = ""
    chain_pem: Pem = ""
    tag: Annotated[str, Limit(max_length=256)] = ""  # whose it is; given back in its status


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketUsage:
    """What a bucket holds; ``charged_bytes`` is what counts against its quota."""

    name: str
    quota_bytes: int
    versioning: bool = False
    expire_days: int = 0
    entries: int = 0
    charged_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsStatus:
    """The store as its user domain sees it. ``state`` is one of ``model.states.STORE``.

    ``csr_pem`` asks for a certificate: without one it does not start. ``memory_bytes`` and
    ``started_s`` are of its domain while that runs.
    """

    state: str
    reason: str = ""
    position: Position = field(default_factory=Position)
    capacity_bytes: int = 0
    disk_bytes: int = 0
    buckets: list[BucketUsage] = field(default_factory=list)
    csr_pem: str = ""
    memory_bytes: int = 0
    started_s: float = 0.0
    tag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsCredentials:
    """Somebody who is to use some buckets: ``read`` or ``write`` by name. NotFound, Busy."""

    name: Name
    buckets: dict[str, Access]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsSecret:
    """What an EE signs its requests with. The same name gets the same keys again."""

    access_key: Annotated[str, Limit(max_length=128)]
    secret_key: Annotated[str, Limit(max_length=128)] = field(repr=False)
    region: Annotated[str, Limit(max_length=64)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsDelete:
    """``bucket`` with all that is in it; "" is the whole store."""

    bucket: Annotated[str, Limit(pattern=r"([a-z0-9][a-z0-9-]{1,61}[a-z0-9])?")] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """One of the user's services on a host; ``started_s`` 0: it does not run."""

    kind: str
    state: Literal["running", "not running"]
    memory_bytes: int = 0
    memory_limit_bytes: int = 0
    started_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceList:
    """All services of the user on a host."""

    services: list[ServiceStatus]
