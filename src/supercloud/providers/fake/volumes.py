"""Pretended volumes: epochs, seals, slots and snapshots as a real host has them, without a disk.

::

    DIRECTORY/volumes/creations.jsonl   one line for every volume that was ever made
    DIRECTORY/volumes/NAME.json         a volume (of its key only a hash)

What a user would have written is a list of words, so that a test can see whether it is lost.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from supercloud.model.errors import (
    BadState,
    Denied,
    Invalid,
    NoResources,
    NotFound,
    Temporary,
    Unsupported,
)
from supercloud.model.states import VOLUME, step
from supercloud.providers.fake.files import write_private
from supercloud.providers.fake.mirrors import Member, Mirrored
from supercloud.providers.fake.volume import OPEN, Volume, check, fill, hash_of
from supercloud.wire.checkpoints import GoesBack
from supercloud.wire.codec import decode, encode
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    Shared,
    VolumeFence,
    VolumeLease,
    VolumeRejoin,
)
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.tunnel import PeerHost
from supercloud.wire.volumes import (
    Seal,
    VolumeCopy,
    VolumeOpen,
    VolumeSpec,
    VolumeStatus,
)

if TYPE_CHECKING:
    from supercloud.providers.fake.cloud import FakeCloud


class FakeVolumes:
    """Implements ``providers.base.Volumes`` on one ``FakeCloud``; state is in its files."""

    def __init__(self, cloud: "FakeCloud") -> None:
        self._cloud = cloud
        self.creations: Counter[str] = Counter()
        self.volumes: dict[str, Volume] = {}
        self._directory = os.path.join(cloud.directory, "volumes")
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._load()

    async def open(self, host: str, asked: VolumeOpen) -> VolumeStatus:
        """Have it, and its next epoch; refused when it is not what ``asked.seal`` is of."""
        await self._cloud.pretend("open")
        volume = self.volumes.get(self.key_of(host, asked.spec.name))
        if volume is None:
            volume = self._make(host, asked)
        else:
            check(volume, asked)
        if volume.state in ("served", "attached"):
            return volume.status()
        volume.spec = asked.spec
        volume.epoch = max(volume.epoch, asked.seal.epoch) + 1
        volume.in_order, volume.filling = False, None
        return self._to(volume, "opened")

    async def serve(
        self,
        host: str,
        name: str,
        epoch: int,
        *,
        mirror: Mirror | None = None,
        shared: Shared | None = None,
    ) -> VolumeStatus:
        """Let it be used; Denied for another epoch than its own."""
        volume = await self._find("serve", host, name)
        if epoch != volume.epoch:
            raise Denied(f"volume {name} is at epoch {volume.epoch}, not {epoch}")
        if volume.state in ("served", "attached"):
            if volume.shared != shared or (volume.mirror is None) != (mirror is None):
                raise BadState(f"volume {name} is served otherwise: close it first")
            return volume.status()
        if mirror is not None and volume.mirror is None:
            volume.mirror = Mirrored.begun(mirror, self._streams(volume, mirror), volume.words)
            volume.used = True
            return self._to(volume, volume.state)
        if volume.mirror is not None and (why := volume.mirror.closed_by()):
            raise Temporary(f"volume {name} cannot be used yet: {why}", delay_s=0.01)
        volume.used, volume.shared = True, shared
        volume.sequence += 1  # its epoch is made durable
        return self._to(volume, "served")

    async def lease(self, host: str, asked: VolumeLease) -> MirrorStatus:
        """Let the mirror there answer."""
        volume = await self._find("lease", host, asked.name)
        mirror = _mirror_of(volume, asked.generation)
        self._look(volume, mirror)
        mirror.leased(asked)
        self.save(volume)
        return mirror.status()

    async def rejoin(self, host: str, asked: VolumeRejoin) -> MirrorStatus:
        """A replica is there again."""
        volume = await self._find("rejoin", host, asked.name)
        mirror = _mirror_of(volume, asked.generation)
        member = mirror.member(asked.replica)
        if not member.connected:
            member.peer = asked.peer
            found = self._streamed(volume, asked.peer, asked.generation)
            if found is None:
                raise Denied(f"volume {asked.name} is not served by {asked.peer.name}")
            member.connected = True
        self.save(volume)
        return mirror.status()

    async def fence(self, host: str, asked: VolumeFence) -> None:
        """A mirror of an older generation there never answers again."""
        volume = await self._find("fence", host, asked.name)
        if volume.mirror is not None and volume.mirror.generation < asked.generation:
            volume.mirror = None
            self._to(volume, "failed")

    def _streams(self, volume: Volume, mirror: Mirror) -> dict[str, list[str]]:
        """The words of each replica that is connected, by its name."""
        found = {}
        for replica in mirror.replicas:
            if replica.there and replica.peer is None:
                found[replica.replica] = volume.words
            elif replica.there and replica.peer is not None:
                other = self._streamed(volume, replica.peer, mirror.generation)
                if other is not None:
                    found[replica.replica] = other.words
        usable = [r for r in mirror.replicas if r.in_sync and r.replica in found]
        if not usable or not (mirror.all_ended or any(r.kept for r in usable)):
            raise Temporary("no replica that will do can be reached", delay_s=0.01)
        return found

    def _streamed(self, volume: Volume, peer: PeerHost, generation: int) -> Volume | None:
        """The replica there, if it is served to us and nobody had it yet."""
        other = self._replica(volume, peer, generation)
        if other is None or other.streamed:
            return None
        other.streamed = True
        self._save_at(peer, other)
        return other

    def _save_at(self, peer: PeerHost, other: Volume) -> None:
        cloud = self._cloud.reach(peer)
        if cloud is not None:
            cloud.volumes.save(other)

    def _look(self, volume: Volume, mirror: Mirrored) -> None:
        """See who is gone, and copy what is lacking; what was copied makes another state."""
        peers = [member.peer for member in mirror.members if member.peer is not None]
        found = [(peer, self._replica(volume, peer, mirror.generation)) for peer in peers]
        others = [(peer, other) for peer, other in found if other is not None]
        before = [(one, list(one.words)) for one in (volume, *(other for _, other in others))]
        mirror.look(lambda member: self._stream(volume, member))
        for one, words in before:
            one.sequence += one.words != words
        for peer, other in others:
            self._save_at(peer, other)

    def _stream(self, volume: Volume, member: Member) -> list[str] | None:
        """The words of a replica that is connected, while it is there; its user writes to them."""
        if member.peer is None or volume.mirror is None:
            return volume.words
        other = self._replica(volume, member.peer, volume.mirror.generation)
        return other.words if other is not None and other.streamed else None

    def _replica(self, volume: Volume, peer: PeerHost, generation: int) -> Volume | None:
        cloud = self._cloud.reach(peer)
        if cloud is None:
            return None
        other = cloud.volumes.volumes.get(cloud.volumes.key_of(peer.name, volume.spec.name))
        served = other is not None and other.state == "served"
        wanted = Shared(host=volume.host, generation=generation)
        return other if served and other is not None and other.shared == wanted else None

    async def attach(
        self, host: str, name: str, platform: str, *, restorable: bool = False
    ) -> VolumeStatus:
        """Give it to a running platform."""
        volume = await self._find("attach", host, name)
        machine = self._cloud.platforms.get(platform)
        if machine is None or machine.state != "running" or machine.host != host:
            raise BadState(f"platform {platform} does not run on host {host}")
        if volume.state == "attached":
            if volume.platform != platform:
                raise BadState(f"volume {name} is attached to {volume.platform}")
            return volume.status()
        if volume.shared is not None:
            raise BadState(f"volume {name} is used by {volume.shared.host}")
        step(VOLUME, volume.state, "attached")
        volume.slot = self._free_slot(platform)
        volume.platform, volume.mode = platform, "nbd" if restorable else "vhost-user-blk"
        return self._to(volume, "attached")

    def still(self, platform: str, snapshot: str) -> dict[str, int]:
        """The platform stands still: its volumes get that snapshot; their slots."""
        there = [volume for volume in self.volumes.values() if volume.platform == platform]
        for volume in there:
            if volume.mode != "nbd" or not snapshot:
                raise Unsupported(f"volume {volume.spec.name} could not be restored with it")
        for volume in there:
            volume.snapshots[snapshot] = list(volume.words)
            volume.sequence += 1
            self.save(volume)
        return {volume.spec.name: volume.slot for volume in there}

    def check_back(self, host: str, wanted: Sequence[GoesBack]) -> None:
        """BadState, NotFound: a platform could not have them back."""
        for item in wanted:
            volume = self.volumes.get(self.key_of(host, item.volume))
            if volume is None or item.snapshot not in volume.snapshots:
                raise NotFound(f"volume {item.volume} has no snapshot {item.snapshot}")
            if volume.state != "served" or volume.shared is not None:
                raise BadState(f"volume {item.volume} is {volume.state}")

    def go_back(self, host: str, platform: str, wanted: Sequence[GoesBack]) -> None:
        """They are the platform's, as the snapshots have them."""
        for item in wanted:
            volume = self.volumes[self.key_of(host, item.volume)]
            volume.words = list(volume.snapshots[item.snapshot])
            volume.sequence += 1
            volume.platform, volume.slot, volume.mode = platform, item.slot, "nbd"
            self._to(volume, "attached")

    async def detach(self, host: str, name: str) -> VolumeStatus:
        """Take it from its platform."""
        volume = await self._find("detach", host, name)
        if volume.state != "attached":
            return volume.status()
        volume.platform, volume.slot = "", 0
        return self._to(volume, "served")

    async def close(self, host: str, name: str) -> VolumeStatus:
        """Not while it is attached."""
        volume = await self._find("close", host, name)
        if volume.state == "attached":
            raise BadState(f"volume {name} is attached to {volume.platform}: detach it first")
        volume.in_order = volume.in_order or volume.state in OPEN
        status = self._to(volume, "closed")
        mirror = volume.mirror.closed() if volume.mirror is not None else None
        volume.mirror, volume.shared, volume.streamed = None, None, False
        self.save(volume)
        seal = status.seal if volume.in_order else Seal()
        return replace(status, mirror=mirror, shared=None, seal=seal)

    async def delete(self, host: str, name: str) -> None:
        """Likewise. Gone already is fine."""
        await self._cloud.pretend("delete_volume")
        key = self.key_of(host, name)
        volume = self.volumes.get(key)
        if volume is None:
            return
        if volume.state == "attached":
            raise BadState(f"volume {name} is attached to {volume.platform}: detach it first")
        del self.volumes[key]
        os.unlink(self._path(key))

    async def change(self, host: str, spec: VolumeSpec) -> VolumeStatus:
        """Grow it, or throttle it otherwise."""
        volume = await self._find("change", host, spec.name)
        if spec.size_bytes < volume.spec.size_bytes or spec.format != volume.spec.format:
            raise Invalid(f"volume {spec.name} can grow only, and stays {volume.spec.format}")
        grows = spec.size_bytes > volume.spec.size_bytes
        if grows and spec.format == "raw" and volume.state == "attached":
            raise BadState(f"volume {spec.name} is raw, and in use")
        volume.spec = spec
        return self._to(volume, volume.state)

    async def snapshot(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """One of that name is kept as it is."""
        volume = await self._opened("snapshot", host, name)
        if snapshot not in volume.snapshots:
            volume.snapshots[snapshot] = list(volume.words)
            volume.sequence += 1
        return self._to(volume, volume.state)

    async def revert(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """While it is not attached."""
        volume = await self._opened("revert", host, name)
        if volume.state == "attached":
            raise BadState(f"volume {name} is attached to {volume.platform}: detach it first")
        if snapshot not in volume.snapshots:
            raise NotFound(f"volume {name} has no snapshot {snapshot}")
        volume.words = list(volume.snapshots[snapshot])
        volume.sequence += 1
        return self._to(volume, volume.state)

    async def forget(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Gone already is fine."""
        volume = await self._opened("forget", host, name)
        if volume.snapshots.pop(snapshot, None) is not None:
            volume.sequence += 1
        return self._to(volume, volume.state)

    async def fill(self, host: str, asked: VolumeCopy) -> VolumeStatus:
        """Have it hold what another one there holds."""
        target = await self._find("copy", host, asked.name)
        source = self.volumes.get(self.key_of(host, asked.of))
        if source is None or source is target:
            raise NotFound(f"host {host} has no other volume {asked.of}")
        status = fill(target, source, asked)
        self.save(target)
        return status

    async def list(self) -> list[tuple[str, VolumeStatus]]:
        """All of them."""
        await self._cloud.pretend("volumes")
        return [(volume.host, volume.status()) for volume in self.volumes.values()]

    # -- what happens to them

    def write(self, name: str, word: str) -> None:
        """What its user writes, and makes durable; BadState while it has none."""
        volume = self.volumes[name]
        if volume.state != "attached":
            raise BadState(f"volume {name} is {volume.state}: nobody can write to it")
        if volume.mirror is not None:
            self._write_all(volume, volume.mirror, word)
            return
        volume.words.append(word)
        volume.sequence += 1
        self.save(volume)

    def _write_all(self, volume: Volume, mirror: Mirrored, word: str) -> None:
        """Answered only when all have it that count; Temporary: not yet."""
        self._look(volume, mirror)
        if why := mirror.closed_by():
            raise Temporary(f"nothing is answered: {why}")
        for member in mirror.members:
            peer, counted = member.peer, member.standing in ("in_sync", "joining")
            if counted and peer is not None:
                other = self._replica(volume, peer, mirror.generation)
                if other is not None:
                    other.words.append(word)
                    other.sequence += 1
                    self._save_at(peer, other)
            elif counted:
                volume.words.append(word)
                volume.sequence += 1
        self.save(volume)

    def killed(self) -> None:
        """The host was: nothing is open any more, and what was not closed was not closed."""
        for volume in self.volumes.values():
            if volume.state in OPEN:
                volume.platform, volume.slot = "", 0
                volume.mirror, volume.shared, volume.streamed = None, None, False
                self._to(volume, "failed", "the host was started anew")
                self._to(volume, "closed")

    def released(self, platform: str) -> None:
        """The platform is gone: its volumes are not attached any more."""
        for volume in self.volumes.values():
            if volume.platform == platform:
                volume.platform, volume.slot = "", 0
                self._to(volume, "served")

    def copy(self, name: str) -> Volume:
        """A copy of the disk as it is, which whoever has the disk can make."""
        loaded: Any = encode(self.volumes[name])
        return decode(Volume, loaded, name)

    def lose(self, name: str) -> Volume:
        """The disk is gone; what it was."""
        volume = self.volumes.pop(name)
        os.unlink(self._path(name))
        return volume

    def put_back(self, copy: Volume) -> None:
        """Put a copy in the disk's place: in the state that its host thinks it is in."""
        now = self.volumes.get(copy.spec.name, copy)
        self.volumes[copy.spec.name] = replace(
            copy, state=now.state, platform=now.platform, slot=now.slot
        )
        self.save(self.volumes[copy.spec.name])

    # -- how

    def _make(self, host: str, asked: VolumeOpen) -> Volume:
        if asked.seal.root:
            raise NotFound(f"host {host} has no volume {asked.spec.name}")
        there = next((item for item in self._cloud.hosts() if item.name == host), None)
        if there is None:
            raise NotFound(f"{self._cloud.name} has no host {host}")
        if asked.spec.size_bytes > there.disk_total_bytes:
            raise NoResources(f"{host}: {asked.spec.size_bytes} bytes of disk do not fit")
        name = self.key_of(host, asked.spec.name)
        self.creations[name] += 1
        with open(os.path.join(self._directory, "creations.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name}) + "\n")
        volume = Volume(host=host, spec=asked.spec, key_sha256=hash_of(asked.key_base64))
        self.volumes[name] = volume
        return volume

    async def _find(self, operation: str, host: str, name: str) -> Volume:
        await self._cloud.pretend(operation)
        volume = self.volumes.get(self.key_of(host, name))
        if volume is None:
            raise NotFound(f"host {host} has no volume {name}")
        return volume

    def key_of(self, host: str, name: str) -> str:
        """Its name, or one that says the host: when another host here has one of that name."""
        there = self.volumes.get(name)
        return name if there is None or there.host == host else f"{name}@{host}"

    async def _opened(self, operation: str, host: str, name: str) -> Volume:
        volume = await self._find(operation, host, name)
        if volume.state not in OPEN[1:]:
            raise BadState(f"volume {name} is {volume.state}, not in use")
        if volume.spec.format != "qcow2":
            raise BadState(f"volume {name} is {volume.spec.format}: only qcow2 has snapshots")
        return volume

    def _free_slot(self, platform: str) -> int:
        taken = {item.slot for item in self.volumes.values() if item.platform == platform}
        for slot in range(1, VOLUME_SLOTS + 1):
            if slot not in taken:
                return slot
        raise NoResources(f"platform {platform} has {VOLUME_SLOTS} volumes already")

    def _to(self, volume: Volume, state: str, reason: str = "") -> VolumeStatus:
        volume.state, volume.reason = step(VOLUME, volume.state, state), reason
        self.save(volume)
        return volume.status()

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name + ".json")

    def save(self, volume: Volume) -> None:
        """Keep it across the end of the process."""
        key = self.key_of(volume.host, volume.spec.name)
        write_private(self._path(key), json.dumps(encode(volume)).encode())

    def _load(self) -> None:
        for entry in sorted(os.listdir(self._directory)):
            with open(os.path.join(self._directory, entry), encoding="utf-8") as file:
                if entry.endswith(".json"):
                    loaded: Any = json.load(file)
                    volume = decode(Volume, loaded, entry)
                    self.volumes[entry.removesuffix(".json")] = volume
                elif entry.endswith(".jsonl"):
                    self.creations.update(json.loads(line)["name"] for line in file)


def _mirror_of(volume: Volume, generation: int) -> Mirrored:
    if volume.mirror is None:
        raise NotFound(f"volume {volume.spec.name} has no mirror here")
    if volume.mirror.generation != generation:
        raise Denied(f"this is generation {volume.mirror.generation}, not {generation}")
    return volume.mirror
