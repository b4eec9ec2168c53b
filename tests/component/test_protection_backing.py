"""A backing file that is full, or that fails."""

import errno
import random
from dataclasses import replace

import pytest

from supercloud.model.errors import NoResources, Permanent, SupercloudError
from supercloud.services.protection.engine import backing_bytes
from supercloud.wire.volumes import Seal
from support.protected_nbd import FLUSH, READ, WRITE, Client
from support.protection import BLOCK, KEY, Disk, audit, content, new_disk, prepared

DEVICE_BYTES = 24 << 20
BLOCKS = DEVICE_BYTES // BLOCK
ENOSPC = 28


class Failing(Disk):
    """A disk that refuses writes, now and then or always."""

    def __init__(self, of: Disk) -> None:
        super().__init__(of.size(), of.now)
        self.full = 0.0
        self.sync_fails = False
        self.journal_full = self.superblock_full = False
        self._rnd = random.Random(3)

    def write(self, data: bytes, offset: int) -> None:
        superblock, journal = offset // BLOCK < 2, 2 <= offset // BLOCK < 2050
        refused = self._rnd.random() < self.full and not superblock
        if refused or (self.journal_full and journal) or (self.superblock_full and superblock):
            raise OSError(errno.ENOSPC, "full")
        super().write(data, offset)

    def sync(self) -> None:
        if self.sync_fails:
            raise OSError(errno.EIO, "lost")
        super().sync()


def made() -> tuple[Failing, Seal]:
    disk, seal = new_disk(DEVICE_BYTES)
    return Failing(disk), seal


def in_use(disk: Disk) -> int:
    state = audit(disk).recover()
    return len(state.entries) + len(state.slots)


def test_a_full_disk_refuses_writes_and_loses_nothing() -> None:
    disk, seal = made()
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    client = Client(device).go()
    assert client.call(WRITE, 0, data=content(1, 10))[0] == 0
    disk.full = 1.0
    assert client.call(WRITE, 0, data=content(2, 10))[0] == ENOSPC
    assert client.call(FLUSH)[0] == ENOSPC
    assert client.call(READ, 0, 10 * BLOCK) == (0, content(1, 10))
    disk.full = 0.0
    assert client.call(FLUSH)[0] == 0
    assert client.call(WRITE, BLOCK, data=content(3))[0] == 0
    client.close()
    assert {found.kind for found in device.evidence()} == {"space"}
    kept = device.close()
    assert kept is not None
    again = prepared(disk, kept)
    assert (
        again.read(0, 3 * BLOCK)
        == content(1, 10)[:BLOCK] + content(3) + content(1, 10)[2 * BLOCK : 3 * BLOCK]
    )
    again.close(commit=False)


def test_what_a_full_journal_refused_is_in_the_next_commit() -> None:
    disk, seal = made()
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    device.write(0, content(1, 3))
    disk.journal_full = True
    with pytest.raises(NoResources):
        device.flush()
    device.write(BLOCK, content(2))
    with pytest.raises(NoResources):
        device.flush()
    disk.journal_full = False
    device.flush()
    survivor = disk.survivor(random.Random(1), 0.0)
    device.close(commit=False)
    again = prepared(survivor, replace(seal, epoch=seal.epoch + 1))
    assert again.read(0, 3 * BLOCK) == content(1) + content(2) + content(1, 3)[2 * BLOCK :]
    again.close(commit=False)


def test_what_is_written_beyond_an_end_that_could_not_be_made_durable_is_safe_too() -> None:
    disk, seal = made()
    device = prepared(disk, seal)
    kept = device.serve(device.next_epoch)
    device.write(0, content(1))
    disk.grow_to(backing_bytes(2 * DEVICE_BYTES))
    disk.full = 1.0
    with pytest.raises(NoResources):
        device.grow(2 * DEVICE_BYTES)
    disk.full = 0.0
    device.write(2 * DEVICE_BYTES - BLOCK, content(2))
    device.flush()
    device.close(commit=False)
    again = prepared(disk.survivor(random.Random(1), 0.0), kept)
    assert not again.figures()["damaged"]
    assert again.read(2 * DEVICE_BYTES - BLOCK, BLOCK) == content(2)
    assert again.read(0, BLOCK) == content(1)
    again.close(commit=False)


def test_after_a_failed_sync_nothing_is_acknowledged_until_it_is_opened_again() -> None:
    disk, seal = made()
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    device.write(0, content(1))
    device.flush()
    kept = device.seal
    device.write(0, content(2))
    disk.sync_fails = True
    with pytest.raises(Permanent):
        device.flush()
    disk.sync_fails = False
    for refused in (device.flush, lambda: device.write(0, content(3))):
        with pytest.raises(Permanent):
            refused()
    assert device.read(0, BLOCK) == content(2)
    assert [found.kind for found in device.evidence()] == ["dead"]
    with pytest.raises(Permanent):
        device.close()
    again = prepared(disk.survivor(random.Random(1), 0.5), kept)
    assert again.read(0, BLOCK) in {content(1), content(2)}
    again.close(commit=False)


def test_a_superblock_that_may_or_may_not_be_there_ends_all_writing() -> None:
    disk, seal = made()
    device = prepared(disk, seal)
    kept = device.serve(device.next_epoch)
    device.write(0, content(1))
    disk.superblock_full = True
    with pytest.raises(NoResources):
        device.flush(checkpoint=True)
    disk.superblock_full = False
    with pytest.raises(Permanent):
        device.flush()
    device.close(commit=False)
    prepared(disk, kept).close(commit=False)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_fails_no_block_and_no_slot_is_lost(seed: int) -> None:
    """Writes of all kinds fail now and then; what succeeded is there, and all slots are counted."""
    rnd = random.Random(seed)
    disk, seal = made()
    device = prepared(disk, seal)
    device.serve(device.next_epoch)
    may: dict[int, list[bytes]] = {}
    for number in range(250):
        disk.full = rnd.choice([0.0, 0.0, 0.3, 0.9])
        block, count = rnd.randrange(BLOCKS - 9), rnd.randrange(1, 9)
        data = content(number, count)
        pieces = {block + at: data[at * BLOCK : (at + 1) * BLOCK] for at in range(count)}
        try:
            if rnd.random() < 0.8:
                device.write(block * BLOCK, data)
                may.update({at: [piece] for at, piece in pieces.items()})
            else:
                device.flush(checkpoint=rnd.random() < 0.5)
        except SupercloudError:
            for at, piece in pieces.items():
                may.setdefault(at, [bytes(BLOCK)]).append(piece)
    disk.full = 0.0
    assert not device.figures()["dead"]
    for block, values in may.items():
        assert device.read(block * BLOCK, BLOCK) in values
    kept = device.close()
    assert kept is not None
    again = prepared(disk, kept)
    assert again.figures()["slots"] - again.figures()["free_slots"] == in_use(disk)
    for block, values in may.items():
        assert again.read(block * BLOCK, BLOCK) in values
    again.close(commit=False)
    assert KEY not in b"".join(disk.now.values())
