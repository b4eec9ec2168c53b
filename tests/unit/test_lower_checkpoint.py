"""What a monitor does for a checkpoint, against a pretended QEMU and a pretended agent."""

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from supercloud.lower.vmm import checkpoint, moment
from supercloud.lower.vmm.checkpoint import Capture, is_inside_guest
from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.machine import Machine
from supercloud.lower.vmm.precopy import extents, settle
from supercloud.model.errors import BadState, Busy, Invalid
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor

PAGE = 4096
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
        self.agent.settimeout(5)
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

    def asked(self) -> dict[str, Any]:
        """What its agent is asked next."""
        self.turn(0.05)
        line = b""
        while not line.endswith(b"\n"):
            line += self.agent.recv(1)
        return dict(json.loads(line))

    def answer(self, word: str) -> None:
        asked = self.asked()
        assert asked["do"] == "pause"
        self.agent.send(f"{word} {asked['nonce']}\n".encode())
        self.turn()

    def end(self) -> None:
        self.capture.end(Request("t", "machine.checkpoint-end", {}))
        self.turn()

    def turn(self, seconds: float = 0.1) -> None:
        self.reactor._stopped = False
        self.reactor.after(seconds, self.reactor.stop)
        self.reactor.run()

    def codes(self) -> list[str]:
        return [method for method, _, _ in self.told]


@pytest.fixture
def bench() -> Iterator[Bench]:
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


def disk(volume: str, mode: str = "nbd", state: str = "attached") -> dict[str, Any]:
    return {"volume": volume, "slot": 1, "mode": mode, "state": state}


def test_it_goes_on_when_its_volumes_have_snapshots_of_where_it_stands_still(bench: Bench) -> None:
    bench.disks = [disk("data")]
    still: list[list[str]] = []

    def snapshot() -> None:
        still.append(list(bench.qemu.names))
        bench.stream.send(b"1")

    bench.on_still = snapshot
    bench.begin(volumes=True)
    bench.answer("paused")
    assert bench.codes() == ["checkpoint.still", "checkpoint.captured"]
    assert bench.told[0][1] == {"disks": bench.disks}
    (names,) = still
    assert "cont" not in names
    assert "blockdev-snapshot" not in names, "the service works while this domain does"
    assert bench.qemu.names[-1] != "stop"


@pytest.mark.parametrize("word", [b"", b"0", None])
def test_without_all_of_its_volumes_snapshots_there_is_no_checkpoint_and_it_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, word: bytes | None
) -> None:
    monkeypatch.setattr(moment, "ANSWER_S", 0.05)
    bench.disks = [disk("data")]
    if word is None:
        bench.on_still = lambda: None  # nobody ever says anything
    else:
        bench.on_still = lambda: (word and bench.stream.send(word), bench.stream.shutdown(1))
    bench.begin(volumes=True)
    bench.answer("paused")
    assert bench.codes()[:2] == ["checkpoint.still", "checkpoint.failed"]
    assert "not all given a snapshot" in bench.told[1][1]["error"]["message"]
    assert "cont" in bench.qemu.names[bench.qemu.names.index("blockdev-snapshot") :]
    bench.turn()
    assert bench.codes()[-1] == "checkpoint.over"


@pytest.mark.parametrize(
    ("there", "volumes", "why"),
    [
        (disk("data", "vhost-user-blk"), True, "could not be restored with it"),
        (disk("data", state="detaching"), True, "plugged in or out"),
        (disk("data"), False, "plugged in or out"),
    ],
)
def test_volumes_that_are_not_of_the_moment_are_no_checkpoint(
    bench: Bench, there: dict[str, Any], volumes: bool, why: str
) -> None:
    bench.begin(volumes=volumes)
    bench.disks = [there]  # by when it stands still
    bench.answer("paused")
    assert bench.codes() == ["checkpoint.failed"]
    assert why in bench.told[0][1]["error"]["message"]
    assert "cont" in bench.qemu.names
    bench.disks = []
    bench.begin(volumes=True)


def test_a_stream_that_was_promised_is_given(bench: Bench) -> None:
    asked = {"room_bytes": MEMORY, "overlay_bytes": 1 << 20, "volumes": True}
    overlay = os.memfd_create("overlay")
    with pytest.raises(Invalid, match="stream"):
        bench.capture.begin(Request("t", "machine.checkpoint", asked, [overlay]))
    os.close(overlay)
    assert bench.qemu.names == []


def test_memory_and_devices_are_captured_between_stop_and_cont_and_its_agent_is_told(
    bench: Bench,
) -> None:
    bench.begin()
    assert "stop" not in bench.qemu.names
    bench.answer("paused")
    assert bench.asked()["do"] == "resume"
    ((method, figures, (state, memory)),) = bench.told
    assert method == "checkpoint.captured"
    assert state == bench.qemu.state
    at = figures["memory_offset"]
    assert memory[at : at + MEMORY] == os.pread(bench.ram, MEMORY, 0)
    assert (figures["memory_bytes"], figures["incremental"]) == (PAGE, False)
    assert 0 < figures["pause_ms"] <= figures["quiet_ms"]
    names = [name for name in bench.qemu.names if name != "query-migrate"]
    still = names[names.index("blockdev-snapshot") : names.index("cont") + 1]
    assert still == ["blockdev-snapshot", "xen-save-devices-state", "migrate-continue", "cont"]
    assert "stop" not in names, "QEMU stops it, when little is left"
    bench.end()
    assert bench.codes()[1:] == ["checkpoint.over"]
    assert bench.qemu.names[-3:] == ["blockdev-del", "blockdev-del", "remove-fd"]
    bench.begin()  # and once more


def test_without_its_agents_word_it_is_never_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "QUIET_S", 0.05)
    bench.begin()
    nonce = bench.asked()["nonce"]
    bench.turn(0.2)
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "did not acknowledge" in figures["error"]["message"]
    assert bench.asked()["do"] == "resume"
    bench.agent.send(f"paused {nonce}\n".encode())  # too late
    bench.turn()
    assert bench.codes() == ["checkpoint.failed"]
    assert bench.qemu.names.count("migrate_cancel") == 1
    assert "migrate-continue" not in bench.qemu.names


@pytest.mark.parametrize("word", ["refused", "paused 0123456789abcdef paused", "ready"])
def test_another_word_than_its_agents_yes_is_none(bench: Bench, word: str) -> None:
    bench.begin()
    bench.answer(word)
    assert "checkpoint.captured" not in bench.codes()
    assert "migrate-continue" not in bench.qemu.names


def test_a_nested_machine_that_runs_though_the_agent_denies_it_is_found_out(bench: Bench) -> None:
    bench.qemu.state = b"QEVM" + processor(0x18C0C2B0) + processor(0x18E0C2B0)
    bench.begin()
    bench.answer("paused")
    assert "checkpoint.captured" not in bench.codes()
    assert "nested VM runs" in bench.told[0][1]["error"]["message"]
    assert bench.qemu.names[-1] != "stop"
    assert "cont" in bench.qemu.names
    bench.turn()
    assert bench.codes() == ["checkpoint.failed", "checkpoint.over"]


@pytest.mark.parametrize(
    "refused", ["blockdev-snapshot", "xen-save-devices-state", "migrate-continue"]
)
def test_what_fails_half_way_goes_on_and_is_taken_back(bench: Bench, refused: str) -> None:
    bench.qemu.refuses.add(refused)
    bench.begin()
    bench.answer("paused")
    assert bench.codes()[0] == "checkpoint.failed"
    after = bench.qemu.names[bench.qemu.names.index(refused) :]
    assert after.index("migrate_cancel") < after.index("cont")
    assert bench.asked()["do"] == "resume"
    bench.turn()
    committed = "block-commit" in bench.qemu.names
    assert committed == (refused != "blockdev-snapshot")
    assert "blockdev-del" in bench.qemu.names
    bench.qemu.refuses.clear()
    bench.begin()


def test_more_memory_than_was_booked_is_given_up_before_it_stands_still(bench: Bench) -> None:
    bench.begin(room_bytes=0)
    with pytest.raises(Busy):
        bench.begin()
    os.pwrite(bench.copy(), bytes(PAGE), 0)
    bench.turn()
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "bytes of memory are in use" in figures["error"]["message"]
    assert "blockdev-snapshot" not in bench.qemu.names
    bench.begin()


def test_memory_that_is_copied_before_anybody_looked_is_copied_again_and_held(bench: Bench) -> None:
    bench.qemu.ends_early = 1
    bench.begin()
    bench.turn()
    while bench.port._nonce != (asked := bench.asked())["nonce"]:
        pass  # it may have been asked in between
    bench.agent.send(f"paused {asked['nonce']}\n".encode())
    bench.turn()
    assert bench.codes() == ["checkpoint.captured"]
    names = bench.qemu.names
    assert names.count("migrate") == 2
    assert names.index("migrate_cancel") < names.index("cont") < names.index("blockdev-snapshot")


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_last_pages_that_are_not_copied_are_no_checkpoint(bench: Bench, end: str) -> None:
    bench.qemu.last_pages = end
    bench.begin()
    bench.answer("paused")
    assert bench.codes()[0] == "checkpoint.failed"
    assert bench.qemu.names[-1] != "stop"
    assert "cont" in bench.qemu.names


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_a_machine_goes_on_though_its_migration_is_not_finished_at_once(
    bench: Bench, end: str
) -> None:
    bench.qemu.last_pages, bench.qemu.unfinished = end, 3
    bench.begin()
    bench.answer("paused")
    assert ("checkpoint.captured" in bench.codes()) == (end == "completed")
    assert bench.qemu.unfinished == 0
    assert bench.qemu.names.count("cont") > 3


def test_given_up_while_memory_is_copied_it_runs_on_and_may_be_taken_again(bench: Bench) -> None:
    bench.begin()
    bench.turn()
    bench.end()
    assert bench.codes()[0] == "checkpoint.failed"
    assert "migrate_cancel" in bench.qemu.names
    bench.begin()
    bench.asked()
    bench.asked()  # to go on, and to be still again
    assert bench.codes().count("checkpoint.failed") == 1


def test_an_overlay_that_is_full_is_told_of_and_written_back_when_nobody_reads_below(
    bench: Bench,
) -> None:
    bench.begin()
    bench.answer("paused")
    bench.qemu.happens("BLOCK_IO_ERROR", {"nospace": True, "action": "stop", "node-name": "x"})
    bench.turn()
    assert bench.codes() == ["checkpoint.captured", "checkpoint.full"]
    assert "block-commit" not in bench.qemu.names
    bench.end()
    assert bench.codes()[-1] == "checkpoint.over"


def test_a_writing_back_that_fails_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.05)
    bench.begin()
    bench.answer("paused")
    bench.qemu.refuses.add("block-commit")
    bench.end()
    assert bench.codes() == ["checkpoint.captured"]
    bench.qemu.refuses.clear()
    bench.turn(0.3)
    assert bench.codes()[-1] == "checkpoint.over"


def test_a_disk_that_stands_still_already_is_no_moment_for_a_checkpoint(bench: Bench) -> None:
    bench.qemu.status = "io-error"
    with pytest.raises(BadState):
        bench.begin()
    assert "migrate" not in bench.qemu.names
    bench.qemu.status = "running"
    bench.begin()
    bench.qemu.status = "io-error"
    bench.answer("paused")
    assert bench.codes() == ["checkpoint.failed"]
    assert "blockdev-snapshot" not in bench.qemu.names


def test_the_flag_of_a_guest_is_looked_for_in_every_processor() -> None:
    outside, inside = processor(0x2B0), processor(0x2B0 | 1 << 21)
    assert not is_inside_guest(b"QEVM" + outside * 3)
    assert is_inside_guest(b"QEVM" + outside * 2 + inside)
    assert not is_inside_guest(b"")


def image(content: dict[int, bytes]) -> tuple[int, int]:
    """A memory with these pages, and QEMU's file of it."""
    ram, file = os.memfd_create("ram"), os.memfd_create("image")
    os.ftruncate(ram, MEMORY)
    for page, data in content.items():
        os.pwrite(ram, data * PAGE, page * PAGE)
    write_image(file, ram)
    return ram, file


def test_a_page_that_became_zero_while_it_was_copied_is_zero() -> None:
    last = MEMORY // PAGE - 1
    ram, file = image({0: b"a", 7: b"b", 8: b"c", 9: b"d", last: b"e"})
    for page in (1, 2, 10, last - 1):  # as they were before
        os.pwrite(file, b"x" * PAGE, PAGES + page * PAGE)
    found = settle(file, MEMORY)
    assert found == (PAGES, 5 * PAGE)
    assert os.pread(file, MEMORY, PAGES) == os.pread(ram, MEMORY, 0)
    for descriptor in (ram, file):
        os.close(descriptor)


@pytest.mark.parametrize(
    ("at", "value"),
    [(64, b"\x03rom"), (79, b"\x02"), (86, b"\x20"), (100, b"\xff"), (92, b"\xff")],
)
def test_memory_in_another_way_than_is_understood_is_refused(at: int, value: bytes) -> None:
    ram, file = image({3: b"a"})
    os.pwrite(file, value, at)
    with pytest.raises(BadState, match="QEMU wrote memory"):
        settle(file, MEMORY)
    for descriptor in (ram, file):
        os.close(descriptor)


def test_only_what_is_there_between_two_offsets_is_found() -> None:
    source = os.memfd_create("source")
    os.ftruncate(source, 64 * PAGE)
    os.pwrite(source, b"a" * PAGE, 0)
    os.pwrite(source, b"b" * 2 * PAGE, 40 * PAGE)
    assert [*extents(source, 0, 64 * PAGE)] == [(0, PAGE), (40 * PAGE, 42 * PAGE)]
    assert [*extents(source, PAGE, 41 * PAGE)] == [(40 * PAGE, 41 * PAGE)]
    assert [*extents(source, 42 * PAGE, 64 * PAGE)] == []
    os.close(source)


def test_a_machine_that_is_not_there_has_no_checkpoint(bench: Bench) -> None:
    bench.port.close()
    bench.begin()
    bench.turn()
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "agent" in figures["error"]["message"]
