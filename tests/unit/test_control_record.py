"""The record of a volume on several hosts, and how long a mirror may answer; without any host."""

import pytest

from supercloud.control.controllers import leases, record
from supercloud.control.documents import ReplicaDocument, VolumeDocument
from supercloud.model.errors import Temporary
from supercloud.model.resources import Provider, Volume
from supercloud.wire.mirrors import MirrorStatus, ReplicaStatus
from supercloud.wire.volumes import Seal, VolumeStatus

EAST, WEST = Provider(name="east", kind="fake"), Provider(name="west", kind="fake")
SEAL = Seal(epoch=2, sequence=5, root="a" * 64)


def volume(**more):
    values = {
        "ucloud": "u", "name": "data", "spec": Volume(name="data", size_bytes=1 << 20, replicas=2),
        "provider": EAST, "host": "e", "replica": "r1", "generation": 3, "mirroring": True,
        "others": [ReplicaDocument(replica="r2", provider=WEST, host="w", wrapped_key="k2")],
        "state": "attached", "wrapped_key": "k1", "opened": True,
    }  # fmt: skip
    return VolumeDocument(**{**values, **more})


def told(*replicas, generation=3):
    rows = [
        ReplicaStatus(replica=name, standing=standing, turn=turn)
        for name, standing, turn in replicas
    ]
    return MirrorStatus(generation=generation, replicas=rows)


def host_says(state, seal=SEAL):
    return VolumeStatus(name="data", state=state, size_bytes=1, format="raw", seal=seal)


def test_a_failing_replica_is_stale_once_it_is_written_down_and_then_it_is_confirmed():
    kept, status = volume(), told(("r1", "in_sync", 0), ("r2", "failing", 1))
    assert record.written(kept, status) == ()
    assert [one.replica for one in record.write_down(kept, status)] == ["r2"]
    assert (kept.in_sync, kept.others[0].in_sync) == (True, False)
    (confirmed,) = record.written(kept, status)
    assert (confirmed.replica, confirmed.turn, confirmed.in_sync) == ("r2", 1, False)
    assert record.write_down(kept, status) == []


def test_one_that_has_it_all_again_is_in_sync_and_kept():
    kept = volume(turns={"r2": 1})
    kept.others[0].in_sync = kept.others[0].kept = False
    record.write_down(kept, told(("r2", "joining", 2)))
    assert (kept.others[0].in_sync, kept.others[0].kept) == (True, True)


@pytest.mark.parametrize("turn", [1, 2])
def test_an_older_turn_changes_nothing(turn):
    kept = volume(turns={"r2": 2})
    assert record.write_down(kept, told(("r2", "failing", turn))) == []
    assert kept.others[0].in_sync


def test_another_generation_changes_nothing_and_is_not_confirmed():
    kept, status = volume(), told(("r2", "failing", 1), generation=2)
    assert record.write_down(kept, status) == []
    kept.turns = {"r2": 1}
    assert record.written(kept, status) == ()


def test_the_last_that_is_in_sync_stays_it():
    kept = volume()
    record.write_down(kept, told(("r1", "failing", 1), ("r2", "failing", 1)))
    assert [replica.in_sync for replica in kept.replicas].count(True) == 1


def test_a_device_that_shows_its_last_seal_was_ended_in_order():
    kept = volume()
    record.ended(kept, host_says("closed"))
    assert (kept.kept, kept.opened) == (True, False)
    kept.opened = True
    record.ended(kept, host_says("closed", Seal()))
    assert (kept.kept, kept.opened) == (False, False)


def test_it_begins_only_with_one_that_is_in_sync_and_kept():
    kept = volume()
    assert record.all_ended(kept, {"r1", "r2"}) is False
    kept.kept = False
    assert record.all_ended(kept, {"r1", "r2"}) is False
    with pytest.raises(Temporary, match="west/w"):
        record.all_ended(kept, {"r1"})
    kept.others[0].kept = False
    assert record.all_ended(kept, {"r1", "r2"}) is True  # all hosts lost their power
    with pytest.raises(Temporary):
        record.all_ended(kept, {"r1"})
    kept.others[0].in_sync = False
    assert record.all_ended(kept, {"r1"}) is True


def test_a_replica_that_went_back_is_refused():
    other = volume().others[0]
    assert record.take(other, host_says("served")) == ""
    assert record.take(other, host_says("served", Seal(epoch=2, sequence=4, root="b" * 64)))
    assert "was at 5 already" in other.refused
    assert other.seal == SEAL


def test_moved_it_keeps_every_replicas_key_and_seal():
    kept = volume(seal=SEAL, platform="p", slot=2, clean=True)
    before = {(r.replica, r.host, r.wrapped_key) for r in kept.replicas}
    assert record.move(kept, ("west", "w"))
    assert {(r.replica, r.host, r.wrapped_key) for r in kept.replicas} == before
    assert (kept.host, kept.replica, kept.platform, kept.slot) == ("w", "r2", "", 0)
    assert not kept.mirroring
    assert not kept.clean
    assert kept.others[0].seal == SEAL
    assert not record.move(kept, ("nowhere", "n"))


class Clock:
    def __init__(self, monkeypatch):
        self.now_s = 1000.0
        monkeypatch.setattr(leases.time, "monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_what_an_earlier_life_granted_is_waited_for(clock):
    held, kept = leases.Leases(5.0), volume()
    assert held.left_s(kept) == pytest.approx(5.0 * leases.DRIFT)
    clock.now_s += 5.0 * leases.DRIFT
    assert held.left_s(kept) == 0


def test_a_lease_counts_from_when_its_stamp_was_received_and_from_before_it_is_sent(clock):
    held, kept = leases.Leases(5.0), volume()
    clock.now_s += 100
    held.heard(kept, MirrorStatus(generation=3, stamp=7))
    clock.now_s += 2
    assert held.left_s(kept) == 0
    asked = held.next(kept)
    assert (asked.stamp, asked.valid_ms) == (7, 5000)
    assert held.left_s(kept) == pytest.approx(5.0 * leases.DRIFT - 2)
    clock.now_s += 1
    held.next(kept)  # with the same stamp it is not longer
    assert held.left_s(kept) == pytest.approx(5.0 * leases.DRIFT - 3)


def test_nothing_is_granted_without_a_stamp_of_that_generation(clock):
    held, kept = leases.Leases(5.0), volume()
    clock.now_s += 100
    assert held.next(kept).valid_ms == 0
    held.heard(kept, MirrorStatus(generation=2, stamp=7))
    assert held.next(kept).valid_ms == 0
    assert held.left_s(kept) == 0
