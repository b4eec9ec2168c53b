"""Pretended checkpoints: heads, secrets and access as a real store has them, of words.

::

    DIRECTORY/checkpoints/HOST.json   all that is in the store of that host

What ran is a list of words, so that a test can see what came back. A host reaches the store of
another one, be it of another provider of the U-Cloud, when the option ``tunnel`` says so.
"""

import asyncio
import hashlib
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from supercloud.model.errors import BadState, Denied, NotFound, Temporary, Unsupported
from supercloud.providers.fake.files import write_private
from supercloud.providers.fake.objects import Store
from supercloud.wire.checkpoints import (
    BUCKET,
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    Head,
    Kept,
    RestoreFrom,
    StoreAccess,
)
from supercloud.wire.codec import decode, encode

if TYPE_CHECKING:
    from supercloud.providers.fake.cloud import FakeCloud, Platform

UP = ("running", "serving", "unready")
PRETENDED_MEMORY_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Record:
    """A checkpoint in the store. ``history`` has those before it that it vouches for."""

    ee: str
    head: Head
    secret_sha256: str
    history: list[Head]
    content: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Records:
    """All that is in a store."""

    records: list[Record] = field(default_factory=list)


class FakeCheckpoints:
    """Implements ``providers.base.Checkpoints``, and what an agent does; state is in its files."""

    def __init__(self, cloud: "FakeCloud") -> None:
        self._cloud = cloud
        self._directory = os.path.join(cloud.directory, "checkpoints")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)

    async def take(self, host: str, asked: CheckpointTake) -> CheckpointTaken:
        """Of a platform, with all that runs there."""
        platform = self._cloud.find(asked.name)
        if platform.host != host:
            raise NotFound(f"host {host} has no platform {asked.name}")
        if platform.state != "running":
            raise BadState(f"platform {asked.name} is {platform.state}")
        files = {suffix: _text(self._cloud.path(asked.name, suffix)) for suffix in (".key", ".pem")}
        content = {"platform": encode(platform), "files": files}
        slots = self._cloud.volumes.still(asked.name, asked.snapshot)
        return replace(await self._take(host, asked, "qemu/tcg", content), slots=slots)

    async def take_environment(
        self,
        platform: "Platform",
        asked: CheckpointTake,
        snapshot: Callable[[], Awaitable[None]],
    ) -> CheckpointTaken:
        """Of an EE, by its agent; ``snapshot`` has the volumes that it writes to snapshotted."""
        status = next((item for item in platform.statuses if item.name == asked.name), None)
        spec = next((item for item in platform.specs if item.name == asked.name), None)
        if status is None or spec is None or status.uid != asked.uid:
            raise NotFound(f"no environment {asked.name} of uid {asked.uid} runs here")
        if status.state not in UP:
            raise BadState(f"environment {asked.name} is {status.state}")
        if not spec.checkpoints:
            raise BadState(f"environment {asked.name} was not started for checkpoints")
        if any(not mount.read_only for mount in spec.volumes):
            if not asked.snapshot:
                raise Unsupported(f"environment {asked.name} writes to volumes")
            await snapshot()
        words = list(platform.words.get(status.uid, []))
        content = {"kind": spec.kind, "words": words}
        return await self._take(platform.host, asked, status.engine, content)

    async def collect(self, host: str, asked: CheckpointCollect) -> CheckpointCollected:
        """What is vouched for and to be kept stays, and what is newer than the head."""
        await self._cloud.pretend("collect")
        path = self._store(host, asked.store)
        there = _load(path)
        stays = [item for item in there.records if _stays(item, asked)]
        removed = len(there.records) - len(stays)
        _save(path, Records(records=stays))
        return CheckpointCollected(removed=removed, removed_bytes=removed * PRETENDED_MEMORY_BYTES)

    async def verify(self, host: str, asked: RestoreFrom) -> CheckpointVerified:
        """Denied as a restore would be."""
        await self._cloud.pretend("verify")
        return CheckpointVerified(read_bytes=len(json.dumps(self.read(host, asked))))

    def read(self, host: str, restore: RestoreFrom) -> dict[str, Any]:
        """What was taken; Denied when it is not there, or not what the head vouches for."""
        records = _load(self._store(host, restore.store)).records
        newest = _find(records, restore.ee, restore.head)
        wanted = restore.head
        if restore.sequence not in (None, restore.head.sequence):
            known = [head for head in newest.history if head.sequence == restore.sequence]
            if not known:
                raise Denied(f"checkpoint {restore.sequence} of {restore.ee} is not vouched for")
            wanted = known[0]
        found = _find(records, restore.ee, wanted)
        if found.secret_sha256 != _hash(restore.store.secret):
            raise Denied(f"checkpoint {wanted.sequence} of {restore.ee} was tampered with")
        return found.content

    # -- what happens to them

    def dropped(self, host: str) -> None:
        """Their bucket is gone."""
        path = os.path.join(self._directory, f"{host}.json")
        if os.path.exists(path):
            os.unlink(path)

    def all(self) -> dict[str, list[tuple[str, int]]]:
        """Name and sequence of all that are there, by host."""
        return {
            entry.removesuffix(".json"): sorted(
                (item.ee, item.head.sequence)
                for item in _load(os.path.join(self._directory, entry)).records
            )
            for entry in sorted(os.listdir(self._directory))
        }

    def tamper(self, host: str, ee: str, sequence: int) -> None:
        """Somebody who has the disk puts another one in its place."""
        path = os.path.join(self._directory, f"{host}.json")
        there = _load(path)
        for item in there.records:
            if (item.ee, item.head.sequence) == (ee, sequence):
                item.secret_sha256 = _hash("another secret")
        _save(path, there)

    # -- how

    async def _take(
        self, host: str, asked: CheckpointTake, engine: str, content: dict[str, Any]
    ) -> CheckpointTaken:
        began_s = time.time()
        await self._cloud.pretend("checkpoint")
        await asyncio.sleep(self._cloud.options.checkpoint_ms / 1000)
        path = self._store(host, asked.store)
        there = _load(path)
        history: list[Head] = []
        if asked.head is not None:
            last = _find(there.records, asked.name, asked.head)
            history = [*last.history, last.head][-1024:]
        sequence = asked.head.sequence + 1 if asked.head else 1
        head = Head(sequence=sequence, root=secrets.token_hex(32))
        there.records.append(
            Record(
                ee=asked.name,
                head=head,
                secret_sha256=_hash(asked.store.secret),
                history=history,
                content=content,
            )
        )
        _save(path, there)
        return CheckpointTaken(
            head=head,
            engine=engine,
            taken_ms=int(began_s * 1000),
            pause_ms=1.0,
            base=asked.head is None,
            memory_bytes=PRETENDED_MEMORY_BYTES,
            dirty_bytes=0 if asked.head is None else 4096,
            disk_bytes=0,
            new_bytes=len(json.dumps(content)),
        )

    def _store(self, host: str, access: StoreAccess) -> str:
        """The file of the store that knows the keys; Denied, or Temporary while it is away."""
        for directory, name, store in self._stores(host):
            made = hashlib.sha256
            for user, buckets in store.users.items():
                key = made(f"{store.key_sha256}/{user}".encode()).hexdigest()[16:56]
                if key == access.secret_key and buckets.get(BUCKET) == "write":
                    if not store.running:
                        raise Temporary("the object store does not answer", delay_s=0.01)
                    return os.path.join(directory, "checkpoints", f"{name}.json")
        raise Denied("no object store that is reached from here knows these keys")

    def _stores(self, host: str) -> Iterator[tuple[str, str, Store]]:
        """Those that the host reaches: directory of their cloud, host, what is known of them."""
        own = self._cloud.objects.stores
        if host in own:
            yield self._cloud.directory, host, own[host]
        if not self._cloud.options.tunnel:
            return
        above = os.path.dirname(self._cloud.directory)
        for cloud in sorted(os.listdir(above)):
            directory = os.path.join(above, cloud, "objects")
            for entry in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
                if entry.endswith(".json"):
                    with open(os.path.join(directory, entry), encoding="utf-8") as file:
                        loaded: Any = json.load(file)
                    store = decode(Store, loaded, entry)
                    yield os.path.join(above, cloud), entry.removesuffix(".json"), store


def _find(records: list[Record], ee: str, head: Head) -> Record:
    for item in records:
        if item.ee == ee and item.head == head:
            return item
    raise Denied(f"checkpoint {head.sequence} of {ee} is missing, or another one")


def _stays(item: Record, asked: CheckpointCollect) -> bool:
    if item.ee in asked.forget:
        return False
    keep: Kept | None = asked.keep.get(item.ee)
    if keep is None or item.head == keep.head or item.head.sequence > keep.head.sequence:
        return True
    return item.head.sequence < keep.head.sequence and item.head.sequence in keep.sequences


def _load(path: str) -> Records:
    if not os.path.exists(path):
        return Records()
    with open(path, encoding="utf-8") as file:
        loaded: Any = json.load(file)
    return decode(Records, loaded, path)


def _save(path: str, records: Records) -> None:
    write_private(path, json.dumps(encode(records)).encode())


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _hash(secret: str) -> str:
    return hashlib.sha256(b"pretended checkpoints" + secret.encode()).hexdigest()
