"""What a machine's monitor may bring about with its volumes, and how they go back with it."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.platform_volumes import TAKEN, Moment, go_back
from supercloud.model.errors import BadState, NotFound
from supercloud.wire.checkpoints import GoesBack
from supercloud.wire.volumes import VolumeSnapshot

SNAPSHOT = "supercloud-0123456789abcdef"


class Volumes:
    """``data`` is in slot 1 of platform ``p``. ``given`` are descriptors for going back."""

    def __init__(self) -> None:
        self.snapshots: list[str] = []
        self.given: list[int] = []
        self.ended: list[str] = []

    def check_in(self, name: str, platform: str, slot: int) -> None:
        if (name, platform, slot) != ("data", "p", 1):
            raise BadState(f"{platform} has no volume {name} in slot {slot}")

    async def snapshot(self, asked: VolumeSnapshot) -> Any:
        self.snapshots.append(asked.name)
        return SimpleNamespace(snapshots=[asked.snapshot])

    async def platform_ended(self, platform: str) -> None:
        self.ended.append(platform)

    async def go_back(self, wanted: GoesBack, _platform: str) -> int:
        if wanted.volume != "data":
            raise NotFound(f"no volume {wanted.volume}")
        self.given.append(os.open("/dev/null", os.O_RDONLY))
        return self.given[-1]


@pytest.fixture
def volumes() -> Any:
    return Volumes()


def said(moment: Moment) -> bytes:
    moment.theirs.setblocking(False)
    try:
        return moment.theirs.recv(16)
    except BlockingIOError:
        return b"-"


def disks(*places: tuple[str, int]) -> dict[str, Any]:
    return {"disks": [{"volume": volume, "slot": slot} for volume, slot in places]}


async def test_a_monitor_says_once_that_its_machine_stands_still(volumes: Any) -> None:
    moment = Moment(volumes, "p", SNAPSHOT)
    await moment.take(disks(("data", 1)))
    assert (said(moment), moment.slots) == (TAKEN, {"data": 1})
    for _ in range(100):
        await moment.take(disks())
    assert (said(moment), moment.slots, volumes.snapshots) == (b"-", {"data": 1}, ["data"])
    moment.close()


@pytest.mark.parametrize(
    "lie", [disks(("data", 2)), disks(("other", 1)), {"disks": "all"}, disks(*[("data", 1)] * 9)]
)
async def test_what_a_monitor_cannot_have_gets_no_snapshot(
    volumes: Any, lie: dict[str, Any]
) -> None:
    moment = Moment(volumes, "p", SNAPSHOT)
    theirs = os.dup(moment.theirs.fileno())
    await moment.take(lie)
    assert moment.error is not None
    assert os.read(theirs, 16) == b"", "it is told at once that there is none"
    assert (volumes.snapshots, moment.slots) == ([], {})
    os.close(theirs)


async def test_when_one_volume_cannot_go_back_none_is_the_platforms(volumes: Any) -> None:
    wanted = [GoesBack(volume=name, slot=1, snapshot=SNAPSHOT) for name in ("data", "gone")]
    with pytest.raises(NotFound):
        await go_back(volumes, "p", wanted)
    assert volumes.ended == ["p", "p"]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(volumes.given[0])
