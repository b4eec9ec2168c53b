"""A capture of a machine without a machine: a pretended QEMU, a pretended agent."""

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from supercloud.lower.vmm.checkpoint import Capture
from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Machine
from supercloud.lower.vmm.precopy import extents
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor

PAGE = 4096
DEADLINE_S = 60.0
MEMORY = 64 << 20
BITMAP, PAGES = 136, 1 << 20  # where QEMU puts them
MAKE = {"id": "checkpoint", "status": "concluded"}


def processor(flags: int) -> bytes:
    """A processor's section in a stream of devices' states."""
    head = b"\x04" + struct.pack(">I", 7) + b"\x03cpu" + struct.pack(">II", 0, 12)
    return head + bytes(16 * 8 + 8 + 8) + struct.pack(">I", flags) + bytes(64)


def write_image(into: int, ram: int) -> None:
    """What QEMU writes with ``mapped-ram``: a header, which pages are not zero, and these."""
    os.pwrite(into, b"QEVM" + bytes(60) + b"\x03ram", 0)
    os.pwrite(into, struct.pack(">QIQQQ", MEMORY, 1, PAGE, BITMAP, PAGES), 68)
    bitmap = bytearray(MEMORY // PAGE // 8)
    for start, end in extents(ram, 0, MEMORY):
        for page in range(start // PAGE, end // PAGE):
            if any(data := os.pread(ram, PAGE, page * PAGE)):
                os.pwrite(into, data, PAGES + page * PAGE)
                bitmap[page // 8] |= 1 << page % 8
    os.pwrite(into, bitmap, BITMAP)
    os.pwrite(into, b"devices", PAGES + MEMORY)


class Qemu(threading.Thread):
    """Answers every command; ``refuses`` with an error. Writes ``state`` where it is told to.

    It copies ``ram`` when it has been told to end that; ``ends_early`` when it was told to begin.
    """

    def __init__(self, end: socket.socket, ram: int) -> None:
        super().__init__(daemon=True)
        self.ram, self.ends_early, self.last_pages = ram, 0, "completed"
        self._into = -1
        self.end, self.refuses, self.names = end, set[str](), list[str]()
        self.status, self.unfinished = "running", 0
        self.state, self._file = b"QEVM" + processor(0x18C0C2B0), -1

    def run(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            self._serve()

    def _serve(self) -> None:
        data = b""
        while True:
            more, descriptors, _, _ = socket.recv_fds(self.end, 1 << 16, 8)
            if not more:
                return
            *lines, data = (data + more).split(b"\n")
            for line in lines:
                self._answer(json.loads(line), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, command: dict[str, Any], descriptors: list[int]) -> None:
        name, arguments = command["execute"], command["arguments"]
        self.names.append(name)
        result: Any = {}
        if name == "query-named-block-nodes":
            result = [{"node-name": "scratch", "image": {"virtual-size": 1 << 20}}]
        elif name == "query-jobs":
            result = [MAKE]
        elif name == "query-status":
            result = {"status": self.status}
        elif name == "query-migrate":
            result = {"status": "active", "ram": {"remaining": PAGE}}
        elif name == "add-fd" and arguments["fdset-id"] == 21:
            self._file = os.dup(descriptors[0])
        elif name == "add-fd" and arguments["fdset-id"] == 22:
            self._into = os.dup(descriptors[0])
        elif name == "xen-save-devices-state":
            os.write(self._file, self.state)
        elif name == "remove-fd" and arguments["fdset-id"] == 21:
            os.close(self._file)
        is_refused = name in self.refuses
        if name == "cont" and self.unfinished:
            self.unfinished, is_refused = self.unfinished - 1, True
        answer = {"error": {"desc": "no"}} if is_refused else {"return": result}
        self._send({"id": command["id"], **answer})
        if name in self.refuses:
            return
        self._copies(name, arguments)
        if name == "blockdev-create":
            self.happens("JOB_STATUS_CHANGE", MAKE)
        elif name == "block-commit":
            self.happens("BLOCK_JOB_READY", {"device": "checkpoint"})
        elif name == "job-complete":
            self.happens("BLOCK_JOB_COMPLETED", {"device": "checkpoint"})

    def _copies(self, name: str, arguments: dict[str, Any]) -> None:
        is_ending = bool(arguments.get("avail-switchover-bandwidth"))
        if name == "migrate" and self.ends_early:
            self.ends_early -= 1
            is_ending = True
        if name == "migrate-continue":
            write_image(self._into, self.ram)
            self.happens("MIGRATION", {"status": self.last_pages})
        elif name == "migrate_cancel":
            self.happens("MIGRATION", {"status": "cancelled"})
        elif is_ending:
            self.happens("STOP", {})
            self.happens("MIGRATION", {"status": "pre-switchover"})

    def happens(self, name: str, data: dict[str, Any]) -> None:
        self._send({"event": name, "data": data})

    def _send(self, message: dict[str, Any]) -> None:
        self.end.send(json.dumps(message).encode() + b"\n")


class Bench:
    """A capture of a machine with shared memory, its QEMU, its agent's end of the port."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.ram = os.memfd_create("ram")
        os.ftruncate(self.ram, MEMORY)
        os.pwrite(self.ram, b"touched", 5 * PAGE)
        ours, theirs = socket.socketpair()
        self.qemu = Qemu(theirs, self.ram)
        self.qemu.start()
        self.told: list[tuple[str, dict[str, Any], list[bytes]]] = []
        self.qmp = Qmp(self.reactor, ours, self._event, lambda: None)
        port, self.agent = socket.socketpair()
        self.agent.setblocking(False)
        self._heard = b""
        self.port = IdentityPort(self.reactor, port, self._said)
        machine = Machine(
            name="m", cpus=1, memory_bytes=MEMORY, accelerator="tcg",
            uplink_mac="02:5c:00:00:00:01", link_mac="02:5c:77:00:00:01",
        )  # fmt: skip
        self.disks: list[dict[str, Any]] = []
        self.stream, self.monitors = socket.socketpair()
        self.on_still: Callable[[], object] = lambda: self.stream.send(b"1")
        self.capture = Capture(
            self.reactor, self.qmp, self.port, self._tell, machine, 1,
            lambda: os.dup(self.ram), lambda: self.disks,
        )  # fmt: skip

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self.capture.on_qmp(name, data)

    def _said(self, word: str) -> None:
        self.capture.said(word)

    def _tell(self, method: str, parameters: Any, files: list[int]) -> None:
        contents = [os.pread(file, 2 * MEMORY, 0) for file in files]
        if method == "checkpoint.still":
            self.on_still()
        self.told.append((method, dict(parameters), contents))

    def begin(self, room_bytes: int = MEMORY, *, volumes: bool = False) -> None:
        overlay = os.memfd_create("overlay")
        given = [overlay, self.monitors.fileno()] if volumes else [overlay]
        asked = {"room_bytes": room_bytes, "overlay_bytes": 1 << 20, "volumes": volumes}
        try:
            self.capture.begin(Request("t", "machine.checkpoint", asked, given))
        finally:
            os.close(overlay)

    def copy(self) -> int:
        """The file that memory is copied into."""
        return self.capture._copy

    def is_held(self) -> bool:
        """Whether memory is copied but for its agent's word."""
        return self.capture._precopy is not None and self.capture._precopy.is_held

    def asked(self) -> dict[str, Any]:
        """What its agent is asked next."""
        self.until(self._hears)
        line, _, self._heard = self._heard.partition(b"\n")
        return dict(json.loads(line))

    def _hears(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._heard += self.agent.recv(4096)
        return b"\n" in self._heard

    def answer(self, word: str) -> None:
        asked = self.asked()
        assert asked["do"] == "pause"
        self.say(word, asked["nonce"])

    def say(self, word: str, nonce: str) -> None:
        """As its agent; until it is taken note of, and some time longer."""
        self.agent.send(f"{word} {nonce}\n".encode())
        self.until(lambda: not select.select([self.port._sock], [], [], 0)[0])
        self.turn()

    def end(self) -> None:
        self.capture.end(Request("t", "machine.checkpoint-end", {}))
        self.turn()

    def until(self, condition: Callable[[], object]) -> None:
        """Turn until it is so."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, (self.codes(), self.qemu.names)
            self.turn(0.005)

    def comes(self, code: str) -> None:
        """It is told."""
        self.until(lambda: code in self.codes())

    def turn(self, seconds: float = 0.1) -> None:
        self.reactor._stopped = False
        self.reactor.after(seconds, self.reactor.stop)
        self.reactor.run()

    def codes(self) -> list[str]:
        return [method for method, _, _ in self.told]


@contextlib.contextmanager
def capturing() -> Iterator[Bench]:
    """One, and all of it closed."""
    made = Bench()
    yield made
    made.capture._settled()
    os.close(made.ram)
    made.port.close()
    made.agent.close()
    made.qmp.close()
    made.qemu.end.close()
    made.stream.close()
    made.monitors.close()
