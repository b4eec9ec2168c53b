"""The object store of a U-Cloud on this host: booked, started, changed, stopped, deleted.

The store is the user's object service, in a domain of its own that keeps ciphertext only. Its data
key passes through here and is not kept: after a restart of the host the store waits for the control
plane to bring it again. Its TLS key is made here; what its clients say passes by: a connection is
handed to the service as it was accepted. One call at a time; every refusal comes before any effect.
"""

import asyncio
import base64
import binascii
import json
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.object_records import ObjectRecords, Store
from supercloud.lower.user_domain.services import Services
from supercloud.model.errors import Invalid, NotFound, SupercloudError
from supercloud.model.events import Severity
from supercloud.model.states import STORE, observed
from supercloud.wire.codec import encode, replace
from supercloud.wire.objects import (
    STORE as NAME,
)
from supercloud.wire.objects import (
    BucketSpec,
    BucketUsage,
    ObjectsApply,
    ObjectsCredentials,
    ObjectsDelete,
    ObjectsSecret,
    ObjectsStatus,
    Position,
    booked_bytes,
)

KIND: Final = "objects"
DIRECTORY: Final = "/run/state"
"""Of the service's own domain: where it keeps what it keeps."""

TIMEOUT_S: Final = 60.0
KEY_BYTES: Final = 32
MAX_CLIENTS: Final = 64
_SUBJECT: Final = f"objects/{NAME}"
_BOOKING: Final = {"use": KIND, "name": NAME}

log = logging.getLogger("supercloud.lower.user_domain.objects")


class Objects:
    """The one store; ``disk`` is the provider's driver, which books what the store may take."""

    def __init__(self, disk: Channel, services: Services, feed: Feed, directory: str) -> None:
        self._disk, self._services, self._feed = disk, services, feed
        self._records = ObjectRecords(directory)
        self._lock = asyncio.Lock()
        self._clients: set[asyncio.Task[None]] = set()
        self._state, self._reason = "stopped" if self._records.store else "absent", ""
        self._position = Position()
        self.elsewhere: Callable[[str, socket.socket], None] = _refused
        services.told[KIND] = self._told

    # -- what is

    async def status(self) -> ObjectsStatus:
        """As it is now; while it does not run, as it was left."""
        store = self._records.store
        if store is None:
            return ObjectsStatus(state="absent")
        known = ObjectsStatus(
            state=self._state,
            reason=self._reason,
            position=self._position,
            capacity_bytes=store.capacity_bytes,
            tag=store.tag,
        )
        if not self._services.is_running(KIND):
            return known
        try:
            return await self._running(known)
        except SupercloudError as error:  # it is going down: the next look tells more
            log.warning("the object store does not answer: %s", error)
            return known

    async def _running(self, known: ObjectsStatus) -> ObjectsStatus:
        told = await self._ask("objects.state")
        if told["state"] == "new":  # somebody died between starting it and telling it what to be
            self._go("stopped")
            return replace(known, state=self._state, reason=self._reason)
        self._go(str(told["state"]), str(told["why"])[:1000])
        segment, records = told["position"]
        self._position = Position(segment=int(segment), records=int(records))
        service = self._services.status(KIND)
        return replace(
            known,
            state=self._state,
            reason=self._reason,
            position=self._position,
            disk_bytes=int(told["disk_bytes"]),
            buckets=[_usage(row) for row in await self._ask("bucket.list")],
            memory_bytes=service.memory_bytes,
            started_s=service.started_s,
        )

    # -- towards what it is to be

    async def apply(self, asked: ObjectsApply, ucloud: str) -> ObjectsStatus:
        """Bring it closer; the answer says how far. NoResources, Invalid before any effect."""
        key = _key(asked)
        _check(asked)
        async with self._lock:
            await self._book(asked)
            if asked.cert_pem:
                await asyncio.to_thread(self._records.install, asked.cert_pem + asked.chain_pem)
            request = await asyncio.to_thread(self._records.request, ucloud)
            if request:
                return replace(await self.status(), csr_pem=request)
            status = await self._started(asked, key)
            if status.state != "ready":
                return status
            if asked.cert_pem:
                await self._present()
            await self._revoke(set(asked.users))
            if await self._buckets(asked.buckets, status.buckets):
                self._say("changed", f"{len(asked.buckets)} buckets are as wished")
                status = await self.status()
            return status

    async def _book(self, asked: ObjectsApply) -> None:
        """Have room for it before anything is made; a smaller one gives the rest back."""
        store, wanted = self._records.store, booked_bytes(asked.capacity_bytes)
        if store is not None and store.capacity_bytes == asked.capacity_bytes:
            return
        before = booked_bytes(store.capacity_bytes) if store else 0
        if wanted > before and store is not None:
            await self._disk.result("disk.grow", {**_BOOKING, "size_bytes": wanted})
        else:
            if store is not None:
                await self._halt("it gets another capacity")
                await self._disk.result("disk.delete", _BOOKING)
            made = await self._disk.call("disk.create", {**_BOOKING, "size_bytes": wanted})
            for descriptor in made.descriptors:
                os.close(descriptor)
        users = store.users if store else {}
        self._records.put(Store(asked.capacity_bytes, asked.tag, users))
        if store is None:
            self._go("stopped")
        else:
            await self._halt("it gets another capacity")

    async def _started(self, asked: ObjectsApply, key: bytes) -> ObjectsStatus:
        channel = self._services.start(KIND)
        if (await self._ask("objects.state"))["state"] != "new":
            return await self.status()
        passed = [_memory(key), _memory(self._records.identity())]
        parameters = {
            "directory": DIRECTORY,
            "capacity_bytes": asked.capacity_bytes,
            "least": [asked.least.segment, asked.least.records],
        }
        try:
            await channel.call("objects.start", parameters, passed, timeout_s=TIMEOUT_S)
        except SupercloudError as error:
            self._services.end(KIND)  # its half that was made goes
            self._go("stopped", str(error))
            raise
        finally:
            for descriptor in passed:
                os.close(descriptor)
        self._go("starting")
        return await self.status()

    async def _present(self) -> None:
        identity = _memory(self._records.identity())
        try:
            await self._services.join(KIND).call("objects.present", {}, [identity])
        finally:
            os.close(identity)

    async def _buckets(self, wanted: list[BucketSpec], there: list[BucketUsage]) -> bool:
        """Whether any had to be changed. Smaller quotas first: they make room for larger ones."""
        known = {row.name: row for row in there}
        quota = {name: row.quota_bytes for name, row in known.items()}
        changed = False
        for spec in sorted(wanted, key=lambda item: item.quota_bytes - quota.get(item.name, 0)):
            if spec != _spec(known.get(spec.name)):
                await self._ask("bucket.apply", encode(spec))
                changed = True
        return changed

    # -- who may use it

    async def credentials(self, asked: ObjectsCredentials) -> ObjectsSecret:
        """Let somebody use buckets; their secret. NotFound, Invalid, Busy while it starts."""
        async with self._lock:
            store = self._store()
            store.users[asked.name] = dict(asked.buckets)
            self._records.put(store)  # before it is so: who is known can be revoked
            reply = await self._call("objects.credentials", encode(asked))
            (descriptor,) = reply
            with os.fdopen(descriptor, "rb") as file:
                file.seek(0)
                told = json.loads(file.read(1 << 16))
            fields = ("access_key", "secret_key", "region")
            return ObjectsSecret(**{name: str(told[name]) for name in fields})

    async def _revoke(self, stay: set[str]) -> None:
        store = self._store()
        for name in store.users.keys() - stay:
            await self._ask("objects.revoke", {"name": name})
            del store.users[name]
            self._records.put(store)

    # -- away

    async def delete(self, asked: ObjectsDelete) -> ObjectsStatus:
        """A bucket, or all; gone already is fine."""
        async with self._lock:
            if self._records.store is None:
                return ObjectsStatus(state="absent")
            if not asked.bucket:
                return await self._delete_all()
            await self._let_go(asked.bucket)
            asking = {"name": asked.bucket, "contents": True}
            while (await self._ask("bucket.delete", asking))["left"]:
                log.info("the bucket %s is being emptied", asked.bucket)
            self._say("bucket_deleted", asked.bucket)
            return await self.status()

    async def _let_go(self, bucket: str) -> None:
        store = self._store()
        for name, buckets in list(store.users.items()):
            if bucket in buckets:
                left = {other: how for other, how in buckets.items() if other != bucket}
                parameters = {"name": name, "buckets": left}
                for descriptor in await self._call("objects.credentials", parameters):
                    os.close(descriptor)
                store.users[name] = left
                self._records.put(store)

    async def _delete_all(self) -> ObjectsStatus:
        self._services.end(KIND, purge=True)
        await self._disk.result("disk.delete", _BOOKING)
        self._records.remove()
        self._position = Position()
        self._go("absent")
        return ObjectsStatus(state="absent")

    async def stop(self) -> ObjectsStatus:
        """Serve no more; what was acknowledged is on the disk. The answer has its last position."""
        async with self._lock:
            await self._halt("nobody uses it")
            return await self.status()

    async def _halt(self, reason: str) -> None:
        if self._services.is_running(KIND):
            await self.status()  # for its position; what comes after is not promised
            self._services.end(KIND)
        if self._records.store is not None:
            self._go("stopped", reason)

    # -- its clients

    def client(self, platform: str, sock: socket.socket) -> None:
        """Somebody of ``platform`` has connected: the service's from now on, wherever that is."""
        if self._records.store is None:
            self.elsewhere(platform, sock)
        else:
            self.client_here(platform, sock)

    def client_here(self, platform: str, sock: socket.socket) -> None:
        """Likewise, for the store that is here: from another host nobody is passed on."""
        if self._state not in ("ready", "restarting") or len(self._clients) >= MAX_CLIENTS:
            log.info("%s: a client of the object store was refused", platform)
            sock.close()
            return
        task = asyncio.ensure_future(self._hand_over(platform, sock))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def _hand_over(self, platform: str, sock: socket.socket) -> None:
        with sock:
            try:
                await self._services.join(KIND).call("objects.accept", {}, [sock.fileno()])
            except SupercloudError as error:
                log.info("%s: a client of the object store was refused: %s", platform, error)

    # -- after a restart of this domain, and when the service died

    def adopt(self) -> None:
        """Take up a store that runs."""
        if self._records.store is not None and self._services.is_running(KIND):
            self._services.join(KIND)
            self._go("starting")
            self._go("ready")

    def service_ended(self, entry: str) -> bool:
        """A domain died: True when it was ours. It is started when the control plane asks."""
        if self._services.kind_of(entry) != KIND:
            return False
        self._services.end(KIND)
        if self._records.store is not None:
            self._go("stopped", "its service died")
        return True

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        if method == "objects.ready":
            self._go("ready")
        elif method == "objects.down":
            self._go("restarting", str(untrusted.get("why", ""))[:1000])

    # -- helpers

    def _store(self) -> Store:
        if self._records.store is None:
            raise NotFound("there is no object store here")
        return self._records.store

    def _go(self, state: str, reason: str = "") -> None:
        before = self._state
        self._state, self._reason = observed(STORE, before, state), reason
        if state != before:
            self._say(state, reason)

    def _say(self, code: str, message: str) -> None:
        severity: Severity = "error" if code in ("failed", "restarting") else "info"
        self._feed.say(_SUBJECT, f"host.objects.{code}", message, severity=severity)

    async def _ask(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        channel = self._services.join(KIND)
        reply = await channel.call(method, parameters, timeout_s=TIMEOUT_S)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result

    async def _call(self, method: str, parameters: dict[str, Any]) -> list[int]:
        """A call that brings descriptors: the caller's to close."""
        reply = await self._services.join(KIND).call(method, parameters, timeout_s=TIMEOUT_S)
        return reply.descriptors


def _refused(_platform: str, sock: socket.socket) -> None:
    """There is no object store anywhere."""
    sock.close()


def _key(asked: ObjectsApply) -> bytes:
    try:
        key = base64.b64decode(asked.key_base64, validate=True)
    except binascii.Error as error:
        raise Invalid("the key is not base64", where="key_base64") from error
    if len(key) != KEY_BYTES:
        raise Invalid(f"a data key has {KEY_BYTES} bytes", where="key_base64")
    return key


def _check(asked: ObjectsApply) -> None:
    quotas = {bucket.name: bucket.quota_bytes for bucket in asked.buckets}
    if len(quotas) != len(asked.buckets):
        raise Invalid("two buckets of one name", where="buckets")
    if sum(quotas.values()) > asked.capacity_bytes:
        raise Invalid("the quotas are more than the capacity", where="capacity_bytes")


def _usage(row: dict[str, Any]) -> BucketUsage:
    return BucketUsage(
        name=str(row["name"]),
        quota_bytes=int(row["quota_bytes"]),
        versioning=bool(row["versioning"]),
        expire_days=int(row["expire_days"]),
        entries=int(row["entries"]),
        charged_bytes=int(row["charged_bytes"]),
    )


def _spec(row: BucketUsage | None) -> BucketSpec | None:
    if row is None:
        return None
    return BucketSpec(
        name=row.name,
        quota_bytes=row.quota_bytes,
        versioning=row.versioning,
        expire_days=row.expire_days,
    )


def _memory(data: bytes) -> int:
    descriptor = os.memfd_create("objects", os.MFD_CLOEXEC)
    os.write(descriptor, data)
    return descriptor
