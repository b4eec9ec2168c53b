"""The dirty pages of a real process that maps a file privately, found and copied."""

import contextlib
import fcntl
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys

import pytest

from supercloud.model.errors import BadState, Invalid, NoResources
from supercloud.services.checkpoint import pages
from supercloud.services.checkpoint.pages import PAGE_BYTES, Captured, Memory, Run

IMAGE_PAGES = 4096
PROGRAM = """
import mmap, os, sys
file = int(sys.argv[1])
size = os.fstat(file).st_size
os.lseek(file, 0, 0)
flags = mmap.MAP_SHARED if sys.argv[2] == "shared" else mmap.MAP_PRIVATE
memory = mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
for line in sys.stdin:
    word, *numbers = line.split()
    for number in map(int, numbers):
        at = number * 4096
        if word == "write":
            memory[at + 7 : at + 15] = b"%08d" % number
        else:
            memory[at]
    print("done", flush=True)
"""


class Process:
    """It maps the file and touches the pages that it is told to."""

    def __init__(self, file, how="private"):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(file), how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[file],
        )  # fmt: skip
        self.tell("read", [0])

    @property
    def pid(self):
        return self.process.pid

    def tell(self, word, numbers):
        self.process.stdin.write(f"{word} {' '.join(map(str, numbers))}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def image():
    file = os.memfd_create("image")
    os.truncate(file, IMAGE_PAGES * PAGE_BYTES)
    for page in range(0, IMAGE_PAGES, 3):
        os.pwrite(file, b"base%08d" % page, page * PAGE_BYTES)
    yield file
    os.close(file)


@pytest.fixture
def process(image):
    made = Process(image)
    yield made
    made.close()


def captured_of(process, image):
    memory, into = Memory(process.pid, image), os.memfd_create("captured")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        memory.capture(into)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        memory.close()
    return Captured(into)


def runs_of(numbers):
    runs = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda p: p[1] - p[0]):
        found = [page for _, page in group]
        runs.append(Run(found[0], len(found)))
    return runs


def test_a_process_that_only_reads_has_no_dirty_pages(process, image):
    process.tell("read", range(0, IMAGE_PAGES, 2))
    assert captured_of(process, image).runs == []


@pytest.mark.parametrize("seed", range(3))
def test_dirty_pages_are_exactly_those_written_with_what_was_written(process, image, seed):
    chance = random.Random(seed)
    written = {chance.randrange(IMAGE_PAGES) for _ in range(400)} | {0, IMAGE_PAGES - 1}
    written |= set(range(1000, 1100))
    process.tell("read", range(IMAGE_PAGES))
    process.tell("write", written)
    captured = captured_of(process, image)
    assert captured.runs == runs_of(written)
    assert captured.size_bytes == IMAGE_PAGES * PAGE_BYTES
    for page in written:
        expected = bytearray(os.pread(image, PAGE_BYTES, page * PAGE_BYTES))
        expected[7:15] = b"%08d" % page
        assert captured.read_at(page * PAGE_BYTES, PAGE_BYTES) == expected


@pytest.mark.parametrize("more", [(), range(2000, 2300), range(0, IMAGE_PAGES, 2)])
def test_room_that_was_made_before_is_used_or_made_larger(process, image, more):
    process.tell("write", [3, 5, 1000])
    memory, into = Memory(process.pid, image), os.memfd_create("captured")
    room = memory.make_room(into)
    process.tell("write", more)
    written = {3, 5, 1000, *more}
    assert memory.capture(into, room=room) == len(written) * PAGE_BYTES
    captured = Captured(into)
    assert captured.runs == runs_of(written)
    for page in (5, max(written)):
        data = captured.read_at(page * PAGE_BYTES, PAGE_BYTES)
        assert data[7:15] == b"%08d" % page
    least = os.fstat(into).st_size
    assert least < (len(written) + 64) * PAGE_BYTES, "what it has too much is given back"
    with pytest.raises(NoResources):
        memory.capture(os.memfd_create("small"), PAGE_BYTES)
    memory.close()


def test_pages_out_of_a_copy_of_all_memory_are_as_those_that_were_captured():
    offset, size = 1 << 20, 64 * PAGE_BYTES
    copy, into = os.memfd_create("copy"), os.memfd_create("captured")
    os.pwrite(copy, os.urandom(size), offset)
    runs = [Run(0, 1), Run(7, 3), Run(63, 1)]
    assert pages.capture_of(copy, offset, size, runs, into) == 5 * PAGE_BYTES
    captured = Captured(into)
    assert (captured.runs, captured.size_bytes) == (runs, size)
    for run in runs:
        at, length = run.page * PAGE_BYTES, run.length * PAGE_BYTES
        assert captured.read_at(at, length) == os.pread(copy, length, offset + at)
    with pytest.raises(BadState):
        pages.capture_of(copy, offset, size + PAGE_BYTES, [Run(64, 1)], into)
    with pytest.raises(Invalid):
        Captured(into)
    for file in (copy, into):
        os.close(file)


def test_the_process_may_go_on_and_the_copy_stays(process, image):
    process.tell("write", [5])
    captured = captured_of(process, image)
    process.tell("write", [6])
    process.close()
    assert captured.runs == [Run(5, 1)]
    assert captured.read_at(5 * PAGE_BYTES + 7, 8) == b"00000005"


def test_the_scan_and_the_page_table_agree_also_past_the_scan_s_buffer(process, image, monkeypatch):
    process.tell("read", range(IMAGE_PAGES))
    process.tell("write", range(0, IMAGE_PAGES, 2))
    monkeypatch.setattr(pages, "_REGIONS", 100)
    (where,) = pages.mappings(process.pid, image)
    pagemap = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY)
    try:
        listed = [*pages.listed(pagemap, where.start, where.end)]
        assert len(listed) == IMAGE_PAGES // 2
        with contextlib.suppress(OSError):  # before Linux 6.7
            fcntl.ioctl(
                pagemap, pages._SCAN, bytearray(pages._SCAN_ARGUMENT.pack(*[96, *[0] * 11]))
            )
            assert [*pages.scanned(pagemap, where.start, where.end)] == listed
    finally:
        os.close(pagemap)


def test_a_kernel_without_the_scan_gives_the_same(process, image, monkeypatch):
    def refuse(*_arguments):
        raise OSError(25, "Inappropriate ioctl for device")
        yield

    process.tell("write", [1, 2, 3, 700])
    monkeypatch.setattr(pages, "scanned", refuse)
    assert captured_of(process, image).runs == [Run(1, 3), Run(700, 1)]


def test_an_image_in_several_mappings_is_one(image):
    """As after a VMM has given advice to parts of it, which splits the mapping."""
    memory = mmap.mmap(image, 0, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_DONTDUMP, 1024 * PAGE_BYTES, 64 * PAGE_BYTES)
    for page in (3, 1023, 1024, 1087, 1088, 4000):
        memory[page * PAGE_BYTES] = 1
    assert len(pages.mappings(os.getpid(), image)) == 3
    own, into = Memory(os.getpid(), image), os.memfd_create("captured")
    own.capture(into)
    own.close()
    captured = Captured(into)
    found = [page for run in captured.runs for page in range(run.page, run.page + run.length)]
    assert found == [3, 1023, 1024, 1087, 1088, 4000]
    for page in found:
        at = page * PAGE_BYTES
        assert captured.read_at(at, PAGE_BYTES) == memory[at : at + PAGE_BYTES]
    memory.close()


def test_memory_that_is_shared_or_not_mapped_is_refused(image):
    shared = Process(image, "shared")
    try:
        with pytest.raises(BadState, match="does not map"):
            Memory(shared.pid, image)
    finally:
        shared.close()
    with pytest.raises(BadState, match="does not map"):
        Memory(os.getpid(), image)


def test_the_whole_is_the_base_under_what_was_captured(process, image):
    written = {0, 1, 15, 16, 17, 33, IMAGE_PAGES - 1}
    process.tell("write", written)
    whole = captured_of(process, image).over(lambda offset, size: os.pread(image, size, offset))
    expected = bytearray(os.pread(image, IMAGE_PAGES * PAGE_BYTES, 0))
    for page in written:
        expected[page * PAGE_BYTES + 7 : page * PAGE_BYTES + 15] = b"%08d" % page
    assert whole(0, len(expected)) == expected
    for offset, size in ((10, 3), (PAGE_BYTES * 2, 5 * PAGE_BYTES), (15 * PAGE_BYTES + 8, 9000)):
        assert whole(offset, size) == expected[offset : offset + size]


def test_a_capture_that_makes_no_sense_is_refused(process, image):
    process.tell("write", [4, 9])
    good = captured_of(process, image)
    data = os.pread(good._file, 1 << 20, 0)
    for at, replacement in (
        (0, b"X"),  # magic
        (8, bytes(8)),  # an image of no pages
        (16, (5).to_bytes(8, "little")),  # more runs than pages
        (24, (3).to_bytes(8, "little")),  # a page too many
        (32, (9).to_bytes(4, "little")),  # runs that overlap
        (36, bytes(4)),  # an empty run
        (40, (IMAGE_PAGES).to_bytes(4, "little")),  # beyond the end
    ):
        file = os.memfd_create("bad")
        os.write(file, data[:at] + replacement + data[at + len(replacement) :])
        with pytest.raises(Invalid):
            Captured(file)
    for length in (0, 10, 40, len(data) - 1):
        file = os.memfd_create("short")
        os.write(file, data[:length])
        with pytest.raises(Invalid):
            Captured(file)
    with pytest.raises(Invalid):
        good.read_at(5 * PAGE_BYTES, 1)
