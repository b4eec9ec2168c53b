"""Volumes on a really running host: opened in two steps, served by the user's own services."""

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.model.errors import Denied, Exists, Invalid, NoResources, NotFound, SupercloudError
from supercloud.services.protection.format import BLOCK, FIRST_SLOT
from support.lower import ControlPlane, RunningHost, patient, pids_of_session, running_host

pytestmark = [pytest.mark.root]

MIB = 1 << 20
KEY = base64.b64encode(bytes(range(32))).decode()
NEW: dict[str, Any] = {"epoch": 0, "sequence": 0, "root": ""}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("host"), "t-vol") as host:
        yield host


@pytest.fixture
def user(host: RunningHost, tmp_path: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path, host, "demo")
    plane.enrol(cpu_permille=2000, memory_bytes=1 << 30, disk_bytes=512 * MIB, vms=1)
    yield plane
    host.admin("user.remove", user="demo")


def spec(name: str = "data", size_bytes: int = 64 * MIB, **more: Any) -> dict[str, Any]:
    return {"name": name, "size_bytes": size_bytes, **more}


async def opened(user: ControlPlane, seal: dict[str, Any] = NEW, **more: Any) -> Any:
    asked = {"spec": spec(**more), "key_base64": KEY, "seal": seal}
    return await user.call("volume.open", asked)


async def served(user: ControlPlane, seal: dict[str, Any] = NEW, **more: Any) -> Any:
    status = await opened(user, seal, **more)
    asked = {"name": status["name"], "epoch": status["seal"]["epoch"]}
    return await user.call("volume.serve", asked)


def backing(host: RunningHost, name: str = "data") -> Path:
    (found,) = host.state.glob(f"domains/disk/*/volume:{name}.*")
    return found


def used(host: RunningHost) -> Any:
    return host.admin("user.list")[0]["used"]["disk_bytes"]


async def test_a_volume_is_opened_served_closed_and_opened_again(
    host: RunningHost, user: ControlPlane
) -> None:
    first = await served(user)
    assert first["state"] == "served"
    assert first["seal"]["root"]
    assert backing(host).stat().st_size == used(host) > 64 * MIB
    closed = await user.call("volume.close", {"name": "data"})
    assert closed["state"] == "closed"
    assert closed["seal"]["sequence"] >= first["seal"]["sequence"]
    again = await served(user, closed["seal"])
    assert (again["state"], again["seal"]["epoch"]) == ("served", first["seal"]["epoch"] + 1)


async def test_all_calls_may_be_repeated(user: ControlPlane) -> None:
    statuses = [await served(user) for _ in range(2)]
    for _ in range(2):
        assert (await user.call("volume.detach", {"name": "data"}))["state"] == "served"
    for _ in range(2):
        assert (await user.call("volume.close", {"name": "data"}))["state"] == "closed"
    for _ in range(2):
        await user.call("volume.delete", {"name": "data"})
    assert statuses[0]["seal"]["epoch"] == statuses[1]["seal"]["epoch"]
    assert (await user.call("volume.list"))["volumes"] == []


async def test_a_copy_from_before_the_last_opening_is_refused(
    host: RunningHost, user: ControlPlane, tmp_path: Path
) -> None:
    await served(user)
    first = await user.call("volume.close", {"name": "data"})
    shutil.copyfile(backing(host), tmp_path / "old")
    await served(user, first["seal"])
    second = await user.call("volume.close", {"name": "data"})
    shutil.copyfile(tmp_path / "old", backing(host))
    with pytest.raises(Denied):
        await opened(user, second["seal"])
    (status,) = (await user.call("volume.list"))["volumes"]
    assert status["state"] == "failed"
    assert status["reason"]


async def test_what_holds_data_is_not_made_anew(user: ControlPlane) -> None:
    await served(user)
    await user.call("volume.close", {"name": "data"})
    with pytest.raises(Exists, match="seal"):
        await opened(user)


async def test_a_backing_that_is_gone_is_not_replaced_by_an_empty_one(
    host: RunningHost, user: ControlPlane
) -> None:
    await served(user)
    closed = await user.call("volume.close", {"name": "data"})
    backing(host).unlink()
    with pytest.raises(NotFound, match="gone"):
        await opened(user, closed["seal"])


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (spec(size_bytes=512 * MIB), NoResources),
        (spec(size_bytes=1000), Invalid),
        (spec(name="../data"), Invalid),
        (spec(format="vmdk"), Invalid),
        (spec(iops=5), Invalid),
        (spec(bytes_per_s=1 << 42), Invalid),
    ],
)
async def test_what_cannot_be_had_leaves_nothing(
    host: RunningHost, user: ControlPlane, asked: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await user.call("volume.open", {"spec": asked, "key_base64": KEY, "seal": NEW})
    assert (await user.call("volume.list"))["volumes"] == []
    assert used(host) == 0
    assert not list(host.state.glob("domains/disk/*/volume:*"))


async def test_a_wrong_key_opens_nothing(user: ControlPlane) -> None:
    await served(user)
    closed = await user.call("volume.close", {"name": "data"})
    wrong = base64.b64encode(bytes(32)).decode()
    asked = {"spec": spec(), "key_base64": wrong, "seal": closed["seal"]}
    with pytest.raises(Denied):
        await user.call("volume.open", asked)
    assert (await served(user, closed["seal"]))["state"] == "served"


async def test_it_grows_and_is_charged_for_it(host: RunningHost, user: ControlPlane) -> None:
    await served(user)
    before = used(host)
    grown = await user.call("volume.change", spec(size_bytes=96 * MIB))
    assert grown["size_bytes"] == 96 * MIB
    assert used(host) == backing(host).stat().st_size > before
    with pytest.raises(Invalid):
        await user.call("volume.change", spec(size_bytes=64 * MIB))
    with pytest.raises(NoResources):
        await user.call("volume.change", spec(size_bytes=1 << 30))
    with pytest.raises(Invalid):
        await user.call("volume.change", spec(size_bytes=128 * MIB, iops=5))
    assert used(host) == backing(host).stat().st_size
    assert (await user.call("volume.close", {"name": "data"}))["size_bytes"] == 96 * MIB


async def test_a_growing_that_is_cut_short_loses_nothing(
    host: RunningHost, user: ControlPlane
) -> None:
    before, size = await served(user), backing(host).stat().st_size
    protection = host.pid_of("protection:demo")
    os.kill(protection, signal.SIGSTOP)
    growing = asyncio.ensure_future(user.call("volume.change", spec(size_bytes=96 * MIB)))
    deadline = time.monotonic() + 30
    while backing(host).stat().st_size == size:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    os.kill(host.pid_of("user:demo"), signal.SIGKILL)
    with pytest.raises(SupercloudError):
        await growing
    os.kill(protection, signal.SIGCONT)
    await patient(lambda: user.call("volume.close", {"name": "data"}))
    await served(user, before["seal"])
    grown = await user.call("volume.change", spec(size_bytes=96 * MIB))
    assert (grown["size_bytes"], used(host)) == (96 * MIB, backing(host).stat().st_size)


async def test_a_growing_that_was_refused_is_not_forgotten(user: ControlPlane) -> None:
    await served(user)
    closed = await user.call("volume.close", {"name": "data"})
    for _ in range(2):
        with pytest.raises(NoResources):
            await served(user, closed["seal"], size_bytes=1 << 30)
    assert (await served(user, closed["seal"]))["size_bytes"] == 64 * MIB


async def test_one_that_cannot_be_served_has_failed_and_says_why(
    host: RunningHost, user: ControlPlane
) -> None:
    await served(user)
    closed = await user.call("volume.close", {"name": "data"})
    with backing(host).open("r+b") as file:  # where the image begins
        os.pwrite(file.fileno(), bytes(64 * BLOCK), FIRST_SLOT * BLOCK)
    status = await opened(user, closed["seal"])
    with pytest.raises(SupercloudError):
        await user.call("volume.serve", {"name": "data", "epoch": status["seal"]["epoch"]})
    assert (await until(user, "failed"))["reason"]
    await user.call("volume.delete", {"name": "data"})
    assert held(host) == []


async def test_snapshots_are_made_listed_and_deleted(user: ControlPlane) -> None:
    await served(user)
    for name in ("one", "two", "two"):
        status = await user.call("volume.snapshot", {"name": "data", "snapshot": name})
    assert sorted(status["snapshots"]) == ["one", "two"]
    await user.call("volume.revert", {"name": "data", "snapshot": "one"})
    status = await user.call("volume.forget", {"name": "data", "snapshot": "one"})
    assert status["snapshots"] == ["two"]


@pytest.mark.parametrize("service", ["protection", "block"])
async def test_a_service_that_dies_fails_what_was_open_and_can_be_had_again(
    host: RunningHost, user: ControlPlane, service: str
) -> None:
    status = await served(user)
    os.kill(host.pid_of(f"{service}:demo"), 9)
    deadline = time.monotonic() + 30
    while True:
        (now,) = (await user.call("volume.list"))["volumes"]
        if now["state"] == "failed":
            break
        assert time.monotonic() < deadline, now
    assert service in now["reason"]
    again = await patient(lambda: served(user, status["seal"]))
    assert (again["state"], again["seal"]["epoch"]) == ("served", status["seal"]["epoch"] + 1)


def children_of(host: RunningHost, domain: str, program: str) -> list[int]:
    found = []
    for pid in pids_of_session(host.pid_of(domain)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if program in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


async def until(user: ControlPlane, state: str) -> Any:
    deadline = time.monotonic() + 30
    while True:
        (now,) = (await user.call("volume.list"))["volumes"]
        if now["state"] == state:
            return now
        assert time.monotonic() < deadline, now


async def failed(host: RunningHost, user: ControlPlane) -> Any:
    """A volume whose storage daemon was killed: its device is open still."""
    status = await served(user)
    (daemon,) = children_of(host, "block:demo", "qemu-storage-daemon")
    os.kill(daemon, 9)
    assert "storage daemon" in (await until(user, "failed"))["reason"]
    return status


def held(host: RunningHost) -> list[str]:
    """Backing files that the protection service has open."""
    numbers = Path(f"/proc/{host.pid_of('protection:demo')}/fd")
    files = []
    for number in numbers.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed
            files.append(os.readlink(number))
    return [file for file in files if "volume:" in file]


@pytest.mark.parametrize("method", ["close", "delete"])
async def test_nothing_of_a_failed_volume_stays_open_when_it_is_given_up(
    host: RunningHost, user: ControlPlane, method: str
) -> None:
    status = await failed(host, user)
    assert held(host)
    await user.call(f"volume.{method}", {"name": "data"})
    assert held(host) == []
    if method == "close":
        assert (await until(user, "closed"))["reason"] == ""
        again = await served(user, status["seal"])
        assert again["seal"]["epoch"] == status["seal"]["epoch"] + 1


async def test_the_users_domain_may_die_while_a_volume_is_served(
    host: RunningHost, user: ControlPlane
) -> None:
    before = await served(user)
    os.kill(host.pid_of("user:demo"), 9)

    async def status() -> Any:
        return (await user.call("volume.list"))["volumes"][0]

    now = await patient(status)
    assert now["state"] == "served"
    assert now["seal"]["epoch"] == before["seal"]["epoch"]
    assert (await user.call("volume.close", {"name": "data"}))["state"] == "closed"


@pytest.mark.parametrize("what", ["protection", "block", "daemon"])
async def test_what_dies_while_the_users_domain_is_away_is_noticed(
    host: RunningHost, user: ControlPlane, what: str
) -> None:
    before = await served(user)
    away = host.pid_of("user:demo")
    os.kill(away, signal.SIGSTOP)
    pids = children_of(host, "block:demo", "qemu-storage-daemon")
    (dying,) = pids if what == "daemon" else [host.pid_of(f"{what}:demo")]
    os.kill(dying, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{dying}").exists():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    os.kill(away, signal.SIGKILL)
    await patient(lambda: until(user, "failed" if what == "daemon" else "closed"))
    again = await served(user, before["seal"])
    assert (again["state"], again["seal"]["epoch"]) == ("served", before["seal"]["epoch"] + 1)


async def test_a_removed_user_leaves_no_volume(host: RunningHost, tmp_path: Path) -> None:
    plane = ControlPlane(tmp_path, host, "gone")
    plane.enrol(cpu_permille=1000, memory_bytes=1 << 30, disk_bytes=512 * MIB, vms=1)
    await served(plane)
    host.admin("user.remove", user="gone")
    assert not list(host.state.glob("domains/disk/*gone*/volume:*"))


async def test_volumes_that_are_not_there_are_said_to_be(user: ControlPlane) -> None:
    for method in ("volume.close", "volume.detach"):
        with pytest.raises(NotFound):
            await user.call(method, {"name": "nowhere"})
    with pytest.raises(NotFound):
        await user.call("volume.serve", {"name": "nowhere", "epoch": 1})


async def test_an_attachment_needs_a_running_platform(user: ControlPlane) -> None:
    await served(user)
    with pytest.raises(NotFound, match="platform"):
        await user.call("volume.attach", {"name": "data", "platform": "nowhere"})
