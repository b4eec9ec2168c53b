"""What a user stored goes when the user is removed, also when a driver is dead just then."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.lower.provider.disk import directory_of
from supercloud.model.errors import Temporary
from support.lower import ControlPlane, RunningHost, running_host

pytestmark = [pytest.mark.root]

SIZE = 4096


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("host"), "t-users") as host:
        yield host


def stored(host: RunningHost, user: str) -> Path:
    """A volume of the user's, as the driver keeps it, with something in it."""
    directory = host.state / "domains/disk" / os.path.basename(directory_of(user))
    owner = os.stat(directory.parent)
    directory.mkdir(exist_ok=True)
    file = directory / f"volume:data.{SIZE}"
    file.write_bytes(b"d" * SIZE)
    for path in (directory, file):
        os.chown(path, owner.st_uid, owner.st_gid)
    return file


def ranges(host: RunningHost) -> list[str]:
    return [row["holder"] for row in host.admin("drivers")[1]["ranges"]]


@pytest.mark.parametrize("dead", ["disk", "uplink"])
async def test_who_is_removed_while_a_driver_is_dead_leaves_nothing(
    host: RunningHost, tmp_path: Path, dead: str
) -> None:
    plane = ControlPlane(tmp_path, host, "gone")
    plane.enrol(memory_bytes=1 << 30, disk_bytes=1 << 30, vms=1)
    file = stored(host, "gone")
    os.kill(host.pid_of(dead), signal.SIGKILL)
    host.admin("user.remove", user="gone")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(Temporary):
            plane.enrol(memory_bytes=1 << 30, disk_bytes=1 << 30, vms=1)
            break
        await asyncio.sleep(0.2)
    assert not file.exists()  # another user, if of the same name
    assert ranges(host) == []
    host.admin("user.remove", user="gone")
