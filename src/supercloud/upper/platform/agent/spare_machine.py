"""A VM's spare: made where its guest waits to be told who it is, and gone on from (``spares``).

The way is that of a checkpoint (``frozen_machine``): the machine is stopped, QEMU writes its
devices' state, its memory is copied. A start fills a memory of its own with it, charged to the VM,
so a spare may go whenever its room is needed.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from supercloud.model.errors import Temporary
from supercloud.upper.platform.agent import cgroups
from supercloud.upper.platform.agent.frozen_machine import DEVICE_SET, fingerprint
from supercloud.upper.platform.agent.qmp import Qmp
from supercloud.upper.platform.agent.spares import RAM, STATE, Spares
from supercloud.wire.messages import EnvironmentSpec

if TYPE_CHECKING:
    from supercloud.upper.platform.agent.machine import Machine

FILL_S: Final = 30.0
_LOOK_S: Final = 0.005
_MAX_PIECE_BYTES: Final = 16 << 20


def is_possible(spec: EnvironmentSpec) -> bool:
    """Whether it can go on from a spare: nothing that it has changes while it does not run."""
    return spec.image.identity and "disk" not in spec.image.blobs and not spec.volumes


def key_of(machine: "Machine") -> str:
    """Of all that its guest can have seen where it waits."""
    spec = machine.spec
    nics = [(nic.network, nic.address, nic.gateway) for nic in spec.nics]
    seen = [fingerprint(machine), spec.name, spec.image.append, nics]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


async def keep(machine: "Machine", spares: Spares, ram: int) -> bool:
    """Stop it where it waits, keep it if there is room, let it go on. Whether it was kept."""
    key, status = key_of(machine), os.fstat(ram)
    if not spares.has_room(status.st_blocks * 512):
        return False
    place = spares.new(key)
    qmp = machine.qmp
    try:
        await qmp.call("stop")
        await _save_devices(qmp, f"{place}/{STATE}.part")
        into = os.open(f"{place}/{RAM}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(into, status.st_size)
            await asyncio.to_thread(copy, ram, into)
        finally:
            os.close(into)
        os.rename(f"{place}/{STATE}.part", f"{place}/{STATE}")
    except BaseException:
        spares.drop(key)
        raise
    finally:
        await qmp.call("cont")
    return True


async def _save_devices(qmp: Qmp, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await qmp.call("add-fd", [file], **{"fdset-id": DEVICE_SET})
        name = f"/dev/fdset/{DEVICE_SET}"
        await qmp.call("xen-save-devices-state", filename=name, live=False)
        await qmp.call("remove-fd", **{"fdset-id": DEVICE_SET})
    finally:
        os.close(file)


async def fill(machine: "Machine", spares: Spares, ram: int) -> int:
    """Its memory, as the spare has it; a descriptor of the devices' state."""
    key = key_of(machine)
    source = spares.open(key, RAM)
    try:
        await _in_its_group(machine.spec.uid, source, ram)
    finally:
        os.close(source)
    return spares.open(key, STATE)


async def _in_its_group(uid: str, source: int, ram: int) -> None:
    """Copy in a child, whose group is charged for what it fills."""
    child, limit_s = os.fork(), time.monotonic() + FILL_S
    if not child:
        _child(uid, source, ram)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)  # noqa: ASYNC222 -- does not wait
        if done:
            break
        if time.monotonic() > limit_s:
            os.kill(child, signal.SIGKILL)
        await asyncio.sleep(_LOOK_S)
    if status:
        raise Temporary("a machine's memory could not be filled from its spare")


def _child(uid: str, source: int, ram: int) -> None:
    code = 1
    try:
        cgroups.enter(cgroups.path_of(uid), os.getpid())
        copy(source, ram)
        code = 0
    finally:
        os._exit(code)


def copy(source: int, into: int) -> None:
    """All that a sparse file has, into an empty one of its size."""
    for start, end in _extents(source):
        at = os.lseek(into, start, os.SEEK_SET)
        while at < end:
            done = os.sendfile(into, source, at, min(end - at, _MAX_PIECE_BYTES))
            if not done:
                raise Temporary("a machine's memory is cut short")
            at += done


def _extents(file: int) -> Iterator[tuple[int, int]]:
    """Where it has anything."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end
