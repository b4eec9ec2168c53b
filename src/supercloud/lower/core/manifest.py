"""The grant manifest: all policy that the core knows, compiled outside, checked here.

A JSON object; ``*`` marks what must be there::

    version*        1
    instance*       name of this host: cgroup prefix ``supercloud/<instance>``
    uids*           {"first": 200000, "count": 1024}: domains get first.., the owners of their user
                    namespaces first+count.. ; no other instance may overlap
    runtime*        {"path": erofs file or directory, "sha256": hex, or null for a directory}
    limits*         of the whole host: {cpu_weight, cpu_permille, memory_bytes, pids, domains,
                    disk_bytes}; what is left out is as in ``Limits``
    kinds*          {name: kind}, see ``Kind``; each of
        argv*           [absolute path, ...]; {0}..{6} are the numbers given to START
        numbers         [[least, most], ...] for those numbers
        environment     {name: value}; the core adds SUPERCLOUD_DOMAIN and SUPERCLOUD_KIND
        filter*         {"path": BPF file, "sha256": hex}
        network         "own" (default: nothing but lo) | "host" | "parent" (its creator's)
        tcp             true: TCP bind and connect are not refused by Landlock
        restart         true: started again when it dies; else it is gone, with all its children
        speaks          true (default): descriptor 3 is its socket to the core
        descriptors     [entry names]: taken from its own table at START as descriptors 4, 5, ...
        binds           [{"source": host path, "target": path below /run, "writable": bool}]
        state           true: a private directory that stays, at /run/state
        devices         [host device nodes], besides null, zero, full, random, urandom
        proc            true: /proc of its own process namespace
        nests           true: it makes mounts in a user namespace of its own (passt, bubblewrap),
                        which Landlock's file rules would forbid: without those
        tmp_bytes       size of /tmp (default 16 MiB); /run has the same
        nofile          limit of descriptors (default 256)
        limits          of its scheduling context unless the creator says otherwise
        own             {memory_bytes, pids} of the domain's own processes, when it may create
                        others; they are booked first, children get what is left
        objects         how many channels, semaphores and memory objects it may make (default 64)
        creates         [kinds it may make]
        peers           {kind: {"descriptors": bool}}: who may be joined to it by a channel, and
                        whether that channel may carry descriptors (then capabilities may be
                        delegated to it as well); must be said on both sides, alike
        creator_rights  on the domain, default [CONTROL, CONNECT, GRANT]
    domains         [{kind*, name*, limits}]: made and started at boot, in this order, out of
                    ``limits``; nobody's children
    channels        [{a*, b*, name_a*, name_b*, type: "seqpacket" (default) | "stream"}] of those
    grants          [{to*, name*, rights*, object*: "domain:NAME" | "sched:NAME" |
                    "inherited:NAME"}] of those; inherited are the keeper's ``--fd NAME=N``
"""

import json
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from supercloud.model.capability import Limits, Rights
from supercloud.model.errors import Invalid
from supercloud.wire.frames import DOMAIN_NAME, NAME

MAX_MANIFEST_BYTES = 1 << 20
MAX_INT = 1 << 62
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SOCKETS = {"seqpacket": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file by path and SHA-256 (empty: not hashed, a directory)."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Bind:
    """A host path shown inside a domain."""

    source: str
    target: str
    writable: bool


@dataclass(frozen=True, slots=True)
class Kind:
    """What domains of one kind are; the fields are the manifest's."""

    name: str
    argv: tuple[str, ...]
    filter: Sealed
    numbers: tuple[tuple[int, int], ...]
    environment: dict[str, str]
    network: str
    tcp: bool
    restart: bool
    speaks: bool
    descriptors: tuple[str, ...]
    binds: tuple[Bind, ...]
    state: bool
    devices: tuple[str, ...]
    proc: bool
    nests: bool
    tmp_bytes: int
    nofile: int
    limits: Limits
    own: Limits
    objects: int
    creates: frozenset[str]
    peers: dict[str, bool]
    creator_rights: Rights


@dataclass(frozen=True, slots=True)
class Initial:
    """A domain that is made at boot; ``limits`` None: the kind's."""

    kind: str
    name: str
    limits: Limits | None


@dataclass(frozen=True, slots=True)
class InitialChannel:
    """A channel between two initial domains, by their names."""

    a: str
    b: str
    name_a: str
    name_b: str
    type: int


@dataclass(frozen=True, slots=True)
class InitialGrant:
    """A capability that an initial domain gets at boot."""

    to: str
    object: str
    rights: Rights
    name: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole, checked."""

    instance: str
    first_uid: int
    uid_count: int
    runtime: Sealed
    limits: Limits
    kinds: dict[str, Kind]
    domains: tuple[Initial, ...]
    channels: tuple[InitialChannel, ...]
    grants: tuple[InitialGrant, ...]
    sha256: str = field(default="", compare=False)


class _Fields:
    """Takes typed fields out of an untrusted JSON object; what is left over is an error."""

    def __init__(self, untrusted: object, where: str) -> None:
        if not isinstance(untrusted, dict):
            raise Invalid("must be an object", where=where)
        self._rest = dict(untrusted)
        self._where = where

    def __enter__(self) -> "_Fields":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self._rest:
            raise Invalid(f"unknown field {sorted(self._rest)[0]!r}", where=self._where)

    def where(self, name: str) -> str:
        return f"{self._where}.{name}"

    def get(self, name: str, type_: type[T], default: T | None = None) -> T:
        value = self._rest.pop(name, default)
        if not isinstance(value, type_) or (type_ is int and isinstance(value, bool)):
            raise Invalid(f"must be {type_.__name__}", where=self.where(name))
        return value

    def text(self, name: str, pattern: re.Pattern[str], default: str | None = None) -> str:
        value = self.get(name, str, default)
        if not pattern.match(value):
            raise Invalid(f"{value!r} is not allowed", where=self.where(name))
        return value

    def number(self, name: str, least: int, most: int, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if not least <= value <= most:
            raise Invalid(f"must be {least}..{most}", where=self.where(name))
        return value

    def path(self, name: str) -> str:
        return _path(self.get(name, str), self.where(name))

    def each(self, name: str, convert: Callable[[Any, str], T]) -> tuple[T, ...]:
        where = self.where(name)
        return tuple(convert(v, f"{where}[{i}]") for i, v in enumerate(self.get(name, list, [])))


def load(path: str) -> Manifest:
    """Read and check a manifest; :class:`Invalid` says which field and why."""
    with open(path, "rb") as file:
        return parse(file.read(MAX_MANIFEST_BYTES + 1))


def parse(untrusted: bytes) -> Manifest:
    """Check a manifest's bytes; see :func:`load`."""
    import hashlib  # noqa: PLC0415  the core's processes load it when they first need it

    if len(untrusted) > MAX_MANIFEST_BYTES:
        raise Invalid(f"larger than {MAX_MANIFEST_BYTES} bytes", where="manifest")
    try:
        document = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not JSON: {error}", where="manifest") from error
    manifest = _manifest(document, hashlib.sha256(untrusted).hexdigest())
    _check_references(manifest)
    return manifest


def _manifest(untrusted: object, sha256: str) -> Manifest:
    with _Fields(untrusted, "manifest") as f:
        f.number("version", 1, 1)
        with _Fields(f.get("uids", dict), "manifest.uids") as uids:
            first = uids.number("first", 1000, 1 << 31)
            count = uids.number("count", 8, 1 << 16)
        kinds = {
            name: _kind(name, kind, f"manifest.kinds.{name}")
            for name, kind in f.get("kinds", dict).items()
        }
        return Manifest(
            f.text("instance", _KIND),
            first,
            count,
            _sealed(f.get("runtime", dict), f.where("runtime"), unhashed=True),
            _limits(f.get("limits", dict), f.where("limits")),
            kinds,
            f.each("domains", _initial),
            f.each("channels", _channel),
            f.each("grants", _grant),
            sha256,
        )


def _kind(name: str, untrusted: object, where: str) -> Kind:
    if not _KIND.match(name):
        raise Invalid(f"{name!r} is not a name for a kind", where=where)
    with _Fields(untrusted, where) as f:
        kind = Kind(
            name=name,
            argv=f.each("argv", _text),
            filter=_sealed(f.get("filter", dict), f.where("filter")),
            numbers=f.each("numbers", _range),
            environment=_environment(f.get("environment", dict, {}), where),
            network=f.text("network", re.compile(r"(own|host|parent)\Z"), "own"),
            tcp=f.get("tcp", bool, False),
            restart=f.get("restart", bool, False),
            speaks=f.get("speaks", bool, True),
            descriptors=f.each("descriptors", _name),
            binds=f.each("binds", _bind),
            state=f.get("state", bool, False),
            devices=f.each("devices", _device),
            proc=f.get("proc", bool, False),
            nests=f.get("nests", bool, False),
            tmp_bytes=f.number("tmp_bytes", 1 << 12, 1 << 40, 16 << 20),
            nofile=f.number("nofile", 16, 1 << 16, 256),
            limits=_limits(f.get("limits", dict, {}), f.where("limits")),
            own=_limits(f.get("own", dict, {}), f.where("own")),
            objects=f.number("objects", 0, 4096, 64),
            creates=frozenset(f.each("creates", _text)),
            peers=_peers(f.get("peers", dict, {}), f.where("peers")),
            creator_rights=_rights(
                f.get("creator_rights", list, ["CONTROL", "CONNECT", "GRANT"]), where
            ),
        )
    _path(kind.argv[0] if kind.argv else "", f"{where}.argv")
    return kind


def _check_references(manifest: Manifest) -> None:
    """Every kind and domain that is named must be there, and peers must agree."""
    kinds = manifest.kinds
    for kind in kinds.values():
        for other in kind.creates | set(kind.peers):
            if other not in kinds:
                raise Invalid(f"no kind {other!r}", where=f"manifest.kinds.{kind.name}")
        for other, descriptors in kind.peers.items():
            if kinds[other].peers.get(kind.name) is not descriptors:
                raise Invalid("peers differ", where=f"manifest.kinds.{kind.name}.peers.{other}")
    names = {domain.name for domain in manifest.domains}
    named = [c.a for c in manifest.channels] + [c.b for c in manifest.channels]
    named += [grant.to for grant in manifest.grants]
    missing = [name for name in named if name not in names]
    missing += [domain.kind for domain in manifest.domains if domain.kind not in kinds]
    if missing or len(names) < len(manifest.domains):
        raise Invalid(f"unknown or double: {missing or 'a domain name'}", where="manifest.domains")


def _limits(untrusted: dict[str, Any], where: str) -> Limits:
    with _Fields(untrusted, where) as f:
        return Limits(
            f.number("cpu_weight", 1, 10000, 100),
            *(
                f.number(name, 0, MAX_INT, 0)
                for name in ("cpu_permille", "memory_bytes", "pids", "domains", "disk_bytes")
            ),
        )


def _sealed(untrusted: dict[str, Any], where: str, *, unhashed: bool = False) -> Sealed:
    if unhashed and untrusted.get("sha256", "") is None:
        untrusted = {**untrusted, "sha256": "0" * 64}
        return Sealed(_sealed(untrusted, where).path, "")
    with _Fields(untrusted, where) as f:
        return Sealed(f.path("path"), f.text("sha256", _SHA256))


def _path(value: str, where: str) -> str:
    if not value.startswith("/") or os.path.normpath(value) != value or "\0" in value:
        raise Invalid(f"{value!r} is not a plain absolute path", where=where)
    return value


def _text(untrusted: Any, where: str) -> str:
    if not isinstance(untrusted, str) or "\0" in untrusted or len(untrusted) > 1 << 16:
        raise Invalid("must be text", where=where)
    return untrusted


def _name(untrusted: Any, where: str) -> str:
    if not NAME.match(_text(untrusted, where)):
        raise Invalid(f"{untrusted!r} is not a name", where=where)
    return str(untrusted)


def _range(untrusted: Any, where: str) -> tuple[int, int]:
    match untrusted:
        case [int(least), int(most)] if 0 <= least <= most <= MAX_INT:
            return least, most
    raise Invalid("must be [least, most]", where=where)


def _environment(untrusted: dict[str, Any], where: str) -> dict[str, str]:
    for name, value in untrusted.items():
        if not _ENVIRONMENT.match(name):
            raise Invalid(f"{name!r} is not a variable", where=f"{where}.environment")
        _text(value, f"{where}.environment.{name}")
    return untrusted


def _bind(untrusted: Any, where: str) -> Bind:
    with _Fields(untrusted, where) as f:
        bind = Bind(f.path("source"), f.path("target"), f.get("writable", bool, False))
    if not bind.target.startswith("/run/") or bind.target == "/run/state":
        raise Invalid("target must be below /run", where=where)
    return bind


def _device(untrusted: Any, where: str) -> str:
    path = _path(_text(untrusted, where), where)
    if not path.startswith("/dev/"):
        raise Invalid("must be below /dev", where=where)
    return path


def _peers(untrusted: dict[str, Any], where: str) -> dict[str, bool]:
    peers = {}
    for name, peer in untrusted.items():
        with _Fields(peer, f"{where}.{name}") as f:
            peers[name] = f.get("descriptors", bool)
    return peers


def _rights(untrusted: list[Any], where: str) -> Rights:
    rights = Rights.NONE
    for name in untrusted:
        if not isinstance(name, str) or name not in Rights.__members__:
            raise Invalid(f"{name!r} is not a right", where=where)
        rights |= Rights[name]
    return rights


def _initial(untrusted: Any, where: str) -> Initial:
    with _Fields(untrusted, where) as f:
        limits = f.get("limits", dict, {})
        return Initial(
            f.get("kind", str),
            f.text("name", DOMAIN_NAME),
            _limits(limits, where) if limits else None,
        )


def _channel(untrusted: Any, where: str) -> InitialChannel:
    with _Fields(untrusted, where) as f:
        return InitialChannel(
            f.get("a", str),
            f.get("b", str),
            f.text("name_a", NAME),
            f.text("name_b", NAME),
            _SOCKETS[f.text("type", re.compile(r"(seqpacket|stream)\Z"), "seqpacket")],
        )


def _grant(untrusted: Any, where: str) -> InitialGrant:
    with _Fields(untrusted, where) as f:
        return InitialGrant(
            f.get("to", str),
            f.text("object", re.compile(r"(domain|sched|inherited):.")),
            _rights(f.get("rights", list), where),
            f.text("name", NAME),
        )
