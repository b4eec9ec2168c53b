"""The object store of a U-Cloud on a really running host: made, changed, stopped, deleted."""

import asyncio
import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.model.errors import Invalid, NoResources, NotFound, Permanent
from supercloud.trust.names import SERVICE, Identity
from supercloud.wire.objects import STORE, booked_bytes
from support.lower import ControlPlane, RunningHost, running_host

pytestmark = [pytest.mark.root]

MIB = 1 << 20
KEY = base64.b64encode(bytes(range(32))).decode()
CAPACITY = 64 * MIB
BUCKETS = [{"name": "photos", "quota_bytes": 32 * MIB}, {"name": "notes", "quota_bytes": 8 * MIB}]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("host"), "t-obj") as host:
        yield host


@pytest.fixture
def user(host: RunningHost, tmp_path: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(tmp_path, host, "demo")
    plane.enrol(cpu_permille=2000, memory_bytes=1 << 30, disk_bytes=2 << 30, vms=1)
    yield plane
    host.admin("user.remove", user="demo")


async def apply(user: ControlPlane, **more: Any) -> Any:
    asked = {"capacity_bytes": CAPACITY, "key_base64": KEY, "buckets": BUCKETS, **more}
    status = await user.call("objects.apply", asked)
    if status["csr_pem"]:
        own = Identity(user.user, SERVICE, STORE)
        made = user.authority.issue(status["csr_pem"], own)
        asked |= {"cert_pem": made.cert_pem, "chain_pem": made.chain_pem}
        status = await user.call("objects.apply", asked)
    deadline_s = time.monotonic() + 120
    while status["state"] in ("starting", "restarting"):
        assert time.monotonic() < deadline_s, status
        await asyncio.sleep(0.1)
        status = await user.call("objects.apply", asked)
    return status


def used(host: RunningHost) -> Any:
    return host.admin("user.list")[0]["used"]["disk_bytes"]


def kept(host: RunningHost) -> Path:
    return host.state / "domains" / "objects:demo"


async def test_a_store_is_made_with_its_buckets_and_booked(
    host: RunningHost, user: ControlPlane
) -> None:
    assert (await user.call("objects.state"))["state"] == "absent"
    status = await apply(user)
    assert status["state"] == "ready"
    assert {b["name"]: b["quota_bytes"] for b in status["buckets"]} == {
        b["name"]: b["quota_bytes"] for b in BUCKETS
    }
    assert used(host) == booked_bytes(CAPACITY)
    assert status["memory_bytes"] > 0
    (service,) = [
        one for one in (await user.call("service.list"))["services"] if one["kind"] == "objects"
    ]
    assert service["state"] == "running"
    assert service["started_s"] > 0


async def test_it_can_be_applied_again_and_changed(host: RunningHost, user: ControlPlane) -> None:
    await apply(user)
    wanted = [{**BUCKETS[0], "versioning": True, "expire_days": 3}, BUCKETS[1]]
    status = await apply(user, buckets=wanted)
    rows = {row["name"]: row for row in status["buckets"]}
    assert (rows["photos"]["versioning"], rows["photos"]["expire_days"]) == (True, 3)
    larger = await apply(user, capacity_bytes=2 * CAPACITY, buckets=wanted)
    assert (larger["state"], larger["capacity_bytes"]) == ("ready", 2 * CAPACITY)
    assert {row["name"] for row in larger["buckets"]} == {"photos", "notes"}
    assert used(host) == booked_bytes(2 * CAPACITY)
    smaller = await apply(user, buckets=wanted)
    assert (smaller["state"], used(host)) == ("ready", booked_bytes(CAPACITY))


async def test_credentials_are_the_same_again_and_go_with_their_user(user: ControlPlane) -> None:
    await apply(user)
    asked = {"name": "web", "buckets": {"photos": "write"}}
    first = await user.call("objects.credentials", asked)
    assert first == await user.call("objects.credentials", asked)
    assert first["secret_key"]
    other = await user.call("objects.credentials", {"name": "job", "buckets": {"notes": "read"}})
    assert other["access_key"] != first["access_key"]
    with pytest.raises(Invalid):
        await user.call("objects.credentials", {"name": "x", "buckets": {"absent": "read"}})
    await apply(user, users=["job"])
    status = await user.call("objects.delete", {"bucket": "notes"})
    assert [row["name"] for row in status["buckets"]] == ["photos"]
    assert (await user.call("objects.delete", {"bucket": "notes"}))["state"] == "ready"


async def test_what_is_too_large_is_refused_before_anything_is_made(
    host: RunningHost, user: ControlPlane
) -> None:
    with pytest.raises(NoResources):
        await user.call(
            "objects.apply", {"capacity_bytes": 2 << 30, "key_base64": KEY, "buckets": []}
        )
    with pytest.raises(Invalid, match="capacity"):
        await user.call(
            "objects.apply", {"capacity_bytes": MIB, "key_base64": KEY, "buckets": BUCKETS}
        )
    assert (await user.call("objects.state"))["state"] == "absent"
    assert used(host) == 0
    with pytest.raises(NotFound):
        await user.call("objects.credentials", {"name": "web", "buckets": {}})


async def test_stopped_it_keeps_its_data_and_an_older_journal_is_refused(
    host: RunningHost, user: ControlPlane
) -> None:
    await apply(user)
    stopped = await user.call("objects.stop")
    assert (stopped["state"], used(host)) == ("stopped", booked_bytes(CAPACITY))
    least = stopped["position"]
    assert least["segment"] > 0
    again = await apply(user, least=least)
    assert len(again["buckets"]) == 2
    await user.call("objects.stop")
    with pytest.raises(Permanent, match="rolled back"):
        await apply(user, least={"segment": least["segment"] + 9, "records": 0})
    assert (await apply(user, least=least))["state"] == "ready"


async def test_another_key_opens_nothing(user: ControlPlane) -> None:
    await apply(user)
    await user.call("objects.stop")
    with pytest.raises(Permanent):
        await apply(user, key_base64=base64.b64encode(bytes(32)).decode())


async def test_a_host_that_starts_anew_has_it_stopped(
    host: RunningHost, user: ControlPlane
) -> None:
    before = (await apply(user))["position"]
    host.stop()
    host.start()
    status = await user.call("objects.state")
    assert status["state"] == "stopped"
    status = await apply(user, least=before)
    assert (status["state"], len(status["buckets"])) == ("ready", 2)


async def test_deleted_it_leaves_nothing(host: RunningHost, user: ControlPlane) -> None:
    await apply(user)
    assert list(kept(host).iterdir())
    assert (await user.call("objects.delete", {}))["state"] == "absent"
    assert (await user.call("objects.delete", {}))["state"] == "absent"
    assert used(host) == 0
    assert not list(kept(host).iterdir())
    assert (await apply(user, buckets=[]))["buckets"] == []


async def test_a_user_who_is_removed_leaves_nothing_either(
    host: RunningHost, user: ControlPlane
) -> None:
    await apply(user)
    host.admin("user.remove", user="demo")
    assert not kept(host).exists()
    user.enrol(cpu_permille=2000, memory_bytes=1 << 30, disk_bytes=2 << 30, vms=1)
