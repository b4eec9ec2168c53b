"""What a checkpoint has to do with a machine's volumes, against a pretended QEMU and agent."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from supercloud.lower.vmm import moment
from supercloud.model.errors import Invalid
from supercloud.wire.portal import Request
from support.capture import MEMORY, Bench, capturing


@pytest.fixture
def bench() -> Iterator[Bench]:
    with capturing() as made:
        yield made


def disk(volume: str, mode: str = "nbd", state: str = "attached") -> dict[str, Any]:
    return {"volume": volume, "slot": 1, "mode": mode, "state": state}


def test_it_goes_on_when_its_volumes_have_snapshots_of_where_it_stands_still(bench: Bench) -> None:
    bench.disks = [disk("data")]
    still: list[list[str]] = []

    def snapshot() -> None:
        still.append(list(bench.qemu.names))
        bench.stream.send(b"1")

    bench.on_still = snapshot
    bench.begin(volumes=True)
    bench.answer("paused")
    bench.comes("checkpoint.captured")
    assert bench.codes() == ["checkpoint.still", "checkpoint.captured"]
    assert bench.told[0][1] == {"disks": bench.disks}
    (names,) = still
    assert "cont" not in names
    assert "blockdev-snapshot" not in names, "the service works while this domain does"
    assert bench.qemu.names[-1] != "stop"


@pytest.mark.parametrize("word", [b"", b"0", None])
def test_without_all_of_its_volumes_snapshots_there_is_no_checkpoint_and_it_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, word: bytes | None
) -> None:
    monkeypatch.setattr(moment, "ANSWER_S", 0.05)
    bench.disks = [disk("data")]
    if word is None:
        bench.on_still = lambda: None  # nobody ever says anything
    else:
        bench.on_still = lambda: (word and bench.stream.send(word), bench.stream.shutdown(1))
    bench.begin(volumes=True)
    bench.answer("paused")
    bench.comes("checkpoint.failed")
    assert bench.codes()[:2] == ["checkpoint.still", "checkpoint.failed"]
    assert "not all given a snapshot" in bench.told[1][1]["error"]["message"]
    assert "cont" in bench.qemu.names[bench.qemu.names.index("blockdev-snapshot") :]
    bench.comes("checkpoint.over")
    assert bench.codes()[-1] == "checkpoint.over"


@pytest.mark.parametrize(
    ("there", "volumes", "why"),
    [
        (disk("data", "vhost-user-blk"), True, "could not be restored with it"),
        (disk("data", state="detaching"), True, "plugged in or out"),
        (disk("data"), False, "plugged in or out"),
    ],
)
def test_volumes_that_are_not_of_the_moment_are_no_checkpoint(
    bench: Bench, there: dict[str, Any], volumes: bool, why: str
) -> None:
    bench.begin(volumes=volumes)
    bench.disks = [there]  # by when it stands still
    bench.answer("paused")
    bench.comes("checkpoint.failed")
    assert bench.codes() == ["checkpoint.failed"]
    assert why in bench.told[0][1]["error"]["message"]
    assert "cont" in bench.qemu.names
    bench.disks = []
    bench.begin(volumes=True)


def test_a_stream_that_was_promised_is_given(bench: Bench) -> None:
    asked = {"room_bytes": MEMORY, "overlay_bytes": 1 << 20, "volumes": True}
    overlay = os.memfd_create("overlay")
    with pytest.raises(Invalid, match="stream"):
        bench.capture.begin(Request("t", "machine.checkpoint", asked, [overlay]))
    os.close(overlay)
    assert bench.qemu.names == []
