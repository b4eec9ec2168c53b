"""The grant manifest: all policy that the core knows, compiled outside, checked here.

A JSON object, read into the tuples below: a field without a default must be there; an unknown
one, a value of another type or a negative number is an error. Rights are lists of names. For
names and paths ``lower.host.soundness`` vouches.
"""

import hashlib
import json
import re
from typing import Any, NamedTuple, get_args, get_origin

from supercloud.lower.core.cgroup import Hierarchy
from supercloud.model.capability import Limits, Rights
from supercloud.model.refusals import Invalid
from supercloud.wire.frames import DOMAIN_NAME

MAX_MANIFEST_BYTES = 1 << 20
_FILTER = re.compile(r"([0-9a-f]{16})+\Z")  # whole instructions
_NONE: dict[str, Any] = {}  # a default, never written to


class Bind(NamedTuple):
    """A host path shown inside a domain at ``target``, below /run."""

    source: str
    target: str
    writable: bool = False


class Kind(NamedTuple):
    """What domains of one kind are."""

    argv: tuple[str, ...]  # absolute path first; {0}..{6} are the numbers given to START
    filter: str  # seccomp: classic BPF in hex
    numbers: tuple[tuple[int, int], ...] = ()  # [least, most] of those numbers
    environment: dict[str, str] = _NONE  # and SUPERCLOUD_DOMAIN, _KIND
    network: str = "own"  # nothing but lo; or "host"
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
    huge_pages: bool = True  # false: none for its programs, though they ask for them
    limits: Limits = Limits()  # of its scheduling context, unless the creator says otherwise
    own: Limits = Limits()  # memory and pids of itself when it may create others: booked first
    objects: int = 64  # how many channels, semaphores and memory objects it may make
    creates: frozenset[str] = frozenset()  # kinds that it may make
    # kinds that may be joined to it by a channel, and whether descriptors pass; then capabilities
    # may be delegated too. Said on both sides, alike
    peers: dict[str, bool] = _NONE
    creator_rights: Rights = Rights.CONTROL | Rights.CONNECT | Rights.GRANT
    name: str = ""  # not in the file: the key


class Grant(NamedTuple):
    """A capability for one of the first domains."""

    to: str
    object: str  # "domain:NAME", "inherited:NAME" (the keeper's --fd NAME=N)
    rights: Rights
    name: str


class Manifest(NamedTuple):
    """The whole. ``instance`` names the host: groups are below ``supercloud/<instance>``.

    Domains get the ``uids`` from ``first_uid`` on, the owners of their user namespaces as many
    after those; no other instance on the machine has any of them.
    """

    version: int
    instance: str
    first_uid: int
    uids: int
    runtime: str  # an erofs image
    runtime_sha256: str  # in hex; empty for a directory, as in tests
    groups: tuple[Hierarchy, ...]  # where the machine has which controllers
    limits: Limits  # of the whole host
    kinds: dict[str, Kind]
    domains: tuple[tuple[str, str], ...] = ()  # (name, kind): made and started at boot, in order
    grants: tuple[Grant, ...] = ()
    sha256: str = ""  # not in the file: of the file


def parse(untrusted: bytes) -> Manifest:
    """Check a manifest's bytes; :class:`Invalid` says which field and why."""
    _require(len(untrusted) <= MAX_MANIFEST_BYTES, "the manifest is too large")
    try:
        read: Manifest = _decode(Manifest, json.loads(untrusted), "manifest")
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON: {error}", where="manifest") from error
    kinds = {name: kind._replace(name=name) for name, kind in read.kinds.items()}
    manifest = read._replace(kinds=kinds, sha256=hashlib.sha256(untrusted).hexdigest())
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """What the fields must be together, as far as the core's own promises hang from it."""
    controllers = {name for tree in manifest.groups for name in tree.controllers}
    _require({"cpu", "memory", "pids"} <= controllers, "no limits without all the controllers")
    _require(manifest.version == 1 and manifest.first_uid >= 1000, "not for us: version or uids")
    _require(DOMAIN_NAME.match(manifest.instance), "a bad name")
    for name, kind in manifest.kinds.items():
        where = f"manifest.kinds.{name}"
        _require(kind.argv and kind.network in ("own", "host"), "bad argv or network", where)
        _require(_FILTER.match(kind.filter), "the filter is no program", where)
        own_is_given = kind.own.memory_bytes and kind.own.pids
        _require(own_is_given or not kind.creates, "own is missing", where)
        _require({*kind.creates, *kind.peers} <= {*manifest.kinds}, "unknown kinds", where)
        peers = {other: manifest.kinds[other].peers.get(name) for other in kind.peers}
        _require(peers == kind.peers, "its peers say otherwise", where)


def _require(holds: object, message: str, where: str = "manifest") -> None:
    if not holds:
        raise Invalid(message, where=where)


def _decode(type_: Any, untrusted: Any, where: str) -> Any:
    """A value of a type out of JSON."""
    origin, inner = get_origin(type_) or type_, get_args(type_)
    of_fields = hasattr(type_, "_fields")
    shape = {tuple: list, frozenset: list, Rights: list}.get(origin, dict if of_fields else origin)
    _require(type(untrusted) is shape, f"must be {type_}", where)
    if of_fields:
        types, given = type_.__annotations__, {*untrusted}
        for name in given - {*types} | {*types} - {*type_._field_defaults} - given:
            _require(False, f"field {name!r} is unknown or missing", where)
        return type_(**{k: _decode(types[k], v, f"{where}.{k}") for k, v in untrusted.items()})
    if origin is Rights:
        _require({*map(str, untrusted)} <= {*Rights.__members__}, "must be a list of rights", where)
        return Rights(sum({Rights[name].value for name in untrusted}))
    if origin is dict:
        return {k: _decode(inner[1], v, f"{where}.{k}") for k, v in untrusted.items()}
    if shape is list:
        sized = ... in inner or origin is frozenset or len(inner) == len(untrusted)
        _require(sized, "of the wrong size", where)
        return origin(_decode(inner[0], v, f"{where}[{n}]") for n, v in enumerate(untrusted))
    _require(type_ is not int or 0 <= untrusted < 1 << 62, "is out of range", where)
    return untrusted
