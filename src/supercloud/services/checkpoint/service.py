"""The checkpointing service: calls of the user's domain, data in descriptors.

| method | parameters and descriptors | answer; result told later |
| --- | --- | --- |
| configure | a file with ``Configuration`` as JSON | nothing |
| checkpoint.take | ``Take``; a descriptor for each part | job; ``Head``, sizes |
| checkpoint.restore | ``Restore``; a descriptor for each part | job; sizes |
| checkpoint.verify | ``Verify`` | job; how many bytes were read, zeros not counted |
| checkpoint.list | ``List`` | job; the checkpoints, newest first |
| checkpoint.collect | ``Collect`` | job; the report |
| checkpoint.status | | the jobs at work |
| connection | one to the object service, that was wanted | nothing |

A part's descriptor is a stream, a file, or for ``dirty`` a capture (``pages``) and then the file of
the template it was captured over. The end of a job is told as ``job.done`` or ``job.failed``;
``connection.wanted`` (see ``dialled``) where the configuration names a server.
"""

import errno
import fcntl
import json
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from supercloud.model.errors import BadState, Busy, Invalid, Unsupported
from supercloud.services.base import Tell
from supercloud.services.checkpoint.backend import Backend
from supercloud.services.checkpoint.collect import Keep, collect
from supercloud.services.checkpoint.dialled import Dialled
from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.jobs import Jobs
from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.manifest import MAX_PARTS, PART_NAME, Head, Part, Sequence
from supercloud.services.checkpoint.pages import MAX_IMAGE_BYTES, Captured, is_rebase_due
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.s3 import S3, Bucket
from supercloud.services.checkpoint.store import Checkpoint, Store
from supercloud.services.checkpoint.writer import BATCH_BYTES, Writer
from supercloud.wire.codec import Limit, Name, Text, decode, encode
from supercloud.wire.portal import Handler, Request
from supercloud.wire.reactor import Reactor

_MAX_CONFIGURATION_BYTES: Final = 64 << 10
PartName = Annotated[str, Limit(pattern=PART_NAME)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """Whose checkpoints, the secret that only the user has, and where they are kept."""

    ucloud: Name
    secret: Annotated[str, Limit(pattern=r"[0-9a-f]{64}")] = field(repr=False)
    directory: Text = ""
    endpoint: Text = ""
    server_name: Text = ""  # in place of an endpoint: who is at the end of dialled connections
    region: Text = "us-east-1"
    bucket: Text = ""
    prefix: Text = ""
    access_key: Text = ""
    secret_key: Text = field(default="", repr=False)
    ca_pem: Annotated[str, Limit(max_length=32 << 10)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The checkpoint whose ``memory`` (or its base) an increment lies over."""

    ee: Name
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class TakePart:
    """A part; ``dirty`` needs a ``base``, and is written whole when that is due or is missing.

    Of a file that holds more, it is ``size_bytes`` from ``offset_bytes`` on.
    """

    name: PartName
    kind: Literal["stream", "file", "dirty"]
    base: Base | None = None
    offset_bytes: Annotated[int, Limit(ge=0, le=MAX_IMAGE_BYTES)] = 0
    size_bytes: Annotated[int, Limit(ge=1, le=MAX_IMAGE_BYTES)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A checkpoint to be taken after ``head``."""

    ee: Name
    engine: Name
    head: Head | None = None
    parts: Annotated[list[TakePart], Limit(min_length=1, max_length=MAX_PARTS)]
    details: dict[str, Text] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore:
    """Parts of a checkpoint to be read: the newest, or an older one that it vouches for.

    Its details must be ``expected`` where both name the same thing, else Unsupported and nothing is
    read. A memory file of fixed size must be as large as its part, and empty.
    """

    ee: Name
    head: Head
    sequence: Sequence | None = None
    parts: Annotated[list[PartName], Limit(min_length=1, max_length=MAX_PARTS)]
    expected: dict[str, Text] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """A checkpoint to be read whole, to nowhere: the newest, or an older one."""

    ee: Name
    head: Head
    sequence: Sequence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class List:
    """The checkpoints of an EE."""

    ee: Name
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """A collection: what is to stay, by EE, and the EEs of which nothing is."""

    keep: dict[str, Keep]
    forget: list[Name] = field(default_factory=list)


class CheckpointService:
    """See the module."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._jobs, self._dialled = Jobs(reactor, tell), Dialled(reactor, tell)
        self._configured: Store | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """Method -> what serves it."""
        return {
            "configure": self._configure,
            "checkpoint.take": self._take,
            "checkpoint.restore": self._restore,
            "checkpoint.verify": self._verify,
            "checkpoint.list": self._list,
            "checkpoint.collect": self._collect,
            "checkpoint.status": self._status,
            "connection": self._dialled.give,
        }

    def close(self) -> None:
        """Finish what was started."""
        self._jobs.close()
        if self._configured is not None:
            self._configured.close()

    @property
    def _store(self) -> Store:
        if self._configured is None:
            raise BadState("the checkpointing service has not been configured")
        return self._configured

    def _configure(self, request: Request) -> None:
        if self._configured is not None:
            raise BadState("the checkpointing service is configured already")
        if len(request.descriptors) != 1:
            raise Invalid("configure comes with one descriptor")
        untrusted = os.pread(request.descriptors[0], _MAX_CONFIGURATION_BYTES, 0)
        try:
            found = decode(Configuration, json.loads(untrusted))
        except ValueError as error:
            raise Invalid("the configuration is not JSON") from error
        keys = Keys(bytes.fromhex(found.secret), found.ucloud)
        if found.server_name:
            self._dialled.expect(found.server_name, found.ca_pem)
        self._configured = Store(backend_of(found, self._dialled.dial), keys)

    def _take(self, request: Request) -> dict[str, int]:
        take, store = decode(Take, request.untrusted), self._store
        count = sum(2 if part.kind == "dirty" else 1 for part in take.parts)
        files = _files(request, count)
        return self._begin(f"take {take.ee}", files, partial(_taken, store, take))

    def _restore(self, request: Request) -> dict[str, int]:
        restore, store = decode(Restore, request.untrusted), self._store
        files = _files(request, len(restore.parts))
        return self._begin(f"restore {restore.ee}", files, partial(_restored, store, restore))

    def _verify(self, request: Request) -> dict[str, int]:
        wanted, store = decode(Verify, request.untrusted), self._store
        return self._jobs.start(f"verify {wanted.ee}", lambda: _verified(store, wanted))

    def _list(self, request: Request) -> dict[str, int]:
        wanted, store = decode(List, request.untrusted), self._store
        return self._jobs.start(f"list {wanted.ee}", lambda: _rows(store, wanted))

    def _collect(self, request: Request) -> dict[str, int]:
        wanted, store = decode(Collect, request.untrusted), self._store
        return self._jobs.start(
            "collect", lambda: encode(collect(store, wanted.keep, wanted.forget))
        )

    def _status(self, _request: Request) -> dict[str, Any]:
        return {"jobs": {str(number): what for number, what in self._jobs.running.items()}}

    def _begin(
        self, what: str, files: list[int], work: Callable[[list[int]], dict[str, Any]]
    ) -> dict[str, int]:
        """Start a job that closes its descriptors; they are closed too if it cannot start."""
        try:
            return self._jobs.start(what, lambda: _closing(files, work))
        except Busy:
            _closing(files, lambda _files: {})
            raise


def make(reactor: Reactor, tell: Tell) -> CheckpointService:
    """For the launcher (``services.base.Make``)."""
    return CheckpointService(reactor, tell)


def backend_of(configuration: Configuration, dial: Callable[[], socket.socket]) -> Backend:
    """Where the configuration says that checkpoints are kept; ``dial`` is for a named server."""
    server = configuration.server_name
    if [configuration.directory, configuration.endpoint, server].count("") != 2:
        raise Invalid("checkpoints are kept in a directory, at an endpoint or by a server")
    if configuration.directory:
        return Directory(Path(configuration.directory))
    context = None
    if configuration.ca_pem and not server:
        context = ssl.create_default_context(cadata=configuration.ca_pem)
    bucket = Bucket(
        endpoint=configuration.endpoint or f"https://{server}",
        region=configuration.region,
        name=configuration.bucket,
        access_key=configuration.access_key,
        secret_key=configuration.secret_key,
        prefix=configuration.prefix,
        context=context,
    )
    return S3(bucket, dial=dial if server else None)


def _files(request: Request, count: int) -> list[int]:
    if len(request.descriptors) != count:
        raise Invalid(f"{count} descriptors are needed, {len(request.descriptors)} came")
    return request.take()


def _closing(files: list[int], work: Callable[[list[int]], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work([*files])
    finally:
        for descriptor in files:
            os.close(descriptor)


def _taken(store: Store, take: Take, files: list[int]) -> dict[str, Any]:
    bases = {
        part.name: store.open(part.base.ee, part.base.head) for part in take.parts if part.base
    }
    with Writer(store, take.ee, take.engine, take.head, _others(take, bases)) as writer:
        for part in take.parts:
            _write(writer, part, files, bases.get(part.name))
        head = writer.commit(take.details)
    parts = store.open(take.ee, head).manifest.parts
    return {"head": encode(head), "parts": {part.name: _figures(part) for part in parts}}


def _others(take: Take, bases: Mapping[str, Checkpoint]) -> list[Checkpoint]:
    """The bases that the writer does not hold already, as the newest."""
    return [
        base for base in bases.values() if (take.ee, take.head) != (base.manifest.ee, base.head)
    ]


def _figures(part: Part) -> dict[str, Any]:
    return {
        "size_bytes": part.size_bytes,
        "new_bytes": part.new_bytes,
        "incremental": part.base is not None,
    }


def _write(writer: Writer, part: TakePart, files: list[int], base: Checkpoint | None) -> None:
    """One part; takes its descriptors off the list."""
    file = files.pop(0)
    if part.kind == "stream":
        writer.write(part.name, partial(os.read, file))
    elif part.kind == "file":
        offset = part.offset_bytes
        size_bytes = part.size_bytes or os.fstat(file).st_size - offset
        read_at = partial(_read_from, file, offset)
        writer.write_at(part.name, size_bytes, read_at, _filled(file, offset, size_bytes))
    else:
        _write_dirty(writer, part.name, Captured(file), files.pop(0), base)


def _write_dirty(
    writer: Writer, name: str, captured: Captured, template: int, base: Checkpoint | None
) -> None:
    if base is None or is_rebase_due(captured.dirty_bytes, captured.size_bytes):
        whole = captured.over(partial(_read_at, template))
        writer.write_at(name, captured.size_bytes, whole)
        return
    below = base.manifest.part(name)
    tree = below.base or below.tree
    if tree.size_bytes != captured.size_bytes:
        raise Invalid(f"{name} is {captured.size_bytes} bytes, its base {tree.size_bytes}")
    writer.increment(name, tree, captured.runs, captured.read_at)


def _restored(store: Store, restore: Restore, files: list[int]) -> dict[str, Any]:
    checkpoint = store.open(restore.ee, restore.head, restore.sequence)
    _check_alike(restore, checkpoint.manifest.details)
    reader = Reader(store, checkpoint)
    sizes = {}
    for name, file in zip(restore.parts, files, strict=True):
        if not stat.S_ISREG(os.fstat(file).st_mode):
            sizes[name] = reader.stream(name, partial(_write_all, file))
        elif _is_fixed(file):
            sizes[name] = reader.fill(name, file)
        else:
            sizes[name] = reader.copy(name, file)
    return {"parts": sizes}


def _verified(store: Store, wanted: Verify) -> dict[str, Any]:
    checkpoint = store.open(wanted.ee, wanted.head, wanted.sequence)
    return {"read_bytes": Reader(store, checkpoint).verify()}


def _check_alike(restore: Restore, details: Mapping[str, str]) -> None:
    for name, expected in restore.expected.items():
        if (found := details.get(name, expected)) != expected:
            raise Unsupported(
                f"the checkpoint of {restore.ee} is of a machine with {name} {found:.80}, "
                f"this one has {expected:.80}",
                hint="restore it as what it was, where that can be had",
            )


def _is_fixed(file: int) -> bool:
    """Whether it is a memory file that can neither shrink nor grow."""
    try:
        return bool(fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # no memory file
        return False


def _filled(file: int, offset: int, size_bytes: int) -> Iterator[int]:
    """Where in a part of a sparse file the batches are that have anything; for ``write_at``."""
    at = 0
    while at < size_bytes:
        try:
            found = os.lseek(file, offset + at, os.SEEK_DATA) - offset
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        at = found // BATCH_BYTES * BATCH_BYTES
        if at < size_bytes:
            yield at
        at += BATCH_BYTES


def _rows(store: Store, wanted: List) -> dict[str, Any]:
    newest = store.open(wanted.ee, wanted.head).manifest
    parts = {part.name: part.size_bytes for part in newest.parts}
    first = {"sequence": newest.sequence, "taken_ms": newest.taken_ms, "parts": parts}
    older = [{"sequence": k.sequence, "taken_ms": k.taken_ms} for k in newest.history]
    return {"checkpoints": [first, *older]}


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise Invalid("a file became shorter while it was read")
    return data


def _read_from(descriptor: int, start: int, offset: int, size: int) -> bytes:
    return _read_at(descriptor, start + offset, size)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
