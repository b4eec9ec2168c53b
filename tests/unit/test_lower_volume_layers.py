"""The user domain's volumes over a pretended driver, pretended services and a pretended machine."""

import asyncio
import base64
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.mirrors import Mirrors
from supercloud.lower.user_domain.volumes import Volumes
from supercloud.model.errors import BadState, Busy, Exists, NoResources, NotFound, Permanent
from supercloud.wire.portal import Closed, Reply
from supercloud.wire.volumes import Seal, VolumeAttach, VolumeOpen, VolumeServe, VolumeSpec

SPEC = VolumeSpec(name="data", size_bytes=64 << 20)
KEY = base64.b64encode(bytes(32)).decode()
SEALED = {"epoch": 1, "sequence": 1, "root": "a" * 64}
FIGURES = dict.fromkeys(
    ("read_bytes", "write_bytes", "reads", "writes", "flushes", "read_ns", "write_ns", "slots",
     "free_slots", "evidence", "full"), 0,
)  # fmt: skip


class Far:
    """The other end of a channel: answers by method, an error is raised; ``heard`` are methods."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name.replace("_", ".", 1): value for name, value in answers.items()}
        self.heard: list[str] = []

    async def call(
        self, method: str, parameters: Any = None, given: Any = None, *, timeout_s: float = 0
    ) -> Reply:
        await asyncio.sleep(0)
        self.heard.append(method)
        answer = self.answers.get(method, {})
        if callable(answer):
            answer = answer(parameters or {})
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Reply):
            return Reply(answer.result, [os.open("/dev/null", os.O_RDWR)])
        return Reply(answer)

    async def result(self, method: str, parameters: Any = None) -> Any:
        return (await self.call(method, parameters)).result


class Slots(Far):
    """A machine's monitor with its slots."""

    def __init__(self) -> None:
        super().__init__()
        self.disks: dict[str, int] = {}
        self.answers = {
            "machine.status": {"ram_shared": True}, "machine.attach": self.attach,
            "machine.detach": self.detach, "machine.disks": self.listed,
        }  # fmt: skip

    def attach(self, asked: Any) -> Any:
        if asked["volume"] in self.disks:
            return Exists("attached already")
        if asked["slot"] in self.disks.values():
            return BadState(f"slot {asked['slot']} is in use")
        self.disks[asked["volume"]] = asked["slot"]
        return {}

    def detach(self, asked: Any) -> Any:
        return {} if self.disks.pop(asked["volume"], None) else NotFound("not attached")

    def listed(self, _asked: Any) -> Any:
        return {"disks": [{"volume": v, "slot": n} for v, n in self.disks.items()]}


def absent(name: str) -> Any:
    raise NotFound(name)


class World:
    def __init__(self, directory: Path) -> None:
        descriptor = Reply({"made": True, "size_bytes": 0})
        self.disk = Far(disk_create=descriptor, disk_open=descriptor)
        self.protection = Far(
            device_create=SEALED, device_prepare=SEALED, device_open=SEALED, device_close=SEALED,
            device_state={**SEALED, **FIGURES}, device_connect=descriptor,
        )  # fmt: skip
        self.block = Far(volume_snapshots={"snapshots": []}, volume_attach=descriptor)
        self.machine = Slots()
        channels = {"protection": self.protection, "block": self.block}
        services: Any = SimpleNamespace(
            start=channels.__getitem__, is_running=channels.__contains__, told={}
        )

        async def machine(_platform: str) -> Any:
            return self.machine

        core = SimpleNamespace(lookup=absent, destroy_named=lambda _: None)
        hub: Any = SimpleNamespace(core=core, join=lambda *_: self.disk)
        feed = Feed("u", "host/t")
        tunnels: Any = SimpleNamespace()
        mirrors = Mirrors(hub.core, services, tunnels, feed)
        self.volumes = Volumes(hub, services, mirrors, feed, str(directory), machine)

    async def serve(self, name: str = "data", seal: Seal | None = None) -> None:
        spec = VolumeSpec(name=name, size_bytes=SPEC.size_bytes)
        await self.open(spec, seal)
        await self.volumes.serve(VolumeServe(name=name, epoch=1))

    async def open(self, spec: VolumeSpec = SPEC, seal: Seal | None = None) -> Any:
        asked = VolumeOpen(spec=spec, key_base64=KEY, seal=seal or Seal())
        return await self.volumes.open(asked)

    async def attach(self, name: str = "data") -> Any:
        return await self.volumes.attach(VolumeAttach(name=name, platform="p"))

    async def state(self) -> dict[str, str]:
        return {status.name: status.state for status in await self.volumes.statuses()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def a_service_died(world: World) -> None:
    for volume in world.volumes._records.by_name.values():
        world.volumes._go(volume, "failed", "its block service died")


# -- attached, and what is left in the machine


async def test_what_a_dead_service_left_in_the_machine_does_not_stand_in_the_way(
    world: World,
) -> None:
    for name in ("data", "other"):
        await world.serve(name)
        await world.attach(name)
    a_service_died(world)
    assert world.machine.disks == {"data": 1, "other": 2}
    await world.serve("other", Seal(**SEALED))  # type: ignore[arg-type]
    assert (await world.attach("other")).slot == 2
    await world.serve("data", Seal(**SEALED))  # type: ignore[arg-type]
    assert (await world.attach("data")).slot == 1


@pytest.mark.parametrize("nonsense", [[], {"disks": 3}, {"disks": [{"volume": "data"}]}])
async def test_a_monitor_that_answers_nonsense_is_an_error_that_says_so(
    world: World, nonsense: Any
) -> None:
    await world.serve()
    world.machine.answers["machine.disks"] = nonsense
    with pytest.raises(Permanent, match="monitor"):
        await world.attach()
    assert await world.state() == {"data": "served"}


# -- what grows under its user

LARGER = VolumeSpec(name="data", size_bytes=128 << 20)


async def by_nbd(world: World) -> list[str]:
    """Attached to a machine with private memory; what is called from here on, in order."""
    world.machine.answers |= {"machine.status": {"ram_shared": False}}
    size = {"size_bytes": LARGER.size_bytes}
    world.block.answers |= {"volume.attach": Reply(size), "volume.stats": {"copying": ""}}
    await world.serve()
    assert (await world.attach()).mode == "nbd"
    heard: list[str] = []
    for far in (world.disk, world.protection, world.block, world.machine):
        far.heard = heard
    return heard


async def test_by_nbd_it_grows_while_its_machine_stands_still(world: World) -> None:
    heard = await by_nbd(world)
    assert (await world.volumes.change(LARGER)).size_bytes == LARGER.size_bytes
    assert heard[:10] == [
        *("volume.stats", "disk.grow", "device.grow", "device.state"),
        *("machine.hold", "volume.detach", "volume.grow", "volume.attach", "machine.renew"),
        "volume.throttle",
    ]


@pytest.mark.parametrize("fails", ["volume.detach", "volume.grow"])
async def test_one_that_cannot_grow_lets_its_machine_go_on(world: World, fails: str) -> None:
    heard = await by_nbd(world)
    world.block.answers[fails] = NoResources("no")
    with pytest.raises(NoResources):
        await world.volumes.change(LARGER)
    assert heard[heard.index(fails) + 1 :][:2] == ["volume.attach", "machine.renew"]
    del world.block.answers[fails]
    assert (await world.volumes.change(LARGER)).size_bytes == LARGER.size_bytes


async def test_one_that_is_being_copied_does_not_grow_and_nothing_stands_still(
    world: World,
) -> None:
    heard = await by_nbd(world)
    world.block.answers["volume.stats"] = {"copying": "clone to other"}
    with pytest.raises(Busy, match="clone to other"):
        await world.volumes.change(LARGER)
    assert not {"disk.grow", "machine.hold"} & set(heard)


async def test_a_raw_one_does_not_grow_under_a_machine_that_would_not_see_it(
    world: World,
) -> None:
    spec = VolumeSpec(name="data", size_bytes=SPEC.size_bytes, format="raw")
    await world.open(spec)
    await world.volumes.serve(VolumeServe(name="data", epoch=1))
    assert (await world.attach()).mode == "vhost-user-blk"
    with pytest.raises(BadState, match="raw, and in use"):
        await world.volumes.change(VolumeSpec(name="data", size_bytes=128 << 20, format="raw"))
    assert "disk.grow" not in world.disk.heard


# -- what is given back


async def test_a_new_one_that_cannot_be_given_back_is_when_it_is_asked_for_again(
    world: World,
) -> None:
    world.protection.answers["device.prepare"] = Permanent("no")
    world.disk.answers["disk.delete"] = Closed("the driver is away")
    with pytest.raises(Permanent):
        await world.open()
    assert await world.state() == {"data": "deleting"}
    world.protection.answers["device.prepare"] = SEALED
    with pytest.raises(Closed):
        await world.open()
    with pytest.raises(Closed):
        await world.volumes.delete("data")
    world.disk.answers["disk.delete"] = {}
    world.disk.heard.clear()
    await world.open(VolumeSpec(name="data", size_bytes=128 << 20))
    assert world.disk.heard == ["disk.delete", "disk.create"]
    assert await world.state() == {"data": "opened"}


async def test_one_that_is_being_deleted_is_not_opened_as_what_it_was(world: World) -> None:
    await world.serve()
    world.disk.answers["disk.delete"] = Closed("the driver is away")
    with pytest.raises(Closed):
        await world.volumes.delete("data")
    world.disk.answers["disk.delete"] = {}
    with pytest.raises(NotFound):
        await world.open(seal=Seal(**SEALED))  # type: ignore[arg-type]
    assert await world.state() == {}


@pytest.mark.parametrize("fails", ["device.prepare", "device.open"])
async def test_what_holds_data_is_never_given_back_by_an_opening_that_fails(
    world: World, fails: str
) -> None:
    await world.serve()
    await world.volumes.close("data")
    world.protection.answers[fails] = Permanent("no")
    with pytest.raises(Permanent):
        await world.serve(seal=Seal(**SEALED))  # type: ignore[arg-type]
    assert await world.state() == {"data": "failed"}
    assert "disk.delete" not in world.disk.heard
    world.protection.answers[fails] = SEALED
    await world.serve(seal=Seal(**SEALED))  # type: ignore[arg-type]
    assert await world.state() == {"data": "served"}


async def test_one_that_is_being_copied_is_not_closed_and_not_harmed_by_who_tries(
    world: World,
) -> None:
    await world.serve()
    world.block.answers["volume.close"] = Busy("volume data: backup to safe is under way")
    with pytest.raises(Busy, match="under way"):
        await world.volumes.close("data")
    assert await world.state() == {"data": "served"}
    assert "device.close" not in world.protection.heard[2:]
    world.block.answers["volume.close"] = {}
    assert (await world.volumes.close("data")).state == "closed"
