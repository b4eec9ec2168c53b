"""Mirrors of real protected devices, used by real clients; replicas and services that are killed."""

import json
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.model.errors import BadState, Denied, Invalid, NotFound
from support.nbd import Client, NbdError
from support.replication import (
    GONE,
    MIB,
    REGION,
    Make,
    Writer,
    all_in_sync,
    answered,
    dialled,
    making,
    until,
)

EIO, EINVAL, ENOSPC = 5, 22, 28


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Make]:
    yield from making(tmp_path)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what clients see


def test_real_clients_find_what_they_wrote_on_every_replica(owners: Make, tmp_path: Path) -> None:
    owner = owners("a", "b", "c")
    host = owner.begun()
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(random.Random(1).randbytes(12 * MIB) + bytes(4 * MIB))
    with dialled(host, tmp_path) as uri:
        told = json.loads(run("nbdinfo", "--json", uri))["exports"][0]
        assert told["export-size"] == owner.size_bytes
        for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
            assert told[ability], ability
        run("nbdcopy", "--flush", str(source), uri)
        run("nbdcopy", uri, str(back))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
        bench = ("qemu-img", "bench", "-f", "raw", "-w", "-c", "400", "-d", "16", "-s", "4096")
        run(*bench, "--flush-interval", "50", uri)
    assert back.read_bytes() == source.read_bytes()
    owner.equal()


def test_overlapping_requests_end_the_same_way_everywhere(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    clients = [host.client() for _ in range(4)]

    def write(number: int) -> None:
        rnd = random.Random(number)
        for _ in range(150):
            length = rnd.choice((512, 4096, 70_000))
            at = rnd.randrange(0, 3 * REGION - length)
            clients[number].write(at, bytes([rnd.randrange(256)]) * length)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()
    owner.equal()


def ask(client: Client, kind: int, offset: int, length: int, flags: int = 0) -> None:
    head = struct.pack(">IHHQQI", 0x25609513, flags, kind, 1, offset, length)
    client.sock.sendall(head)


def test_trimmed_and_zeroed_blocks_read_as_zeros_on_all(owners: Make) -> None:
    owner = owners()
    client = owner.begun().client()
    client.write(0, b"x" * 4 * REGION)
    for kind, at in ((4, 0), (6, 2 * REGION)):
        ask(client, kind, at, REGION, 1)
        client.answered()
    zeros, full = bytes(REGION), b"x" * REGION
    assert client.read(0, 4 * REGION) == zeros + full + zeros + full
    client.close()
    owner.equal()


def test_requests_out_of_bounds_are_refused_and_harm_nothing(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    size = owner.size_bytes
    for kind, offset, length, error in (
        (0, size, 1, EINVAL), (0, size - 1, 2, EINVAL), (0, 0, 0, EINVAL), (5, 0, 1, EINVAL),
        (6, size, 1, ENOSPC), (4, size, 1, EINVAL), (77, 0, 1, EINVAL), (0, 1 << 63, 1, EINVAL),
        (0, 0, 0, EINVAL),
    ):  # fmt: skip
        ask(client, kind, offset, length)
        with pytest.raises(NbdError) as refused:
            client.answered()
        assert refused.value.args[0] == error, (kind, offset, length)
    ask(client, 1, 0, (32 << 20) + 1)  # a write too large cannot be skipped: it is over
    with pytest.raises(GONE):
        client.answered()
    other = host.client()
    assert other.read(0, 4096) == bytes(4096)
    other.close()


@pytest.mark.parametrize(
    "data",
    [b"\0" * 64, b"\xff" * 64, struct.pack(">IQII", 1, 0x49484156454F5054, 7, 1 << 20)],
)
def test_a_client_that_breaks_the_protocol_is_cut_off(owners: Make, data: bytes) -> None:
    owner = owners()
    host = owner.begun()
    with socket.socket(fileno=host.call("mirror.connect").descriptors[0]) as sock:
        sock.settimeout(60)
        sock.sendall(data)
        while sock.recv(4096):
            pass
    client = host.client()
    client.write(0, b"y" * 4096)
    client.close()


# -- replicas that fail


def test_nothing_is_answered_before_a_failed_replica_is_known_to_be_stale(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    client.write(0, b"1" * 4096)
    owner.confirms.clear()
    owner.replicas["b"].kill()
    client.send_write(0, b"2" * 4096)
    until(lambda: host.standing("b") == "failing")
    assert not answered(client)
    assert "b" in host.state()["closed_by"]
    owner.confirms.set()
    client.answered()
    assert owner.in_sync == {"a"}
    client.close()


def test_a_killed_replica_gets_what_it_missed_and_no_more(owners: Make) -> None:
    owner = owners(mib=64)
    host = owner.begun()
    client = host.client()
    for at in range(0, 32 * MIB, MIB):
        client.write(at, b"1" * MIB)
    client.flush()
    owner.replicas["b"].kill()
    for at in (3, 3, 4, 77, 500):
        client.write(at * REGION + 4096, b"2" * 4096)
    client.flush()
    until(lambda: host.standing("b") == "stale")
    lacks = next(r["lacks_bytes"] for r in host.state()["replicas"] if r["replica"] == "b")
    assert lacks == 4 * REGION
    owner.back("b")

    def copied() -> int:
        return int(owner.replicas["b"].ask("figures")["write_bytes"])

    until(lambda: copied() >= 4 * REGION)  # the last is counted once it is answered
    assert copied() == 4 * REGION
    client.close()
    owner.equal()


def test_what_a_replica_had_not_flushed_is_copied_again(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    for at in range(8):
        client.write(at * REGION, bytes([at + 1]) * 4096)  # never flushed
    owner.replicas["b"].kill()
    owner.replicas["b"].start()
    until(lambda: host.standing("b") == "stale")
    owner.attach("b")
    until(all_in_sync(owner))
    client.close()
    owner.equal()


def test_a_replica_killed_again_and_again_under_load_ends_equal(owners: Make) -> None:
    owner = owners(mib=32)
    host = owner.begun()
    writer = Writer(host.client(), 32 * MIB // 4096)
    for _ in range(4):
        writer.goes_on()
        owner.replicas["b"].kill()
        until(lambda: host.standing("b") == "stale")
        writer.goes_on()
        owner.back("b")
    writer.goes_on()
    writer.stop()
    writer.check(writer.client)
    writer.client.close()
    owner.equal()


def test_the_local_replica_killed_under_load_is_done_without(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    writer = Writer(host.client(), 16 * MIB // 4096)
    writer.goes_on()
    owner.replicas["a"].kill()
    writer.goes_on()
    assert owner.in_sync == {"b"}
    owner.back("a")
    writer.goes_on()
    writer.stop()
    writer.check(writer.client)
    writer.client.close()
    owner.equal()


def test_of_three_one_killed_under_load_is_done_without_by_both_others(owners: Make) -> None:
    owner = owners("a", "b", "c")
    host = owner.begun()
    writer = Writer(host.client(), 16 * MIB // 4096)
    writer.goes_on()
    owner.replicas["b"].kill()
    until(lambda: host.standing("b") == "stale")
    writer.goes_on()
    assert owner.in_sync == {"a", "c"}
    missed = next(r["lacks_bytes"] for r in host.state()["replicas"] if r["replica"] == "b")
    assert missed >= 50 * 4096, "many writes went on without it"
    owner.back("b")
    writer.goes_on()
    writer.stop()
    writer.check(writer.client)
    for replica in owner.replicas.values():
        client = replica.client()
        writer.check(client)
        client.close()
    writer.client.close()
    owner.equal()


def test_a_silent_replica_is_given_up_the_last_one_never(owners: Make) -> None:
    owner = owners()
    host = owner.begun(silence_ms=10_000)  # what goes on answering may be slow as well
    client = host.client()
    with owner.replicas["b"].silent():
        client.write(0, b"1" * 4096)
        until(lambda: owner.in_sync == {"a"})
    with owner.replicas["a"].silent():
        client.send_write(0, b"2" * 4096)
        threading.Event().wait(13)  # longer than the other was given
        assert not answered(client), (host.state(), client.sock.recv(100))
    client.answered()
    assert client.read(0, 4096) == b"2" * 4096
    client.close()


def test_the_last_replica_gone_ends_the_mirror_without_a_wrong_answer(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    client.write(0, b"1" * 4096)
    owner.replicas["b"].kill()
    until(lambda: owner.in_sync == {"a"})
    owner.replicas["a"].kill()
    with pytest.raises(GONE):
        client.write(0, b"2" * 4096)
    until(lambda: owner.count("mirror.over"))
    assert owner.in_sync == {"a"}
    with pytest.raises(Denied):
        host.call("mirror.connect")
    for replica in owner.replicas.values():
        replica.start()
    owner.open(host, ["a", "b"])
    until(all_in_sync(owner))
    owner.equal()


def test_what_one_replica_cannot_read_another_gives_and_it_is_repaired(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    local = owner.replicas["a"]
    client.write(0, b"1" * REGION)
    client.flush()
    raw = bytearray(local.path.read_bytes())
    for at in range(2050 * 4096, len(raw), 4096):  # behind superblocks and journal: all slots
        raw[at] ^= 1
    local.path.write_bytes(raw)
    assert client.read(0, REGION) == b"1" * REGION
    until(lambda: owner.count("replica.evidence"))
    found = next(what for method, what in owner.heard if method == "replica.evidence")
    assert (found["replica"], found["errno"]) == ("a", EIO)
    until(lambda: owner.count("replica.resynced"))
    until(all_in_sync(owner))
    assert local.client().read(0, REGION) == b"1" * REGION
    client.close()


def test_a_replica_that_answers_nonsense_is_stale(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    owner.replicas["b"].kill()
    until(lambda: owner.in_sync == {"a"})
    for nonsense in (b"\0" * 18, b"NBDMAGICIHAVEOPT\0\1" + b"\xff" * 20):
        ours, theirs = socket.socketpair()
        what = {"generation": owner.generation, "replica": "b"}
        host.call("replica.attach", [theirs.fileno()], **what)
        theirs.close()
        ours.sendall(nonsense)
        until(lambda: host.standing("b") == "stale")
        ours.close()
        client.write(0, b"3" * 4096)
    client.close()


# -- what is refused


def test_descriptors_and_parameters_that_will_not_do_are_refused(
    owners: Make, tmp_path: Path
) -> None:
    owner = owners()
    host = owner.new_host()
    streams = [replica.stream() for replica in owner.replicas.values()]
    file = os.open(tmp_path / "map", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(file, os.fstat(host.map).st_size)
    small = os.memfd_create("small")
    both = [{"replica": name, "in_sync": True, "kept": True} for name in "ab"]
    good: dict[str, Any] = {"generation": 1, "size_bytes": owner.size_bytes, "replicas": both}
    for given, more in (
        ([], {}), ([host.map], {}), ([host.map, streams[0]], {}), ([file, *streams], {}),
        ([small, *streams], {}), ([host.map, streams[0], file], {}),
        ([host.map, *streams], {"size_bytes": owner.size_bytes << 12}),
        ([host.map, *streams], {"generation": 0}),
        ([host.map, *streams], {"replicas": [both[0], both[0]]}),
        ([host.map, *streams], {"replicas": [{**row, "in_sync": False} for row in both]}),
        ([host.map, *streams], {"replicas": both * 2}), ([host.map, *streams], {"replicas": []}),
        ([host.map, *streams], {"more": 1}), ([host.map, *streams], {"volume": "../x"}),
        ([host.map, *streams], {"silence_ms": 1}),
    ):  # fmt: skip
        with pytest.raises(Invalid):
            host.call("mirror.open", given, **{**good, **more})
    assert host.call("mirror.list").result == {"volumes": {}}
    for method in ("connect", "quiesce", "state", "close"):
        with pytest.raises(NotFound):
            host.call(f"mirror.{method}")
    for descriptor in (file, small, *streams):
        os.close(descriptor)


def test_what_is_connected_is_not_attached_and_what_is_unknown_not_found(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for name, refusal in (("a", BadState), ("z", NotFound)):
            with pytest.raises(refusal):
                what = {"generation": owner.generation, "replica": name}
                host.call("replica.attach", [ours.fileno()], **what)
