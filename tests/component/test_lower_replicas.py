"""Volumes that are kept on two really running hosts: mirrored over the tunnel, lost, taken up again.

The test is the owner: it keeps the record, raises generations, renews leases.
"""

import asyncio
import base64
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from supercloud.model.errors import BadState, Denied, SupercloudError, Temporary
from support.lower import ControlPlane, RunningHost, patient, pids_of_session, running_host

pytestmark = [pytest.mark.root]

MIB = 1 << 20
NEW: dict[str, Any] = {"epoch": 0, "sequence": 0, "root": ""}
SPEC = {"name": "data", "size_bytes": 16 * MIB}
VALID_MS = 5000


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RunningHost]]:
    with contextlib.ExitStack() as running:
        yield {
            name: running.enter_context(
                running_host(tmp_path_factory.mktemp(name), f"t-rep-{name}")
            )
            for name in ("a", "b")
        }


@dataclass
class Site:
    """A replica's host, and what the owner keeps of it."""

    plane: ControlPlane
    key: str = field(default_factory=lambda: base64.b64encode(os.urandom(32)).decode())
    seal: dict[str, Any] = field(default_factory=lambda: NEW)
    in_sync: bool = True
    kept: bool = True
    spec: dict[str, Any] = field(default_factory=lambda: SPEC)

    @property
    def peer(self) -> dict[str, Any]:
        host, user = self.plane.host, self.plane.user
        return {"name": host.instance, "user": user, "address": "127.0.0.1", "port": host.port}

    async def call(self, method: str, **asked: Any) -> Any:
        return await self.plane.call(method, asked)

    async def opened(self) -> None:
        await patient(lambda: self.call("volume.list"))
        await patient(self.closed)
        status = await self.call("volume.open", spec=self.spec, key_base64=self.key, seal=self.seal)
        self.seal = status["seal"]

    async def closed(self) -> None:
        names = [one["name"] for one in (await self.call("volume.list"))["volumes"]]
        if "data" in names:
            status = await self.call("volume.close", name="data")
            if status["seal"]["root"]:
                self.seal = status["seal"]

    async def served(self, **how: Any) -> Any:
        return await self.call("volume.serve", name="data", epoch=self.seal["epoch"], **how)


class Owner:
    """Keeps the record of the one volume; ``source`` names the host with the mirror."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self.sites, self.generation = sites, 0
        self.source, self.turns, self.new = "", {}, True
        self.stamp = 0
        self.renews = True
        self.status: dict[str, Any] = {}
        self.leasing: asyncio.Task[None] | None = None

    async def begin(self, source: str, *, clean: bool, without: tuple[str, ...] = ()) -> Any:
        """Open everywhere, mirror at ``source``, let it be used."""
        there = [name for name in self.sites if name not in without]
        for name in there:
            await self.sites[name].opened()
        self.generation += 1
        self.source, self.turns = source, dict.fromkeys(self.sites, 0)
        for name in set(there) - {source}:
            shared = {"host": self.sites[source].peer["name"], "generation": self.generation}
            await self.sites[name].served(shared=shared)
        mirror = {
            "generation": self.generation, "clean": clean, "new": self.new,
            "replicas": [self.replica(name, there=name in there) for name in self.sites],
        }  # fmt: skip
        status = await self.sites[source].served(mirror=mirror)
        assert status["state"] == "opened"
        self.stamp = status["mirror"]["stamp"]
        self.renews, self.leasing = True, asyncio.ensure_future(self.lease())
        served = await patient(lambda: self.sites[source].served(mirror=mirror))
        assert served["state"] == "served"
        self.new = False
        return served

    def replica(self, name: str, *, there: bool) -> dict[str, Any]:
        site = self.sites[name]
        peer = None if name == self.source else site.peer
        return {
            "replica": name, "in_sync": site.in_sync, "kept": site.kept, "there": there,
            "peer": peer,
        }  # fmt: skip

    async def lease(self) -> None:
        """Renew, and write down what is told: in that order with the next renewal."""
        written: list[dict[str, Any]] = []
        while True:
            asked = {"name": "data", "generation": self.generation, "written": written}
            if self.renews:
                asked |= {"stamp": self.stamp, "valid_ms": VALID_MS}
            with contextlib.suppress(SupercloudError):
                self.status = await self.sites[self.source].call("volume.lease", **asked)
                self.stamp = self.status["stamp"]
                written = self.write_down()
            await asyncio.sleep(0.05 if written else 0.3)

    def write_down(self) -> list[dict[str, Any]]:
        written = []
        for one in self.status["replicas"]:
            name, turn = one["replica"], one["turn"]
            if one["standing"] not in ("failing", "joining"):
                continue
            if turn > self.turns[name]:
                self.turns[name] = turn
                self.sites[name].in_sync = one["standing"] == "joining"
                self.sites[name].kept |= self.sites[name].in_sync
                assert any(site.in_sync for site in self.sites.values())
            written.append({"replica": name, "turn": turn, "in_sync": self.sites[name].in_sync})
        return written

    async def until(self, **standings: str) -> None:
        async with asyncio.timeout(60):
            while {o["replica"]: o["standing"] for o in self.status["replicas"]} != standings:
                await asyncio.sleep(0.05)

    async def end(self) -> Any:
        """As ``down`` does it."""
        status = await self.sites[self.source].call("volume.close", name="data")
        await self.stop()
        for name, site in self.sites.items():
            if name != self.source:
                await site.closed()
        self.sites[self.source].seal = status["seal"]
        return status

    async def stop(self) -> None:
        if self.leasing is not None:
            self.leasing.cancel()
            await asyncio.gather(self.leasing, return_exceptions=True)

    async def snapshot(self, name: str) -> Any:
        asked = {"name": "data", "snapshot": name}
        return await self.sites[self.source].call("volume.snapshot", **asked)


@pytest.fixture
async def owner(hosts: dict[str, RunningHost], tmp_path: Path) -> AsyncIterator[Owner]:
    sites = {name: Site(ControlPlane(tmp_path, host, "demo")) for name, host in hosts.items()}
    for site in sites.values():
        site.plane.enrol(cpu_permille=2000, memory_bytes=1 << 30, disk_bytes=256 * MIB, vms=1)
        await site.call("host.info")  # its certificate is signed
    made = Owner(sites)
    yield made
    await made.stop()
    for host in hosts.values():
        host.admin("user.remove", user="demo")


async def test_a_volume_is_on_both_hosts_and_each_has_a_key_of_its_own(owner: Owner) -> None:
    served = await owner.begin("a", clean=True)
    assert served["mirror"]["generation"] == 1
    await owner.until(a="in_sync", b="in_sync")
    await owner.snapshot("one")
    (other,) = (await owner.sites["b"].call("volume.list"))["volumes"]
    assert (other["state"], other["shared"]["generation"]) == ("served", 1)
    assert other["figures"]["written_bytes"] > 0
    closed = await owner.end()
    assert closed["mirror"]["clean"]
    again = await owner.begin("b", clean=True)
    assert again["snapshots"] == ["one"]
    await owner.until(a="in_sync", b="in_sync")


async def test_it_grows_on_all_hosts_when_it_is_opened_anew(
    owner: Owner, hosts: dict[str, RunningHost]
) -> None:
    await owner.begin("a", clean=True)
    await owner.snapshot("one")
    larger = {**SPEC, "size_bytes": 32 * MIB}
    with pytest.raises(BadState, match="on several hosts"):
        await owner.sites["a"].call("volume.change", **larger)
    await owner.end()
    before = [host.admin("user.list")[0]["used"]["disk_bytes"] for host in hosts.values()]
    for site in owner.sites.values():
        site.spec = larger
    assert (await owner.begin("a", clean=True))["size_bytes"] == 32 * MIB
    await owner.until(a="in_sync", b="in_sync")
    after = [host.admin("user.list")[0]["used"]["disk_bytes"] for host in hosts.values()]
    assert after[0] - before[0] == after[1] - before[1] >= 16 * MIB
    await owner.snapshot("two")
    await owner.end()
    again = await owner.begin("b", clean=True)  # and it is as large on the other one
    assert (again["size_bytes"], sorted(again["snapshots"])) == (32 * MIB, ["one", "two"])


async def test_a_host_that_is_killed_loses_nothing_that_was_answered(
    owner: Owner, hosts: dict[str, RunningHost]
) -> None:
    await owner.begin("a", clean=True)
    await owner.snapshot("answered")
    killed = hosts["a"]
    kill_all(killed)
    await owner.stop()
    try:
        await asyncio.sleep(VALID_MS / 1000)  # its lease is over, whoever of it may live
        served = await owner.begin("b", clean=False, without=("a",))
        assert served["snapshots"] == ["answered"]
        await owner.until(a="stale", b="in_sync")
        await owner.snapshot("later")
    finally:
        killed.start()
    owner.sites["a"].kept = False
    await patient(owner.sites["a"].opened, 60)
    await owner.sites["a"].served(
        shared={"host": owner.sites["b"].peer["name"], "generation": owner.generation}
    )
    peer = owner.sites["a"].peer
    asked = {"name": "data", "generation": owner.generation, "replica": "a", "peer": peer}
    await owner.sites["b"].call("volume.rejoin", **asked)
    await owner.until(a="in_sync", b="in_sync")
    await owner.end()
    back = await owner.begin("a", clean=False)
    assert sorted(back["snapshots"]) == ["answered", "later"]


def kill_all(host: RunningHost) -> None:
    """The whole host at once, as a power cut: whoever is below its keeper, too."""
    pids = pids_of_session(host.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    for pid in {*pids, *pids_of_session(host.pid)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert host.process is not None
    host.process.wait()


async def test_a_replica_whose_service_dies_is_stale_and_the_volume_goes_on(
    owner: Owner, hosts: dict[str, RunningHost]
) -> None:
    await owner.begin("a", clean=True)
    os.kill(hosts["b"].pid_of("protection:demo"), signal.SIGKILL)
    await owner.until(a="in_sync", b="stale")
    assert not owner.sites["b"].in_sync
    await owner.snapshot("alone")


async def test_without_a_lease_nothing_is_answered_and_with_one_it_goes_on(owner: Owner) -> None:
    await owner.begin("a", clean=True)
    owner.renews = False
    async with asyncio.timeout(60):
        while owner.status.get("closed_by") != "no lease":
            await asyncio.sleep(0.1)
    waiting = asyncio.ensure_future(owner.snapshot("late"))
    await asyncio.sleep(1)
    assert not waiting.done()
    owner.renews = True
    assert (await waiting)["snapshots"] == ["late"]


async def test_a_newer_generation_ends_the_old_one_for_good(owner: Owner) -> None:
    await owner.begin("a", clean=True)
    await owner.stop()
    first = owner.sites["a"]
    await first.call("volume.fence", name="data", generation=2)
    with pytest.raises(Denied):
        await first.call(
            "volume.lease", name="data", generation=1, stamp=owner.stamp, valid_ms=VALID_MS
        )
    async with asyncio.timeout(30):
        while (await first.call("volume.list"))["volumes"][0]["state"] != "failed":
            await asyncio.sleep(0.1)


async def test_a_replica_is_given_to_the_named_host_in_the_named_generation_once(
    owner: Owner,
) -> None:
    await owner.begin("a", clean=True)
    b, a = owner.sites["b"], owner.sites["a"]
    asked = {"name": "data", "generation": 1, "replica": "b", "peer": b.peer}
    assert (await a.call("volume.rejoin", **asked))["replicas"]  # it is connected: nothing is done
    with pytest.raises(BadState, match="otherwise"):
        await b.served(shared={"host": a.peer["name"], "generation": 2})
    os.kill(a.plane.host.pid_of("user:demo"), signal.SIGKILL)  # the tunnel ends with it
    await patient(lambda: a.call("volume.list"))
    await owner.until(a="in_sync", b="stale")
    with pytest.raises(Denied, match="already"):
        await a.call("volume.rejoin", **asked)
    await b.opened()
    await b.served(shared={"host": b.peer["name"], "generation": 1})
    with pytest.raises(Denied, match="not served"):
        await a.call("volume.rejoin", **asked)


async def test_a_close_asked_again_shows_the_same_seal_and_none_after_a_kill(
    owner: Owner,
) -> None:
    await owner.begin("a", clean=True)
    await owner.end()
    b = owner.sites["b"]
    again = await b.call("volume.close", name="data")
    assert again["seal"] == b.seal
    await b.opened()
    os.kill(b.plane.host.pid_of("protection:demo"), signal.SIGKILL)
    async with asyncio.timeout(30):
        while (await b.call("volume.list"))["volumes"][0]["state"] != "failed":
            await asyncio.sleep(0.1)
    for _ in range(2):
        assert not (await b.call("volume.close", name="data"))["seal"]["root"]


async def test_nothing_begins_while_who_may_have_more_is_away(owner: Owner) -> None:
    await owner.begin("a", clean=True)
    await owner.end()
    owner.sites["b"].kept = False
    with pytest.raises(Temporary, match="may have more"):
        await owner.sites["b"].opened()
        owner.generation += 1
        owner.source = "b"
        replicas = [owner.replica("b", there=True), owner.replica("a", there=False)]
        await owner.sites["b"].served(mirror={"generation": owner.generation, "replicas": replicas})
