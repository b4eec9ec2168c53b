"""How much room the block service wants on a device, and when it does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.services.block import capacity
from support.block import Bench
from support.nbd import MIB


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        made.close()


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
