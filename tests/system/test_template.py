"""Platforms out of memory on a real host: made, re-identified, charged, invalidated, given up."""

import asyncio
import contextlib
import hashlib
import mmap
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from supercloud.control import bootdata
from supercloud.control.convert import in_process, pack_in_process
from supercloud.control.images import Images
from supercloud.model.resources import Environment
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from supercloud.wire.codec import encode
from supercloud.wire.content import blobs_of, can_be_prepared, without_secrets
from supercloud.wire.messages import Apply, EnvironmentSpec, Nic, PortMap, Process
from supercloud.wire.peer import Stream
from support.inside import inside, with_shell
from support.link import Link
from support.lower import ControlPlane, RunningHost, pids_of_session, running_host

pytestmark = [pytest.mark.vm, pytest.mark.root]

USER = "quagga-zebra"
MIB, GIB = 1 << 20, 1 << 30
SHAPE = {"memory_bytes": 768 * MIB, "scratch_bytes": GIB, "cpus": 1}
MADE_S = 180.0
SECRET = "c3-not-in-a-template"
_KEY = b"-----BEGIN PRIVATE KEY-----\nM"
SAMPLE = """
echo =urandom $(head -c 32 /dev/urandom | sha256sum)
echo =uuid $(cat /proc/sys/kernel/random/uuid)
echo =boot-id $(cat /proc/sys/kernel/random/boot_id)
echo =machine-id $(cat /etc/machine-id)
echo =host-name $(hostname)
echo =uplink-mac $(cat /sys/class/net/eth0/address)
echo =link-mac $(cat /sys/class/net/eth1/address)
echo =time $(python3 -I -S -c 'import time; print(time.time())')
"""
SECRETS = """
echo =key $(sha256sum < /run/supercloud/identity/key.pem)
echo =certificate $(sha256sum < /run/supercloud/identity/cert.pem)
echo =scratch-key $(dmsetup table --showkeys scratch | sha256sum)
"""
# What the host told it, so that it asked no DHCP server: 10.0.2.2, as /proc/net/route has it.
UPLINK = """
for n in $(seq 300); do grep -q nameserver /etc/resolv.conf && break; sleep 0.2; done
echo =gateway $(awk '$2 == "00000000" { print $3 }' /proc/net/route)
echo =asked $(ls /run/supercloud | grep -c udhcpc)
"""
HAS_KEY = """
for n in $(seq 300); do test -e /run/supercloud/scratch || break; sleep 0.2; done
"""
# The file system came with the template, in the kernel's cache; the disk is this clone's own.
DISK = """
cd /var/lib/supercloud; mkdir many; for n in $(seq 40); do echo $n > many/$n; done
head -c 3000000 /dev/urandom > probe
before=$(cat probe many/* | sha256sum); sync; echo 3 > /proc/sys/vm/drop_caches
echo =kept $(test "$before" = "$(cat probe many/* | sha256sum)" && echo whole)
cd /; mount -o remount,ro /var/lib/supercloud
echo =checked $(e2fsck -fn /dev/$(ls /sys/block | grep dm-) > /tmp/e2fsck 2>&1; echo $?)
mount -o remount,rw /var/lib/supercloud
"""


@pytest.fixture(scope="module")
def host(product_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    images = tmp_path_factory.mktemp("images")
    place, before = tmp_path_factory.mktemp("host"), os.environ.get("SUPERCLOUD_IMAGES")
    os.environ["SUPERCLOUD_IMAGES"] = str(with_shell(product_images, images))
    try:
        with running_host(place, "t-tpl", "--templates", "auto") as host:
            yield host
    finally:
        os.environ.pop("SUPERCLOUD_IMAGES")
        if before is not None:
            os.environ["SUPERCLOUD_IMAGES"] = before


class Cloud:
    """One user's, whose platforms may enrol."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane, self.link = plane, Link(plane.directory, USER)
        self.tokens: dict[str, str] = {}
        self.rendezvous = Rendezvous(plane.dialer, self.link.hub.serve_relayed)

    async def shape(self, **more: Any) -> dict[str, Any]:
        return {"image": await self.plane.image(), **SHAPE, **more}

    async def create(self, name: str, **more: Any) -> dict[str, Any]:
        self.tokens[name] = token = self.link.owner.expect(name)
        endpoints = ["169.254.77.1:7444"]
        data = bootdata.user_data(USER, name, token, self.plane.ca_pem, endpoints)
        config = bootdata.config_iso(USER, name, data)
        made: dict[str, Any] = await self.plane.create(name, config=config, **{**SHAPE, **more})
        return made

    async def prepare(self, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = await self.plane.call("template.prepare", await self.shape(**more))
        return found

    async def template(self, **more: Any) -> dict[str, Any]:
        """The ready one; made if need be."""
        async with asyncio.timeout(MADE_S):
            while (found := await self.prepare(**more))["state"] == "making":
                await asyncio.sleep(0.3)
        return found

    async def connected(self, *names: str) -> None:
        async with asyncio.timeout(90):
            while not set(names) <= set(self.link.hub.sessions):
                await asyncio.sleep(0.1)

    async def delete(self, *names: str) -> None:
        for name in names:
            await self.plane.call("platform.delete", {"name": name})


@pytest.fixture
async def cloud(host: RunningHost, tmp_path: Path, vm_lock: None) -> AsyncIterator[Cloud]:
    plane = ControlPlane(tmp_path, host, USER)
    plane.enrol(cpu_permille=2000, memory_bytes=4 * GIB, disk_bytes=8 * GIB, vms=3)
    made = Cloud(plane)
    try:
        yield made
    finally:
        await made.link.hub.close()
        host.admin("user.remove", user=USER)


@contextlib.asynccontextmanager
async def rendezvous(cloud: Cloud) -> AsyncIterator[None]:
    parking = asyncio.ensure_future(cloud.rendezvous.run())
    try:
        yield
    finally:
        parking.cancel()
        await asyncio.gather(parking, return_exceptions=True)


def sampled(said: str) -> dict[str, str]:
    """What was asked for; the agent logs to the same console."""
    lines = [line[1:].partition(" ") for line in said.splitlines() if line.startswith("=")]
    return {key: value for key, _, value in lines}


def template_file(host: RunningHost, size_bytes: int) -> Path:
    """The template's RAM, as a clone's QEMU has it open."""
    for pid in pids_of_session(host.pid):
        if Path(f"/proc/{pid}/comm").read_text().startswith("qemu"):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(path).startswith("/memfd:memory") and path.stat().st_size == size_bytes:  # fmt: skip
                        return path
    raise LookupError("no clone has a template's RAM")


def held(host: RunningHost) -> dict[str, Any]:
    (user,) = host.admin("user.list")
    return {
        "used": {k: user["used"][k] for k in ("memory_bytes", "disk_bytes", "vms")},
        "inside": host.admin("host.domains")[0]["domains_inside"],
        "processes": len(pids_of_session(host.pid)),
        "groups": sum(host.instance in d for d, _, _ in os.walk("/sys/fs/cgroup")),
    }


async def until_started(cloud: Cloud, *names: str) -> None:
    for name in names:
        await cloud.plane.wait_for(name, "running", timeout_s=90)


async def event(cloud: Cloud, code: str) -> None:
    """When it has come."""
    said = b""
    async with cloud.plane.connected() as connection, asyncio.timeout(MADE_S):
        async with connection.peer.open("events.watch", {}) as stream:
            async for data in stream.chunks():
                said += data
                if code.encode() in said:
                    return


async def test_the_first_platform_boots_and_the_next_starts_from_what_was_made_in_the_background(
    cloud: Cloud,
) -> None:
    assert (await cloud.create("first"))["started_from"] == "boot"
    async with rendezvous(cloud):
        await cloud.connected("first")
    await event(cloud, "host.template.ready")
    assert (await cloud.create("second"))["started_from"] == "memory"
    await until_started(cloud, "first", "second")
    await cloud.delete("first", "second")


async def test_two_clones_share_nothing_that_must_differ_and_each_has_a_certificate_of_its_own(
    host: RunningHost, cloud: Cloud, product_images: Path
) -> None:
    found = await cloud.template()
    assert found["state"] == "ready", found
    assert found["booked_bytes"] > SHAPE["memory_bytes"]
    made = await asyncio.gather(cloud.create("one"), cloud.create("two"))
    assert {status["started_from"] for status in made} == {"memory"}
    await until_started(cloud, "one", "two")

    began_s = time.time()
    said = await asyncio.gather(*(inside(cloud.plane, name, SAMPLE) for name in ("one", "two")))
    one, two = map(sampled, said)
    # nobody was at the rendezvous: the clocks are what the host's side told
    for sample in (one, two):
        assert began_s - 1 < float(sample.pop("time")) < time.time() + 1
        assert all(sample.values()), sample
    assert len(one) == 7
    assert not [key for key in one if one[key] == two[key]]
    assert (one["host-name"], two["host-name"]) == ("one", "two")
    places = {(status["address"], status["first_port"]) for status in made}
    assert len(places) == 2

    async with rendezvous(cloud):
        await cloud.connected("one", "two")
        assert cloud.link.owner.pins["one"] != cloud.link.owner.pins["two"]
        for name, sample in (("one", one), ("two", two)):
            assert cloud.link.hub.sessions[name].hello.boot_id == sample["boot-id"]
        keys = [sampled(await inside(cloud.plane, n, HAS_KEY + SECRETS)) for n in ("one", "two")]
        assert len(keys[0]) == 3
        assert not [key for key in keys[0] if keys[0][key] == keys[1][key]]
        empty = hashlib.sha256(b"").hexdigest()
        assert not [value for value in keys[0].values() if value.startswith(empty)]
        ways_out = [sampled(await inside(cloud.plane, n, UPLINK)) for n in ("one", "two")]
        assert ways_out == [{"gateway": "0202000A", "asked": "0"}] * 2
        assert sampled(await inside(cloud.plane, "one", DISK)) == {"kept": "whole", "checked": "0"}

    # what the clones run from is what was measured, and has nothing of them or of their owner
    ram = template_file(host, SHAPE["memory_bytes"])
    with ram.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert hashlib.sha256(memory).hexdigest() == found["ram_sha256"]
        assert memory.find(b"supercloud.identity") > 0  # one does find what is there
        pem = cloud.plane.ca_pem.splitlines()[1]
        for secret in (*cloud.tokens.values(), pem, USER, one["link-mac"]):
            assert memory.find(secret.encode()) < 0, secret
        public = (product_images / "root.erofs").read_bytes()  # GnuTLS has keys to test itself with
        at = memory.find(_KEY)
        while at >= 0:
            assert memory[at : at + 90] in public, "a private key that is not of the image"
            at = memory.find(_KEY, at + 1)
    await cloud.delete("one", "two")


class Guest:
    """A VM's shell on its console."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._said = stream, ""

    async def ask(self, command: str) -> str:
        """One line that the command prints."""
        mark = os.urandom(4).hex()
        await self._stream.write(f"echo ={mark} $({command}) {mark}=\n".encode())
        wanted = re.compile(rf"^={mark} (.*) {mark}=", re.MULTILINE)
        async with asyncio.timeout(90):
            while not (found := wanted.search(self._said.replace("\r", ""))):
                data = await self._stream.read()
                assert data is not None
                self._said += data.decode(errors="replace") if isinstance(data, bytes) else ""
        return found[1]


def examples(images: Path, work: Path) -> list[EnvironmentSpec]:
    """The two examples as a control plane has them ready, and the blobs of both below ``work``."""
    made = Images(work, partial(in_process, cache=work / "oci"), pack_in_process)
    found = []
    for number, (name, kind, image) in enumerate(
        (("web", "container", f"oci:{images}/web"), ("machine", "vm", f"{images}/vm")), 2
    ):
        wish = Environment(name=name, kind=kind, image=image)
        ref = asyncio.run(made.prepare(wish, "", lambda _: None))
        nic = Nic(
            network="default", address=f"10.64.0.{number}/24", gateway="10.64.0.1",
            mac=f"02:64:00:00:00:0{number}",
        )  # fmt: skip
        found.append(EnvironmentSpec(
            name=name, uid=f"e-{name}", kind=kind, image=ref, nics=[nic], memory_bytes=96 * MIB,
            ports=[PortMap(port=8080)], process=Process(env={"SECRET": SECRET}),
        ))  # fmt: skip
    return found


async def prepare_with(cloud: Cloud, specs: list[EnvironmentSpec], work: Path) -> dict[str, Any]:
    """A template that has them ready, as the control plane would have it made."""
    assert all(can_be_prepared(spec) for spec in specs)
    more = {"environments": encode([without_secrets(spec) for spec in specs])}
    missing = (await cloud.prepare(**more))["missing"]
    blobs = blobs_of(specs)
    assert sorted(missing) == sorted(blobs)
    async with cloud.plane.connected() as connection:
        for digest, blob in blobs.items():
            async with connection.peer.open("template.blob", encode(blob)) as stream:
                place = work / "blobs" / "sha256" / digest.removeprefix("sha256:")
                await stream.write(place.read_bytes())
                stream.end()
                assert await stream.read() is None
    return await cloud.template(**more)


async def serving(cloud: Cloud, platform: str, names: set[str]) -> None:
    """Until the platform runs these, and nothing else any more."""
    async with asyncio.timeout(120):
        while True:
            report = await cloud.link.hub.sessions[platform].list()
            if {each.name: each.state for each in report.environments} == dict.fromkeys(names, "serving"):  # fmt: skip
                return
            await asyncio.sleep(0.2)


async def test_environments_that_are_ready_in_a_template_go_on_as_others_in_each_clone(
    host: RunningHost, cloud: Cloud, example_images: Path, tmp_path: Path
) -> None:
    specs = await asyncio.to_thread(examples, example_images, tmp_path / "cache")
    found = await prepare_with(cloud, specs, tmp_path / "cache")
    assert found["state"] == "ready", found
    began_s = time.time()  # the template's own clock stands before it
    await asyncio.gather(cloud.create("one"), cloud.create("two"))
    async with rendezvous(cloud):
        await cloud.connected("one", "two")
        # no blob can be pulled: whatever runs was ready
        wanted = {"one": specs, "two": specs[1:]}
        for platform, there in wanted.items():
            await cloud.link.hub.sessions[platform].apply(Apply(generation=1, environments=there))
        for platform, there in wanted.items():
            await serving(cloud, platform, {spec.name for spec in there})
        said = []
        for platform in wanted:
            async with cloud.link.hub.sessions[platform].console("machine") as stream:
                guest = Guest(stream)
                said.append(await guest.ask("cat /proc/sys/kernel/random/uuid"))
                said.append(await guest.ask("cat /proc/sys/kernel/random/boot_id"))
                assert began_s - 1 < int(await guest.ask("date +%s")) < time.time() + 1
        assert len(set(said)) == 4, said  # the guests' generators have nothing in common
        left = await inside(cloud.plane, "two", "echo =left $(ls /run/supercloud/ee)\n")
        assert sampled(left) == {"left": "e-machine"}
    ram = template_file(host, SHAPE["memory_bytes"])
    with ram.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert memory.find(b"e-machine") > 0
        assert memory.find(SECRET.encode()) < 0
    await cloud.delete("one", "two")


async def test_another_shape_boots_and_a_template_gives_way_to_a_platform_that_needs_its_room(
    host: RunningHost, cloud: Cloud
) -> None:
    assert (await cloud.template())["state"] == "ready"
    charged = host.admin("user.list")[0]["used"]["memory_bytes"]
    assert charged >= SHAPE["memory_bytes"]  # the provider counts it
    info = await cloud.plane.call("host.info")
    assert info["used"]["memory_bytes"] == 0  # who places platforms need not
    other = await cloud.create("other", memory_bytes=3584 * MIB)
    assert other["started_from"] == "boot"
    await until_started(cloud, "other")
    assert held(host)["used"]["memory_bytes"] == 3584 * MIB
    lacking = await cloud.template()
    assert lacking["state"] == "absent"
    assert "memory_bytes" in lacking["reason"]
    await cloud.delete("other")


@pytest.mark.parametrize("victim", ["monitor", "qemu", "user"])
async def test_a_killed_maker_leaves_nothing(host: RunningHost, cloud: Cloud, victim: str) -> None:
    await cloud.plane.image()
    before = held(host)
    assert (await cloud.prepare())["state"] == "making"
    pid = await victims_pid(host, victim)
    assert held(host)["used"]["memory_bytes"] > before["used"]["memory_bytes"]
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60):
        while held(host) != before:
            await asyncio.sleep(0.2)
    if victim != "user":
        assert (await cloud.prepare())["state"] == "refused"


async def victims_pid(host: RunningHost, victim: str) -> int:
    """When the maker's QEMU runs."""
    async with asyncio.timeout(60):
        while True:
            for pid in pids_of_session(host.pid):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text().startswith("qemu"):
                        monitor = int(Path(f"/proc/{pid}/stat").read_text().split()[3])
                        user = host.pid_of(f"user:{USER}")
                        return {"monitor": monitor, "qemu": pid, "user": user}[victim]
            await asyncio.sleep(0.05)


async def test_a_restarted_user_domain_keeps_its_template_and_its_clones(
    host: RunningHost, cloud: Cloud
) -> None:
    found = await cloud.template()
    await cloud.create("one")
    await until_started(cloud, "one")
    os.kill(host.pid_of(f"user:{USER}"), signal.SIGKILL)
    await until_started(cloud, "one")
    again = await cloud.prepare()
    assert (again["state"], again["ram_sha256"]) == ("ready", found["ram_sha256"])
    assert (await cloud.create("two"))["started_from"] == "memory"
    await until_started(cloud, "two")
    await cloud.delete("one", "two")
