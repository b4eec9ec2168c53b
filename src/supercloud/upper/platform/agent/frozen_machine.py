"""Checkpoints of VMs: pages written since a base, devices' state, the disk; all of one moment.

The machine stands still for few things only: QEMU writes its devices' state, starts a backup of the
disk (which keeps, from then on, what the machine is about to overwrite), the saver copies the dirty
pages, and the volumes that it writes to are snapshotted (``standstill``). QEMU gets files as
descriptors over its control socket: it has no path of ours.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Self

from supercloud.model.errors import BadState, Invalid, Permanent, SupercloudError
from supercloud.upper.platform.agent import hardware, standstill
from supercloud.upper.platform.agent.frozen_container import paused
from supercloud.upper.platform.agent.processes import Watched, run
from supercloud.upper.platform.agent.qmp import Qmp
from supercloud.upper.platform.agent.saving import (
    ANSWER_TIMEOUT_S,
    PAUSE_TIMEOUT_S,
    saver,
    workplace,
)
from supercloud.upper.platform.agent.state import read_json, write_json
from supercloud.upper.platform.saver.requests import (
    DEVICE,
    MEMORY,
    RAM_NAME,
    Captured,
    Found,
    Ready,
    Restore,
    Take,
    Write,
)
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken

if TYPE_CHECKING:
    from supercloud.upper.platform.agent.engine import Services
    from supercloud.upper.platform.agent.machine import Machine

ENGINE = "qemu"
DEVICE_SET, DISK_SET = 90, 91  # of descriptors, while a checkpoint is taken
BACKUP, TARGET = "checkpoint", "checkpoint-target"
DISK_PART = "disk-root"
BACKUP_TIMEOUT_S = 3600.0

log = logging.getLogger("supercloud.agent.frozen_machine")


def make_ram(size_bytes: int) -> int:
    """A memory file for a machine's RAM; whoever has the descriptor may map it."""
    ram = os.memfd_create(RAM_NAME, os.MFD_CLOEXEC)
    os.ftruncate(ram, size_bytes)
    return ram


def ram_arguments(ram: int, size_bytes: int) -> list[str]:
    """QEMU's, for RAM in that file."""
    backend = f"memory-backend-file,id=ram,size={size_bytes},mem-path=/proc/self/fd/{ram}"
    return ["-object", f"{backend},share=on,prealloc=off", "-machine", "memory-backend=ram"]


def incoming_arguments(state: int) -> list[str]:
    """QEMU's, to go on with that state of its devices, which names no configuration."""
    return ["-global", "migration.send-configuration=off", "-incoming", "defer",
            "-add-fd", f"fd={state},set={DEVICE_SET}"]  # fmt: skip


async def load(qmp: Qmp) -> None:
    """Load the devices' state, and run."""
    await qmp.call("migrate-incoming", uri=f"file:/dev/fdset/{DEVICE_SET}")
    async with asyncio.timeout(30):
        while True:
            told = await qmp.call("query-status")
            if told["status"] == "running":
                break
            moved = await qmp.call("query-migrate")
            if moved.get("status") == "failed":
                raise Permanent(f"QEMU does not take the state: {moved.get('error-desc', '')}")
            await asyncio.sleep(0.01)
    await qmp.call("remove-fd", **{"fdset-id": DEVICE_SET})


async def recover(qmp: Qmp) -> None:
    """Undo what an agent that was killed in the middle of a checkpoint has left."""
    told = await qmp.call("query-status")
    if told["status"] in ("paused", "save-vm"):
        await qmp.call("cont")
    for step in (
        ("block-job-cancel", {"device": BACKUP, "force": True}),
        ("blockdev-del", {"node-name": TARGET}),
        ("remove-fd", {"fdset-id": DEVICE_SET}),
        ("remove-fd", {"fdset-id": DISK_SET}),
    ):
        with contextlib.suppress(Permanent):
            await qmp.call(step[0], **step[1])


async def take(
    machine: "Machine", wanted: CheckpointTake, services: "Services", process: Watched
) -> CheckpointTaken:
    """A checkpoint of a running one, which stands still for a moment."""
    uid, qmp = machine.spec.uid, machine.qmp
    standstill.check(machine.spec, wanted)
    with workplace(uid) as place:
        request = Take(
            ucloud=services.ucloud, ee=wanted.name, engine=ENGINE, store=wanted.store,
            head=wanted.head, directory=place, pid=process.pid, base=_base(machine, process),
            details=fingerprint(machine),
        )  # fmt: skip
        async with (
            saver(log_path=f"{machine.places.run}/saver.log") as helper,
            _Pause(qmp, machine, place) as pause,
        ):
            # a new base begins with all pages counted as clean: whatever ends it before it is
            # there, no increment may lie over the old one any more
            _keep_base(machine, process, "")
            ready = await helper.ask("take", request, Ready, ANSWER_TIMEOUT_S)
            _keep_base(machine, process, ready.base if not ready.is_new else "")
            await standstill.ahead(services.volumes, uid)
            try:
                saving = await pause.begin()
                capturing = helper.ask("capture", None, Captured, PAUSE_TIMEOUT_S)
                keeping = standstill.keep(services.volumes, wanted, services.snapshot)
                await standstill.together(saving, capturing, keeping)
            finally:
                pause_ms = await pause.end()
            await pause.settled()
            taken = await helper.ask("write", Write(), CheckpointTaken, ANSWER_TIMEOUT_S)
            _keep_base(machine, process, ready.base)
    return paused(taken, pause_ms)


class _Pause:
    """The moment: files given to QEMU before it, the machine stopped and resumed, undone after."""

    def __init__(self, qmp: Qmp, machine: "Machine", place: str) -> None:
        self._qmp, self._machine, self._place = qmp, machine, place
        self._has_disk = machine.has_disk
        self._begun_s = self._stopped_s = 0.0
        self._backup: Awaitable[dict[str, Any]] | None = None

    async def __aenter__(self) -> Self:
        await self._give(f"{self._place}/{DEVICE}", DEVICE_SET, os.O_WRONLY)
        if self._has_disk:
            await self._make_target()
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(SupercloudError, OSError):
            await recover(self._qmp)

    async def begin(self) -> "asyncio.Future[None]":
        """When it has stopped; QEMU goes on to save without waiting for our word."""
        self._begun_s = self._stopped_s = time.monotonic()
        stopping = asyncio.ensure_future(self._qmp.call("stop"))
        saving = asyncio.ensure_future(self._save())
        try:
            await stopping
        except BaseException:
            saving.cancel()
            raise
        self._stopped_s = time.monotonic()
        return saving

    async def _save(self) -> None:
        """The devices' state, and the disk's as it is kept from now on."""
        if self._has_disk:
            self._backup = self._machine.job_ended(BACKUP)
            await self._qmp.call(
                "blockdev-backup",
                **{"job-id": BACKUP, "device": "disk", "target": TARGET, "sync": "top"},
            )
        await self._qmp.call(
            "xen-save-devices-state", filename=f"/dev/fdset/{DEVICE_SET}", live=False
        )

    async def end(self) -> float:
        """Go on; how long it stood still, in ms."""
        kept_s = time.monotonic()
        await self._qmp.call("cont")
        ended_s = time.monotonic()
        parts = self._stopped_s - self._begun_s, kept_s - self._stopped_s, ended_s - kept_s
        log.info("%s stood still: stop %.1f, save %.1f, go on %.1f ms",
                 self._machine.spec.name, *(part * 1000 for part in parts))  # fmt: skip
        return (ended_s - self._begun_s) * 1000

    async def settled(self) -> None:
        """When what was written of it is whole."""
        if self._backup is None:
            return
        async with asyncio.timeout(BACKUP_TIMEOUT_S):
            event = await self._backup
        if event.get("error"):
            raise Permanent(f"QEMU could not copy the disk: {event['error']}")
        await self._qmp.call("blockdev-del", **{"node-name": TARGET})

    async def _make_target(self) -> None:
        path, image = f"{self._place}/{DISK_PART}", self._machine.image_path
        size = (await _virtual_size(self._qmp)) or 0
        await run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F",
                  self._machine.spec.image.format, "-b", image, path, str(size))  # fmt: skip
        await self._give(path, DISK_SET, os.O_RDWR)
        file = {"driver": "file", "filename": f"/dev/fdset/{DISK_SET}", "discard": "unmap"}
        node = {"driver": "qcow2", "node-name": TARGET, "file": file, "backing": "image"}
        await self._qmp.call("blockdev-add", **node)

    async def _give(self, path: str, fdset: int, access: int) -> None:
        """QEMU takes a descriptor of a set only if it is open for just what it wants to do."""
        file = os.open(path, access | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await self._qmp.call("add-fd", [file], **{"fdset-id": fdset})
        finally:
            os.close(file)


async def _virtual_size(qmp: Qmp) -> int:
    nodes = await qmp.call("query-named-block-nodes", flat=True)
    return next(int(n["image"]["virtual-size"]) for n in nodes if n["node-name"] == "disk")


def fingerprint(machine: "Machine") -> dict[str, str]:
    """What must be the same where it goes on: the machine as its guest sees it, and QEMU's build.

    Of the platform's image, as both come from there.
    """
    spec = machine.spec
    shape = [
        machine.name, spec.memory_bytes, spec.cpus, [nic.mac for nic in spec.nics],
        [volume.volume for volume in spec.volumes], spec.image.format,
        sorted((role, blob.digest) for role, blob in spec.image.blobs.items()),
        hardware.base(spec, machine.name.partition("/")[2]),
    ]  # fmt: skip
    return {"engine": machine.name, "qemu": _qemu(), "shape": _hashed(shape)}


def _hashed(value: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _qemu() -> str:
    """The size of the program stands for its build; the hash of 20 MB would take its time."""
    return str(os.stat("/usr/bin/qemu-system-x86_64").st_size)


def _base_path(machine: "Machine") -> str:
    return f"{machine.places.run}/base.json"


def _base(machine: "Machine", process: Watched) -> str:
    """What its pages have been tracked since; empty after a start."""
    kept = read_json(_base_path(machine), {})
    mine = kept.get("pid") == process.pid and kept.get("ticks") == process.start_ticks
    return str(kept["base"]) if mine else ""


def _keep_base(machine: "Machine", process: Watched, base: str) -> None:
    kept = {"pid": process.pid, "ticks": process.start_ticks, "base": base}
    write_json(_base_path(machine), kept)


# -- restore


def _marker(machine: "Machine") -> str:
    return f"{machine.places.run}/restored"


def is_due(machine: "Machine") -> bool:
    """Whether its next start is from a checkpoint."""
    return machine.spec.restore is not None and not os.path.exists(_marker(machine))


def done(machine: "Machine") -> None:
    """It runs: from now on it starts as any other."""
    write_json(_marker(machine), True)


async def fetch(machine: "Machine", ucloud: str, ram: int) -> int:
    """Read and verify the whole: RAM filled, disk in place; a descriptor of the devices' state."""
    wanted, uid = machine.spec.restore, machine.spec.uid
    if wanted is None:
        raise BadState("nothing to restore")
    with workplace(uid) as place:
        request = Restore(
            ucloud=ucloud, ee=wanted.ee, store=wanted.store, head=wanted.head,
            sequence=wanted.sequence, directory=place, ram=ram,
        )  # fmt: skip
        log_path = f"{machine.places.run}/saver.log"
        async with saver(uid, [ram], log_path) as helper:
            found = await helper.ask("restore", request, Found, ANSWER_TIMEOUT_S)
            _check(machine, found)
            await helper.ask("fetch", None, dict, ANSWER_TIMEOUT_S)
        if machine.has_disk:
            with open(f"{place}/{DISK_PART}", "rb") as file:
                machine.check_disk(file.read(512))
            os.replace(f"{place}/{DISK_PART}", machine.disk)
        return os.open(f"{place}/{DEVICE}", os.O_RDONLY | os.O_CLOEXEC)


def _check(machine: "Machine", found: Found) -> None:
    if found.engine != ENGINE or MEMORY not in found.parts or DEVICE not in found.parts:
        raise Invalid(f"checkpoint {found.sequence} is of {found.engine}, not of a VM")
    ours = fingerprint(machine)
    for key, what in (
        ("shape", "another machine (image, memory, processors, networks or volumes)"),
        ("engine", f"{found.details.get('engine')}, and this platform has {ours['engine']}"),
        ("qemu", "another build of QEMU than this platform has"),
    ):
        if found.details.get(key) != ours[key]:
            raise Invalid(f"checkpoint {found.sequence} is of {what}")
    if machine.has_disk != (DISK_PART.replace("-", ":", 1) in found.parts):
        raise Invalid(f"checkpoint {found.sequence} has other disks")
