"""The grant manifest: all policy that the core knows, compiled outside, checked here.

A JSON object, read into the dataclasses below: a field without a default must be there, an
unknown one is an error, and so is a value of another type or out of range. Rights are lists of
their names. What the fields mean is said at them.
"""

import hashlib
import json
import re
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from supercloud.model.capability import Limits, Rights
from supercloud.model.errors import Invalid
from supercloud.wire.frames import DOMAIN_NAME, NAME

MAX_MANIFEST_BYTES = 1 << 20
_MAX_INT = 1 << 62
_PLAIN_PATH = re.compile(r"(/[^/\0]+)+\Z|/\Z")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}\Z")


def _require(holds: object, message: str) -> None:
    if not holds:
        raise Invalid(message)


def _require_path(path: str, below: str = "/") -> None:
    plain = _PLAIN_PATH.match(path) and not {".", ".."} & set(path.split("/"))
    _require(plain and path.startswith(below), f"{path!r} is not a plain path below {below}")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file by path and SHA-256 in hex; None for a directory, as a runtime in tests."""

    path: str
    sha256: str | None

    def __post_init__(self) -> None:
        _require_path(self.path)
        _require(self.sha256 is None or re.fullmatch("[0-9a-f]{64}", self.sha256), "bad sha256")


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path shown inside a domain at ``target``, below /run."""

    source: str
    target: str
    writable: bool = False

    def __post_init__(self) -> None:
        _require_path(self.source)
        _require_path(self.target, "/run/")


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind that may be joined by a channel; with ``descriptors`` the channel may carry them and
    capabilities may be delegated. Must be said on both sides, alike."""

    descriptors: bool


@dataclass(frozen=True, slots=True)
class Kind:
    """What domains of one kind are."""

    argv: tuple[str, ...]  # absolute path first; {0}..{6} are the numbers given to START
    filter: Sealed  # BPF program
    name: str = ""  # not in the file: the key
    numbers: tuple[tuple[int, int], ...] = ()  # [least, most] of those numbers
    environment: dict[str, str] = field(default_factory=dict)
    """The core adds SUPERCLOUD_DOMAIN and SUPERCLOUD_KIND."""
    network: str = "own"  # nothing but lo; or "host", or "parent" (its creator's)
    tcp: bool = False  # true: TCP bind and connect are not refused by Landlock
    restart: bool = False  # true: started again when it dies; else it is gone, with its children
    speaks: bool = True  # descriptor 3 is its socket to the core
    descriptors: tuple[str, ...] = ()
    """Names of entries of its own table: taken at START as descriptors 4, 5, ..."""
    binds: tuple[Bind, ...] = ()
    state: bool = False  # true: a private directory that stays, at /run/state
    devices: tuple[str, ...] = ()  # host nodes besides null, zero, full, random, urandom
    proc: bool = False  # /proc of its own process namespace
    nests: bool = False
    """It makes mounts in a user namespace of its own (passt), which Landlock's file rules would
    forbid: without those."""
    tmp_bytes: int = 16 << 20  # size of /tmp, and of /run
    nofile: int = 256  # limit of descriptors
    limits: Limits = Limits()  # noqa: RUF009  frozen
    """Of its scheduling context, unless the creator says otherwise."""
    own: Limits = Limits()  # noqa: RUF009
    """Memory and pids of the domain's own processes, when it may create others: booked first."""
    objects: int = 64  # how many channels, semaphores and memory objects it may make
    creates: frozenset[str] = frozenset()  # kinds that it may make
    peers: dict[str, Peer] = field(default_factory=dict)
    creator_rights: Rights = Rights.CONTROL | Rights.CONNECT | Rights.GRANT

    def __post_init__(self) -> None:
        _require(self.argv, "argv is empty")
        for path, below in [(self.argv[0], "/"), *((device, "/dev/") for device in self.devices)]:
            _require_path(path, below)
        _require(self.network in ("own", "host", "parent"), f"no network {self.network!r}")
        _require(1 <= self.limits.cpu_weight <= 10000, "cpu_weight must be 1..10000")
        _require(not self.creates or (self.own.memory_bytes and self.own.pids), "own is missing")
        _require(all(NAME.match(name) for name in self.descriptors), "a descriptor has a bad name")


@dataclass(frozen=True, slots=True)
class Initial:
    """A domain that is made and started at boot, in this order; nobody's child."""

    kind: str
    name: str
    limits: Limits | None = None

    def __post_init__(self) -> None:
        _require(DOMAIN_NAME.match(self.name), f"{self.name!r} is not a name for a domain")


@dataclass(frozen=True, slots=True)
class InitialChannel:
    """A channel between two of those, by their names; ``type`` "seqpacket" or "stream"."""

    a: str
    b: str
    name_a: str
    name_b: str
    type: str = "seqpacket"


@dataclass(frozen=True, slots=True)
class InitialGrant:
    """A capability that one of those gets: to "domain:NAME", "sched:NAME", or "inherited:NAME",
    which is the keeper's ``--fd NAME=N``."""

    to: str
    object: str
    rights: Rights
    name: str


@dataclass(frozen=True, slots=True)
class Uids:
    """Domains get ``first``.., the owners of their user namespaces ``first + count``.. ; no other
    instance of a machine may overlap."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole. ``instance`` names the host: groups are below ``supercloud/<instance>``."""

    version: int
    instance: str
    uids: Uids
    runtime: Sealed
    limits: Limits  # of the whole host
    kinds: dict[str, Kind]
    domains: tuple[Initial, ...] = ()
    channels: tuple[InitialChannel, ...] = ()
    grants: tuple[InitialGrant, ...] = ()
    sha256: str = ""  # not in the file: of the file

    def __post_init__(self) -> None:
        _require(self.version == 1, f"version {self.version} is not known")
        _require(all(map(_KIND.match, [self.instance, *self.kinds])), "a bad instance or kind name")
        _require(self.uids.first >= 1000, "uids below 1000 are not ours")
        for name, kind in self.kinds.items():
            object.__setattr__(kind, "name", name)
            for other in {*kind.creates, *kind.peers}:
                _require(other in self.kinds, f"kind {name} names {other!r}, which is none")
            for other, peer in kind.peers.items():
                _require(
                    self.kinds[other].peers.get(name) == peer, f"{name}, {other}: peers differ"
                )
        names = [domain.name for domain in self.domains]
        ends = [end for c in self.channels for end in (c.a, c.b)] + [g.to for g in self.grants]
        _require(len(set(names)) == len(names), "two domains of one name")
        _require({*ends} <= {*names}, f"no domains { ({*ends} - {*names}) }")
        _require({d.kind for d in self.domains} <= set(self.kinds), "a domain of an unknown kind")


def parse(untrusted: bytes) -> Manifest:
    """Check a manifest's bytes; :class:`Invalid` says which field and why."""
    _require(len(untrusted) <= MAX_MANIFEST_BYTES, "the manifest is too large")
    try:
        document = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON: {error}", where="manifest") from error
    manifest: Manifest = _build(Manifest, document, "manifest")
    object.__setattr__(manifest, "sha256", hashlib.sha256(untrusted).hexdigest())
    return manifest


def _build(type_: Any, untrusted: Any, where: str) -> Any:
    """A value of a type out of JSON; all refusals say where."""
    try:
        return _convert(type_, untrusted, where)
    except Invalid as error:
        raise error if error.where else Invalid(str(error), where=where) from error


def _convert(type_: Any, untrusted: Any, where: str) -> Any:
    origin, inner = get_origin(type_), get_args(type_)
    if origin is UnionType:
        return None if untrusted is None else _build(inner[0], untrusted, where)
    if is_dataclass(type_):
        return _build_object(type_, untrusted, where)
    if type_ is Rights:
        chosen = [Rights.__members__.get(str(name)) for name in untrusted or ()]
        _require(isinstance(untrusted, list) and None not in chosen, "must be a list of rights")
        return Rights(sum({int(right) for right in chosen if right}))
    _require(type(untrusted) is {tuple: list, frozenset: list}.get(origin, origin or type_),
             f"must be {type_}")  # fmt: skip
    if origin is dict:
        return {k: _build(inner[1], v, f"{where}.{k}") for k, v in untrusted.items() if k}
    if origin in (tuple, frozenset):
        pair = Ellipsis not in inner and origin is tuple
        _require(not pair or len(untrusted) == len(inner), f"must have {len(inner)} values")
        return origin(_build(inner[0], v, f"{where}[{n}]") for n, v in enumerate(untrusted))
    _require(type_ is not int or 0 <= untrusted <= _MAX_INT, "is out of range")
    _require(type_ is not str or "\0" not in untrusted, "must not hold a NUL")
    return untrusted


def _build_object(type_: Any, untrusted: Any, where: str) -> Any:
    _require(isinstance(untrusted, dict), "must be an object")
    known = {f.name: f for f in fields(type_)}
    for name in untrusted:
        _require(name in known, f"unknown field {name!r}")
    for name, f in known.items():
        optional = f.default is not MISSING or f.default_factory is not MISSING
        _require(name in untrusted or optional, f"field {name!r} is missing")
    hints = get_type_hints(type_)
    return type_(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in untrusted.items()})
