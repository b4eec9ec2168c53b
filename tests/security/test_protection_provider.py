"""What a provider may try with the backing file: bit flips, swaps, replays, truncation, rollback."""

import contextlib
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from supercloud.model.errors import BadState, Denied, NoResources, Permanent, SupercloudError
from supercloud.services.protection import format as fmt
from supercloud.services.protection.audit import NotAuthentic
from supercloud.services.protection.engine import Device, backing_bytes, format_device
from supercloud.wire.volumes import Seal
from support.protected_nbd import READ, WRITE, Client
from support.protection import BLOCK, KEY, NAME, Disk, audit, content, new_disk, prepared

DEVICE_BYTES = 24 << 20
BLOCKS = 300  # written, over three leaves


def filled() -> tuple[Disk, Seal]:
    """A cleanly closed device with content, and its seal."""
    disk, seal = new_disk(DEVICE_BYTES)
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    device.write(0, content(1, BLOCKS))
    seal = device.close()
    assert seal is not None
    return disk, seal


def opened(disk: Disk, seal: Seal) -> Device:
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    return device


def slot_of(disk: Disk, block: int) -> int:
    return audit(disk).recover().entries[block].slot


def test_a_flipped_bit_is_an_error_of_its_block_alone_and_evidence() -> None:
    disk, seal = filled()
    slot = slot_of(disk, 7)
    disk.now[slot] = bytes([disk.now[slot][0] ^ 1]) + disk.now[slot][1:]
    device = opened(disk, seal)
    with pytest.raises(Permanent):
        device.read(7 * BLOCK, BLOCK)
    assert device.read(0, 7 * BLOCK) == content(1, BLOCKS)[: 7 * BLOCK]
    assert device.read(8 * BLOCK, BLOCK) == content(1, BLOCKS)[8 * BLOCK : 9 * BLOCK]
    found = device.evidence()
    assert [(e.kind, e.index, e.slot) for e in found] == [("block", 7, slot)]
    device.write(7 * BLOCK, content(2))  # and it can be written anew
    assert device.read(7 * BLOCK, BLOCK) == content(2)
    device.close()


@pytest.mark.parametrize("bit", [0, 8 * 1000 + 3, 8 * BLOCK - 1])
def test_any_bit_of_a_block_counts(bit: int) -> None:
    disk, seal = filled()
    slot = slot_of(disk, 0)
    number = int.from_bytes(disk.now[slot], "little") ^ 1 << bit
    disk.now[slot] = number.to_bytes(BLOCK, "little")
    device = opened(disk, seal)
    with pytest.raises(Permanent):
        device.read(0, BLOCK)
    device.close()


def test_over_nbd_the_request_fails_and_the_server_goes_on() -> None:
    disk, seal = filled()
    slot = slot_of(disk, 7)
    disk.now[slot] = bytes(BLOCK)
    device = opened(disk, seal)
    client = Client(device).go()
    assert client.call(READ, 6 * BLOCK, 3 * BLOCK) == (5, b"")
    assert client.call(READ, 6 * BLOCK, BLOCK) == (0, content(1, BLOCKS)[6 * BLOCK : 7 * BLOCK])
    assert client.call(WRITE, 7 * BLOCK, data=content(3)) == (0, b"")
    assert client.call(READ, 7 * BLOCK, BLOCK) == (0, content(3))
    client.close()
    device.close()
    assert device.close() is None


def test_swapped_blocks_are_neither() -> None:
    disk, seal = filled()
    one, other = slot_of(disk, 1), slot_of(disk, 2)
    disk.now[one], disk.now[other] = disk.now[other], disk.now[one]
    device = opened(disk, seal)
    for block in (1, 2):
        with pytest.raises(Permanent):
            device.read(block * BLOCK, BLOCK)
    device.close()


def test_a_replayed_block_is_refused() -> None:
    """An old ciphertext of the same block, put where the new one lies."""
    disk, seal = filled()
    old = disk.now[slot_of(disk, 3)]
    device = opened(disk, seal)
    device.write(3 * BLOCK, content(9))
    seal = device.close()
    disk.now[slot_of(disk, 3)] = old
    device = opened(disk, seal)
    with pytest.raises(Permanent):
        device.read(3 * BLOCK, BLOCK)
    device.close()


def test_a_replayed_page_of_the_tree_is_refused_and_the_device_can_be_read_only() -> None:
    disk, seal = filled()
    before = audit(disk).recover()
    old = dict(disk.now)
    device = opened(disk, seal)
    device.write(3 * BLOCK, content(9))
    seal = device.close()
    after = audit(disk).recover()
    for new_slot, old_slot in zip(sorted(after.slots), sorted(before.slots), strict=True):
        disk.now[new_slot] = old[old_slot]
    with pytest.raises(NotAuthentic):
        audit(disk).recover()
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    assert device.figures()["damaged"]
    assert "page" in {found.kind for found in device.evidence()}
    with pytest.raises(BadState):
        device.write(0, content(1))
    with pytest.raises(Permanent):
        device.read(0, BLOCK)
    device.close()


def test_a_damaged_leaf_costs_its_own_blocks_only() -> None:
    disk, seal = filled()
    state = audit(disk).recover()
    reader, leaf = audit(disk), None
    for slot in state.slots:
        page = disk.now[slot]
        disk.now[slot] = bytes(BLOCK)
        try:
            reader.recover()
        except NotAuthentic as error:
            leaf = slot if str(error) == "kind 1, index 1" else None
        if leaf:
            break
        disk.now[slot] = page
    assert leaf
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    assert device.read(0, 128 * BLOCK) == content(1, BLOCKS)[: 128 * BLOCK]
    with pytest.raises(Permanent):
        device.read(128 * BLOCK, BLOCK)
    device.close()


def test_a_rollback_of_the_whole_file_is_refused_at_open() -> None:
    disk, seal = filled()
    old = disk.copy()
    device = opened(disk, seal)
    device.write(0, content(5))
    newer = device.close()
    assert newer is not None
    with pytest.raises(Denied) as refused:
        prepared(old, newer)
    assert refused.value.details["evidence"] == "rolled_back"
    prepared(old, seal).close()  # which was right, once


def test_a_rollback_to_before_a_flush_is_refused_when_its_seal_was_kept() -> None:
    disk, seal = filled()
    device = opened(disk, seal)
    device.write(0, content(5))
    device.flush()
    old, kept_old = disk.copy(), device.seal
    device.write(0, content(6))
    device.flush()
    kept = device.seal
    device.close(commit=False)
    with pytest.raises(Denied):
        prepared(old, kept)
    prepared(old, kept_old).close(commit=False)
    prepared(disk, kept).close(commit=False)


def test_an_epoch_that_came_to_nothing_does_not_open_the_door_to_older_states() -> None:
    """Kept for an opening that never happened, the epoch is still not used again."""
    disk, seal = filled()
    promised = replace(seal, epoch=seal.epoch + 1)
    device = prepared(disk, promised)
    assert device.next_epoch == promised.epoch + 1
    with pytest.raises(Denied):
        device.serve(seal.epoch)
    device.close(commit=False)


def test_a_fork_is_refused() -> None:
    """Two openings of one state: only that whose seal was kept goes on."""
    disk, seal = filled()
    fork = disk.copy()
    for one, number in ((disk, 1), (fork, 2)):
        device = prepared(one, seal)
        device.serve(device.next_epoch + number)
        for step in range(4 * number):
            device.write(0, content(10 * number + step))
            device.flush()
        if one is disk:
            kept = device.seal
        device.close(commit=False)
    prepared(disk, kept).close(commit=False)
    with pytest.raises(Denied) as refused:
        prepared(fork, replace(kept, epoch=kept.epoch + 1))
    assert refused.value.details["evidence"] == "forked"
    with pytest.raises(Denied) as refused:  # nobody promised its epoch when this seal was kept
        prepared(fork, seal)
    assert refused.value.details["evidence"] == "epoch"


def test_an_older_epoch_with_more_commits_is_refused() -> None:
    """A crash made its end unknown; the user went on from before it."""
    disk, seal = filled()
    device = prepared(disk, seal)
    device.serve(seal.epoch + 1)
    for step in range(30):
        device.write(0, content(step))
        device.flush(checkpoint=True)
    device.close(commit=False)
    ahead = disk.copy()
    disk, seal = filled()
    device = prepared(disk, replace(seal, epoch=seal.epoch + 1))
    kept = device.serve(seal.epoch + 2)
    device.close(commit=False)
    with pytest.raises(Denied) as refused:
        prepared(ahead, kept)
    assert refused.value.details["evidence"] == "rolled_back"


def test_truncation_is_refused_at_open_and_an_error_later(tmp_path: Path) -> None:
    size = 1 << 20
    descriptor = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(descriptor, backing_bytes(size))
    seal = format_device(descriptor, KEY, NAME, size)
    device = Device(descriptor, KEY, NAME, seal)
    device.serve(device.next_epoch)
    device.write(0, content(1, 256))
    seal = device.close()
    os.truncate(descriptor, backing_bytes(size) - BLOCK)
    with pytest.raises(NoResources):
        Device(descriptor, KEY, NAME, seal)
    os.truncate(descriptor, backing_bytes(size))
    device = Device(descriptor, KEY, NAME, seal)
    device.serve(device.next_epoch)
    os.truncate(descriptor, fmt.FIRST_SLOT * BLOCK)
    with pytest.raises(Permanent):
        device.read(0, BLOCK)
    device.close()
    os.close(descriptor)


@pytest.mark.parametrize(("key", "name"), [(bytes(32), NAME), (KEY, "another")])
def test_another_key_or_device_opens_nothing(key: bytes, name: str) -> None:
    disk, seal = filled()
    with pytest.raises(Denied) as refused:
        prepared(disk, seal, key, name)
    assert refused.value.details["evidence"] == "not_a_device"


def test_garbage_of_any_kind_is_refused_or_read_as_it_was() -> None:
    """Random blocks over random places: no crash, and no wrong byte."""
    rnd = random.Random(4)
    disk, seal = filled()
    whole = content(1, BLOCKS)
    for _ in range(40):
        hurt = disk.copy()
        for _ in range(rnd.randrange(1, 6)):
            place = rnd.choice([0, 1, *range(2, 8), *rnd.sample(sorted(hurt.now), 4)])
            hurt.now[place] = rnd.choice(
                [rnd.randbytes(BLOCK), bytes(BLOCK), hurt.now[rnd.choice(sorted(hurt.now))]]
            )
        try:
            device = opened(hurt, seal)
        except SupercloudError:
            continue
        for block in range(BLOCKS):
            with contextlib.suppress(SupercloudError):
                assert (
                    device.read(block * BLOCK, BLOCK) == whole[block * BLOCK : (block + 1) * BLOCK]
                )
        device.close()


def test_the_backing_file_shows_neither_content_nor_names_nor_zeros(tmp_path: Path) -> None:
    size, needle = 8 << 20, b"the quick brown fox of " + NAME.encode()
    descriptor = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(descriptor, backing_bytes(size))
    device = Device(descriptor, KEY, NAME, format_device(descriptor, KEY, NAME, size))
    device.serve(device.next_epoch)
    client = Client(device).go()
    for at in range(0, size, 64 << 10):
        assert client.call(WRITE, at + 13, data=needle * 100)[0] == 0
    device.flush()
    client.close()
    device.close()
    raw = (tmp_path / "backing").read_bytes()
    for secret in (needle, needle[:16], NAME.encode(), KEY, KEY[:16]):
        assert secret not in raw
    os.close(descriptor)


def test_a_nonce_is_never_used_twice() -> None:
    """Over crashes, restarts and overwrites: one nonce, one ciphertext."""
    seen: dict[bytes, bytes] = {}
    disk, seal = new_disk(DEVICE_BYTES)
    for life in range(6):
        device = prepared(disk, seal)
        seal = replace(seal, epoch=device.next_epoch)
        device.serve(device.next_epoch)
        for step in range(8):
            device.write(step % 3 * BLOCK, content(1))
            device.write((step * 128) % 5000 * BLOCK, content(1, 2))
            device.flush(checkpoint=step % 4 == 3)
            reader = audit(disk)
            for entry in reader.recover().entries.values():
                sealed = disk.now[entry.slot]
                assert seen.setdefault(entry.nonce, sealed) == sealed
            for place, layout in ((0, fmt.SUPER), (1, fmt.SUPER), (2, fmt.RECORD)):
                head = layout.unpack_from(disk.now.get(place, bytes(BLOCK)))
                counter, epoch = (head[1], head[2]) if layout is fmt.SUPER else (head[2], head[3])
                nonce = epoch.to_bytes(4, "little") + counter.to_bytes(8, "little")
                if epoch:
                    assert seen.setdefault(nonce, disk.now[place]) == disk.now[place]
        device.close(commit=life % 2 == 0)
    assert len(set(seen.values())) == len(seen) > 50


def test_a_connection_is_the_devices_to_close() -> None:
    disk, seal = filled()
    device = opened(disk, seal)
    client = Client(device).go()
    idle, theirs = socket.socketpair()
    device.connect(theirs.detach())
    device.close()
    with pytest.raises((EOFError, ConnectionError, BrokenPipeError)):
        client.call(READ, 0, BLOCK)
    idle.close()
