"""Room for snapshots: refused when it might run out, and how much would do. Real storage daemons."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.lower.user_domain import layers
from supercloud.model.errors import NoResources
from supercloud.services.block import capacity
from supercloud.wire.volumes import VolumeSpec
from support.block import Bench
from support.nbd import MIB


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_a_device_never_runs_full_under_a_writer(bench: Bench) -> None:
    """What could not be written in the worst case is refused when it is asked for."""
    bench.create("data", 16 * MIB, device_bytes=capacity.device_bytes(16 * MIB, snapshots=1))
    rounds = 0
    with bench.client("data") as client:
        for rounds in range(1, 9):
            for offset in range(0, 16 * MIB, MIB):
                client.write(offset, bytes([rounds]) * MIB)  # every block anew
            try:
                bench.call("volume.snapshot", volume="data", snapshot=f"s{rounds}")
            except NoResources as error:
                assert "grow the device" in error.hint
                break
        assert rounds == 2  # one snapshot fits, another would not
        for offset in range(0, 16 * MIB, MIB):
            client.write(offset, b"z" * MIB)
        client.flush()
    assert bench.read("data", 15 * MIB, MIB) == b"z" * MIB
    with pytest.raises(NoResources):
        bench.create("more", 64 * MIB, device_bytes=64 * MIB)


def test_a_volume_without_room_for_a_snapshot_has_it_at_the_size_that_its_user_is_told(
    bench: Bench,
) -> None:
    spec = VolumeSpec(name="data", size_bytes=16 * MIB)
    bench.create("data", 16 * MIB, device_bytes=8 << 40, has_bytes=layers.device_bytes(spec))

    def fill(size_bytes: int, data: bytes) -> None:
        with bench.client("data") as client:
            for offset in range(0, size_bytes, MIB):
                client.write(offset, data * MIB)
            client.flush()

    fill(16 * MIB, b"a")
    bench.call("volume.snapshot", volume="data", snapshot="first")
    fill(16 * MIB, b"b")
    with pytest.raises(NoResources) as refused:
        bench.call("volume.snapshot", volume="data", snapshot="second")
    told = layers.no_room(spec, refused.value)
    assert "volume data has no room for another snapshot" in told.message
    found = re.search(r"(\d+)MiB do for this one", told.hint)
    assert found
    larger = VolumeSpec(name="data", size_bytes=int(found[1]) * MIB)
    grown = {"size_bytes": larger.size_bytes, "device_bytes": layers.device_bytes(larger)}
    bench.call("volume.grow", volume="data", **grown)
    bench.call("volume.snapshot", volume="data", snapshot="second")
    fill(larger.size_bytes, b"c")
    back = bench.call("volume.revert", volume="data", snapshot="first")
    assert back["size_bytes"] == larger.size_bytes
    assert bench.read("data", 15 * MIB, MIB) == b"a" * MIB
    fill(larger.size_bytes, b"d")  # it never runs full
    bench.call("volume.close", volume="data")
    bench.open("data", device_bytes=grown["device_bytes"])
    bench.call("volume.revert", volume="data", snapshot="second")
    assert bench.read("data", 15 * MIB, MIB) == b"b" * MIB


def test_one_that_has_grown_and_was_written_all_over_goes_back_as_well(bench: Bench) -> None:
    """There is room for what it may become, though not beside all that was written since."""
    bench.create("data", 16 * MIB, device_bytes=capacity.device_bytes(32 * MIB, snapshots=1))
    for offset in range(0, 16 * MIB, MIB):
        bench.write("data", offset, b"a" * MIB)
    bench.call("volume.snapshot", volume="data", snapshot="old")
    bench.call("volume.grow", volume="data", size_bytes=32 * MIB)
    for letter in (b"b", b"c"):
        with bench.client("data") as client:
            for offset in range(0, 32 * MIB, MIB):
                client.write(offset, letter * MIB)
            client.flush()
        for _ in range(2):
            back = bench.call("volume.revert", volume="data", snapshot="old")
            assert back["size_bytes"] == 32 * MIB
        assert bench.read("data", 0, MIB) == b"a" * MIB
        assert bench.read("data", 31 * MIB, MIB) == bytes(MIB)


def test_one_that_was_left_small_by_a_try_that_was_cut_short_is_large_again(bench: Bench) -> None:
    bench.create("data", 16 * MIB, device_bytes=capacity.device_bytes(32 * MIB, snapshots=1))
    bench.write("data", 0, b"a")
    bench.call("volume.snapshot", volume="data", snapshot="old")
    asked = {"volume": "data", "snapshot": "old", "size_bytes": 32 * MIB}
    assert bench.call("volume.revert", **asked)["size_bytes"] == 32 * MIB
    assert bench.call("volume.revert", **asked)["size_bytes"] == 32 * MIB
    assert (bench.read("data", 0, 1), bench.read("data", 31 * MIB, 1)) == (b"a", b"\0")
