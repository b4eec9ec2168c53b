"""Checkpoints of platforms on a real host, with a container and a nested VM that check themselves."""

import asyncio
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.control import bootdata
from supercloud.model.errors import (
    Denied,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from supercloud.wire.messages import Apply, Exec, Logs, VolumeMount
from support.checkpoints import KEY, Checkpointing
from support.inside import inside, with_shell
from support.link import Link
from support.lower import ControlPlane, RunningHost, pids_of_session, running_host
from support.platform import machine, web

pytestmark = [pytest.mark.vm, pytest.mark.root]

USER, NAME = "demo", "p1"
MIB, GIB = 1 << 20, 1 << 30
SHAPE = {"memory_bytes": 1536 * MIB, "scratch_bytes": GIB, "cpus": 1}
QUOTA = {"cpu_permille": 2000, "memory_bytes": 5 * GIB, "disk_bytes": 6 * GIB, "vms": 2}
SNAPSHOT = "supercloud-0123456789abcdef"
# a counter and a hash over all of its values, in nothing but the memory of a shell
LOOP = (
    "n=0; h=x; while :; do n=$((n+1)); h=$(echo $h $n | sha256sum | cut -c1-16); "
    "echo STATE $n $h$OUT; sleep 0.4; done"
)
BEHIND = "</dev/null >/dev/null 2>&1 &"  # the exec that began it ends


@pytest.fixture(scope="module")
def host(product_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    images = tmp_path_factory.mktemp("images")
    place, before = tmp_path_factory.mktemp("host"), os.environ.get("SUPERCLOUD_IMAGES")
    os.environ["SUPERCLOUD_IMAGES"] = str(with_shell(product_images, images))
    try:
        with running_host(place, "t-ck") as host:
            yield host
    finally:
        os.environ.pop("SUPERCLOUD_IMAGES")
        if before is not None:
            os.environ["SUPERCLOUD_IMAGES"] = before


class Cloud:
    """One user's, with a store for checkpoints; ``p1`` is its platform."""

    def __init__(self, host: RunningHost, plane: ControlPlane, directory: Path) -> None:
        self.host, self.plane, self.directory = host, plane, directory
        self.link, self.checkpoints = Link(plane.directory, USER), Checkpointing(plane)
        self.rendezvous = Rendezvous(plane.dialer, self.link.hub.serve_relayed)

    async def create(self, **more: Any) -> dict[str, Any]:
        if "restore" not in more:
            self.link.owner.pins.pop(NAME, None)  # it makes a key of its own
        token = self.link.owner.expect(NAME)
        endpoints = ["169.254.77.1:7444"]
        data = bootdata.user_data(USER, NAME, token, self.plane.ca_pem, endpoints)
        config = bootdata.config_iso(USER, NAME, data)
        made: dict[str, Any] = await self.plane.create(NAME, config=config, **{**SHAPE, **more})
        await self.plane.wait_for(NAME, "running", timeout_s=90)
        return made

    async def template(self) -> None:
        shape = {"image": await self.plane.image(), **SHAPE}
        async with asyncio.timeout(150):
            while (found := await self.plane.call("template.prepare", shape))["state"] != "ready":
                assert found["state"] == "making", found
                await asyncio.sleep(0.3)

    async def volume(self, name: str) -> int:
        """One that is attached as what can be restored; its slot."""
        spec = {"name": name, "size_bytes": 64 * MIB}
        seal = {"epoch": 0, "sequence": 0, "root": ""}
        asked = {"spec": spec, "key_base64": KEY, "seal": seal}
        epoch = (await self.plane.call("volume.open", asked))["seal"]["epoch"]
        await self.plane.call("volume.serve", {"name": name, "epoch": epoch})
        wanted = {"name": name, "platform": NAME, "restorable": True}
        status = await self.plane.call("volume.attach", wanted)
        assert status["mode"] == "nbd"
        return int(status["slot"])

    def restore(self, taken: dict[str, Any]) -> dict[str, Any]:
        """``PlatformSpec.restore``, with its volumes."""
        back = [
            {"volume": volume, "slot": slot, "snapshot": SNAPSHOT}
            for volume, slot in taken["slots"].items()
        ]
        return {**self.checkpoints.restore(NAME), "volumes": back}

    async def session(self) -> Any:
        async with asyncio.timeout(90):
            while NAME not in self.link.hub.sessions:
                await asyncio.sleep(0.1)
        return self.link.hub.sessions[NAME]

    async def delete(self) -> None:
        await self.plane.call("platform.delete", {"name": NAME})
        async with asyncio.timeout(30):
            while NAME in self.link.hub.sessions:
                await asyncio.sleep(0.05)

    def held(self) -> dict[str, Any]:
        (user,) = self.host.admin("user.list")
        used = {k: user["used"][k] for k in ("memory_bytes", "disk_bytes", "vms")}
        return {**used, "processes": len(pids_of_session(self.host.pid))}


@pytest.fixture
async def cloud(host: RunningHost, tmp_path: Path, vm_lock: None) -> AsyncIterator[Cloud]:
    plane = ControlPlane(tmp_path, host, USER)
    plane.enrol(**QUOTA)
    made = Cloud(host, plane, tmp_path)
    await made.checkpoints.prepare()
    parking = asyncio.ensure_future(made.rendezvous.run())
    try:
        yield made
    finally:
        parking.cancel()
        await asyncio.gather(parking, return_exceptions=True)
        await made.link.hub.close()
        host.admin("user.remove", user=USER)


def checked(said: bytes, least: int = 1) -> int:
    """The last count that was said, if the hash over all before it is right."""
    whole = said.rpartition(b"\n")[0]  # the last line may still be on its way
    lines = [line.split() for line in whole.decode(errors="replace").splitlines()]
    states = [
        (int(w[1]), w[2]) for w in lines if len(w) == 3 and w[0] == "STATE" and w[1].isdigit()
    ]
    assert states, said[-2000:]
    count, found = states[-1]
    digest = "x"
    for number in range(1, count + 1):
        digest = hashlib.sha256(f"{digest} {number}\n".encode()).hexdigest()[:16]
    assert found == digest, f"{count}: {found}, not {digest}"
    assert count >= least
    return count


class Writing:
    """A container that counts, and writes every number to a volume."""

    def __init__(self, cloud: Cloud, example_images: Path, slot: int) -> None:
        self.cloud = cloud
        place = cloud.directory / "machine"
        place.mkdir()
        around: Any = SimpleNamespace(examples=example_images, directory=place, link=cloud.link)
        mount = VolumeMount(volume="data", path="/data", slot=slot)
        self.spec = web(around, volumes=[mount])

    async def start(self) -> None:
        session = await self.cloud.session()
        await session.apply(Apply(generation=1, environments=[self.spec], names={}))
        async with asyncio.timeout(120):
            while [e.state for e in (await session.list()).environments] != ["serving"]:
                await asyncio.sleep(0.3)
        loop = "n=0; while :; do n=$((n+1)); echo $n >> /data/all; sleep 0.2; done"
        await self.execute(f"({loop}) {BEHIND}")

    async def execute(self, command: str) -> bytes:
        out, argv = b"", ["sh", "-c", command]
        async with (await self.cloud.session()).exec(Exec(name="web", argv=argv)) as stream:
            stream.signal(eof=True)
            async with asyncio.timeout(60):
                async for chunk in stream.chunks():
                    out += chunk
        return out

    async def written(self, least: int) -> int:
        """The last number, once it is so large; none is missing before it, and none there twice."""
        async with asyncio.timeout(60):
            while True:
                words = (await self.execute("cat /data/all")).split()
                assert words == [b"%d" % n for n in range(1, len(words) + 1)], words
                if len(words) >= least:
                    return len(words)
                await asyncio.sleep(0.3)


class Environments:
    """A container and a VM that count, and how far each says that it is."""

    def __init__(self, cloud: Cloud, example_images: Path) -> None:
        self.cloud = cloud
        place = cloud.directory / "machine"
        place.mkdir()
        around: Any = SimpleNamespace(examples=example_images, directory=place, link=cloud.link)
        self.specs = [web(around), machine(around)]

    async def start(self) -> None:
        session = await self.cloud.session()
        names = {spec.name: [spec.nics[0].address.partition("/")[0]] for spec in self.specs}
        await session.apply(Apply(generation=1, environments=self.specs, names=names))
        await self.serving()
        loop = LOOP.replace("$OUT", " > /tmp/state.new; mv /tmp/state.new /tmp/state")
        await self.execute(f"({loop}) {BEHIND}")
        async with (await self.cloud.session()).console("machine") as console:
            line = f"{LOOP.replace('$OUT', '')}\n".encode()
            for at in range(0, len(line), 8):  # a serial port takes sixteen at a time
                await console.write(line[at : at + 8])
                await asyncio.sleep(0.1)
        await self.counting()

    async def counting(self) -> None:
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(AssertionError):
                    await self.container()
                    await self.vm()
                    return
                await asyncio.sleep(0.3)

    async def serving(self) -> None:
        async with asyncio.timeout(120):
            while True:
                report = await (await self.cloud.session()).list()
                if [e.state for e in report.environments] == ["serving", "serving"]:
                    return
                await asyncio.sleep(0.3)

    async def execute(self, command: str) -> bytes:
        out, argv = b"", ["sh", "-c", command]
        async with (await self.cloud.session()).exec(Exec(name="web", argv=argv)) as stream:
            stream.signal(eof=True)
            async with asyncio.timeout(60):
                async for chunk in stream.chunks():
                    out += chunk
        return out

    async def container(self, least: int = 1) -> int:
        return checked(await self.execute("cat /tmp/state"), least)

    async def vm(self, least: int = 1) -> int:
        return checked(await self.output(), least)

    async def output(self) -> bytes:
        """The last lines of the VM's console."""
        said, asked = b"", Logs(name="machine", tail=40, follow=False)
        async with (await self.cloud.session()).logs(asked) as stream:
            async for chunk in stream.chunks():
                said += chunk
        return said

    async def beyond(self, container: int, vm: int) -> None:
        """Both go on, from there."""
        ended_s = time.monotonic() + 60
        while (at := (await self.container(), await self.vm())) and (
            at[0] <= container or at[1] <= vm
        ):
            assert time.monotonic() < ended_s, (at, (container, vm), await self.seen())
            await asyncio.sleep(0.3)

    async def seen(self) -> str:
        """What the platform knows of one that does not go on."""
        report = await (await self.cloud.session()).list()
        looks = (
            "cat /proc/uptime; dmesg | tail -20; for p in /proc/[0-9]*; do "
            "echo $p $(cat $p/comm) $(grep State: $p/status) $(cat $p/wchan); done"
        )
        said = (await self.output()).decode(errors="replace")
        return f"{report}\n{said}\n{await inside(self.cloud.plane, NAME, looks)}"


@pytest.mark.parametrize("how", ["memory", pytest.param("boot", marks=pytest.mark.long)])
async def test_a_platform_goes_on_as_its_checkpoint_has_it_with_all_that_runs_inside(
    cloud: Cloud, example_images: Path, how: str
) -> None:
    if how == "memory":
        await cloud.template()
    assert (await cloud.create())["started_from"] == how
    environments = Environments(cloud, example_images)
    await environments.start()
    pin = (await cloud.session()).pin
    await environments.beyond(2, 2)

    first = await cloud.checkpoints.take(NAME)
    assert (first["base"], first["dirty_bytes"]) == (True, 0)
    at_first = (await environments.container(), await environments.vm())
    await environments.execute("touch /tmp/after-first")
    await environments.beyond(*at_first)
    before = (await environments.container(), await environments.vm())
    second = await cloud.checkpoints.take(NAME)
    assert second["base"] == (how == "boot"), "whose written pages nobody knows"
    assert (second["dirty_bytes"] > 0) == (how == "memory")
    assert second["dirty_bytes"] < SHAPE["memory_bytes"]
    assert second["new_bytes"] < first["new_bytes"]
    assert 0 < second["pause_ms"] <= float(second["details"]["quiet_ms"])
    await environments.beyond(*before)
    await environments.execute("touch /tmp/after-second")
    await cloud.delete()

    made = await cloud.create(restore=cloud.checkpoints.restore(NAME))
    assert made["started_from"] == "checkpoint"
    session = await cloud.session()
    assert session.pin == pin, "its own key and certificate"
    assert set((await environments.execute("ls /tmp")).split()) & {
        b"after-first",
        b"after-second",
    } == {b"after-first"}
    await environments.beyond(
        await environments.container(before[0]), await environments.vm(before[1])
    )
    asked_s = time.time()
    clock_s = float(await inside(cloud.plane, NAME, "date +%s"))
    assert asked_s - 2 <= clock_s <= time.time() + 2

    # from there on the next one is whole, and those after it are not
    assert (await cloud.checkpoints.take(NAME))["base"]
    assert not (await cloud.checkpoints.take(NAME))["base"]
    await cloud.delete()
    await cloud.create(restore=cloud.checkpoints.restore(NAME, first["head"]["sequence"]))
    assert not {b"after-first", b"after-second"} & set(
        (await environments.execute("ls /tmp")).split()
    )
    await environments.beyond(*at_first)
    await cloud.delete()


async def test_what_is_not_the_checkpoint_that_was_taken_is_refused_and_nothing_is_left(
    cloud: Cloud,
) -> None:
    await cloud.create()
    await cloud.session()
    taken = await cloud.checkpoints.take(NAME)
    assert taken["details"]["started_from"] == "boot"
    assert taken["base"], "what was booted is written whole"
    assert (await cloud.checkpoints.take(NAME))["base"]
    await cloud.delete()
    before = cloud.held()
    restore = cloud.checkpoints.restore(NAME)
    other = {**restore, "head": {**restore["head"], "root": "0" * 64}}
    with pytest.raises(Denied, match="not the one that was taken") as refused:
        await cloud.create(restore=other)
    assert refused.value.details["reason"] == "replayed"
    with pytest.raises(Denied, match="not in the store"):
        await cloud.create(restore={**restore, "store": {**restore["store"], "secret": "0" * 64}})
    with pytest.raises(Unsupported, match="memory_bytes"):
        await cloud.create(restore=restore, memory_bytes=512 * MIB)
    with pytest.raises(NoResources):
        await cloud.create(restore=restore, memory_bytes=3 * GIB)
    assert cloud.held() == before
    assert await cloud.plane.state(NAME) == "absent"
    # neither in what is kept of it nor in what was said
    await cloud.create(restore=restore)
    kept = [p for p in cloud.host.state.rglob("*") if p.is_file() and p.suffix in (".json", ".log")]
    logs = [*kept, *cloud.host.state.glob("log/*"), cloud.host.directory / "host.log"]
    for path in logs:
        text = path.read_bytes()
        for secret in (cloud.checkpoints.secret, cloud.checkpoints.store["secret_key"]):
            assert secret.encode() not in text, path
    await cloud.delete()
    assert cloud.held() == before


@pytest.mark.parametrize("how", ["boot", pytest.param("memory", marks=pytest.mark.long)])
async def test_its_volumes_go_back_to_the_same_moment_as_its_memory(
    cloud: Cloud, example_images: Path, how: str
) -> None:
    if how == "memory":
        await cloud.template()
    assert (await cloud.create())["started_from"] == how
    slot = await cloud.volume("data")
    environments = Writing(cloud, example_images, slot)
    await environments.start()
    await environments.written(3)

    first = await cloud.checkpoints.take(NAME, snapshot=SNAPSHOT)
    assert first["slots"] == {"data": slot}
    at_first = await environments.written(1)
    await environments.execute("touch /data/later; sync")
    await environments.written(at_first + 5)
    await cloud.delete()

    for _ in range(2):  # what is written after it went on is lost the second time
        made = await cloud.create(restore=cloud.restore(first))
        assert made["started_from"] == "checkpoint"
        (status,) = (await cloud.plane.call("volume.list"))["volumes"]
        assert (status["platform"], status["slot"], status["mode"]) == (NAME, slot, "nbd")
        await cloud.session()
        assert b"later" not in await environments.execute("ls /data")
        await environments.execute("touch /data/later; sync")
        await environments.written(at_first + 5)
        await inside(cloud.plane, NAME, "sync; echo 3 > /proc/sys/vm/drop_caches")
        await environments.written(at_first + 7)
        await cloud.delete()
    wrong = cloud.restore(first)
    wrong["volumes"][0]["snapshot"] = "supercloud-ffffffffffffffff"
    with pytest.raises(NotFound):
        await cloud.create(restore=wrong)
    (status,) = (await cloud.plane.call("volume.list"))["volumes"]
    assert status["state"] == "served", "it is nobody's again"


async def test_without_the_agents_word_there_is_no_checkpoint_and_everything_goes_on(
    cloud: Cloud,
) -> None:
    await cloud.create()
    await cloud.session()
    before = cloud.held()
    agent = (
        "$(for p in $(cat /proc/1/task/1/children); "
        "do grep -q python /proc/$p/comm && echo $p; done)"
    )
    await inside(cloud.plane, NAME, f"kill -STOP {agent}")
    with pytest.raises(Temporary, match="did not acknowledge"):
        await cloud.checkpoints.take(NAME)
    assert await cloud.plane.state(NAME) == "running"
    await inside(cloud.plane, NAME, f"kill -CONT {agent}")
    assert cloud.held() == before
    await cloud.checkpoints.take(NAME)
    await cloud.delete()


@pytest.mark.long
async def test_a_quota_without_room_refuses_before_anything_stands_still(cloud: Cloud) -> None:
    await cloud.create()
    await cloud.session()
    full = {"memory_bytes": 1537 * MIB, "vms": 1}
    cloud.host.admin("user.quota", user=USER, quota={**QUOTA, **full})
    with pytest.raises(NoResources, match="of memory for a while"):
        await cloud.checkpoints.take(NAME)
    used = cloud.held()["disk_bytes"]
    cloud.host.admin("user.quota", user=USER, quota={**QUOTA, "disk_bytes": used + MIB})
    with pytest.raises(NoResources, match="of disk for a while"):
        await cloud.checkpoints.take(NAME)
    cloud.host.admin("user.quota", user=USER, quota=QUOTA)
    await cloud.checkpoints.take(NAME)
    await cloud.delete()


@pytest.mark.parametrize("delay_s", [0.0, pytest.param(0.6, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "victim",
    [
        "checkpoint",
        pytest.param("user", marks=pytest.mark.long),
        pytest.param("vmm", marks=pytest.mark.long),
    ],
)
async def test_whoever_is_killed_in_the_middle_nothing_is_left_and_the_next_one_is_whole(
    cloud: Cloud, victim: str, delay_s: float
) -> None:
    empty = cloud.held()
    await cloud.create()
    await cloud.session()
    await cloud.checkpoints.take(NAME)
    before = cloud.held()
    taking = asyncio.ensure_future(cloud.checkpoints.take(NAME))
    name = f"{victim}:{USER}" + (f":{NAME}" if victim == "vmm" else "")
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(LookupError):
                cloud.host.pid_of(f"checkpoint:{USER}")
                break
            await asyncio.sleep(0.01)
    await asyncio.sleep(delay_s)
    os.kill(cloud.host.pid_of(name), signal.SIGKILL)
    if delay_s:
        await asyncio.wait([taking])  # it may have been quick enough
        with contextlib.suppress(SupercloudError):
            await taking
    else:
        with pytest.raises(SupercloudError):
            await taking
    if victim == "vmm":
        await cloud.plane.wait_for(NAME, "failed")
        await cloud.delete()
        await cloud.create()
        await cloud.session()
    async with asyncio.timeout(60):
        while cloud.held() != before:
            await asyncio.sleep(0.2)
    await cloud.checkpoints.take(NAME)
    await cloud.delete()
    assert {**cloud.held(), "processes": 0} == {**empty, "processes": 0}
