"""Pretended object stores: positions, buckets, users as a real host has them, without a server.

::

    DIRECTORY/objects/creations.jsonl   one line for every store that was ever made
    DIRECTORY/objects/HOST.json         a store (of its key only a hash)
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from supercloud.model.errors import Busy, Invalid, NoResources, NotFound, Permanent
from supercloud.providers.fake.files import write_private
from supercloud.trust import keys
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.checkpoints import BUCKET
from supercloud.wire.codec import decode, encode
from supercloud.wire.objects import (
    STORE,
    Access,
    BucketSpec,
    BucketUsage,
    ObjectsApply,
    ObjectsCredentials,
    ObjectsSecret,
    ObjectsStatus,
    Position,
    booked_bytes,
)

if TYPE_CHECKING:
    from supercloud.providers.fake.cloud import FakeCloud

PRETENDED_MEMORY_BYTES = 100 << 20


@dataclass(slots=True, kw_only=True)
class Store:
    """A store. ``words`` is what its users put into its buckets."""

    host: str
    key_sha256: str
    capacity_bytes: int
    tag: str = ""
    running: bool = False
    certified: bool = False
    segment: int = 0
    records: int = 0
    buckets: list[BucketSpec] = field(default_factory=list)
    users: dict[str, dict[str, Access]] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)

    def status(self, csr_pem: str = "") -> ObjectsStatus:
        """As its host shows it."""
        rows = [
            BucketUsage(**encode(spec), entries=len(self.words.get(spec.name, [])))
            for spec in self.buckets
        ]
        return ObjectsStatus(
            state="ready" if self.running else "stopped",
            position=Position(segment=self.segment, records=self.records),
            capacity_bytes=self.capacity_bytes,
            buckets=rows if self.running else [],
            csr_pem=csr_pem,
            memory_bytes=PRETENDED_MEMORY_BYTES if self.running else 0,
            tag=self.tag,
        )


class FakeObjects:
    """Implements ``providers.base.Objects``. ``creations`` counts by host."""

    def __init__(self, cloud: "FakeCloud") -> None:
        self._cloud = cloud
        self._directory = os.path.join(cloud.directory, "objects")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self.creations: Counter[str] = Counter()
        self.stores: dict[str, Store] = {}
        self._load()

    async def apply(self, host: str, asked: ObjectsApply) -> ObjectsStatus:
        """Made, started, changed at once: nothing takes time here."""
        await self._cloud.pretend("objects")
        store = self.stores.get(host)
        self._check(host, asked, store)
        if store is None:
            store = self._make(host, asked)
        store.capacity_bytes, store.tag = asked.capacity_bytes, asked.tag
        store.certified = store.certified or bool(asked.cert_pem)
        if not store.certified:
            self._save(store)
            return store.status(self._request(host, asked.tag.rpartition(":")[2]))
        if not store.running:
            _open(store, asked)
        known = {spec.name: spec for spec in store.buckets}
        wanted = known | {spec.name: spec for spec in asked.buckets}
        if list(wanted.values()) != store.buckets or not store.users.keys() <= set(asked.users):
            store.buckets = list(wanted.values())
            store.users = {name: of for name, of in store.users.items() if name in asked.users}
            store.records += 1
        self._save(store)
        return store.status()

    async def state(self, host: str) -> ObjectsStatus:
        """As it is."""
        await self._cloud.pretend("objects")
        store = self.stores.get(host)
        return store.status() if store else ObjectsStatus(state="absent")

    async def credentials(self, host: str, asked: ObjectsCredentials) -> ObjectsSecret:
        """The same name gets the same keys again."""
        await self._cloud.pretend("objects")
        store = self.stores.get(host)
        if store is None:
            raise NotFound("there is no object store here")
        if not store.running:
            raise Busy("the object store is stopped")
        if unknown := asked.buckets.keys() - {spec.name for spec in store.buckets}:
            raise Invalid(f"{min(unknown)!r} is no bucket", where="buckets")
        store.users[asked.name] = dict(asked.buckets)
        store.records += 1
        self._save(store)
        made = hashlib.sha256(f"{store.key_sha256}/{asked.name}".encode()).hexdigest()
        return ObjectsSecret(access_key=f"SC{made[:16]}", secret_key=made[16:56], region="fake")

    async def delete(self, host: str, bucket: str = "") -> ObjectsStatus:
        """Gone already is fine."""
        await self._cloud.pretend("objects")
        store = self.stores.get(host)
        if store is None:
            return ObjectsStatus(state="absent")
        if bucket in ("", BUCKET):
            self._cloud.checkpoints.dropped(host)
        if not bucket:
            del self.stores[host]
            os.unlink(self._path(host))
            return ObjectsStatus(state="absent")
        store.buckets = [spec for spec in store.buckets if spec.name != bucket]
        store.words.pop(bucket, None)
        for buckets in store.users.values():
            buckets.pop(bucket, None)
        store.records += 1
        self._save(store)
        return store.status()

    async def stop(self, host: str) -> ObjectsStatus:
        """Its data stays."""
        await self._cloud.pretend("objects")
        store = self.stores.get(host)
        if store is None:
            return ObjectsStatus(state="absent")
        store.running = False
        self._save(store)
        return store.status()

    # -- what happens to them

    def put(self, host: str, secret: ObjectsSecret, bucket: str, word: str) -> None:
        """What an EE does with its credentials; ``NotFound`` when they are none."""
        store = self.stores[host]
        for name, buckets in store.users.items():
            made = hashlib.sha256(f"{store.key_sha256}/{name}".encode()).hexdigest()
            if secret.secret_key == made[16:56] and buckets.get(bucket) == "write":
                store.words.setdefault(bucket, []).append(word)
                store.records += 1
                self._save(store)
                return
        raise NotFound(f"nobody with these keys may write to {bucket}")

    def die(self, host: str) -> None:
        """Its service ends by itself."""
        self.stores[host].running = False
        self._save(self.stores[host])

    # -- how

    def _check(self, host: str, asked: ObjectsApply, store: Store | None) -> None:
        there = next((item for item in self._cloud.hosts() if item.name == host), None)
        if there is None:
            raise NotFound(f"{self._cloud.name} has no host {host}")
        if booked_bytes(asked.capacity_bytes) > there.disk_total_bytes:
            raise NoResources(f"{host}: a store of {asked.capacity_bytes} bytes does not fit")
        if sum(bucket.quota_bytes for bucket in asked.buckets) > asked.capacity_bytes:
            raise Invalid("the quotas are more than the capacity", where="capacity_bytes")
        if store is not None and store.key_sha256 != _hash(asked.key_base64):
            raise Permanent("the journal was altered, or made with another key")

    def _make(self, host: str, asked: ObjectsApply) -> Store:
        self.creations[host] += 1
        with open(os.path.join(self._directory, "creations.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"host": host}) + "\n")
        store = self.stores[host] = Store(
            host=host,
            key_sha256=_hash(asked.key_base64),
            capacity_bytes=asked.capacity_bytes,
            tag=asked.tag,
        )
        return store

    def _request(self, host: str, ucloud: str) -> str:
        path = os.path.join(self._directory, f"{host}.key")
        keys.ensure_key(path)
        own = Identity(ucloud, SERVICE, STORE)
        return keys.make_request(path, own.uri, own.dns)

    def _path(self, host: str) -> str:
        return os.path.join(self._directory, host + ".json")

    def _save(self, store: Store) -> None:
        write_private(self._path(store.host), json.dumps(encode(store)).encode())

    def _load(self) -> None:
        for entry in sorted(os.listdir(self._directory)):
            with open(os.path.join(self._directory, entry), encoding="utf-8") as file:
                if entry.endswith(".json"):
                    loaded: Any = json.load(file)
                    store = decode(Store, loaded, entry)
                    self.stores[store.host] = store
                elif entry.endswith(".jsonl"):
                    self.creations.update(json.loads(line)["host"] for line in file)


def _open(store: Store, asked: ObjectsApply) -> None:
    """A new segment is begun at each start; what is older than what was seen is refused."""
    least = (asked.least.segment, asked.least.records)
    if (store.segment, store.records) < least:
        raise Permanent(f"the journal ends before {least}: it was rolled back")
    store.running, store.segment, store.records = True, store.segment + 1, 1


def _hash(key: str) -> str:
    return hashlib.sha256(b"pretended store" + key.encode()).hexdigest()
