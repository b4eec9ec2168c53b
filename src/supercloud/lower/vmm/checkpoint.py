"""A checkpoint of a running machine: the part of it that the machine stands still for.

::

    overlay prepared                      (runs)
    agent: everything nested is still     (runs; without its word there is no checkpoint)
    stop
      disk      its writes go to an overlay from here on; what is below stays as it is
      devices   their state, some hundred KiB
      memory    the pages that differ from the file it was started from; all of it after a boot
    go on, and the agent is told so
    what was captured is told             (runs; others store it, and read the disk below)
    end: the overlay is written back, and goes

A machine out of a template or a checkpoint has private memory, whose written pages the kernel can
tell (``services.checkpoint.pages``). One that was booted has it shared, and what was written since
a moment cannot be told (soft-dirty bits are not in every kernel, and go with a page that is swapped
out): all that was ever touched is copied.
"""

import contextlib
import logging
import mmap
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self

from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Machine
from supercloud.model.errors import (
    BadState,
    Busy,
    Invalid,
    NoResources,
    SupercloudError,
    Temporary,
    to_wire,
)
from supercloud.services.checkpoint.pages import PAGE_BYTES, Memory
from supercloud.wire.codec import Limit, decode
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp, Refused
from supercloud.wire.reactor import Reactor, Timer

QUIET_S: Final = 20.0
RETRY_S: Final = 2.0
_DISK, _OVERLAY, _FILE, _JOB = "scratch", "overlay", "overlay-file", "checkpoint"
_OVERLAY_SET, _STATE_SET = 20, 21
_MAX_STATE_BYTES: Final = 32 << 20
_PIECE_BYTES: Final = 16 << 20

# A processor's section in QEMU's stream: full section, number, "cpu", instance, version; then its
# registers, instruction pointer and flags, and the emulator's own flags (target/i386/machine.c).
_PROCESSOR: Final = re.compile(rb"\x04.{4}\x03cpu.{8}", re.DOTALL)
_FLAGS_AT: Final = 16 * 8 + 8 + 8
_IN_GUEST: Final = 1 << 21  # HF_GUEST_MASK

log = logging.getLogger("supercloud.lower.vmm")

Tell = Callable[[str, Mapping[str, Any], list[int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``room_bytes``: for a copy of memory, at most. The overlay's file has ``overlay_bytes``."""

    room_bytes: Annotated[int, Limit(ge=0, le=1 << 42)]
    overlay_bytes: Annotated[int, Limit(ge=1 << 20, le=1 << 46)]


class Capture:
    """One machine's. ``ram`` opens its memory's object; ``tell`` is to the user's domain."""

    def __init__(
        self,
        reactor: Reactor,
        qmp: Qmp,
        identity: IdentityPort,
        tell: Tell,
        machine: Machine,
        pid: int,
        ram: Callable[[], int],
    ) -> None:
        self._reactor, self._qmp, self._identity, self._tell = reactor, qmp, identity, tell
        self._machine, self._pid, self._ram = machine, pid, ram
        self._order: Order | None = None  # while its agent has not answered
        self._prepared = ExitStack()  # and what is open for it till then
        self._asked_s = 0.0
        self._waiting: Timer | None = None
        self._state = self._copy = -1
        self._capture: Callable[[], int] = lambda: 0
        self._has_nodes = self._is_split = self._is_made = self._is_ending = False

    # -- what may be asked

    def estimate(self, _request: Request) -> dict[str, Any]:
        """``{memory_bytes}``: what a copy of its memory would take now."""
        with ExitStack() as opened:
            return {"memory_bytes": self._extent(opened)}

    def begin(self, request: Request) -> dict[str, Any]:
        """``Order`` and the overlay's file: answers at once.

        Told is ``checkpoint.captured`` with two files, the devices' state and the memory's copy, or
        ``checkpoint.failed``; and ``checkpoint.full`` when the overlay is: end it then.
        """
        order = decode(Order, request.untrusted, "checkpoint", ignore_unknown=True)
        if len(request.descriptors) != 1:
            raise Invalid("the overlay's descriptor is missing")
        if self._has_nodes or self._order is not None:
            raise Busy("another checkpoint of this platform is not over yet")
        try:
            self._add_nodes(order, request.descriptors[0])
            self._prepare(order)
            self._identity.pause()
        except (SupercloudError, OSError):
            self._remove_nodes()
            self._prepared.close()
            raise
        self._order, self._asked_s = order, time.monotonic()
        self._waiting = self._reactor.after(QUIET_S, self._no_answer)
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

    # -- what its agent says

    def said(self, word: str) -> None:
        """``paused`` or ``refused``."""
        if self._order is None:
            return
        if word != "paused":
            self._fail(BadState("the platform's agent could not stop what runs inside it"))
            return
        try:
            told, files = self._taken()
            self._tell("checkpoint.captured", told, files)
            self._settled()
        except (SupercloudError, OSError) as error:
            self._fail(error)

    def _no_answer(self) -> None:
        self._fail(
            Temporary(
                f"the platform's agent did not acknowledge within {QUIET_S:g} s that what runs "
                "inside it stands still: no checkpoint was taken"
            )
        )

    def _settled(self) -> None:
        """Its agent has had its time."""
        self._order = None
        self._prepared.close()
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
        ram = self._ram()
        opened.callback(os.close, ram)
        if self._machine.ram_shared:
            touched = opened.enter_context(Touched(ram, self._copy))
            touched.copy(order.room_bytes)
            self._capture = lambda: touched.copy(order.room_bytes)
        else:
            memory = Memory(self._pid, ram)
            opened.callback(memory.close)
            room = memory.make_room(self._copy, order.room_bytes)
            self._capture = lambda: memory.capture(self._copy, order.room_bytes, room)

    def _taken(self) -> tuple[dict[str, Any], list[int]]:
        state = self._state
        if self._qmp.ask("query-status").get("status") != "running":
            raise BadState("the machine stands still already: its disk is full, or it is ending")
        self._give_state(state)
        try:
            self._qmp.ask("stop")
            stopped_s, taken_ms = time.monotonic(), time.time_ns() // 1_000_000
            self._qmp.ask("blockdev-snapshot", {"node": _DISK, "overlay": _OVERLAY})
            self._is_split = True
            self._save_devices(state)
            captured = self._capture()
        finally:
            self._qmp.ask("cont")
            went_on_s = time.monotonic()
            self._identity.resume()
            self._qmp.command("remove-fd", {"fdset-id": _STATE_SET})
        told = {
            "pause_ms": round((went_on_s - stopped_s) * 1000, 3),
            "quiet_ms": round((went_on_s - self._asked_s) * 1000, 3),
            "taken_ms": taken_ms,
            "memory_bytes": captured,
            "incremental": not self._machine.ram_shared,
        }
        return told, [state, self._copy]

    def _give_state(self, state: int) -> None:
        again = os.open(f"/proc/self/fd/{state}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._qmp.ask("add-fd", {"fdset-id": _STATE_SET}, descriptors=[again])
        finally:
            os.close(again)

    def _save_devices(self, state: int) -> None:
        arguments = {"filename": f"/dev/fdset/{_STATE_SET}", "live": False}
        self._qmp.ask("xen-save-devices-state", arguments)
        size = os.fstat(state).st_size
        if not 0 < size <= _MAX_STATE_BYTES:
            raise BadState(f"the devices' state has {size} bytes")
        if self._machine.accelerator == "tcg" and is_inside_guest(os.pread(state, size, 0)):
            raise BadState("a nested VM runs, though the agent said that nothing does")

    def _extent(self, opened: ExitStack) -> int:
        ram = self._ram()
        opened.callback(os.close, ram)
        if self._machine.ram_shared:
            return os.fstat(ram).st_blocks * 512
        memory = Memory(self._pid, ram)
        opened.callback(memory.close)
        return sum(run.length for run in memory.dirty()) * PAGE_BYTES

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
        if name == "JOB_STATUS_CHANGE" and data.get("id") == _JOB:
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


class Touched:
    """All that a sparse memory file ``source`` has in it, into the empty one ``into``.

    What is copied once before the pause has its pages then, so that it takes a fifth of the time.
    """

    def __init__(self, source: int, into: int) -> None:
        size = os.fstat(source).st_size
        os.ftruncate(into, size)
        self._source, self._target = source, mmap.mmap(into, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._target.close()

    def copy(self, most_bytes: int) -> int:
        """Copy it, again or for the first time; how many bytes. NoResources: they are more."""
        copied = 0
        with memoryview(self._target) as view:
            for at, end in extents(self._source):
                copied += end - at
                if copied > most_bytes:
                    raise NoResources(f"more than {most_bytes} bytes of memory are in use")
                self._copy(view[:end], at)
        return copied

    def _copy(self, view: memoryview, at: int) -> None:
        while at < len(view):
            at += os.preadv(self._source, [view[at : at + _PIECE_BYTES]], at)


def extents(file: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has anything."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end
