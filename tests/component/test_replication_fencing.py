"""Services and hosts that are killed, leases that end, generations that are over."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import Denied, Invalid, SupercloudError
from support.replication import GONE, MIB, Make, Writer, all_in_sync, answered, making, until


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Make]:
    yield from making(tmp_path)


# -- services and hosts that are killed


def test_a_host_killed_under_load_loses_nothing_that_was_answered(owners: Make) -> None:
    owner = owners(mib=32)
    host = owner.begun()
    writer = Writer(host.client(), 32 * MIB // 4096)
    writer.goes_on(300)
    host.kill()  # the service, the replica beside it, and with the host the map
    owner.replicas["a"].kill()
    writer.stop()
    other = owner.new_host()
    owner.open(other, ["b"])
    client = other.client()
    writer.check(client)
    assert owner.in_sync == {"b"}
    owner.replicas["a"].start()
    again = Writer(client, 32 * MIB // 4096)
    again.goes_on()
    owner.attach("a")
    until(all_in_sync(owner))
    again.stop()
    client.close()
    owner.equal()


def test_a_service_killed_under_load_makes_replicas_equal_with_its_map(owners: Make) -> None:
    owner = owners(mib=64)
    host = owner.begun()
    writer = Writer(host.client(), 512)
    writer.goes_on(200)
    host.kill()
    writer.stop()
    host.start()
    before = owner.replicas["b"].ask("figures")["write_bytes"]
    assert before
    owner.open(host, ["a", "b"])
    client = host.client()
    writer.check(client)
    until(all_in_sync(owner))
    assert owner.replicas["b"].ask("figures")["write_bytes"] <= 512 * 4096
    client.close()
    owner.equal()


def test_a_map_of_another_generation_is_not_believed(owners: Make) -> None:
    owner = owners()
    first = owner.begun()
    client = first.client()
    client.write(0, b"1" * 4096)
    client.flush()
    client.close()
    first.kill()
    second = owner.open(owner.new_host(), ["b"])
    client = second.client()
    client.write(5 * MIB, b"2" * 4096)  # of which the first host's map knows nothing
    client.flush()
    client.close()
    second.kill()
    first.start()
    owner.open(first, ["a", "b"])
    until(all_in_sync(owner))
    assert first.client().read(5 * MIB, 4096) == b"2" * 4096
    owner.equal()


def test_closed_in_order_it_is_clean_and_nothing_is_copied(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    client.write(0, b"1" * 4096)
    host.call("mirror.quiesce")
    with pytest.raises(GONE):
        client.read(0, 4096)
    until(lambda: owner.count("mirror.quiet"))
    host.call("mirror.close")
    owner.equal()
    other = owner.open(owner.new_host(), ["a", "b"], clean=True)
    assert all_in_sync(owner)()
    assert owner.replicas["b"].ask("figures")["write_bytes"] == 0
    assert other.client().read(0, 4096) == b"1" * 4096


# -- fencing


def test_without_a_lease_requests_wait_and_none_fails(owners: Make) -> None:
    owner = owners()
    owner.renews.clear()
    host = owner.begun()
    client = host.client()
    client.send_write(0, b"1" * 4096)
    assert not answered(client)
    assert host.state()["closed_by"] == "no lease"
    owner.renew()
    client.answered()
    stamp = host.state()["stamp"]
    brief = {"generation": owner.generation, "stamp": stamp, "valid_ms": 1}
    host.call("lease.renew", **brief)  # does not shorten what was given
    assert client.read(0, 4096) == b"1" * 4096
    client.close()


def test_a_lease_counts_from_its_stamp(owners: Make) -> None:
    owner = owners()
    owner.renews.clear()
    host = owner.begun()
    stamp = host.state()["stamp"]
    what = {"generation": owner.generation, "stamp": stamp}
    threading.Event().wait(0.2)
    host.call("lease.renew", **what, valid_ms=100)  # under way for longer than it is valid
    assert host.state()["closed_by"] == "no lease"
    for stamp in (0, host.state()["stamp"] + 10**12):
        with pytest.raises(Invalid):
            host.call("lease.renew", generation=owner.generation, stamp=stamp, valid_ms=1000)


def test_a_newer_generation_ends_the_older_for_ever(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    client.write(0, b"1" * 4096)
    owner.renews.clear()
    host.call("mirror.fence", generation=owner.generation + 1)
    with pytest.raises(GONE):
        client.read(0, 4096)
    stamp = host.state()["stamp"]
    with pytest.raises(Denied):
        host.call("lease.renew", generation=owner.generation, stamp=stamp, valid_ms=1000)
    with pytest.raises(Denied):
        host.call("mirror.connect")
    for generation in (owner.generation, owner.generation + 1):  # seen already
        owner.generation = generation - 1
        with pytest.raises(Denied):
            owner.open(host, ["a", "b"])
    owner.generation = 2
    owner.renews.set()
    owner.open(host, ["a", "b"])
    assert host.client().read(0, 4096) == b"1" * 4096


def test_any_call_of_a_newer_generation_fences(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    newer = owner.generation + 1
    with pytest.raises(SupercloudError):
        host.call("replica.confirm", generation=newer, replica="b", turn=1, in_sync=True)
    assert "has begun" in host.state()["closed_by"]


def test_a_confirmation_of_an_earlier_turn_changes_nothing(owners: Make) -> None:
    owner = owners()
    host = owner.begun()
    client = host.client()
    for _ in range(2):  # fails and comes back: turns 1 and 2, then 3 and 4
        client.write(0, b"1" * 4096)
        owner.replicas["b"].kill()
        until(lambda: owner.in_sync == {"a"})
        owner.replicas["b"].start()
        until(lambda: host.standing("b") == "stale")
        owner.attach("b")
        until(all_in_sync(owner))
    owner.confirms.clear()
    owner.replicas["b"].kill()
    until(lambda: host.standing("b") == "failing")
    what = {"generation": owner.generation, "replica": "b"}
    for turn, in_sync in ((1, False), (3, False), (4, True), (5, True), (6, False)):
        host.call("replica.confirm", **what, turn=turn, in_sync=in_sync)
        assert host.standing("b") == "failing"
    owner.confirms.set()
    until(lambda: host.standing("b") == "stale")
    owner.replicas["b"].start()
    owner.confirms.clear()
    owner.attach("b")
    until(lambda: host.standing("b") == "joining")
    for turn in (2, 4, 5, 7):
        host.call("replica.confirm", **what, turn=turn, in_sync=True)
        assert host.standing("b") == "joining"
    owner.confirms.set()
    until(all_in_sync(owner))
    client.close()
