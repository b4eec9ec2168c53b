"""A crash at any write loses no acknowledged flush, and never reads as corruption."""

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import SupercloudError
from supercloud.services.protection.engine import Device
from supercloud.wire.volumes import Seal
from support.protection import BLOCK, Disk, audit, content, differing, new_disk, prepared

DEVICE_BYTES = 24 << 20  # 48 leaves: more than the smallest cache takes dirty
BLOCKS = DEVICE_BYTES // BLOCK
ZERO = bytes(BLOCK)


@dataclass
class User:
    """What a user knows: what each block may read as, and the seal that they keep."""

    seal: Seal
    may: dict[int, list[bytes]] = field(default_factory=dict)
    written: int = 0
    sure: set[int] = field(default_factory=set)  # written in this life, and no error came

    def wrote(self, block: int, data: bytes) -> None:
        for at in range(0, len(data), BLOCK):
            self.may.setdefault(block + at // BLOCK, [ZERO]).append(data[at : at + BLOCK])

    def flushed(self) -> None:
        self.may.update({block: self.may[block][-1:] for block in self.sure})


def act(device: Device, user: User, operation: tuple[str, int, int]) -> None:
    """One operation. What was begun may be there, whether or not it succeeds."""
    kind, block, count = operation
    count = min(count, BLOCKS - block)
    if kind == "write":
        user.written += 1
        data = content(user.written, count)
        user.wrote(block, data)
        user.sure.difference_update(range(block, block + count))
        device.write(block * BLOCK, data)
        user.sure.update(range(block, block + count))
    elif kind == "part":
        user.written += 1
        piece = content(user.written)[: BLOCK // 2]
        sure = block in user.sure
        for before in user.may.get(block, [ZERO])[-1 if sure else 0 :]:
            user.wrote(block, before[:1000] + piece + before[1000 + len(piece) :])
        user.sure.discard(block)
        device.write(block * BLOCK + 1000, piece)
        user.sure.update({block} if sure else ())
    elif kind == "scatter":
        for step in range(40):
            act(device, user, ("write", (block + step * 128) % BLOCKS, 1))
    elif kind == "zero":
        user.wrote(block, bytes(count * BLOCK))
        user.sure.difference_update(range(block, block + count))
        device.zero(block * BLOCK, count * BLOCK)
        user.sure.update(range(block, block + count))
    else:
        device.flush(checkpoint=kind == "checkpoint")
        user.flushed()
        user.seal = device.seal


def live(disk: Disk, user: User, operations: list[tuple[str, int, int]]) -> bool:
    """Open, and do all that; False when the power went off on the way."""
    device = prepared(disk, user.seal)
    try:
        promised, user.sure = device.next_epoch, set()
        user.seal = replace(user.seal, epoch=promised)
        user.seal = device.serve(promised)
        for operation in operations:
            act(device, user, operation)
    except SupercloudError:
        assert disk.operations > disk.fuse
        return False
    finally:
        evidence = {found.kind for found in device.evidence()}
        device.close(commit=False)
        assert not evidence & {"block", "page"}
    return True


def verify(disk: Disk, user: User) -> None:
    """The engine and the independent reader find one state, and it is one that may be.

    It is the user's state from then on if the disk has it for good.
    """
    device = prepared(disk, user.seal)
    state = audit(disk).recover()
    assert device.found.sequence == state.sequence >= user.seal.sequence
    assert device.found.root == state.chain[:28].hex() + f"{state.epoch:08x}"
    assert not device.figures()["damaged"]
    assert differing(device, user.may) == []
    reader = audit(disk)
    for block in user.may:
        assert reader.block(state, block) == device.read(block * BLOCK, BLOCK)
    in_use = len(state.entries) + len(state.slots)
    assert device.figures()["slots"] - device.figures()["free_slots"] == in_use
    if not disk.pending:
        user.may = {n: [device.read(n * BLOCK, BLOCK)] for n in user.may}
        user.seal = replace(device.found, epoch=max(user.seal.epoch, device.found.epoch))
    device.close(commit=False)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "write", "part", "zero", "flush", "flush", "checkpoint", "scatter"]
        ),
        st.one_of(st.integers(0, 5), st.integers(0, BLOCKS - 1)),  # mostly the same few
        st.sampled_from([1, 1, 2, 7, 130]),
    ),
    max_size=12,
)
# what is done, after how many writes and syncs it ends, and whether the power goes or the process
LIVES = st.lists(
    st.tuples(OPERATIONS, st.integers(0, 60), st.integers(0, 1 << 32), st.booleans()), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(lives=LIVES, kept=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_any_crash_leaves_a_state_that_may_be(lives: list, kept: float) -> None:
    disk, seal = new_disk(DEVICE_BYTES)
    user = User(seal)
    for operations, fuse, seed, power in lives:
        disk.fuse = disk.operations + fuse
        live(disk, user, operations)
        if power:
            disk = disk.survivor(random.Random(seed), kept)
        verify(disk, user)


# overwrites within one commit, too: only the first of them gives a durable slot up
SCRIPT = [
    ("write", 5, 3), ("flush", 0, 0), ("write", 6, 1), ("part", 7, 1), ("flush", 0, 0),
    ("write", 5, 1), ("write", 5, 1), ("write", 5, 1), ("flush", 0, 0),
    ("write", 100, 60), ("zero", 110, 5), ("checkpoint", 0, 0), ("write", 5, 2), ("flush", 0, 0),
    ("scatter", 3, 1), ("write", 6, 1), ("flush", 0, 0), ("zero", 5, 2), ("flush", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_every_write_boundary_of_a_life(kept: float) -> None:
    """One life, cut at each of its writes and syncs in turn; the next life goes on from there."""
    disk, seal = new_disk(DEVICE_BYTES)
    whole = Disk(disk.size(), disk.now)
    assert live(whole, User(seal), SCRIPT)
    assert whole.operations > 25
    for fuse in range(whole.operations + 1):
        user, cut = User(seal), Disk(disk.size(), disk.now, fuse)
        live(cut, user, SCRIPT)
        again = cut.survivor(random.Random(fuse), kept)
        verify(again, user)
        assert live(again, user, [("write", 6, 2), ("flush", 0, 0)])
        verify(again.survivor(random.Random(fuse), kept), user)


def test_what_a_killed_process_left_in_the_cache_is_made_durable_before_it_is_built_on() -> None:
    """First the process dies, at any write; the next one begins, at most so far; then the power."""
    disk, seal = new_disk(DEVICE_BYTES)
    for fuse in range(5, 24):
        for more in range(1, 12):
            user, cut = User(seal), Disk(disk.size(), disk.now, fuse)
            live(cut, user, SCRIPT)
            cut.fuse = cut.operations + more
            live(cut, user, [("write", 5, 4), ("flush", 0, 0), ("write", 100, 64)])
            verify(cut.survivor(random.Random(fuse * more), 0.2), user)


def test_a_crash_loses_what_a_flush_did_not_acknowledge_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test itself can fail: with syncs that do nothing an acknowledged flush is lost."""
    disk, seal = new_disk(DEVICE_BYTES)
    user = User(seal)
    liar = Disk(disk.size(), disk.now)
    monkeypatch.setattr(liar, "sync", lambda: None)
    live(liar, user, SCRIPT)
    with pytest.raises((AssertionError, SupercloudError)):
        verify(liar.survivor(random.Random(1), 0.0), user)


def test_a_state_that_is_only_in_the_cache_is_not_built_on() -> None:
    """A killed process left a record unsynced; the next one's first writes must not use its slots."""
    overwrites = [("write", 5, 1), ("flush", 0, 0)] * 3
    disk, seal = new_disk(DEVICE_BYTES)
    whole = Disk(disk.size(), disk.now)
    live(whole, User(seal), overwrites)
    for more in range(7):
        for seed in range(12):
            user, cut = User(seal), Disk(disk.size(), disk.now, whole.operations - 1)
            assert not live(cut, user, overwrites)  # killed in the last sync
            cut.fuse = cut.operations + more
            live(cut, user, [])
            verify(cut.survivor(random.Random(seed), 0.5), user)


class Watched(Disk):
    """A disk whose power is thought to go, now and then, just before a sync is done."""

    def __init__(self, disk: Disk, user: User, rnd: random.Random) -> None:
        super().__init__(disk.size(), disk.now)
        self._user, self._rnd, self.cuts = user, rnd, 0

    def sync(self) -> None:
        if self._rnd.random() < 0.4:
            reader = audit(self.survivor(self._rnd, self._rnd.choice([0.5, 0.9])))
            state = reader.recover()
            for block, may in self._user.may.items():
                assert reader.block(state, block) in may
            self.cuts += 1
        super().sync()


@pytest.mark.parametrize("seed", range(2))
def test_a_device_whose_slots_go_round_and_round(seed: int) -> None:
    """Every free slot has been in use before: one that is set free too early is hit at last."""
    rnd = random.Random(seed)
    disk, seal = new_disk(64 * BLOCK)
    user = User(seal)
    watched = Watched(disk, user, rnd)
    kinds = ["write", "write", "flush", "checkpoint", "checkpoint"]
    operations = [(rnd.choice(kinds), rnd.randrange(50), rnd.randrange(1, 14)) for _ in range(2000)]
    assert live(watched, user, operations)
    assert watched.cuts > 200
    verify(watched.survivor(rnd, 0.5), user)
