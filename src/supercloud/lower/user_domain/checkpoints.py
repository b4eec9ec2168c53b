"""Checkpoints of this user's platforms: taken, kept in the U-Cloud's object store, restored.

A machine's monitor does what the machine has to stand still for (``vmm.checkpoint``); the scratch
disk is read while the machine writes elsewhere, and what it wrote there is put back afterwards.
Room for all of that is booked on the user's quota before anything stands still. What is captured is
given to the checkpointing service (``checkpoint_sessions``). Its volumes get a snapshot of the same
moment (``platform_volumes``).
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

from supercloud.lower.client import SCHEDULING
from supercloud.lower.user_domain import origins, parts
from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.checkpoint_sessions import Session, Sessions
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.user_domain.platform_volumes import Moment, go_back
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.records import KEPT_HEADS, Record
from supercloud.lower.user_domain.volumes import Volumes
from supercloud.lower.vmm.machine import Descriptors, command_line
from supercloud.lower.vmm.template import MAX_STATE_BYTES, Inputs, machine_of
from supercloud.model.errors import (
    Busy,
    Denied,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
    from_wire,
)
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    Head,
    RestoreFrom,
)
from supercloud.wire.codec import decode, encode
from supercloud.wire.host import PlatformSpec

ENGINE: Final = "qemu"
DEVICE, MEMORY, DISK = "device", "memory", "disk:scratch"
CAPTURE_S: Final = 180.0
OVER_S: Final = 600.0
OVERLAY_BYTES: Final = (1 << 30, 64 << 20)
"""For what is written while the disk is read: as much as that, if need be as little as that."""
ROOM_BYTES: Final = 32 << 20
"""Beyond what was seen of memory a moment before, which may be a quarter more by then."""
LIVE_BYTES: Final = 24 << 20
"""More than that is not copied in a pause: all memory is, while the machine runs."""
GIVE_BACK_TRIES: Final = 10

log = logging.getLogger("supercloud.lower.user_domain.checkpoints")


@dataclass(slots=True)
class _Still:
    """A checkpoint of one platform under way: what its monitor is waited for.

    ``moment``: its volumes have a part in it.
    """

    captured: asyncio.Future[dict[str, Any]]
    moment: Moment | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    spoil: Callable[[SupercloudError], None] = lambda _error: None
    files: list[int] = field(default_factory=list)

    def take(self, figures: dict[str, Any], files: list[int]) -> None:
        """It has been captured."""
        self.files = files
        self.captured.set_result(figures)

    def let_go(self) -> None:
        """Nobody wants what was captured any more, or what may yet be; safe to repeat."""
        if not self.captured.done():
            self.captured.cancel()
        elif not self.captured.cancelled():
            self.captured.exception()
        while self.files:
            os.close(self.files.pop())

    @property
    def slots(self) -> dict[str, int]:
        """Of the volumes that have a snapshot of it."""
        return self.moment.slots if self.moment else {}


class Checkpoints:
    """All of them; ``sessions`` give the service."""

    def __init__(
        self, hub: Hub, sessions: Sessions, platforms: Platforms, volumes: Volumes, feed: Feed
    ) -> None:
        self._core, self._platforms, self._feed = hub.core, platforms, feed
        self._volumes = volumes
        self._sessions = sessions
        self._still: dict[str, _Still] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        platforms.on_checkpoint = self._monitor_told
        platforms.on_taken_over = self._taken_over
        platforms.restore = self.restore

    def is_under_way(self, platform: str) -> bool:
        """Whether one is being taken: until its disk is one again."""
        return platform in self._still

    # -- what the control plane asks

    async def take(self, asked: CheckpointTake) -> CheckpointTaken:
        """One of a running platform. BadState, Busy, NoResources, Unsupported, Temporary.

        Its ``uid`` has no meaning for platforms, whose names are unique.
        """
        name = asked.name
        machine = await self._platforms.machine(name)
        if name in self._still:
            raise Busy(f"another checkpoint of {name} is being taken")
        moment = Moment(self._volumes, name, asked.snapshot) if asked.snapshot else None
        self._still[name] = _Still(asyncio.get_running_loop().create_future(), moment)
        try:
            taken = await self._take(asked, machine, self._platforms.record(name))
        except SupercloudError as error:
            self._say(name, "not_taken", str(error), severity="warning")
            raise
        finally:
            self._still.pop(name).let_go()
            if moment is not None:
                moment.close()
        shown = {k: v for k, v in encode(taken).items() if k != "head"}
        self._say(name, "taken", f"number {taken.head.sequence}", details=shown)
        return taken

    async def collect(self, asked: CheckpointCollect) -> CheckpointCollected:
        """Remove what is not to stay."""
        parameters = {"keep": encode(asked.keep), "forget": asked.forget}
        try:
            async with self._sessions.open(asked.store) as session:
                report = await session.job("checkpoint.collect", parameters)
        except Busy:
            return CheckpointCollected(state="busy")
        return CheckpointCollected(
            removed_bytes=int(report["freed_bytes"]), removed=len(report["dropped"])
        )

    async def verify(self, asked: RestoreFrom) -> CheckpointVerified:
        """Read all of one, whoever's it is. Denied with the reason when it is not what was taken.

        NotFound is what a host answers that does not know this call.
        """
        named = {"ee": asked.ee, "head": encode(asked.head), "sequence": asked.sequence}
        async with self._sessions.open(asked.store) as session:
            try:
                report = await session.job("checkpoint.verify", named)
            except NotFound as error:
                raise Denied(error.message, hint=error.hint) from None
        return CheckpointVerified(read_bytes=int(report["read_bytes"]))

    # -- taking one

    async def _take(
        self, asked: CheckpointTake, machine: Channel, record: Record
    ) -> CheckpointTaken:
        if not asked.snapshot and (await machine.result("machine.disks"))["disks"]:
            raise Unsupported(
                f"platform {asked.name} has volumes, and no snapshots of them are asked for",
                hint="a newer control plane asks for them",
            )
        if asked.snapshot:
            await self._volumes.check_room(asked.name)
        async with self._sessions.open(asked.store) as session:
            if asked.head is not None:  # what it lies over is there and whole
                named = {"ee": asked.name, "head": encode(asked.head)}
                await session.job("checkpoint.list", named)
            async with self._captured(record, machine, session) as (figures, files):
                try:
                    result = await self._store(asked, record, session, figures, files)
                finally:
                    session.end()  # nobody reads the disk below from here on
        head = decode(Head, result["head"], "head", ignore_unknown=True)
        record.heads = [*record.heads, [head.sequence, head.root]][-KEPT_HEADS:]
        self._platforms.put(record)
        return _taken(record, head, figures, result["parts"], self._still[asked.name].slots)

    async def _store(
        self,
        asked: CheckpointTake,
        record: Record,
        session: Session,
        figures: dict[str, Any],
        files: list[int],
    ) -> dict[str, Any]:
        state, copy = files
        described: list[dict[str, Any]] = [{"name": DEVICE, "kind": "file"}]
        with ExitStack() as opened:
            passed: list[int] = [state, copy]
            memory: dict[str, Any] = {"name": MEMORY, "kind": "file"}
            if figures["incremental"]:
                memory |= {"kind": "dirty", **self._base(asked, record)}
                passed.append(self._origin_file(record, opened))
            else:
                at, size = int(figures.get("memory_offset", 0)), record.spec.memory_bytes
                memory |= {"offset_bytes": at, "size_bytes": size}
            described += [memory, {"name": DISK, "kind": "file"}]
            disk = await self._platforms.assembly.make_disk(record.spec)  # it is there
            opened.callback(os.close, disk)
            parameters = {
                "ee": asked.name,
                "engine": ENGINE,
                "head": encode(asked.head) if asked.head else None,
                "parts": described,
                "details": expected_of(
                    self._platforms.inputs_of(record.spec), self._still[asked.name].slots
                ),
            }
            return await session.job("checkpoint.take", parameters, [*passed, disk])

    @staticmethod
    def _base(asked: CheckpointTake, record: Record) -> dict[str, Any]:
        """The newest one, if it was taken of this machine since it started from what it did."""
        head = asked.head
        if head is None or [head.sequence, head.root] not in record.heads:
            return {}
        return {"base": {"ee": asked.name, "head": encode(head)}}

    def _origin_file(self, record: Record, opened: ExitStack) -> int:
        origin = origins.origin_of(record)
        if origin is None:
            raise Invalid(f"the monitor of {record.spec.name} says what cannot be")
        descriptor = self._core.take(self._core.lookup(origin.ram).selector)
        opened.callback(os.close, descriptor)
        return descriptor

    @contextlib.asynccontextmanager
    async def _captured(
        self, record: Record, machine: Channel, session: Session
    ) -> AsyncIterator[tuple[dict[str, Any], list[int]]]:
        """The monitor's figures and its two files; the machine runs on, its disk stays below."""
        name, still = record.spec.name, self._still[record.spec.name]
        still.spoil = session.spoil
        overlay, size = await self._overlay(record.spec)
        try:
            order = {**await self._room(record.spec, machine), "overlay_bytes": size}
            given = [overlay]
            if still.moment is not None:
                order["volumes"] = True
                given.append(still.moment.theirs.fileno())
            await machine.call("machine.checkpoint", order, given)
            figures = await asyncio.wait_for(still.captured, CAPTURE_S)
            try:
                yield figures, still.files
            finally:
                still.let_go()
        except TimeoutError:
            raise Temporary(f"the monitor of {name} did not come to the point") from None
        finally:
            still.let_go()
            os.close(overlay)
            await self._put_back(record, machine)

    async def _overlay(self, spec: PlatformSpec) -> tuple[int, int]:
        """Its file and size: as large as the quota has room for, within bounds."""
        most, least = (min(size, parts.whole_pages(spec.scratch_bytes)) for size in OVERLAY_BYTES)
        size = most
        while True:
            try:
                return await self._platforms.assembly.make_overlay(spec, size), size
            except NoResources as error:
                if size <= least:
                    raise NoResources(
                        f"a checkpoint of {spec.name} takes {least} bytes of disk for a while: "
                        f"{error.message}",
                        hint="ask the provider for a larger quota, or delete what is not needed",
                    ) from error
            size = max(least, parts.whole_pages(size // 4))

    async def _room(self, spec: PlatformSpec, machine: Channel) -> dict[str, Any]:
        """Book what its memory's copy will take: of all, or of what was written. NoResources."""
        seen = await machine.result("machine.extent")
        whole, dirty = int(seen["memory_bytes"]), seen.get("dirty_bytes")
        if dirty is None or dirty > LIVE_BYTES:
            try:
                return {"live": True, "room_bytes": self._give_room(spec, whole, dirty or 0)}
            except NoResources:
                if dirty is None:
                    raise
        return {"live": False, "room_bytes": self._give_room(spec, int(dirty))}

    def _give_room(self, spec: PlatformSpec, *seen: int) -> int:
        """For copies of what was seen, each of which may have grown."""
        room = sum(min(part + part // 4, spec.memory_bytes) for part in seen) + ROOM_BYTES
        try:
            self._platforms.assembly.give_room(spec, room)
        except NoResources as error:
            raise NoResources(
                f"a checkpoint of {spec.name} takes {room} bytes of memory for a while: "
                f"{error.message}",
                hint="ask the provider for a larger quota, or delete what is not needed",
            ) from error
        return room

    async def _put_back(self, record: Record, machine: Channel) -> None:
        """The overlay back into the disk, and what was booked back to the quota."""
        name, still = record.spec.name, self._still.get(record.spec.name)
        try:
            await machine.result("machine.checkpoint-end")
            if still is not None:
                await asyncio.wait_for(still.over.wait(), OVER_S)
            await self._platforms.assembly.drop_overlay(name)
            await self._give_back(record.spec)
        except (SupercloudError, TimeoutError) as error:  # its end gives all back
            log.warning("%s: not all of a checkpoint is given back: %s", name, error)

    async def _give_back(self, spec: PlatformSpec) -> None:
        for _ in range(GIVE_BACK_TRIES):
            try:
                self._platforms.assembly.give_room(spec, 0)
            except NotFound:
                return
            except Busy:
                await asyncio.sleep(0.2)  # the copy is just being freed
            else:
                return

    # -- going on from one

    async def restore(self, spec: PlatformSpec, inputs: Inputs) -> None:
        """Its disk and memory objects, as the checkpoint has them; whoever asked undoes a failure.

        Denied with the reason when what is in the store is not what was taken.
        """
        if spec.restore is None:
            raise Invalid("nothing to go on from")
        core, restore = self._core, spec.restore
        with ExitStack() as opened:
            disk = await self._platforms.assembly.make_disk(spec)
            opened.callback(os.close, disk)
            selector = core.create_memory(spec.memory_bytes, origins.restored_ram(spec.name))
            ram = core.take(selector)
            opened.callback(os.close, ram)
            state = os.memfd_create("state", os.MFD_CLOEXEC)
            opened.callback(os.close, state)
            async with self._sessions.open(restore.store, spec.memory_bytes) as session:
                parameters = _asked(restore, inputs)
                result = await session.job("checkpoint.restore", parameters, [state, ram, disk])
            content = os.pread(state, MAX_STATE_BYTES + 1, 0)
            sizes = (result["parts"][DISK], len(content) <= MAX_STATE_BYTES)
            if sizes != (parts.whole_pages(spec.scratch_bytes), True):
                raise Invalid(f"the checkpoint of {restore.ee} has a disk of another size")
            parts.sealed_memory(core, origins.restored_state(spec.name), content, SCHEDULING)
        # only now: a checkpoint that is no good costs nothing of what is on them
        plugs = await go_back(self._volumes, spec.name, restore.volumes)
        self._platforms.assembly.plug(spec.name, plugs)
        self._say(spec.name, "read", f"number {restore.sequence or restore.head.sequence}")

    # -- what a monitor tells

    def _monitor_told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        still = self._still.get(str(untrusted.get("platform")))
        if method == "checkpoint.captured" and still and not still.captured.done():
            if _is_whole(untrusted, descriptors):
                still.take(untrusted, descriptors)
                return
            still.captured.set_exception(Temporary("the monitor gave no files"))
        for descriptor in descriptors:
            os.close(descriptor)
        if still is None:
            return
        if method == "checkpoint.over":
            still.over.set()
        elif method == "checkpoint.still" and still.moment is not None:
            self._in_background(still.moment.take(untrusted))
        elif method == "checkpoint.failed":
            known = still.moment.error if still.moment else None
            self._spoiled(still, known or from_wire(untrusted.get("error")))
        elif method == "checkpoint.full":
            more = "more was written in between than the disk quota has room for"
            self._spoiled(still, NoResources(f"the checkpoint was given up: {more}"))

    @staticmethod
    def _spoiled(still: _Still, error: SupercloudError) -> None:
        if not still.captured.done():
            still.captured.set_exception(error)
        else:
            still.spoil(error)

    async def platform_ended(self, name: str) -> None:
        """Its machine is gone: what was captured is, what was not never will be."""
        still = self._still.get(name)
        if still is not None:
            still.over.set()
            if not still.captured.done():
                still.captured.set_exception(Temporary(f"platform {name} ended"))

    def _taken_over(self, name: str) -> None:
        """After a restart of this domain: a checkpoint that was being taken is none."""
        self._in_background(self._clean_up(name))

    async def _clean_up(self, name: str) -> None:
        if name in self._still:
            return
        self._still[name] = _Still(asyncio.get_running_loop().create_future())
        try:
            machine = await self._platforms.machine(name)
            await self._put_back(self._platforms.record(name), machine)
        except SupercloudError as error:
            log.info("%s: %s", name, error)
        finally:
            del self._still[name]

    # -- bookkeeping

    def _say(self, platform: str, code: str, message: str, **more: Any) -> None:
        self._feed.say(f"platform/{platform}", f"host.checkpoint.{code}", message, **more)

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def expected_of(inputs: Inputs, slots: dict[str, int]) -> dict[str, str]:
    """What a checkpoint says of its machine, and a machine must be alike to go on from it.

    ``machine`` is QEMU's command line; ``volumes`` are plugged in beside that, in ``slots``. Its
    build is not among them, nor is the host's kernel: QEMU itself refuses a state that it does not
    understand.
    """
    numbers = range(3, 3 + len(Descriptors.__slots__))
    given = Descriptors(**dict(zip(Descriptors.__slots__, numbers, strict=True)))
    line = command_line(replace(machine_of(inputs), start="restore"), given)
    return {
        "image": inputs.image,
        "cpus": str(inputs.cpus),
        "memory_bytes": str(inputs.memory_bytes),
        "scratch_bytes": str(inputs.scratch_bytes),
        "accelerator": inputs.accelerator,
        "machine": hashlib.sha256(json.dumps(line).encode()).hexdigest(),
        "volumes": ",".join(f"{name}:{slot}" for name, slot in sorted(slots.items())),
    }


def _asked(restore: RestoreFrom, inputs: Inputs) -> dict[str, Any]:
    return {
        "ee": restore.ee,
        "head": encode(restore.head),
        "sequence": restore.sequence,
        "parts": [DEVICE, MEMORY, DISK],
        "expected": expected_of(inputs, {item.volume: item.slot for item in restore.volumes}),
    }


def _taken(
    record: Record,
    head: Head,
    figures: dict[str, Any],
    stored: dict[str, Any],
    slots: dict[str, int],
) -> CheckpointTaken:
    base = not stored[MEMORY]["incremental"]
    return CheckpointTaken(
        head=head,
        engine=ENGINE,
        taken_ms=int(figures["taken_ms"]),
        pause_ms=float(figures["pause_ms"]),
        base=base,
        memory_bytes=record.spec.memory_bytes,
        dirty_bytes=0 if base else int(figures["memory_bytes"]),
        disk_bytes=int(stored[DISK]["size_bytes"]),
        new_bytes=sum(int(part["new_bytes"]) for part in stored.values()),
        details={
            "quiet_ms": f"{float(figures['quiet_ms']):.1f}",
            "captured_bytes": str(int(figures["memory_bytes"])),
            "started_from": record.started_from,
        },
        slots=slots,
    )


def _is_whole(untrusted: dict[str, Any], descriptors: list[int]) -> bool:
    """Whether a monitor's figures and files are there."""
    numbers = ("taken_ms", "pause_ms", "quiet_ms", "memory_bytes")
    return len(descriptors) == 2 and all(isinstance(untrusted.get(n), int | float) for n in numbers)
