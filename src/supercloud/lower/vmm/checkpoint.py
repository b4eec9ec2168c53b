"""A checkpoint of a running machine: the part of it that the machine stands still for.

::

    overlay prepared                      (runs)
    agent: everything nested is still     (runs; without its word there is no checkpoint)
    stop
      volumes   snapshots of them, which the user's domain has taken (``moment``)
      disk      its writes go to an overlay from here on; what is below stays as it is
      devices   their state, some hundred KiB
      memory    the pages that differ from the file it was started from; all of it after a boot
    go on, and the agent is told so
    what was captured is told             (runs; others store it, and read the disk below)
    end: the overlay is written back, and goes

Where memory is private the kernel can tell the pages that were written since the machine started
(``services.checkpoint.pages``). While they are few, they are copied in the pause. When they are
more, or memory is shared, all of it is copied while the machine runs (``precopy``), and in the
pause what was written last: the agent is asked when little is left, and QEMU stops the machine.
"""

import contextlib
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final

from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Machine
from supercloud.lower.vmm.moment import Moment, Statuses
from supercloud.lower.vmm.precopy import Precopy, go_on, settle
from supercloud.model.errors import (
    BadState,
    Busy,
    Invalid,
    SupercloudError,
    Temporary,
    to_wire,
)
from supercloud.services.checkpoint.pages import PAGE_BYTES, Memory, Run, capture_of, is_rebase_due
from supercloud.wire.codec import Limit, decode
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp, Refused
from supercloud.wire.reactor import Reactor, Timer

QUIET_S: Final = 20.0
RETRY_S: Final = 2.0
_DISK, _OVERLAY, _FILE, _JOB = "scratch", "overlay", "overlay-file", "checkpoint"
_OVERLAY_SET, _STATE_SET = 20, 21
_MAX_STATE_BYTES: Final = 32 << 20

# A processor's section in QEMU's stream: full section, number, "cpu", instance, version; then its
# registers, instruction pointer and flags, and the emulator's own flags (target/i386/machine.c).
_PROCESSOR: Final = re.compile(rb"\x04.{4}\x03cpu.{8}", re.DOTALL)
_FLAGS_AT: Final = 16 * 8 + 8 + 8
_IN_GUEST: Final = 1 << 21  # HF_GUEST_MASK

log = logging.getLogger("supercloud.lower.vmm")

Tell = Callable[[str, Mapping[str, Any], list[int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``room_bytes``: for a copy of memory, at most. The overlay's file has ``overlay_bytes``.

    ``live``: the whole memory, while the machine runs; shared memory is never copied otherwise.
    ``volumes``: they get snapshots, and a stream on which that is said is given, too.
    """

    live: bool = False
    volumes: bool = False
    room_bytes: Annotated[int, Limit(ge=0, le=1 << 42)]
    overlay_bytes: Annotated[int, Limit(ge=1 << 20, le=1 << 46)]


class Capture:
    """One machine's. ``ram`` opens its memory's object; ``tell`` is to the user's domain.

    ``disks`` are its volumes, as they are now.
    """

    def __init__(
        self,
        reactor: Reactor,
        qmp: Qmp,
        identity: IdentityPort,
        tell: Tell,
        machine: Machine,
        pid: int,
        ram: Callable[[], int],
        disks: Statuses,
    ) -> None:
        self._reactor, self._qmp, self._identity, self._tell = reactor, qmp, identity, tell
        self._machine, self._pid, self._ram, self._disks = machine, pid, ram, disks
        self._moment = Moment(disks, tell, None)
        self._order: Order | None = None  # while its agent has not answered
        self._prepared = ExitStack()  # and what is open for it till then
        self._asked_s = 0.0
        self._waiting: Timer | None = None
        self._state = self._copy = -1
        self._capture: Callable[[], int] = lambda: 0
        self._precopy: Precopy | None = None
        self._stopped_s = 0.0
        self._has_nodes = self._is_split = self._is_made = self._is_ending = False

    # -- what may be asked

    def estimate(self, _request: Request) -> dict[str, Any]:
        """``{memory_bytes, dirty_bytes}``: what a copy of its memory would take now.

        All of it, and of what was written since it started; the latter is null where nobody knows.
        """
        with ExitStack() as opened:
            ram = self._ram()
            opened.callback(os.close, ram)
            touched_bytes = os.fstat(ram).st_blocks * 512
            if self._machine.ram_shared:
                return {"memory_bytes": touched_bytes, "dirty_bytes": None}
            memory = Memory(self._pid, ram)
            opened.callback(memory.close)
            dirty_bytes = sum(run.length for run in memory.dirty()) * PAGE_BYTES
        whole_bytes = min(touched_bytes + dirty_bytes, self._machine.memory_bytes)
        return {"memory_bytes": whole_bytes, "dirty_bytes": dirty_bytes}

    def begin(self, request: Request) -> dict[str, Any]:
        """``Order`` and the overlay's file: answers at once.

        Told is ``checkpoint.captured`` with two files, the devices' state and the memory's copy, or
        ``checkpoint.failed``; and ``checkpoint.full`` when the overlay is: end it then.
        """
        order = decode(Order, request.untrusted, "checkpoint", ignore_unknown=True)
        if len(request.descriptors) != 1 + order.volumes:
            raise Invalid("the overlay's descriptor is missing, or the stream's")
        if self.is_under_way:
            raise Busy("another checkpoint of this platform is not over yet")
        stream = request.descriptors[1] if order.volumes else None
        self._moment = Moment(self._disks, self._tell, stream)
        self._order = order
        self._prepared.callback(self._moment.close)
        try:
            self._add_nodes(order, request.descriptors[0])
            self._prepare(order)
        except (SupercloudError, OSError):
            self._settled()
            self._remove_nodes()
            raise
        return {}

    def end(self, _request: Request) -> dict[str, Any]:
        """The disk below is not needed any more; ``checkpoint.over`` is told when it is whole."""
        if self._order is not None:
            self._fail(Temporary("it was given up"))
        if self._is_split and not self._is_ending:
            self._is_ending = True
            self._write_back()
        elif not self._has_nodes:
            self._tell("checkpoint.over", {}, [])
        return {}

    @property
    def is_under_way(self) -> bool:
        """Whether one is being taken, or is not over yet."""
        return self._has_nodes or self._order is not None

    # -- what its agent says

    def said(self, word: str) -> None:
        """``paused`` or ``refused``."""
        if self._order is None:
            return
        if word != "paused":
            self._fail(BadState("the platform's agent could not stop what runs inside it"))
            return
        try:
            if self._precopy is None:
                self._captured(self._taken())
            elif self._precopy.is_held:  # or it is asked again
                self._check_running()
                self._precopy.finish()
        except (SupercloudError, OSError) as error:
            self._fail(error)

    def _ask(self) -> None:
        """Its agent's word is what is missing now."""
        self._identity.pause()
        self._asked_s = time.monotonic()
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self._reactor.after(QUIET_S, self._no_answer)

    def _ask_while_held(self) -> None:
        try:
            self._ask()
        except (SupercloudError, OSError) as error:
            self._fail(error)

    def _no_answer(self) -> None:
        self._fail(
            Temporary(
                f"the platform's agent did not acknowledge within {QUIET_S:g} s that what runs "
                "inside it stands still: no checkpoint was taken"
            )
        )

    def _captured(self, told: dict[str, Any]) -> None:
        self._tell("checkpoint.captured", told, [self._state, self._copy])
        self._settled()

    def _settled(self) -> None:
        """Its agent has had its time."""
        self._prepared.close()
        self._order = self._precopy = None
        if self._waiting is not None:
            self._waiting.cancel()

    def _fail(self, error: BaseException) -> None:
        log.warning("no checkpoint: %s", error)
        self._settled()
        with contextlib.suppress(SupercloudError):
            self._identity.resume()
        if self._is_split:
            if not self._is_ending:
                self._is_ending = True
                self._write_back()
        else:
            self._remove_nodes()
        known = error if isinstance(error, SupercloudError) else Temporary(str(error))
        self._tell("checkpoint.failed", {"error": to_wire(known)}, [])

    # -- standing still

    def _prepare(self, order: Order) -> None:
        """The two files, with room in them: nothing of that needs a machine that stands still."""
        opened = self._prepared
        self._state = self._memory_file("state", opened)
        self._copy = self._memory_file("memory", opened)
        self._give_state(self._state, opened)
        if order.live or self._machine.ram_shared:
            self._check_running()
            self._precopy = precopy = Precopy(
                self._reactor, self._qmp, self._ask_while_held, self._stands_still, self._fail
            )
            opened.callback(precopy.close)
            precopy.start(self._copy, order.room_bytes)
            return
        memory = self._private_memory(opened)
        room = memory.make_room(self._copy, order.room_bytes)
        self._capture = lambda: memory.capture(self._copy, order.room_bytes, room)
        self._ask()

    def _check_running(self) -> None:
        if self._qmp.ask("query-status").get("status") != "running":
            raise BadState("the machine stands still already: its disk is full, or it is ending")

    def _taken(self) -> dict[str, Any]:
        """Stop the machine, take all of it, let it go on."""
        self._check_running()
        with self._goes_on() as told:
            self._stopped_s = time.monotonic()
            self._qmp.ask("stop")
            self._split()
            told["memory_bytes"] = self._capture()
            self._moment.end()
        return {**told, "incremental": True}

    def _stands_still(self) -> None:
        """QEMU stopped it, as what is left of the memory is little."""
        try:
            self._captured(self._taken_live())
        except (SupercloudError, OSError) as error:
            self._fail(error)

    def _taken_live(self) -> dict[str, Any]:
        if self._precopy is None:
            raise BadState("nobody copies its memory")
        runs: list[Run] | None = None
        with self._goes_on() as told:
            try:
                self._split()
                self._precopy.complete()
            except BaseException:
                self._precopy.close()
                raise
            if not self._machine.ram_shared:
                runs = self._written()
            self._moment.end()
        size_bytes = self._machine.memory_bytes
        image = settle(self._copy, size_bytes)
        if runs is not None:
            written = self._memory_file("written", self._prepared)
            count = capture_of(self._copy, image.offset, size_bytes, runs, written)
            self._copy = written
            return {**told, "memory_bytes": count, "incremental": True}
        told |= {"memory_bytes": image.filled_bytes, "memory_offset": image.offset}
        return {**told, "incremental": False}

    def _written(self) -> list[Run] | None:
        """Of a private memory; None when it is time for the whole again."""
        with ExitStack() as opened:
            runs = self._private_memory(opened).dirty()
        dirty_bytes = sum(run.length for run in runs) * PAGE_BYTES
        return None if is_rebase_due(dirty_bytes, self._machine.memory_bytes) else runs

    def _private_memory(self, opened: ExitStack) -> Memory:
        ram = self._ram()
        opened.callback(os.close, ram)
        memory = Memory(self._pid, ram)
        opened.callback(memory.close)
        return memory

    def _split(self) -> None:
        """The disks and the devices, of the moment at which the machine stands still."""
        self._moment.begin()
        self._qmp.ask("blockdev-snapshot", {"node": _DISK, "overlay": _OVERLAY})
        self._is_split = True
        self._save_devices(self._state)

    @contextlib.contextmanager
    def _goes_on(self) -> Iterator[dict[str, Any]]:
        """Whatever happens, the machine does, and all inside it; how long it stood still."""
        told: dict[str, Any] = {}
        try:
            yield told
        finally:
            go_on(self._qmp)
            went_on_s, now_ms = time.monotonic(), time.time_ns() // 1_000_000
            self._identity.resume()
        pause_ms = (went_on_s - self._stopped_s) * 1000
        told |= {
            "pause_ms": round(pause_ms, 3),
            "quiet_ms": round((went_on_s - self._asked_s) * 1000, 3),
            "taken_ms": now_ms - round(pause_ms),
        }

    def _give_state(self, state: int, opened: ExitStack) -> None:
        again = os.open(f"/proc/self/fd/{state}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._qmp.ask("add-fd", {"fdset-id": _STATE_SET}, descriptors=[again])
        finally:
            os.close(again)
        opened.callback(self._qmp.command, "remove-fd", {"fdset-id": _STATE_SET})

    def _save_devices(self, state: int) -> None:
        arguments = {"filename": f"/dev/fdset/{_STATE_SET}", "live": False}
        self._qmp.ask("xen-save-devices-state", arguments)
        size = os.fstat(state).st_size
        if not 0 < size <= _MAX_STATE_BYTES:
            raise BadState(f"the devices' state has {size} bytes")
        if self._machine.accelerator == "tcg" and is_inside_guest(os.pread(state, size, 0)):
            raise BadState("a nested VM runs, though the agent said that nothing does")

    @staticmethod
    def _memory_file(name: str, opened: ExitStack) -> int:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        opened.callback(os.close, descriptor)
        return descriptor

    # -- the overlay

    def _add_nodes(self, order: Order, descriptor: int) -> None:
        """A qcow2 image of the disk's size in a file that cannot grow beyond its own."""
        disk = next(n for n in self._qmp.ask("query-named-block-nodes") if n["node-name"] == _DISK)
        size_bytes = int(disk["image"]["virtual-size"])
        self._has_nodes, self._is_made = True, False
        self._qmp.ask("add-fd", {"fdset-id": _OVERLAY_SET}, descriptors=[descriptor])
        file = {"driver": "file", "filename": f"/dev/fdset/{_OVERLAY_SET}", "discard": "unmap"}
        limited = {"driver": "raw", "node-name": _FILE, "size": order.overlay_bytes, "file": file}
        self._qmp.ask("blockdev-add", limited)
        options = {"driver": "qcow2", "file": _FILE, "size": size_bytes}
        self._qmp.ask("blockdev-create", {"job-id": _JOB, "options": options})
        if not self._qmp.wait(lambda: self._is_made, 10.0):
            raise Temporary("the overlay was not made in time")
        (job,) = (job for job in self._qmp.ask("query-jobs") if job["id"] == _JOB)
        self._qmp.ask("job-dismiss", {"id": _JOB})
        if "error" in job:
            raise Temporary(f"the overlay was not made: {job['error']}")
        overlay = {"driver": "qcow2", "node-name": _OVERLAY, "file": _FILE, "backing": None}
        self._qmp.ask("blockdev-add", {**overlay, "discard": "unmap"})

    def _remove_nodes(self) -> None:
        for node in (_OVERLAY, _FILE):
            self._qmp.command("blockdev-del", {"node-name": node})
        self._qmp.command("remove-fd", {"fdset-id": _OVERLAY_SET})
        self._has_nodes = False

    def _write_back(self) -> None:
        try:
            nodes = {"device": _OVERLAY, "top-node": _OVERLAY, "base-node": _DISK}
            self._qmp.ask("block-commit", {"job-id": _JOB, **nodes})
        except Refused as error:  # the disk goes on as it is
            log.warning("the overlay cannot be written back now: %s", error)
            self._reactor.after(RETRY_S, self._write_back)
        except Temporary:
            log.warning("QEMU does not answer")  # the watchdog's affair

    def on_qmp(self, name: str, data: dict[str, Any]) -> None:
        """An event of QEMU's."""
        if self._precopy is not None:
            self._precopy.on_qmp(name, data)
        if name == "STOP":
            self._stopped_s = time.monotonic() - max(0.0, time.time() - self._qmp.event_s)
        elif name == "JOB_STATUS_CHANGE" and data.get("id") == _JOB:
            self._is_made = self._is_made or data.get("status") == "concluded"
        elif name == "BLOCK_JOB_READY" and data.get("device") == _JOB:
            self._qmp.command("job-complete", {"id": _JOB})
        elif name == "BLOCK_JOB_COMPLETED" and data.get("device") == _JOB:
            self._written_back(str(data.get("error", "")))
        elif name == "BLOCK_IO_ERROR" and data.get("nospace") and self._is_split:
            self._tell("checkpoint.full", {}, [])

    def _written_back(self, error: str) -> None:
        if error:
            log.warning("the overlay was not written back: %s", error)
            self._reactor.after(RETRY_S, self._write_back)
            return
        self._remove_nodes()
        self._is_split = self._is_ending = False
        self._tell("checkpoint.over", {}, [])


def is_inside_guest(state: bytes) -> bool:
    """Whether an emulated processor was in a nested guest when its state was saved.

    Such a state cannot be loaded: the emulator loses where it was.
    """
    for found in _PROCESSOR.finditer(state):
        (flags,) = struct.unpack_from(">I", state, found.end() + _FLAGS_AT)
        if flags & _IN_GUEST:
            return True
    return False
