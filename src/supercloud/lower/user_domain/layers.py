"""What a volume is made of: from below, backing file, protected device, the block service's volume.

Each call goes through the layers in order; what failed half-way is taken back as far as it came.
The names of the methods are those of ``services.protection`` and ``services.block``.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.mirrors import Mirrors
from supercloud.lower.user_domain.services import Services
from supercloud.lower.user_domain.volume_news import FULL, full
from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    NoResources,
    NotFound,
    Permanent,
    SupercloudError,
    Temporary,
)
from supercloud.services.block import capacity
from supercloud.services.protection.format import BLOCK, backing_blocks
from supercloud.wire.codec import decode, encode
from supercloud.wire.mirrors import Mirror, MirrorStatus
from supercloud.wire.portal import Reply
from supercloud.wire.volumes import Seal, VolumeFigures, VolumeSpec

PROTECTION: Final = "protection"
BLOCKS: Final = "block"
TIMEOUT_S: Final = 90.0
REACH_BYTES: Final = 8 << 40  # as far as a device can ever grow
MIB: Final = 1 << 20
CACHE_BYTES: Final = 16 << 20  # of the tree over a device: 2 GiB of blocks at hand
UNPLUG_TRIES: Final = 5  # a guest that boots does not listen
UNPLUG_LOOKS: Final = 40
UNPLUG_LOOK_S: Final = 0.1


def device_bytes(spec: VolumeSpec) -> int:
    """Size of the device below a volume; one of qcow2 has room for a snapshot of all of it.

    A raw volume is its device.
    """
    size = capacity.device_bytes(spec.size_bytes, spec.format, snapshots=1)
    return -(-size // BLOCK) * BLOCK


def no_room(spec: VolumeSpec, error: NoResources) -> NoResources:
    """The block service's refusal of a snapshot, as who has no say in devices can act on it.

    The device of a volume as large as all that is on this one would have room.
    """
    used, device = (error.details.get(name) for name in ("used_bytes", "device_bytes"))
    if not isinstance(used, int) or not isinstance(device, int):
        return error
    used_mib, size_mib, enough_mib = (
        -(-size // MIB) for size in (used, spec.size_bytes, max(used, spec.size_bytes + MIB))
    )
    return NoResources(
        f"volume {spec.name} has no room for another snapshot: {used_mib} MiB are taken by what is "
        f"in it and what snapshots keep, all its {size_mib} MiB may be written anew after it, and "
        f"there is room for {device // MIB} MiB",
        hint=f"give it a larger size in the manifest: {enough_mib}MiB do for this one, and twice "
        "of what is in it for those to come",
        details=error.details,
    )


def _backing_bytes(size: int) -> int:
    return backing_blocks(size // BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class User:
    """The machine that has a volume, and how (vhost-user-blk | nbd)."""

    platform: str
    machine: Channel
    mode: str


class Layers:
    """The provider's disk driver and the user's services, put on each other."""

    def __init__(self, disk: Channel, services: Services, mirrors: Mirrors) -> None:
        self._disk, self._services, self._mirrors = disk, services, mirrors

    def join(self) -> None:
        """Take up the channels of services that run."""
        for kind in (PROTECTION, BLOCKS):
            self._services.start(kind)
        self._mirrors.join()

    async def facts(self, name: str, *, used: bool) -> dict[str, Any]:
        """Seal, stored bytes, figures, evidence, snapshots, whether full: of a ``VolumeStatus``.

        ``used``: the block service has it.
        """
        told = await self._ask(PROTECTION, "device.state", {"device": name})
        facts: dict[str, Any] = {"seal": _seal(told), **_figures(told)}
        if told["full"]:
            facts |= {"full": True, "reason": FULL}
        if used:
            listed = await self._ask(BLOCKS, "volume.snapshots", {"volume": name})
            facts["snapshots"] = [str(one["snapshot"]) for one in listed["snapshots"]]
        return facts

    async def lost(self, name: str, *, used: bool, mirrored: bool) -> str:
        """What is not there any more of an open volume; empty when it is whole."""
        if name not in await self._ask(PROTECTION, "device.list", {}):
            return "its device is not open any more"
        if mirrored:
            try:
                await self._mirrors.status(name)
            except NotFound:
                return "its mirror is not open any more"
        if used:
            listed = await self._ask(BLOCKS, "volume.list", {})
            if name not in listed["volumes"]:
                return "its storage daemon ended"
        return ""

    async def open(self, spec: VolumeSpec, key: bytes, seal: Seal) -> Seal:
        """The device, made if ``seal`` is of none; the seal to keep before it is served.

        Denied when it is not the device that ``seal`` is of, NotFound when there is none.
        """
        size, given = device_bytes(spec), await self._backing(spec, new=not seal.root)
        with contextlib.ExitStack() as opened:
            for descriptor in given:
                opened.callback(os.close, descriptor)
            if len(given) != 1:
                raise Permanent(f"the provider's driver gave no backing for volume {spec.name}")
            secret = _secret(key)
            opened.callback(os.close, secret)
            passed, device = [*given, secret], {"device": spec.name}
            await self.put_away(spec.name)
            if not seal.root:
                asked = {**device, "size_bytes": size}
                seal = _seal(await self._ask(PROTECTION, "device.create", asked, passed))
            asked = {**device, "cache_bytes": CACHE_BYTES, **encode(seal)}
            return _seal(await self._ask(PROTECTION, "device.prepare", asked, passed))

    async def _backing(self, spec: VolumeSpec, *, new: bool) -> list[int]:
        """It may be larger than ``spec`` says, after a growing that failed half-way."""
        asked: dict[str, Any] = {"use": "volume", "name": spec.name}
        if new:
            asked["size_bytes"] = _backing_bytes(device_bytes(spec))
            return (await self._disk.call("disk.create", asked)).descriptors
        try:
            return (await self._disk.call("disk.open", asked)).descriptors
        except NotFound as error:
            message = f"the backing of volume {spec.name} is gone from this host"
            raise NotFound(message) from error

    async def begin(self, name: str, epoch: int) -> None:
        """Begin the epoch: the device can be used."""
        await self._ask(PROTECTION, "device.open", {"device": name, "epoch": epoch})

    async def mirror(self, spec: VolumeSpec, asked: Mirror) -> MirrorStatus:
        """Have a mirror over the device and those of other hosts."""
        return await self._mirrors.open(spec.name, device_bytes(spec), asked)

    async def serve(self, spec: VolumeSpec, mirror: Mirror | None, *, new: bool) -> None:
        """Let the block service have the device, or the mirror over it. Temporary: no lease."""
        if mirror is not None:
            await self._mirrors.check_open(spec.name, mirror.generation)
        how = "volume.create" if new else "volume.open"
        await self._open_volume(how, spec, mirrored=mirror is not None)
        if mirror is not None and spec.format != "raw":  # its devices may have grown before
            asked = {"volume": spec.name, "size_bytes": spec.size_bytes}
            await self._ask(BLOCKS, "volume.grow", asked)
        await self._throttle(spec)

    async def share(self, name: str) -> int:
        """A stream of the device for another host: the caller's to close."""
        await self._hold(name, hold=True)
        (descriptor,) = await self._call(PROTECTION, "device.connect", {"device": name})
        return descriptor

    async def _hold(self, name: str, *, hold: bool) -> None:
        """Whether writes that find no room on the provider's disk wait for it, or are refused.

        They wait while somebody has it that cannot do without them. They do not while the block
        service works on it alone, which would stand still for all volumes; nor when it is to be let
        go of, which would never come to an end.
        """
        await self._ask(PROTECTION, "device.hold", {"device": name, "hold": hold})

    async def need_room(self, name: str, what: str) -> None:
        """NoResources while writes wait: it would wait behind them."""
        if (await self._ask(PROTECTION, "device.state", {"device": name}))["full"]:
            raise full(name, what)

    async def close(self, name: str, *, mirrored: bool) -> tuple[Seal, MirrorStatus | None]:
        """Close all layers; the device's final seal, and how the mirror was."""
        await self._let_go(name)
        if self._services.is_running(BLOCKS):
            with contextlib.suppress(NotFound):  # it was not served yet, or is another host's
                await self._ask(BLOCKS, "volume.close", {"volume": name})
        mirror = await self._mirrors.close(name) if mirrored else None
        return _seal(await self._ask(PROTECTION, "device.close", {"device": name})), mirror

    async def put_away(self, name: str) -> Seal:
        """Close what is left of an opening that has failed, as far as it can be; its last seal."""
        await self._let_go(name)
        if self._services.is_running(BLOCKS):
            for method in ("volume.detach", "volume.close"):
                with contextlib.suppress(SupercloudError):
                    await self._ask(BLOCKS, method, {"volume": name})
        with contextlib.suppress(SupercloudError):
            await self._mirrors.drop(name)
        if self._services.is_running(PROTECTION):
            with contextlib.suppress(SupercloudError):
                return _seal(await self._ask(PROTECTION, "device.close", {"device": name}))
        return Seal()

    async def _let_go(self, name: str) -> None:
        """Nothing waits any more."""
        if self._services.is_running(PROTECTION):
            with contextlib.suppress(SupercloudError):  # there is nothing to wait for
                await self._hold(name, hold=False)

    async def delete(self, name: str) -> None:
        """Give the backing file back."""
        self._mirrors.forget(name)
        await self._disk.result("disk.delete", {"use": "volume", "name": name})

    async def attach(
        self, name: str, platform: str, machine: Channel, slot: int, *, restorable: bool = False
    ) -> str:
        """Into the machine's slot; how it is joined to it (vhost-user-blk | nbd).

        ``restorable``: as what a machine can have whose RAM is private, as a restored one's is.
        """
        status = await machine.result("machine.status")
        shared = status.get("ram_shared") is True
        mode = "vhost-user-blk" if shared and not restorable else "nbd"
        asked = {"volume": name, "machine": platform, "mode": mode, "ram_shared": shared}
        joined = await self._call(BLOCKS, "volume.attach", asked)
        try:
            parameters = {"volume": name, "slot": slot, "mode": mode, "export": name}
            await machine.call("machine.attach", parameters, joined, timeout_s=TIMEOUT_S)
            await self._hold(name, hold=True)
        except BaseException:
            with contextlib.suppress(SupercloudError):
                await self._ask(BLOCKS, "volume.detach", {"volume": name})
            raise
        finally:
            for descriptor in joined:
                os.close(descriptor)
        return mode

    async def connect(self, name: str, platform: str) -> int:
        """A socket for a machine that is yet to be, by NBD: the caller's to close."""
        asked = {"volume": name, "machine": platform, "mode": "nbd", "ram_shared": False}
        (descriptor,) = await self._call(BLOCKS, "volume.attach", asked)
        await self._hold(name, hold=True)
        return descriptor

    async def slots_beside(self, name: str, machine: Channel) -> set[int]:
        """What is taken in the machine, once what an earlier attachment left of it is out."""
        slots = await _plugged(machine)
        if slots.pop(name, None) is not None:
            await self.unplug(name, machine)
        return set(slots.values())

    async def detach(self, name: str, machine: Channel | None) -> None:
        """Out of the machine, if it is still there. What waits for room fails."""
        await self._let_go(name)
        if machine is not None:
            try:
                await self.unplug(name, machine)
            except BaseException:
                await self._hold(name, hold=True)
                raise
        await self._ask(BLOCKS, "volume.detach", {"volume": name})

    @staticmethod
    async def unplug(name: str, machine: Channel) -> None:
        """Ask the guest to let go until it has. Temporary when it does not."""
        for _ in range(UNPLUG_TRIES):
            with contextlib.suppress(NotFound):
                await machine.result("machine.detach", {"volume": name})
            for _ in range(UNPLUG_LOOKS):
                if name not in await _plugged(machine):
                    return
                await asyncio.sleep(UNPLUG_LOOK_S)
        raise Temporary(
            f"the platform does not let go of volume {name}: it does when nothing there uses it"
        )

    async def change(self, old: VolumeSpec, new: VolumeSpec, user: User | None) -> None:
        """Grow every layer from below, and throttle; what was done already is done.

        ``user`` has it meanwhile. BadState when it cannot grow under that.
        """
        grows = new.size_bytes > old.size_bytes
        if grows:
            if user is not None:
                await self._may_grow(new, user)
            await self.grow_device(new)
        await self.need_room(new.name, "changed")
        if grows:
            if user is not None and user.mode == "nbd":
                await self._grow_held(old, new, user)
            else:
                await self._grow(old, new)
        await self._throttle(new)

    async def grow_device(self, spec: VolumeSpec) -> None:
        """Its backing file and its device, which is open; what was done already is done."""
        size = device_bytes(spec)
        asked = {"use": "volume", "name": spec.name, "size_bytes": _backing_bytes(size)}
        await self._disk.result("disk.grow", asked)
        await self._ask(PROTECTION, "device.grow", {"device": spec.name, "size_bytes": size})

    async def _may_grow(self, spec: VolumeSpec, user: User) -> None:
        """QEMU 10's block layer changes no raw node's size under an export."""
        if spec.format == "raw" and user.mode != "nbd":
            hint = "it grows when nothing uses it: supercloud down, then up again"
            raise BadState(f"volume {spec.name} is raw, and in use", hint=hint)
        if words := await self.copying(spec.name):
            raise Busy(f"volume {spec.name}: {words} is under way")

    async def _grow(self, old: VolumeSpec, new: VolumeSpec) -> None:
        if new.format == "raw":
            await self._grow_raw(old)
            return
        asked = {"volume": new.name, "size_bytes": new.size_bytes}
        asked["device_bytes"] = device_bytes(new)
        await self._ask(BLOCKS, "volume.grow", asked)

    async def _grow_held(self, old: VolumeSpec, new: VolumeSpec, user: User) -> None:
        """NBD tells a machine the size only once: it stands still, and gets a new connection.

        Cut short anywhere this is done again: the machine is held for long enough.
        """
        name = {"volume": new.name}
        await user.machine.call("machine.hold", name, timeout_s=TIMEOUT_S)
        try:
            await self._ask(BLOCKS, "volume.detach", name)
            await self._grow(old, new)
        finally:
            asked = name | {"machine": user.platform, "mode": "nbd", "ram_shared": False}
            reply = await self._reply(BLOCKS, "volume.attach", asked)
            with passing(reply.descriptors):
                size = {"size_bytes": reply.result["size_bytes"], "export": new.name}
                await user.machine.call("machine.renew", name | size, reply.descriptors)

    async def _grow_raw(self, old: VolumeSpec) -> None:
        """A raw volume is its device, and the block service learns its size when it is opened."""
        with contextlib.suppress(NotFound):  # it was closed by an attempt that failed
            await self._ask(BLOCKS, "volume.close", {"volume": old.name})
        await self._open_volume("volume.open", old, mirrored=False)

    async def of_snapshot(self, what: str, spec: VolumeSpec, snapshot: str) -> None:
        """``snapshot``, ``revert`` or ``forget``. NoResources says what size would do."""
        await self.need_room(spec.name, "changed")
        methods = {"snapshot": "snapshot", "revert": "revert", "forget": "snapshot-delete"}
        asked: dict[str, Any] = {"volume": spec.name, "snapshot": snapshot}
        if what == "revert":  # also if an earlier try was cut short before it was as large again
            asked["size_bytes"] = spec.size_bytes
        try:
            await self._ask(BLOCKS, f"volume.{methods[what]}", asked)
        except Exists:
            if what != "snapshot":  # one that is there is kept
                raise
        except NoResources as error:
            raise no_room(spec, error) from None

    async def copying(self, name: str) -> str:
        """What is being copied out of it or into it, in words; empty when nothing is."""
        return str((await self._ask(BLOCKS, "volume.stats", {"volume": name}))["copying"])

    async def copy(self, of: str, to: str, snapshot: str) -> None:
        """Begin to copy a snapshot, or without one what the last backup there has not."""
        await self.need_room(of, "copied")
        asked = {"volume": of, "to": to}
        if not snapshot:
            await self._ask(BLOCKS, "volume.backup", asked | {"bitmap": to})
            return
        given = await self._call(PROTECTION, "device.connect", {"device": of})
        with passing(given):
            await self._ask(BLOCKS, "volume.clone", asked | {"snapshot": snapshot}, given)

    async def _open_volume(self, method: str, spec: VolumeSpec, *, mirrored: bool) -> None:
        name = spec.name
        asked = {"volume": name, "format": spec.format, "size_bytes": spec.size_bytes}
        if mirrored:
            connected = [await self._mirrors.connect(name)]
        elif spec.format == "raw":
            connected = await self._call(PROTECTION, "device.connect", {"device": name})
        else:  # it may grow while it is open
            reaching = {"device": name, "reach_bytes": REACH_BYTES}
            connected = await self._call(PROTECTION, "device.connect", reaching)
            asked["device_bytes"] = device_bytes(spec)
        try:
            await self._call(BLOCKS, method, asked, connected)
        finally:
            for descriptor in connected:
                os.close(descriptor)

    async def _throttle(self, spec: VolumeSpec) -> None:
        asked = {"volume": spec.name, "iops": spec.iops, "bytes_per_s": spec.bytes_per_s}
        await self._ask(BLOCKS, "volume.throttle", asked)

    async def _ask(
        self, kind: str, method: str, parameters: dict[str, Any], given: list[int] | None = None
    ) -> Any:
        channel = self._services.start(kind)
        reply = await channel.call(method, parameters, given, timeout_s=TIMEOUT_S)
        with passing(reply.descriptors):
            return reply.result

    async def _call(
        self, kind: str, method: str, parameters: dict[str, Any], given: list[int] | None = None
    ) -> list[int]:
        """A call that brings descriptors: the caller's to close."""
        return (await self._reply(kind, method, parameters, given)).descriptors

    async def _reply(
        self, kind: str, method: str, parameters: dict[str, Any], given: list[int] | None = None
    ) -> Reply:
        channel = self._services.start(kind)
        return await channel.call(method, parameters, given, timeout_s=TIMEOUT_S)


@contextlib.contextmanager
def passing(descriptors: list[int]) -> Iterator[None]:
    """They are of no use here afterwards."""
    try:
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def _plugged(machine: Channel) -> dict[str, int]:
    """The slots of the volumes that are in the machine, by its monitor."""
    untrusted = await machine.result("machine.disks")
    try:
        return {str(disk["volume"]): int(disk["slot"]) for disk in untrusted["disks"]}
    except (KeyError, TypeError, ValueError) as error:
        raise Permanent("the platform's monitor does not say which volumes it has") from error


def _seal(told: dict[str, Any]) -> Seal:
    known = {name: told.get(name) for name in ("epoch", "sequence", "root")}
    return decode(Seal, known, "seal")


def _figures(told: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ``VolumeStatus``, from the device's figures."""
    count = {name: int(number) for name, number in told.items() if isinstance(number, int)}
    figures = VolumeFigures(
        read_bytes=count["read_bytes"],
        written_bytes=count["write_bytes"],
        reads=count["reads"],
        writes=count["writes"],
        flushes=count["flushes"],
        read_latency_us=count["read_ns"] / 1000 / max(1, count["reads"]),
        write_latency_us=count["write_ns"] / 1000 / max(1, count["writes"]),
    )
    stored = (count["slots"] - count["free_slots"]) * BLOCK
    return {"figures": figures, "stored_bytes": stored, "evidence": count["evidence"]}


def _secret(key: bytes) -> int:
    """A memory file with the key in it."""
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    os.write(descriptor, key)
    return descriptor
