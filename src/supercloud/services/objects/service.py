"""The object service's calls, over one weed and our half beside it (``front``).

| call | parameters and descriptors | result |
| --- | --- | --- |
| ``objects.start`` | ``directory``, ``capacity_bytes``, ``durable``, ``least`` | state |
| ``objects.state`` | | state, position of the journal, bytes on the disk |
| ``objects.connect`` | | a connected stream to the S3 port, which speaks TLS |
| ``objects.accept`` | a client's connection, one descriptor | |
| ``objects.present`` | key and chain for TLS, one descriptor | |
| ``objects.credentials`` | ``name``, ``buckets``, ``generation`` | access key; the secret |
| ``objects.revoke`` | ``name`` | |
| ``bucket.apply`` | ``name``, ``quota_bytes``, ``versioning``, ``expire_days`` | the bucket's row |
| ``bucket.list`` | | rows with usage |
| ``bucket.delete`` | ``name``, ``contents`` | whether something is ``left``: call again |

With ``objects.start`` come two descriptors: 32 bytes of key, and key and chain for TLS in PEM; both
are read once and kept in memory only. A user's secret goes as a descriptor, too, of JSON.
``buckets`` says ``read`` or ``write`` by name. A bucket with something in it is deleted only with
``contents``: true.
``least`` is a position as ``objects.state`` said it before: an older journal is refused.
"""

import collections
import contextlib
import hashlib
import hmac
import json
import os
import signal
import ssl
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    Invalid,
    NoResources,
)
from supercloud.services.base import Service, Tell
from supercloud.services.objects import administer
from supercloud.services.objects.front import Front
from supercloud.services.objects.records import (
    MAX_BUCKETS,
    MAX_USERS,
    Records,
    bucket_name,
    bucket_of,
    identity_name,
    key_name,
    user_of,
)
from supercloud.services.objects.sigv4 import REGION
from supercloud.services.objects.weed import RELOAD, VOLUME_MIB, Ports, Weed, credentials, identity
from supercloud.wire.children import Children, how_it_ended
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.reactor import Reactor

MIB: Final = 1 << 20
MAX_CAPACITY_BYTES: Final = 64 << 40
MAX_IDENTITY_BYTES: Final = 64 << 10
KEY_BYTES: Final = 32
_SPARE_VOLUMES: Final = 3  # one being written, one being vacuumed, weed's own notes
_POLL_S: Final = 0.05
_BACKOFF_S: Final = (0.2, 10.0)
_LINES: Final = 40


@dataclass(frozen=True, slots=True)
class Place:
    """What the launcher decides: the program, a directory in memory, ports."""

    program: str = "/usr/bin/weed"
    run: str = "/run/objects"
    ports: Ports = field(default_factory=Ports)


class ObjectService:
    """One U-Cloud's object store; see the module."""

    def __init__(self, reactor: Reactor, tell: Tell, place: Place | None = None) -> None:
        self._reactor, self._tell, self._place = reactor, tell, place or Place()
        self._children = Children(reactor)
        self._state, self._why = "new", ""
        self._weed: Weed | None = None
        self._front: Front | None = None
        self._records = Records()
        self._revoked: set[str] = set()
        self._secret, self._capacity_bytes = b"", 0
        self._pid, self._backoff_s = 0, 0.0
        self._output, self._said = -1, collections.deque[str](maxlen=_LINES)

    def handlers(self) -> Mapping[str, Handler]:
        """See the module."""
        return {
            "objects.start": self._start,
            "objects.state": lambda _request: self._described(),
            "objects.connect": self._connect,
            "objects.accept": self._accept,
            "objects.present": self._present,
            "objects.credentials": self._credentials,
            "objects.revoke": self._revoke,
            "bucket.apply": self._apply,
            "bucket.list": lambda _request: self._list(),
            "bucket.delete": self._delete,
        }

    def close(self) -> None:
        """End weed, then flush the journal."""
        self._state = "closed"
        if self._pid:
            self._children.kill(self._pid)
        if self._front is not None:
            self._front.close()
            self._front = None
        self._children.close()

    def _start(self, request: Request) -> dict[str, Any]:
        if self._state != "new":
            raise BadState(f"the object store is {self._state}")
        directory = request.text("directory")
        capacity = request.number("capacity_bytes", MIB, MAX_CAPACITY_BYTES)
        least = _position(request.untrusted.get("least", [0, 0]))
        if len(request.descriptors) != 2:
            raise Invalid("two descriptors are needed: the key, and the TLS identity")
        key, pem = (_read(fd, MAX_IDENTITY_BYTES) for fd in request.descriptors)
        if len(key) != KEY_BYTES:
            raise Invalid(f"the key has {len(key)} bytes, not {KEY_BYTES}")
        context, run = _context(pem), self._place.run
        for path in (run, f"{directory}/journal", f"{directory}/volumes"):
            os.makedirs(path, mode=0o700, exist_ok=True)
        self._secret, self._capacity_bytes = _derived(key, b"weed"), capacity
        weed = Weed(
            program=self._place.program,
            data=f"{directory}/volumes",
            run=run,
            secret=self._secret,
            volumes=-(-capacity * 3 // 2 // (VOLUME_MIB * MIB)) + _SPARE_VOLUMES,
            durable=request.untrusted.get("durable", True) is not False,
            ports=self._place.ports,
        )
        self._front = Front(
            directory=f"{directory}/journal",
            key=_derived(key, b"journal"),
            least=least,
            context=context,
            store_socket=weed.store_socket,
            s3_port=weed.ports.s3,
            failed=self._journal_failed,
        )
        self._weed, self._records = weed, Records.from_bytes(self._front.records())
        self._set_quotas()
        self._launch()
        return self._described()

    def _launch(self) -> None:
        weed, front = self._running()
        front.forget_lifecycle()
        weed.prepare([*self._records.identities(self._secret)])
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._output = reading
        self._reactor.watch(_Descriptor(reading), self._read_output)
        try:  # its words have names in them: they stay in memory
            self._pid = self._children.start(
                weed.argv(), [], self._ended, environment=weed.environment(), output=writing
            )
        finally:
            os.close(writing)
        self._state = "starting"
        self._reactor.after(_POLL_S, self._poll)

    def _poll(self) -> None:
        if self._state != "starting":
            return
        weed = self._running()[0]
        if weed.configure() and administer.ready(weed):
            self._state, self._why, self._backoff_s = "ready", "", 0.0
            self._tell("objects.ready", {})
        else:
            self._reactor.after(_POLL_S, self._poll)

    def _ended(self, status: int) -> None:
        self._pid = 0
        self._reactor.forget(_Descriptor(self._output))
        os.close(self._output)
        if self._state == "closed":
            return
        self._why = f"the S3 server was {how_it_ended(status)}"
        if self._state != "failed":
            self._state = "restarting"
            self._backoff_s = min(max(2 * self._backoff_s, _BACKOFF_S[0]), _BACKOFF_S[1])
            self._reactor.after(self._backoff_s, self._again)
        self._tell("objects.down", {"why": self._why})

    def _again(self) -> None:
        if self._state == "restarting":
            self._launch()

    def _journal_failed(self, error: OSError) -> None:
        """On the loop's thread: nothing is acknowledged from here on, so stop pretending."""
        self._state, self._why = "failed", f"the journal cannot be written: {error.strerror}"
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def _read_output(self) -> None:
        data = b""
        while chunk := _read_some(self._output):
            data += chunk
        self._said.extend(data.decode(errors="replace").splitlines())

    def _connect(self, _request: Request) -> Reply:
        return Reply(None, [self._running()[1].connect()])

    def _accept(self, request: Request) -> None:
        front = self._running()[1]
        if len(request.descriptors) != 1:
            raise Invalid("one descriptor is needed: the connection")
        front.accept(*request.take())

    def _present(self, request: Request) -> None:
        if len(request.descriptors) != 1:
            raise Invalid("one descriptor is needed: the TLS identity")
        context = _context(_read(request.descriptors[0], MAX_IDENTITY_BYTES))
        self._running()[1].present(context)

    def _credentials(self, request: Request) -> Reply:
        weed, front = self._ready()
        user = user_of(request, self._records)
        if user.name not in self._records.users and len(self._records.users) >= MAX_USERS:
            raise NoResources(f"there are {MAX_USERS} users of the object store")
        self._records.users[user.name] = user
        self._keep(front)
        theirs = credentials(self._secret, key_name(user))
        self._reload(weed, lambda: administer.accepts(weed, theirs))
        secret = {**asdict(theirs), "region": REGION}
        return Reply({"access_key": theirs.access_key}, [_memory(json.dumps(secret).encode())])

    def _revoke(self, request: Request) -> None:
        weed, front = self._ready()
        user = self._records.users.pop(request.name("name"), None)
        if user is not None:
            self._revoked.add(user.name)
            self._keep(front)
            theirs = credentials(self._secret, key_name(user))
            self._reload(weed, lambda: not administer.accepts(weed, theirs))

    def _reload(self, weed: Weed, done: Callable[[], bool]) -> None:
        gone = self._revoked - {*self._records.users}  # it forgets nobody but by another key
        rows = [
            identity(identity_name(name), credentials(os.urandom(KEY_BYTES), name), [])
            for name in gone
        ]
        weed.write_identities([*self._records.identities(self._secret), *rows])
        self._children.kill(self._pid, RELOAD)
        administer.wait_for(done)

    def _apply(self, request: Request) -> dict[str, Any]:
        weed, front = self._ready()
        bucket, there = bucket_of(request), self._records.buckets
        taken = sum(other.quota_bytes for other in there.values() if other.name != bucket.name)
        if taken + bucket.quota_bytes > self._capacity_bytes:
            raise NoResources(
                f"{bucket.name}: {bucket.quota_bytes} bytes do not fit beside {taken} of others"
                f" in {self._capacity_bytes}",
                where="quota_bytes",
            )
        if bucket.name not in there and len(there) >= MAX_BUCKETS:
            raise NoResources(f"there are {MAX_BUCKETS} buckets")
        administer.apply(weed, bucket, there.get(bucket.name))
        there[bucket.name] = bucket
        self._keep(front)
        self._set_quotas()
        return self._row(bucket.name)

    def _list(self) -> list[dict[str, Any]]:
        self._running()
        return [self._row(name) for name in sorted(self._records.buckets)]

    def _delete(self, request: Request) -> dict[str, bool]:
        weed, front = self._ready()
        name = bucket_name(request)
        users = [u.name for u in self._records.users.values() if name in u.buckets]
        if users:
            raise Exists(f"{name} is used by {', '.join(users)}", hint="objects.revoke them first")
        if request.untrusted.get("contents") is True and self._emptied(weed, front, name):
            return {"left": True}
        administer.delete(weed, name)
        self._records.buckets.pop(name, None)
        self._keep(front)
        self._set_quotas()
        return {"left": False}

    @staticmethod
    def _emptied(weed: Weed, front: Front, name: str) -> bool:
        """Delete some of it; whether there may be more. BadState when it does not become less."""
        before = front.usage(name).entries
        if administer.empty(weed, name):
            return False
        if front.usage(name).entries >= before:
            raise BadState(f"bucket {name} cannot be emptied", hint="delete the whole store")
        return True

    def _row(self, name: str) -> dict[str, Any]:
        return {**asdict(self._records.buckets[name]), **asdict(self._running()[1].usage(name))}

    def _described(self) -> dict[str, Any]:
        front, weed = self._front, self._weed
        disk = _disk_bytes(weed.data) if weed is not None else 0
        return {
            "state": self._state,
            "why": self._why,
            "position": list(front.position) if front else [0, 0],
            "disk_bytes": disk + (front.journal_bytes if front else 0),
            "pid": self._pid,
        }

    def _keep(self, front: Front) -> None:
        front.keep(self._records.to_bytes())

    def _set_quotas(self) -> None:
        quotas = {name: bucket.quota_bytes for name, bucket in self._records.buckets.items()}
        self._running()[1].set_quotas(quotas)

    def _running(self) -> tuple[Weed, Front]:
        if self._weed is None or self._front is None:
            raise BadState(f"the object store is {self._state}", hint="objects.start comes first")
        return self._weed, self._front

    def _ready(self) -> tuple[Weed, Front]:
        if self._state != "ready":
            raise Busy(f"the object store is {self._state}; {self._why}".rstrip("; "))
        return self._running()


@dataclass(frozen=True)
class _Descriptor:
    """A descriptor as the reactor wants it."""

    number: int

    def fileno(self) -> int:
        return self.number


def make(reactor: Reactor, tell: Tell) -> Service:
    """The service as a host's launcher makes it."""
    return ObjectService(reactor, tell)


def _disk_bytes(directory: str) -> int:
    """What the files in a directory take; weed may remove some meanwhile."""
    total = 0
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            total += os.lstat(f"{directory}/{name}").st_blocks * 512
    return total


def _position(untrusted: object) -> tuple[int, int]:
    if isinstance(untrusted, list) and len(untrusted) == 2:
        first, second = untrusted
        if type(first) is int and type(second) is int and min(first, second) >= 0:
            return first, second
    raise Invalid("least must be two numbers", where="least")


def _derived(key: bytes, what: bytes) -> bytes:
    return hmac.digest(key, b"supercloud objects " + what, hashlib.sha256)


def _read(descriptor: int, most: int) -> bytes:
    """All of a memory file, from its beginning."""
    data = os.pread(descriptor, most + 1, 0)
    if len(data) > most:
        raise Invalid("a descriptor with too much behind it")
    return data


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""


def _memory(data: bytes) -> int:
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    os.fchmod(descriptor, 0o400)
    return descriptor


def _context(pem: bytes) -> ssl.SSLContext:
    """Server side of TLS, 1.2 for the S3 clients of this world; the key is in memory only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    descriptor = _memory(pem)
    try:
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    except (OSError, ssl.SSLError) as error:
        raise Invalid(f"not a TLS identity in PEM: {error}") from error
    finally:
        os.close(descriptor)
    return context
