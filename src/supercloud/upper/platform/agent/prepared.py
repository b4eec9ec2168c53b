"""What a template has ready for its clones: environments, as far as nobody has to be somebody.

The template's own scratch disk holds what to prepare (``wire.content``): blobs, which stay in
memory; containers' images mounted, their namespaces and networks made; VMs started and stopped
again where they wait for an identity (see ``guestport``). All of it is left as an earlier agent
leaves it to the next one (``state.json``), so a clone takes it up as after a restart: what its
first desired set does not name goes. Whatever cannot be prepared is left out, and starts as always.
"""

import hashlib
import logging
import mmap
import os
import time
from dataclasses import dataclass

from supercloud.model.errors import Invalid, NotFound, SupercloudError, Temporary
from supercloud.upper.platform.agent import cgroups, engine, paths
from supercloud.upper.platform.agent.accelerator import Accelerator
from supercloud.upper.platform.agent.blobs import Blobs
from supercloud.upper.platform.agent.bootdata import disk
from supercloud.upper.platform.agent.container import Container
from supercloud.upper.platform.agent.disks import Disks
from supercloud.upper.platform.agent.engine import Places, Services
from supercloud.upper.platform.agent.fetch import Source
from supercloud.upper.platform.agent.firewall import Firewall, ruleset
from supercloud.upper.platform.agent.machine import ENGINE_BYTES, Machine
from supercloud.upper.platform.agent.names import Names
from supercloud.upper.platform.agent.namespaces import IDS_PER_ENVIRONMENT
from supercloud.upper.platform.agent.networks import Networks
from supercloud.upper.platform.agent.processes import Watched
from supercloud.upper.platform.agent.scratch import SERIAL, Scratch
from supercloud.upper.platform.agent.state import write_json
from supercloud.upper.platform.agent.volumes import Volumes
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.codec import encode
from supercloud.wire.content import HEADER_BYTES, Content, Placed, from_header
from supercloud.wire.messages import EnvironmentSpec

MACHINE_TIMEOUT_S = 60.0
ALL_TIMEOUT_S = 100.0

log = logging.getLogger("supercloud.agent.prepared")


@dataclass(slots=True)
class _Room:
    """Memory that prepared VMs may take: half of the platform's."""

    left_bytes: int

    def take(self, spec: EnvironmentSpec) -> bool:
        """Whether there was room for it."""
        needed = spec.memory_bytes + ENGINE_BYTES
        if spec.kind == "vm" and needed > self.left_bytes:
            return False
        self.left_bytes -= needed if spec.kind == "vm" else 0
        return True


async def prepare(accelerator: Accelerator, uplink: str) -> None:
    """Whatever the disk holds; for a template, before it is anybody. ``uplink`` names its NIC."""
    content = _content()
    if not content.environments:
        return
    engine.make_places()
    cgroups.prepare()
    nobodys = Volumes(Disks()), "", _no_snapshot
    services = Services(Blobs(_nobody), Networks(), Scratch(), accelerator, *nobodys)
    services.networks.ensure(content.environments)
    try:
        await Firewall().apply(ruleset(uplink, services.networks.by_name.values(), []))
    except (SupercloudError, OSError) as error:
        log.warning("no rules are prepared: %s", error)
    names = Names("template")
    await names.apply(services.networks.by_name.values(), content.environments, {})
    room, end_s = _Room(cgroups.total_memory_bytes() // 2), time.monotonic() + ALL_TIMEOUT_S
    for number, spec in enumerate(content.environments, 1):
        if time.monotonic() < end_s and room.take(spec):
            await _one(spec, services, number * IDS_PER_ENVIRONMENT)
    await names.apply([], [], {})  # it ends: it has random numbers of its own


async def _one(spec: EnvironmentSpec, services: Services, base_id: int) -> None:
    kind = Container if spec.kind == "container" else Machine
    made = kind(spec, services, base_id)
    try:
        process = await made.start_ahead(MACHINE_TIMEOUT_S)
    except (SupercloudError, OSError) as error:
        log.warning("%s is not prepared: %s", spec.name, error)
        await made.destroy()
        return
    _leave(spec, base_id, process)
    log.info("%s is prepared", spec.name)


def _leave(spec: EnvironmentSpec, base_id: int, process: Watched | None) -> None:
    """As a worker of this EE would."""
    pid, ticks = (process.pid, process.start_ticks) if process else (0, 0)
    write_json(Places(spec.uid).state, {
        "spec": encode(spec), "base_id": base_id, "restarts": 0, "started_s": 0.0, "pid": pid,
        "ticks": ticks, "launched_s": process.launched_s if process else 0.0, "state": "pending",
        "reason": "", "exit_status": None, "held": False,
    })  # fmt: skip
    if process:
        process.close()


def _nobody() -> Source:
    raise Temporary("a template has no control plane")


async def _no_snapshot(_: CheckpointSnapshot) -> None:
    _nobody()


# -- the disk


def _content() -> Content:
    """What is on it, its blobs in memory and as they should be."""
    try:
        descriptor = os.open(disk(SERIAL), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except NotFound:
        return Content()
    try:
        with mmap.mmap(-1, HEADER_BYTES) as buffer:
            size = os.preadv(descriptor, [buffer], 0)
            content = from_header(buffer[:size])
            if content.blobs:
                os.makedirs(paths.PREPARED, mode=0o700, exist_ok=True)
            for blob in content.blobs:
                _take(descriptor, blob, buffer)
    except (Invalid, OSError) as error:
        log.warning("nothing is prepared: %s", error)
        return Content()
    finally:
        os.close(descriptor)
    return content


def _take(descriptor: int, blob: Placed, buffer: mmap.mmap) -> None:
    name = blob.digest.removeprefix("sha256:")
    part, hasher, left = f"{paths.PREPARED}/{name}.part", hashlib.sha256(), blob.size_bytes
    with open(part, "wb") as file:
        while left > 0:
            offset = blob.offset_bytes + blob.size_bytes - left
            count = min(left, os.preadv(descriptor, [buffer], offset))
            if count <= 0:
                raise Invalid(f"{blob.digest} is cut off")
            piece = buffer[:count]
            hasher.update(piece)
            file.write(piece)
            left -= count
    if hasher.hexdigest() != name:
        os.unlink(part)
        raise Invalid(f"what came as {blob.digest} has another hash")
    os.chmod(part, 0o444)  # opened again by /proc/self/fd in QEMU; the directory is closed
    os.rename(part, f"{paths.PREPARED}/{name}")
