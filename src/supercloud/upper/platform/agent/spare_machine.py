"""A VM's spare: made where its guest waits to be told who it is, and gone on from (``spares``).

The way is that of a checkpoint (``frozen_machine``): the machine is stopped, QEMU writes its
devices' state, its memory is copied. A start fills a memory of its own with it, charged to the VM,
so a spare may go whenever its room is needed.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from supercloud.model.errors import SupercloudError, Temporary
from supercloud.upper.platform.agent import cgroups
from supercloud.upper.platform.agent.frozen_machine import DEVICE_SET, fingerprint
from supercloud.upper.platform.agent.processes import Watched, fork
from supercloud.upper.platform.agent.qmp import Qmp
from supercloud.upper.platform.agent.spares import RAM, STATE, Spares
from supercloud.upper.platform.agent.state import extents
from supercloud.wire.messages import EnvironmentSpec

if TYPE_CHECKING:
    from supercloud.upper.platform.agent.machine import Machine

FILL_S: Final = 30.0
SLACK_BYTES: Final = 4 << 20  # the devices' state, and what is touched in between
_MAX_PIECE_BYTES: Final = 16 << 20
_PIECE_BYTES: Final = 1 << 20
_PAGE_BYTES: Final = 4096


def is_possible(spec: EnvironmentSpec) -> bool:
    """Whether it can go on from a spare: nothing that it has changes while it does not run.

    Keys of an object store do, and would lie in the spare.
    """
    changes = spec.volumes or spec.objects
    return spec.image.identity and "disk" not in spec.image.blobs and not changes


def key_of(machine: "Machine") -> str:
    """Of all that its guest can have seen where it waits."""
    spec = machine.spec
    nics = [(nic.network, nic.address, nic.gateway) for nic in spec.nics]
    seen = [fingerprint(machine), spec.name, spec.image.append, nics]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


async def keep(machine: "Machine", spares: Spares, pid: int, size_bytes: int) -> bool:
    """Stop it where it waits, keep it if there is room, let it go on. Whether it was kept."""
    key, start = key_of(machine), _address(pid, size_bytes)
    needed_bytes = SLACK_BYTES + sum(end - at for at, end in _touched(pid, start, size_bytes))
    if not spares.has_room(needed_bytes):
        return False
    place = spares.new(key, needed_bytes)
    qmp = machine.qmp
    try:
        await qmp.call("stop")
        await _save_devices(qmp, f"{place}/{STATE}.part")
        into = os.open(f"{place}/{RAM}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(into, size_bytes)
            await _to_its_end(_copy_out, pid, start, size_bytes, into)
        finally:
            os.close(into)
        os.rename(f"{place}/{STATE}.part", f"{place}/{STATE}")
    except BaseException:
        spares.drop(key)
        raise
    finally:
        await qmp.call("cont")
    return True


def _address(pid: int, size_bytes: int) -> int:
    """Where a process has its guest's memory: the one mapping that is as large."""
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            start, _, end = line.split(" ", 1)[0].partition("-")
            if " rw-" in line and int(end, 16) - int(start, 16) == size_bytes:
                found.append(int(start, 16))
    if len(found) != 1:
        raise Temporary(f"{len(found)} mappings are as large as the machine's memory")
    return found[0]


def _touched(pid: int, start: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """What there is of it, as offsets: eight bytes a page, present and swapped in the last."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        table = os.pread(pagemap.fileno(), size_bytes // _PAGE_BYTES * 8, start // _PAGE_BYTES * 8)
    for run in re.finditer(rb"[\x40-\xff]+", table[7::8]):
        yield run.start() * _PAGE_BYTES, run.end() * _PAGE_BYTES


async def _to_its_end(work: Callable[..., None], *arguments: Any) -> None:
    """In a thread, which cannot be cancelled and has our descriptors: so it is waited for."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _copy_out(pid: int, start: int, size_bytes: int, into: int) -> None:
    """The memory of a machine that stands still, into an empty file."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for begin, end in _touched(pid, start, size_bytes):
            at = begin
            while at < end:
                data = os.pread(memory.fileno(), min(end - at, _PIECE_BYTES), start + at)
                if not data:
                    raise Temporary("a machine's memory went away while it was copied")
                at += os.pwrite(into, data, at)


async def _save_devices(qmp: Qmp, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await qmp.call("add-fd", [file], **{"fdset-id": DEVICE_SET})
        name = f"/dev/fdset/{DEVICE_SET}"
        await qmp.call("xen-save-devices-state", filename=name, live=False)
    finally:
        os.close(file)
        with contextlib.suppress(SupercloudError):  # or a checkpoint would go into this file
            await qmp.call("remove-fd", **{"fdset-id": DEVICE_SET})


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
    body = partial(_copy_charged, uid, source, ram)
    child = Watched(fork(body, (source, ram)), time.monotonic())
    try:
        await child.ended_within(FILL_S)
    finally:
        child.send(signal.SIGKILL)  # unless it has ended
        status = await child.wait()
        child.close()
    if status:
        raise Temporary("a machine's memory could not be filled from its spare")


def _copy_charged(uid: str, source: int, ram: int) -> int:
    cgroups.enter(cgroups.path_of(uid), os.getpid())
    copy(source, ram)
    return 0


def copy(source: int, into: int) -> None:
    """All that a sparse file has, into an empty one of its size."""
    for start, end in extents(source):
        at = os.lseek(into, start, os.SEEK_SET)
        while at < end:
            done = os.sendfile(into, source, at, min(end - at, _MAX_PIECE_BYTES))
            if not done:
                raise Temporary("a machine's memory is cut short")
            at += done
