"""What a monitor does for a checkpoint, against a pretended QEMU and a pretended agent."""

import os
from collections.abc import Iterator

import pytest

from supercloud.lower.vmm import checkpoint
from supercloud.lower.vmm.checkpoint import is_inside_guest
from supercloud.lower.vmm.precopy import extents, settle
from supercloud.model.errors import BadState, Busy
from support.capture import MEMORY, PAGE, PAGES, Bench, capturing, processor, write_image


@pytest.fixture
def bench() -> Iterator[Bench]:
    with capturing() as made:
        yield made


def test_memory_and_devices_are_captured_between_stop_and_cont_and_its_agent_is_told(
    bench: Bench,
) -> None:
    bench.begin()
    assert "stop" not in bench.qemu.names
    bench.answer("paused")
    bench.comes("checkpoint.captured")
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
    bench.comes("checkpoint.over")
    assert bench.codes()[1:] == ["checkpoint.over"]
    last = ["blockdev-del", "blockdev-del", "remove-fd"]
    bench.until(lambda: bench.qemu.names[-3:] == last)
    bench.begin()  # and once more


def test_without_its_agents_word_it_is_never_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "QUIET_S", 0.05)
    bench.begin()
    nonce = bench.asked()["nonce"]
    bench.comes("checkpoint.failed")
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "did not acknowledge" in figures["error"]["message"]
    assert bench.asked()["do"] == "resume"
    bench.say("paused", nonce)  # too late
    assert bench.codes() == ["checkpoint.failed"]
    assert bench.qemu.names.count("migrate_cancel") == 1
    assert "migrate-continue" not in bench.qemu.names


@pytest.mark.parametrize("word", ["refused", "paused 0123456789abcdef paused", "ready"])
def test_another_word_than_its_agents_yes_is_none(bench: Bench, word: str) -> None:
    bench.begin()
    bench.answer(word)
    bench.end()
    bench.comes("checkpoint.failed")
    assert "checkpoint.captured" not in bench.codes()
    assert "migrate-continue" not in bench.qemu.names


def test_a_nested_machine_that_runs_though_the_agent_denies_it_is_found_out(bench: Bench) -> None:
    bench.qemu.state = b"QEVM" + processor(0x18C0C2B0) + processor(0x18E0C2B0)
    bench.begin()
    bench.answer("paused")
    bench.comes("checkpoint.failed")
    assert "checkpoint.captured" not in bench.codes()
    assert "nested VM runs" in bench.told[0][1]["error"]["message"]
    assert bench.qemu.names[-1] != "stop"
    assert "cont" in bench.qemu.names
    bench.comes("checkpoint.over")
    assert bench.codes() == ["checkpoint.failed", "checkpoint.over"]


@pytest.mark.parametrize(
    "refused", ["blockdev-snapshot", "xen-save-devices-state", "migrate-continue"]
)
def test_what_fails_half_way_goes_on_and_is_taken_back(bench: Bench, refused: str) -> None:
    bench.qemu.refuses.add(refused)
    bench.begin()
    bench.answer("paused")
    bench.comes("checkpoint.failed")
    assert bench.codes()[0] == "checkpoint.failed"
    after = bench.qemu.names[bench.qemu.names.index(refused) :]
    assert after.index("migrate_cancel") < after.index("cont")
    assert bench.asked()["do"] == "resume"
    bench.until(lambda: not bench.capture.is_under_way)
    committed = "block-commit" in bench.qemu.names
    assert committed == (refused != "blockdev-snapshot")
    bench.until(lambda: "blockdev-del" in bench.qemu.names)
    bench.qemu.refuses.clear()
    bench.begin()


def test_more_memory_than_was_booked_is_given_up_before_it_stands_still(bench: Bench) -> None:
    bench.begin(room_bytes=0)
    with pytest.raises(Busy):
        bench.begin()
    os.pwrite(bench.copy(), bytes(PAGE), 0)
    bench.comes("checkpoint.failed")
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "bytes of memory are in use" in figures["error"]["message"]
    assert "blockdev-snapshot" not in bench.qemu.names
    bench.begin()


def test_memory_that_is_copied_before_anybody_looked_is_copied_again_and_held(bench: Bench) -> None:
    bench.qemu.ends_early = 1
    bench.begin()
    bench.until(lambda: bench.qemu.names.count("migrate") == 2 and bench.is_held())
    while bench.port._nonce != (asked := bench.asked())["nonce"]:
        pass  # it may have been asked in between
    bench.say("paused", asked["nonce"])
    bench.comes("checkpoint.captured")
    assert bench.codes() == ["checkpoint.captured"]
    names = bench.qemu.names
    assert names.count("migrate") == 2
    assert names.index("migrate_cancel") < names.index("cont") < names.index("blockdev-snapshot")


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_last_pages_that_are_not_copied_are_no_checkpoint(bench: Bench, end: str) -> None:
    bench.qemu.last_pages = end
    bench.begin()
    bench.answer("paused")
    bench.comes("checkpoint.failed")
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
    bench.until(bench.codes)
    assert ("checkpoint.captured" in bench.codes()) == (end == "completed")
    assert bench.qemu.unfinished == 0
    assert bench.qemu.names.count("cont") > 3


def test_given_up_while_memory_is_copied_it_runs_on_and_may_be_taken_again(bench: Bench) -> None:
    bench.begin()
    bench.until(bench.is_held)
    bench.end()
    assert bench.codes()[0] == "checkpoint.failed"
    assert "migrate_cancel" in bench.qemu.names
    bench.begin()
    assert [bench.asked()["do"] for _ in range(3)] == ["pause", "resume", "pause"]
    assert bench.codes().count("checkpoint.failed") == 1


def test_an_overlay_that_is_full_is_told_of_and_written_back_when_nobody_reads_below(
    bench: Bench,
) -> None:
    bench.begin()
    bench.answer("paused")
    bench.comes("checkpoint.captured")
    bench.qemu.happens("BLOCK_IO_ERROR", {"nospace": True, "action": "stop", "node-name": "x"})
    bench.comes("checkpoint.full")
    assert bench.codes() == ["checkpoint.captured", "checkpoint.full"]
    assert "block-commit" not in bench.qemu.names
    bench.end()
    bench.comes("checkpoint.over")
    assert bench.codes()[-1] == "checkpoint.over"


def test_a_writing_back_that_fails_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.05)
    bench.begin()
    bench.answer("paused")
    bench.comes("checkpoint.captured")
    bench.qemu.refuses.add("block-commit")
    bench.end()
    assert bench.codes() == ["checkpoint.captured"]
    bench.qemu.refuses.clear()
    bench.comes("checkpoint.over")
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
    bench.comes("checkpoint.failed")
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
    bench.comes("checkpoint.failed")
    ((method, figures, _),) = bench.told
    assert method == "checkpoint.failed"
    assert "agent" in figures["error"]["message"]
