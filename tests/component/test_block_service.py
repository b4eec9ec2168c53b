"""The block service with real storage daemons, on raw files behind other storage daemons."""

import contextlib
import errno
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    Permanent,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.services.block.service import LEGAL
from support.block import Bench
from support.nbd import MIB, Client, NbdError

KIB, SECTOR = 1 << 10, 512


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_what_is_written_is_there_when_it_is_opened_again(bench: Bench) -> None:
    assert bench.create("data")["created"]
    bench.write("data", 5 * MIB, b"kept" * KIB)
    bench.call("volume.close", volume="data")
    with pytest.raises(NotFound):
        bench.call("volume.stats", volume="data")
    assert bench.open("data")["size_bytes"] == 64 * MIB
    assert bench.read("data", 5 * MIB, 4 * KIB) == b"kept" * KIB
    assert bench.read("data", 0, KIB) == bytes(KIB)


def test_creating_again_opens_what_is_there_and_never_overwrites(bench: Bench) -> None:
    bench.create("data")
    bench.write("data", 0, b"precious")
    with pytest.raises(Exists):
        bench.create("data")
    bench.call("volume.close", volume="data")
    with pytest.raises(Exists):
        bench.create("data", 32 * MIB)
    assert not bench.create("data")["created"]
    assert bench.read("data", 0, 8) == b"precious"


def test_a_raw_volume_is_its_device(bench: Bench) -> None:
    with pytest.raises(Invalid):
        bench.create("plain", 32 * MIB, format="raw", device_bytes=64 * MIB)
    bench.create("plain", 64 * MIB, format="raw")
    bench.write("plain", MIB, b"plain")
    assert bench.device("plain").path.read_bytes()[MIB : MIB + 5] == b"plain"
    for method in ("volume.snapshot", "volume.grow"):
        with pytest.raises(Unsupported):
            bench.call(method, volume="plain", snapshot="s", size_bytes=128 * MIB)


def test_growing_keeps_what_is_there(bench: Bench) -> None:
    bench.create("data")
    bench.write("data", 0, b"old")
    bench.call("volume.grow", volume="data", size_bytes=128 * MIB)
    bench.write("data", 128 * MIB - 3, b"end")
    assert bench.read("data", 0, 3) == b"old"
    with pytest.raises(Invalid):
        bench.call("volume.grow", volume="data", size_bytes=64 * MIB)
    with pytest.raises(NoResources):
        bench.call("volume.grow", volume="data", size_bytes=512 * MIB)
    with bench.client("data"), pytest.raises(BadState):
        bench.call("volume.grow", volume="data", size_bytes=160 * MIB)


def test_going_back_to_a_snapshot_and_deleting_it(bench: Bench) -> None:
    bench.create("data")
    with bench.client("data") as client:  # snapshots are taken under a machine's writes
        client.write(0, b"first")
        bench.call("volume.snapshot", volume="data", snapshot="one")
        client.write(0, b"other")
        with pytest.raises(BadState):
            bench.call("volume.revert", volume="data", snapshot="one")
    with pytest.raises(Exists):
        bench.call("volume.snapshot", volume="data", snapshot="one")
    assert bench.read("data", 0, 5) == b"other"
    bench.call("volume.revert", volume="data", snapshot="one")
    assert bench.read("data", 0, 5) == b"first"
    [taken] = bench.call("volume.snapshots", volume="data")["snapshots"]
    assert taken["snapshot"] == "one"
    assert abs(taken["taken_s"] - time.time()) < 3600
    bench.call("volume.snapshot-delete", volume="data", snapshot="one")
    bench.call("volume.snapshot-delete", volume="data", snapshot="one")  # done is done
    with pytest.raises(NotFound):
        bench.call("volume.revert", volume="data", snapshot="one")
    assert bench.read("data", 0, 5) == b"first"


def test_a_device_that_waits_makes_writers_wait_and_loses_nothing(bench: Bench) -> None:
    """Full at the provider: the device's service holds the requests that it has no room for."""
    bench.create("data")
    device = bench.device("data")
    with bench.client("data") as client:
        with device.holding():
            client.send_write(0, b"held" * KIB)
            client.sock.settimeout(2)
            with pytest.raises(TimeoutError):
                client.answered()
        client.sock.settimeout(120)
        client.answered()
        client.flush()
    assert bench.read("data", 0, 4 * KIB) == b"held" * KIB


def test_a_daemon_that_waits_amid_a_command_does_not_hold_up_other_volumes(bench: Bench) -> None:
    for name in ("data", "other"):
        bench.create(name)
    with bench.device("data").holding():
        with pytest.raises(Temporary, match="no answer"):
            bench.call("volume.snapshot", volume="data", snapshot="one")
        for _ in range(100):  # at once
            with pytest.raises(Temporary, match="has not answered"):
                bench.call("volume.snapshots", volume="data")
        bench.write("other", 0, b"goes on")
    volume = bench.service._volumes["data"]
    bench.until(lambda: not volume.daemon._qmp.is_behind)
    assert [s["snapshot"] for s in bench.call("volume.snapshots", volume="data")["snapshots"]] in (
        [],
        ["one"],
    )
    assert bench.read("other", 0, 7) == b"goes on"


def test_a_write_that_the_device_has_no_room_for_fails_with_that_error_and_the_rest_goes_on(
    bench: Bench,
) -> None:
    """Exports cannot pause: a device that refuses is seen by the writer, who tries again."""
    bench.device("data", 64 * MIB, no_room=2048)
    bench.create("data", 64 * MIB, format="raw")
    with bench.client("data") as client:
        client.write(0, b"before")
        with pytest.raises(NbdError) as refusal:
            client.write(MIB, b"x" * SECTOR)
        assert refusal.value.args[0] == errno.ENOSPC
        client.write(MIB, b"x" * SECTOR)
        client.flush()
        assert client.read(0, 6) == b"before"


def test_clones_of_what_is_there_and_of_a_snapshot(bench: Bench) -> None:
    for name in ("data", "now", "then"):
        bench.create(name)
    bench.write("data", 0, b"then")
    bench.call("volume.snapshot", volume="data", snapshot="old")
    with bench.client("data") as client:
        client.write(0, b"now!")
        bench.call("volume.clone", volume="data", to="now")
        client.write(0, b"late")  # while it is being copied or after
        assert bench.heard("volume.copied") == {"volume": "data", "to": "now", "error": ""}
    bench.clone("data", "then", "old")
    with pytest.raises(Busy):
        bench.call("volume.close", volume="data")
    with pytest.raises(Busy):
        bench.call("volume.snapshot-delete", volume="data", snapshot="old")
    with pytest.raises(Busy):
        bench.attach("then")
    assert bench.heard("volume.copied")["error"] == ""
    contents = {name: bench.read(name, 0, 4) for name in ("data", "now", "then")}
    assert contents == {"data": b"late", "now": b"now!", "then": b"then"}


def test_what_has_grown_since_a_snapshot_stays_so_in_it_and_in_its_clones(bench: Bench) -> None:
    bench.create("data")
    bench.write("data", 0, b"then")
    bench.call("volume.snapshot", volume="data", snapshot="old")
    bench.call("volume.grow", volume="data", size_bytes=96 * MIB)
    bench.write("data", 96 * MIB - 3, b"end")
    bench.create("then", 96 * MIB)
    bench.clone("data", "then", "old")
    assert bench.heard("volume.copied")["error"] == ""
    assert bench.call("volume.revert", volume="data", snapshot="old")["size_bytes"] == 96 * MIB
    for name in ("data", "then"):
        assert bench.read(name, 0, 4) == b"then"
        assert bench.read(name, 96 * MIB - 3, 3) == bytes(3)


def test_a_snapshot_is_cloned_under_a_machine_that_writes_over_all_of_it(bench: Bench) -> None:
    for name in ("data", "then"):
        bench.create(name)
    pieces = [bytes([number + 1]) * MIB for number in range(64)]
    with bench.client("data") as client:
        for number, piece in enumerate(pieces):
            client.write(number * MIB, piece)
        client.flush()
        bench.call("volume.snapshot", volume="data", snapshot="old")
        over = threading.Event()

        def write() -> None:
            while not over.is_set():
                for number in range(64):
                    client.write(number * MIB, b"\xff" * MIB)
                client.flush()

        writer = threading.Thread(target=write)
        bench.clone("data", "then", "old")
        writer.start()
        assert bench.heard("volume.copied")["error"] == ""
        over.set()
        writer.join()
        assert client.read(0, 2) == b"\xff\xff"
    assert [bench.read("then", number * MIB, MIB) for number in range(64)] == pieces
    bench.call("volume.close", volume="data")
    bench.open("data")  # and the source's image is in order
    bench.call("volume.revert", volume="data", snapshot="old")
    assert bench.read("data", 63 * MIB, MIB) == pieces[63]


def test_a_copy_between_volumes_of_two_sizes_is_refused_and_leaves_both_usable(
    bench: Bench,
) -> None:
    bench.create("data")
    bench.create("small", 32 * MIB)
    with pytest.raises(Invalid, match="33554432"):
        bench.call("volume.clone", volume="data", to="small")
    with pytest.raises(Invalid):
        bench.call("volume.backup", volume="data", to="data", bitmap="b")
    bench.write("small", 0, b"ok")


def back_up(bench: Bench, **expected: object) -> dict[str, object]:
    begun: dict[str, object] = bench.call("volume.backup", volume="data", to="safe", bitmap="daily")
    assert bench.heard("volume.copied")["error"] == ""
    for name, value in expected.items():
        assert begun[name] == value
    return begun


def test_a_second_backup_copies_exactly_what_has_changed(bench: Bench) -> None:
    bench.create("data")
    bench.create("safe")
    bench.write("data", 0, b"a" * MIB)
    back_up(bench, full=True)
    assert bench.read("safe", 0, MIB) == b"a" * MIB
    # a change of the copy's own shows what an increment does not touch
    bench.write("safe", 10 * MIB, b"untouched")
    bench.write("data", 3 * MIB, b"b" * (64 * KIB))
    bench.write("data", 7 * MIB + 5, b"c")
    back_up(bench, full=False, bytes=128 * KIB)
    bench.call("volume.close", volume="data")  # the bitmap is on the device
    bench.open("data")
    bench.write("data", 9 * MIB, b"d" * (64 * KIB))
    back_up(bench, full=False, bytes=64 * KIB)
    back_up(bench, full=False, bytes=0)
    assert bench.read("safe", 10 * MIB, 9) == b"untouched"
    bench.write("safe", 10 * MIB, bytes(9))
    for offset in range(0, 64 * MIB, 8 * MIB):
        assert bench.read("safe", offset, 8 * MIB) == bench.read("data", offset, 8 * MIB)


def test_a_backup_after_going_back_or_after_a_crash_is_a_full_one(bench: Bench) -> None:
    bench.create("data")
    bench.create("safe")
    bench.call("volume.snapshot", volume="data", snapshot="s")
    back_up(bench, full=True)
    assert bench.call("volume.revert", volume="data", snapshot="s")["lost_bitmaps"] == ["daily"]
    back_up(bench, full=True)
    bench.call("volume.close", volume="data")
    bench.open("data")  # the bitmap is stored, and in use from now on
    back_up(bench, full=False)
    bench.kill("data")
    bench.open("data")
    assert "killed" in str(back_up(bench, full=True)["reason"])


def test_nothing_acknowledged_is_lost_when_the_daemon_is_killed(bench: Bench) -> None:
    bench.create("data")
    rng = random.Random(7)
    for _ in range(3):
        client = Client(bench.attach("data"), "data")
        victim = bench.pid("data")
        killer = threading.Timer(rng.uniform(0.05, 0.4), os.kill, (victim, 9))
        killer.start()
        flushed = -1
        with contextlib.suppress(OSError):
            for block in range(64 * MIB // (64 * KIB)):
                client.write(block * 64 * KIB, bytes([block % 251 + 1]) * (64 * KIB))
                client.flush()
                flushed = block
        killer.join()
        told = bench.heard("volume.lost")
        assert told["volume"] == "data"
        assert told["machine"] == "m"
        assert "SIGKILL" in told["reason"]
        bench.open("data")
        with bench.client("data", machine="another") as client:
            for block in range(flushed + 1):
                data = client.read(block * 64 * KIB, 64 * KIB)
                assert data == bytes([block % 251 + 1]) * (64 * KIB)


def test_a_copy_ends_with_an_error_when_its_target_dies(bench: Bench) -> None:
    for name in ("data", "safe"):
        bench.create(name)
    bench.write("data", 0, b"x" * MIB)
    with bench.device("safe").holding():
        bench.call("volume.backup", volume="data", to="safe", bitmap="daily")
        os.kill(bench.pid("safe"), 9)
        assert "safe" in bench.heard("volume.copied")["error"]
    assert bench.heard("volume.lost")["volume"] == "safe"
    bench.open("safe")
    back_up(bench, full=True)
    assert bench.read("safe", 0, MIB) == b"x" * MIB


def seconds_to_write(client: Client, size_bytes: int, piece_bytes: int) -> float:
    started_s = time.monotonic()
    for offset in range(0, size_bytes, piece_bytes):
        client.write(offset, b"t" * piece_bytes)
    return time.monotonic() - started_s


def test_throttling_limits_and_is_changed_under_a_writer(bench: Bench) -> None:
    bench.create("data")
    with bench.client("data") as client:
        bench.call("volume.throttle", volume="data", iops=0, bytes_per_s=2 * MIB)
        bytes_s = seconds_to_write(client, 8 * MIB, 64 * KIB)
        bench.call("volume.throttle", volume="data", iops=20, bytes_per_s=0)
        operations_s = seconds_to_write(client, 80 * 4 * KIB, 4 * KIB)
        assert bytes_s > 2.5  # 4 s but for the burst
        assert operations_s > 2.5
        bench.call("volume.throttle", volume="data", iops=0, bytes_per_s=64 * KIB)
        for _ in range(2):  # the second one waits for what the first one took
            client.send_write(0, b"t" * 16 * MIB)
        bench.call("volume.throttle", volume="data", iops=0, bytes_per_s=0)
        started_s = time.monotonic()
        for _ in range(2):
            client.answered()
        assert time.monotonic() - started_s < 120  # 256 s by the old limit


def test_vhost_user_onto_private_ram_is_refused_with_the_reason(bench: Bench) -> None:
    bench.create("data")
    with pytest.raises(Unsupported, match="private RAM"):
        bench.attach("data", mode="vhost-user-blk", ram_shared=False)
    bench.attach("data", mode="vhost-user-blk", ram_shared=True).close()
    bench.call("volume.detach", volume="data")
    bench.call("volume.detach", volume="data")  # done is done


def test_one_machine_at_a_time_has_a_volume(bench: Bench) -> None:
    bench.create("data")
    first = bench.attach("data", "one")
    with pytest.raises(BadState, match="one"):
        bench.attach("data", "two")
    for method in ("volume.close", "volume.delete"):
        with pytest.raises(BadState):
            bench.call(method, volume="data")
    with bench.client("data", machine="one"):  # its QEMU was started again: the old end is dead
        first.settimeout(30)
        assert first.recv(1 << 16).startswith(b"NBDMAGIC")
        assert first.recv(1) == b""
    with bench.client("data", machine="two", read_only=True) as client:
        with pytest.raises(NbdError):
            client.write(0, b"x")


def test_growing_under_vhost_user_before_the_machine_has_taken_it(bench: Bench) -> None:
    """The daemon must live on: QEMU 10 dies when nobody has connected to the export yet."""
    bench.create("data")
    with bench.attach("data", mode="vhost-user-blk", ram_shared=True):
        pid = bench.pid("data")
        bench.call("volume.grow", volume="data", size_bytes=96 * MIB)
        assert bench.call("volume.stats", volume="data")["size_bytes"] == 96 * MIB
        assert bench.pid("data") == pid


def test_growing_with_its_device_under_a_machine(bench: Bench) -> None:
    """The device announces more than it has; the service is told how much that is."""
    bench.create("data", 32 * MIB, device_bytes=8 << 40, has_bytes=48 * MIB)
    bench.write("data", 0, b"old")
    with pytest.raises(NoResources):
        bench.call("volume.grow", volume="data", size_bytes=64 * MIB)
    with bench.attach("data", mode="vhost-user-blk", ram_shared=True):
        for _ in range(2):
            larger = {"size_bytes": 64 * MIB, "device_bytes": 96 * MIB}
            grown = bench.call("volume.grow", volume="data", **larger)
            assert (grown["size_bytes"], grown["device_bytes"]) == (64 * MIB, 96 * MIB)
    bench.call("volume.detach", volume="data")
    pieces = [bytes([number]) * MIB for number in range(64)]
    with bench.client("data") as client:
        assert client.read(0, 3) == b"old"
        for number, piece in enumerate(pieces):
            client.write(number * MIB, piece)
        client.flush()
    bench.call("volume.close", volume="data")
    bench.open("data", device_bytes=96 * MIB)
    assert [bench.read("data", number * MIB, MIB) for number in range(64)] == pieces


def test_a_device_that_holds_no_volume_or_is_none(bench: Bench) -> None:
    empty = bench.device("empty")
    with pytest.raises(Permanent, match="no volume"):
        bench.open("empty")
    assert set(empty.path.read_bytes()) == {0}  # and nothing was written to it
    ours, theirs = socket.socketpair()
    ours.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(Invalid, match="NBD"):
        bench.call("volume.open", [theirs.detach()], volume="x", format="raw")
    ours.close()
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(Invalid, match="socket"):
        bench.call("volume.open", [reading], volume="x", format="raw")
    with pytest.raises(Invalid, match="missing"):
        bench.call("volume.open", volume="x", format="raw")


def test_a_damaged_image_is_refused_and_left_alone(bench: Bench) -> None:
    bench.create("data")
    bench.write("data", 0, b"x" * MIB)
    bench.call("volume.close", volume="data")
    path = bench.device("data").path
    with path.open("r+b") as file:
        file.seek(40)  # the L1 table's offset, in the header
        file.write(b"\0\0\0\0\x7f\xff\0\0")
    before = path.read_bytes()
    with pytest.raises(SupercloudError):
        bench.open("data")
    assert path.read_bytes() == before


GARBAGE = (
    None,
    "",
    "../../etc",
    "a" * 64,
    "-x",
    -1,
    1.5,
    True,
    [],
    {"a": 1},
    "driver=file",
    1 << 70,
)


@pytest.mark.parametrize("method", sorted({*LEGAL, "volume.create", "volume.open"}))
def test_garbage_is_refused_by_name(bench: Bench, method: str) -> None:
    if method in LEGAL:
        bench.create("data")
    for garbage in GARBAGE:
        with pytest.raises((Invalid, NotFound)):
            bench.call(method, volume=garbage)
    if method in ("volume.close", "volume.delete", "volume.detach", "volume.stats"):
        return
    if method == "volume.snapshots":
        return
    names = ("size_bytes", "snapshot", "to", "bitmap", "machine", "mode", "iops", "format")
    for garbage in GARBAGE:
        with pytest.raises((Invalid, NotFound)):
            bench.call(method, volume="data", **dict.fromkeys(names, garbage))


def test_the_daemons_argv_names_no_volume_and_no_path(bench: Bench) -> None:
    bench.create("payroll")
    argv = Path(f"/proc/{bench.pid('payroll')}/cmdline").read_bytes()
    assert b"payroll" not in argv
    assert str(bench.place).encode() not in argv


def test_closing_the_service_ends_every_daemon(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.create(name)
    pids = [bench.pid("one"), bench.pid("two")]
    bench.service.close()
    bench.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert bench.told == []
