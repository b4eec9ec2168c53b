"""The grant manifest: all policy that the core knows, compiled outside, checked here.

A JSON object, read into the dataclasses below: a field without a default must be there; an
unknown one, a value of another type or a negative number is an error. Rights are lists of names.
"""

import hashlib
import json
import os.path
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from supercloud.lower.core.cgroup import Hierarchy
from supercloud.model.capability import Limits, Rights
from supercloud.model.refusals import Invalid
from supercloud.wire.frames import DOMAIN_NAME, NAME

MAX_MANIFEST_BYTES = 1 << 20
_NO_LIMITS = Limits()


def _require(holds: object, message: str) -> None:
    if not holds:
        raise Invalid(message)


def _require_path(path: str, below: str = "/") -> None:
    plain = os.path.normpath(path) == path and path.startswith(below) and "\0" not in path
    _require(plain, f"{path!r} is not a plain path below {below}")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file by path and SHA-256 in hex; null for a directory, as a runtime in tests."""

    path: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path shown inside a domain at ``target``, below /run."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind that may be joined by a channel; said on both sides, alike."""

    descriptors: bool  # may they pass; then capabilities may be delegated to it as well


@dataclass(frozen=True, slots=True)
class Kind:
    """What domains of one kind are."""

    argv: tuple[str, ...]  # absolute path first; {0}..{6} are the numbers given to START
    filter: Sealed  # BPF program
    numbers: tuple[tuple[int, int], ...] = ()  # [least, most] of those numbers
    environment: dict[str, str] = field(default_factory=dict)  # and SUPERCLOUD_DOMAIN, _KIND
    network: str = "own"  # nothing but lo; or "host", or "parent" (its creator's)
    tcp: bool = False  # true: TCP bind and connect are not refused by Landlock
    restart: bool = False  # true: started again when it dies; else it is gone, with its children
    speaks: bool = True  # descriptor 3 is its socket to the core
    descriptors: tuple[str, ...] = ()  # entries of its table, at START descriptors 4, 5, ...
    binds: tuple[Bind, ...] = ()
    state: bool = False  # true: a private directory that stays, at /run/state
    devices: tuple[str, ...] = ()  # host nodes besides null, zero, full, random, urandom
    proc: bool = False  # /proc of its own process namespace
    nests: bool = False  # it makes mounts in a user namespace of its own: no Landlock file rules
    tmp_bytes: int = 16 << 20  # size of /tmp, and of /run
    nofile: int = 256  # limit of descriptors
    limits: Limits = _NO_LIMITS  # of its scheduling context, unless the creator says otherwise
    own: Limits = _NO_LIMITS  # memory and pids of itself when it may create others: booked first
    objects: int = 64  # how many channels, semaphores and memory objects it may make
    creates: frozenset[str] = frozenset()  # kinds that it may make
    peers: dict[str, Peer] = field(default_factory=dict)
    creator_rights: Rights = Rights.CONTROL | Rights.CONNECT | Rights.GRANT
    name: str = ""  # not in the file: the key

    def __post_init__(self) -> None:
        for path in [*self.argv[:1], *(bind.source for bind in self.binds)]:
            _require_path(path)
        for paths, below in ((self.devices, "/dev/"), ([b.target for b in self.binds], "/run/")):
            for path in paths:
                _require_path(path, below)
        _require(self.argv and self.network in ("own", "host", "parent"), "bad argv or network")
        _require(not self.creates or (self.own.memory_bytes and self.own.pids), "own is missing")
        _require(all(map(NAME.match, self.descriptors)), "a descriptor has a bad name")


@dataclass(frozen=True, slots=True)
class Initial:
    """A domain that is made and started at boot, in this order; nobody's child."""

    kind: str
    name: str
    limits: Limits | None = None


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
    """A capability for one of those."""

    to: str
    object: str  # "domain:NAME", "sched:NAME", "inherited:NAME" (the keeper's --fd NAME=N)
    rights: Rights
    name: str


@dataclass(frozen=True, slots=True)
class Uids:
    """Domains get ``first``.., the owners of their user namespaces ``first + count``.. ."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole. ``instance`` names the host: groups are below ``supercloud/<instance>``."""

    version: int
    instance: str
    uids: Uids  # of no other instance on the machine
    runtime: Sealed  # an erofs image
    groups: tuple[Hierarchy, ...]  # where the machine has which controllers
    limits: Limits  # of the whole host
    kinds: dict[str, Kind]
    domains: tuple[Initial, ...] = ()
    channels: tuple[InitialChannel, ...] = ()
    grants: tuple[InitialGrant, ...] = ()
    sha256: str = ""  # not in the file: of the file

    def __post_init__(self) -> None:
        names = [domain.name for domain in self.domains]
        controllers = {name for tree in self.groups for name in tree.controllers}
        _require({"cpu", "memory", "pids"} <= controllers, "no limits without all the controllers")
        _require(self.version == 1 and self.uids.first >= 1000, "version or uids are not for us")
        _require(all(map(DOMAIN_NAME.match, [self.instance, *names, *self.kinds])), "a bad name")
        for name, kind in self.kinds.items():
            object.__setattr__(kind, "name", name)
            _require({*kind.creates, *kind.peers} <= {*self.kinds}, f"{name} names unknown kinds")
            alike = all(self.kinds[o].peers.get(name) == peer for o, peer in kind.peers.items())
            _require(alike, f"the peers of {name} say otherwise")
        ends = [end for c in self.channels for end in (c.a, c.b)] + [g.to for g in self.grants]
        _require({*ends} <= {*names} and len({*names}) == len(names), "unknown or double domains")
        _require({d.kind for d in self.domains} <= {*self.kinds}, "a domain of an unknown kind")


def parse(untrusted: bytes) -> Manifest:
    """Check a manifest's bytes; :class:`Invalid` says which field and why."""
    _require(len(untrusted) <= MAX_MANIFEST_BYTES, "the manifest is too large")
    try:
        manifest: Manifest = _build(Manifest, json.loads(untrusted), "manifest")
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON: {error}", where="manifest") from error
    object.__setattr__(manifest, "sha256", hashlib.sha256(untrusted).hexdigest())
    return manifest


def _build(type_: Any, untrusted: Any, where: str) -> Any:
    """A value of a type out of JSON; all refusals say where."""
    try:
        return _convert(type_, untrusted, where)
    except Invalid as error:
        raise error if error.where else Invalid(str(error), where=where) from error


def _convert(type_: Any, untrusted: Any, where: str) -> Any:
    origin, inner = get_origin(type_) or type_, get_args(type_)
    if origin is UnionType:
        return None if untrusted is None else _build(inner[0], untrusted, where)
    shape = {tuple: list, frozenset: list, Rights: list}.get(origin, origin)
    made_of_fields = is_dataclass(type_)
    _require(type(untrusted) is (dict if made_of_fields else shape), f"must be {type_}")
    if made_of_fields:
        known, hints = {f.name: f for f in fields(type_)}, get_type_hints(type_)
        needed = {n for n, f in known.items() if f.default is f.default_factory is MISSING}
        for name in {*untrusted} ^ {*known}:
            _require(name in known and name not in needed, f"field {name!r} unknown or missing")
        return type_(**{k: _build(hints[k], v, f"{where}.{k}") for k, v in untrusted.items()})
    if origin is Rights:
        _require({*map(str, untrusted)} <= {*Rights.__members__}, "must be a list of rights")
        return Rights(sum({Rights[name].value for name in untrusted}))
    if origin is dict:
        return {k: _build(inner[1], v, f"{where}.{k}") for k, v in untrusted.items()}
    if shape is list:
        _require(... in inner or origin is frozenset or len(inner) == len(untrusted), "wrong size")
        return origin(_build(inner[0], v, f"{where}[{n}]") for n, v in enumerate(untrusted))
    _require(type_ is not int or 0 <= untrusted < 1 << 62, "is out of range")
    return untrusted
