"""What a user stored goes when the user is removed, also when a driver is dead just then."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.lower.provider.disk import directory_of
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


def leaving(host: RunningHost) -> list[str]:
    """Who is removed and not forgotten yet."""
    document = json.loads((host.state / "domains/multiplexing/users.json").read_text())
    return list(document["leaving"])


def ranges(host: RunningHost) -> list[str]:
    return [row["holder"] for row in host.admin("drivers")[1]["ranges"]]


@pytest.mark.parametrize("dead", ["disk", "uplink"])
async def test_who_is_removed_while_a_driver_is_dead_leaves_nothing(
    host: RunningHost, tmp_path: Path, dead: str
) -> None:
    plane = ControlPlane(tmp_path, host, "gone")
    plane.enrol(memory_bytes=1 << 30, disk_bytes=1 << 30, vms=1)
    file, own = stored(host, "gone"), host.state / "domains" / "user:gone"
    assert own.exists()
    os.kill(host.pid_of(dead), signal.SIGKILL)
    host.admin("user.remove", user="gone")
    deadline = time.monotonic() + 30
    while leaving(host) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    assert leaving(host) == [], host.logs()[-6000:]
    assert not file.exists()
    assert not own.exists()
    assert ranges(host) == []


async def test_who_could_not_be_made_and_is_removed_leaves_nothing(
    host: RunningHost, tmp_path: Path
) -> None:
    """Its domain is not there to be ended with what it kept, nor when the host starts again."""
    plane = ControlPlane(tmp_path, host, "gone")
    plane.enrol(memory_bytes=1 << 30, disk_bytes=1 << 30, vms=1)
    file, own = stored(host, "gone"), host.state / "domains" / "user:gone"
    host.stop()
    assert own.exists()
    users = host.state / "domains/multiplexing/users.json"
    document = json.loads(users.read_text())
    document["leaving"] = [document["users"].pop()["name"]]  # written, and then all ended
    users.write_text(json.dumps(document))
    (host.state / "domains/uplink/ranges.json").write_text('{"gone/p": [20000, 2]}')
    host.start()
    deadline = time.monotonic() + 30
    while leaving(host) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    assert (leaving(host), file.exists(), own.exists()) == ([], False, False)
    assert (host.admin("user.list"), ranges(host)) == ([], [])
