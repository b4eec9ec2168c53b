"""The device as NBD clients see it: real ones, and one that breaks the rules."""

import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid
from supercloud.services.protection.engine import Device, backing_bytes, format_device
from support.commandline import wait_for
from support.protected_nbd import (
    CACHE,
    DISC,
    FLUSH,
    FUA,
    READ,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Client,
    listening,
)
from support.protection import BLOCK, KEY, NAME
from support.victim import Victim

SIZE = 64 << 20
EIO, EINVAL, ENOSPC = 5, 22, 28


class Backed:
    """A device over a real file."""

    def __init__(self, place: Path, size: int = SIZE) -> None:
        self.descriptor = os.open(place / "backing", os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self.descriptor, backing_bytes(size))
        seal = format_device(self.descriptor, KEY, NAME, size)
        self.device = Device(self.descriptor, KEY, NAME, seal)
        self.device.serve(self.device.next_epoch)

    def again(self) -> Device:
        seal = self.device.close()
        assert seal is not None
        self.device = Device(self.descriptor, KEY, NAME, seal)
        self.device.serve(self.device.next_epoch)
        return self.device


@pytest.fixture
def backed(tmp_path: Path) -> Iterator[Backed]:
    made = Backed(tmp_path)
    yield made
    made.device.close()
    os.close(made.descriptor)


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- real clients


def test_nbdinfo_sees_what_is_promised(backed: Backed, tmp_path: Path) -> None:
    with listening(backed.device, tmp_path) as uri:
        told = json.loads(run("nbdinfo", "--json", uri))
    export = told["exports"][0]
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"]
    assert export["export-size"] == SIZE
    assert export["block_size_preferred"] == BLOCK
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert export[ability], ability
    assert not export["is_read_only"]
    assert export["contexts"] == ["base:allocation"]


def test_nbdcopy_there_and_back_over_several_connections(backed: Backed, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    rnd = random.Random(1)
    with source.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 8 << 20):
            file.seek(at + rnd.randrange(4096))
            file.write(rnd.randbytes(3 << 20))
    with listening(backed.device, tmp_path) as uri:
        run("nbdcopy", "--flush", "--connections=4", str(source), uri)
        assert backed.device.figures()["zeroed_bytes"] > 0
    with listening(backed.again(), tmp_path) as uri:
        extents = json.loads(run("nbdinfo", "--map", "--json", uri))
        run("nbdcopy", uri, str(back))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
    assert back.read_bytes() == source.read_bytes()
    assert {extent["type"] for extent in extents} == {0, 3}
    assert sum(extent["length"] for extent in extents) == SIZE


def test_qemu_img_bench_and_a_qcow2_inside(backed: Backed, tmp_path: Path) -> None:
    with listening(backed.device, tmp_path) as uri:
        run("qemu-img", "bench", "-q", "-f", "raw", "-t", "none", "-w", "-c", "500", "-d", "16",
            "--flush-interval=50", "--pattern=65", uri)  # fmt: skip
        assert backed.device.read(0, 500 * BLOCK) == b"A" * 500 * BLOCK
        run("qemu-img", "create", "-q", "-f", "qcow2", uri, "32M")
        for command in ("write -P 7 1000 5M", "write -z 1M 1M", "flush"):
            run("qemu-io", "-f", "qcow2", "-c", command, uri)
    with listening(backed.again(), tmp_path) as uri:
        run("qemu-img", "check", "-f", "qcow2", uri)
        checks = ("read -P 7 1000 1047576", "read -P 0 1M 1M", "read -P 7 2M 3M")
        for command in checks:
            assert "Pattern verification failed" not in run(
                "qemu-io", "-f", "qcow2", "-c", command, uri
            )


def test_fio_verifies_mixed_writes(backed: Backed, tmp_path: Path) -> None:
    with listening(backed.device, tmp_path) as uri:
        run("fio", "--name=mixed", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--size=32M",
            "--bsrange=512-128k", "--bs_unaligned", "--iodepth=16", "--verify=crc32c",
            "--fsync=64", "--serialize_overlap=1", "--do_verify=1", cwd=tmp_path)  # fmt: skip
    assert backed.device.figures()["failed_requests"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_killed_under_load_it_keeps_what_was_flushed(tmp_path: Path, seed: int) -> None:
    """SIGKILL in the middle of writes and flushes of four threads: all that was acknowledged is there."""
    backed = Backed(tmp_path)
    seal = backed.device.close()
    for life in range(3):
        path = tmp_path / f"sock{life}"
        victim = Victim(backed.descriptor, seal, path)
        seal = victim.seal
        acknowledged: dict[int, int] = {}
        attempted: dict[int, list[int]] = {}
        enough = threading.Event()

        def load(
            thread: int,
            life=life,
            enough=enough,
            acknowledged=acknowledged,
            attempted=attempted,
            path=path,
        ) -> None:
            client = Client.__new__(Client)
            client.sock, client._cookie = socket.socket(socket.AF_UNIX), 0
            client.sock.connect(str(path))
            client.go()
            rnd, since = random.Random(seed * 100 + thread), {}
            try:
                for step in range(1 << 30):
                    block, value = rnd.randrange(200) * 4 + thread, life << 40 | step << 8 | thread
                    attempted.setdefault(block, []).append(value)
                    assert (
                        client.call(WRITE, block * BLOCK, data=struct.pack("<Q", value) * 512)[0]
                        == 0
                    )
                    since[block] = value
                    if step % 7 == 6:
                        assert client.call(FLUSH)[0] == 0
                        acknowledged.update(since)
                    if step == 150:
                        enough.set()
            except (EOFError, OSError):
                client.close()

        threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        assert enough.wait(120)
        victim.kill()
        for thread in threads:
            thread.join()
        device = Device(backed.descriptor, KEY, NAME, seal)
        for block, values in attempted.items():
            data = device.read(block * BLOCK, BLOCK)
            (found,) = set(struct.unpack("<512Q", data))
            oldest = acknowledged.get(block)
            may = values[values.index(oldest) :] if oldest is not None else [*values, None]
            assert found in may or oldest is None, (block, found)
        assert not device.evidence() or {e.kind for e in device.evidence()} <= {"discarded"}
        seal = device.found
        device.close(commit=False)
        victim.__exit__()
    os.close(backed.descriptor)


# -- the protocol


def test_flush_fua_trim_and_zeroes(backed: Backed) -> None:
    client, data = Client(backed.device).go(), os.urandom(3 * BLOCK)
    before = backed.device.seal.sequence
    assert client.call(WRITE, 0, data=data, flags=FUA)[0] == 0
    assert backed.device.seal.sequence == before + 1
    assert client.call(WRITE, BLOCK * 10, data=data)[0] == 0
    assert client.call(FLUSH)[0] == 0
    assert backed.device.seal.sequence == before + 2
    assert client.call(FLUSH)[0] == 0  # nothing to do, nothing done
    assert backed.device.seal.sequence == before + 2
    assert client.call(TRIM, 100, 2 * BLOCK)[0] == 0  # one whole block of it
    assert client.call(READ, 0, 3 * BLOCK)[1] == data[:BLOCK] + bytes(BLOCK) + data[2 * BLOCK :]
    assert client.call(ZEROES, 10 * BLOCK + 50, 100, flags=FUA)[0] == 0
    assert client.call(READ, 10 * BLOCK, 200)[1] == data[:50] + bytes(100) + data[150:200]
    client.close()
    figures = backed.device.figures  # counted once it is answered
    wait_for(lambda: figures()["flushes"] == 4, 60)  # two of them with a change


def test_what_was_never_written_reads_as_zeros_and_takes_no_room(backed: Backed) -> None:
    client = Client(backed.device).go()
    free = backed.device.figures()["free_slots"]
    assert client.call(READ, 0, 5 << 20)[1] == bytes(5 << 20)
    assert client.call(ZEROES, 0, SIZE)[0] == 0
    assert client.call(FLUSH)[0] == 0
    assert backed.device.figures()["free_slots"] == free
    client.close()


def test_a_request_as_large_as_may_be(backed: Backed) -> None:
    client, data = Client(backed.device).go(), os.urandom(32 << 20)
    assert client.call(WRITE, 7, data=data)[0] == 0
    assert client.call(READ, 7, len(data))[1] == data
    client.close()


def test_an_overwritten_device_never_runs_out_of_room(backed: Backed) -> None:
    client = Client(backed.device).go()
    for turn in range(3):
        for at in range(0, SIZE, 4 << 20):
            assert client.call(WRITE, at, data=bytes([turn + 1]) * (4 << 20))[0] == 0
    assert client.call(READ, SIZE - 1, 1)[1] == b"\3"
    assert backed.again().read(0, BLOCK) == b"\3" * BLOCK
    client.close()


def test_two_connections_see_each_others_writes(backed: Backed) -> None:
    one, other = Client(backed.device).go(), Client(backed.device).go()
    for number in range(50):
        assert one.call(WRITE, number * 100, data=bytes([number]) * 100)[0] == 0
        assert other.call(READ, number * 100, 100)[1] == bytes([number]) * 100
    assert backed.device.figures()["connections"] == 2
    one.close(), other.close()


def test_parts_of_one_block_written_at_once_all_arrive(backed: Backed) -> None:
    clients = [Client(backed.device).go() for _ in range(4)]

    def write(client: Client, number: int) -> None:
        for turn in range(200):
            at = turn % 8 * BLOCK + number * 1024
            assert client.call(WRITE, at, data=bytes([number + 1]) * 1024)[0] == 0

    threads = [
        threading.Thread(target=write, args=pair) for pair in zip(clients, range(4), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block = b"".join(bytes([number + 1]) * 1024 for number in range(4))
    assert backed.device.read(0, 8 * BLOCK) == block * 8
    for client in clients:
        client.close()


def test_it_grows_with_its_file(backed: Backed) -> None:
    os.truncate(backed.descriptor, backing_bytes(2 * SIZE))
    backed.device.write(SIZE - BLOCK, b"x" * BLOCK)
    backed.device.grow(2 * SIZE)
    client = Client(backed.device).go()
    assert client.call(WRITE, 2 * SIZE - BLOCK, data=b"y" * BLOCK)[0] == 0
    client.close()
    device = backed.again()
    assert device.figures()["blocks"] == 2 * SIZE // BLOCK
    assert device.read(SIZE - BLOCK, BLOCK) == b"x" * BLOCK
    assert device.read(2 * SIZE - BLOCK, BLOCK) == b"y" * BLOCK


def test_a_client_that_was_announced_more_follows_its_growth(backed: Backed) -> None:
    client = Client(backed.device, 8 * SIZE).go()
    assert client.size_bytes == 8 * SIZE
    assert client.call(WRITE, SIZE, data=b"y" * BLOCK)[0] == ENOSPC
    assert client.call(READ, SIZE - BLOCK, 2 * BLOCK)[0] == EINVAL
    assert client.call(WRITE, SIZE - BLOCK, data=b"x" * BLOCK)[0] == 0
    os.truncate(backed.descriptor, backing_bytes(2 * SIZE))
    backed.device.grow(2 * SIZE)
    assert client.call(WRITE, 2 * SIZE - BLOCK, data=b"y" * BLOCK)[0] == 0
    assert client.call(READ, SIZE - BLOCK, 2 * BLOCK) == (0, b"x" * BLOCK + bytes(BLOCK))
    assert client.call(WRITE, 2 * SIZE, data=b"z" * BLOCK)[0] == ENOSPC
    client.close()
    for reach in (BLOCK + 1, 1 << 45):
        with pytest.raises(Invalid):
            Client(backed.device, reach)


def test_it_grows_under_clients_that_write(backed: Backed) -> None:
    ends = iter(range(2, 6))
    os.truncate(backed.descriptor, backing_bytes(6 * SIZE))
    over = threading.Event()
    written = [0] * 4

    def write(number: int) -> None:
        client, at = Client(backed.device, 8 * SIZE).go(), number
        while not over.is_set():
            assert client.call(WRITE, at % 4096 * BLOCK, data=bytes([number + 1]) * BLOCK)[0] == 0
            if not at % 64:
                assert client.call(FLUSH)[0] == 0
            written[number], at = at, at + 4
        client.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for end in ends:
        backed.device.grow(end * SIZE)
        backed.device.write(end * SIZE - BLOCK, bytes([end]) * BLOCK)
    while min(written) < 1024:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    device = backed.again()
    assert device.read(0, 1024 * BLOCK) == b"".join(bytes([n % 4 + 1]) * BLOCK for n in range(1024))
    for end in range(2, 6):
        assert device.read(end * SIZE - BLOCK, BLOCK) == bytes([end]) * BLOCK
    assert device.evidence() == []


# -- a client that breaks the rules


@pytest.mark.parametrize(
    ("kind", "offset", "length", "error"),
    [
        (READ, SIZE, 1, EINVAL),
        (READ, (1 << 64) - 1, 2, EINVAL),
        (READ, 0, 0, EINVAL),
        (READ, 0, 33 << 20, 75),
        (TRIM, SIZE - BLOCK, 2 * BLOCK, EINVAL),
        (ZEROES, SIZE, 1, ENOSPC),
        (CACHE, 0, BLOCK, EINVAL),
        (STATUS, 0, BLOCK, EINVAL),
        (99, 0, 0, EINVAL),
    ],
)
def test_requests_out_of_bounds_get_an_error(
    backed: Backed, kind: int, offset: int, length: int, error: int
) -> None:
    client = Client(backed.device).go()
    client.send(kind, offset, length)
    assert client.reply()[0] == error
    assert client.call(READ, 0, 1) == (0, b"\0")
    client.close()


def test_a_write_past_the_end_is_refused_with_its_data_skipped(backed: Backed) -> None:
    client = Client(backed.device).go()
    assert client.call(WRITE, SIZE - 1, data=b"ab")[0] == ENOSPC
    assert client.call(READ, SIZE - 1, 1) == (0, b"\0")
    client.close()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        bytes(100),
        struct.pack(">I", 7),
        struct.pack(">IQII", 3, 0x49484156454F5054, 7, 1 << 31),
        struct.pack(">IQII", 3, 0x49484156454F5054, 10, 4096) + b"\xff" * 4096,
        struct.pack(">IQII", 3, 0x49484156454F5054, 7, 6) + b"\xff" * 6,
        struct.pack(">I", 3) + struct.pack(">QII", 0x49484156454F5054, 99, 0) * 100,
    ],
)
def test_rubbish_ends_its_connection_at_most(backed: Backed, rubbish: bytes) -> None:
    rude, polite = Client(backed.device), Client(backed.device).go()
    rude.sock.sendall(rubbish)
    assert polite.call(READ, 0, 1) == (0, b"\0")
    rude.close(), polite.close()


def test_too_many_connections_are_refused(backed: Backed) -> None:
    from supercloud.model.errors import Busy

    clients = [Client(backed.device) for _ in range(8)]
    with pytest.raises(Busy):
        Client(backed.device)
    for client in clients:
        client.close()


def test_an_oversized_write_ends_the_connection(backed: Backed) -> None:
    client = Client(backed.device).go()
    client.send(WRITE, 0, 33 << 20)
    with pytest.raises(EOFError):
        client.reply()
    client.close()


def test_disconnecting_leaves_the_device_to_others(backed: Backed) -> None:
    client = Client(backed.device).go()
    client.send(DISC)
    with pytest.raises(EOFError):
        client.reply()
    client.close()
    again = Client(backed.device).go()
    assert again.call(READ, 0, 1) == (0, b"\0")
    again.close()
