"""VMs in a platform whose processor cannot nest: they are emulated there, and say so."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from supercloud.model.emulation import EMULATED_CPU
from supercloud.wire.messages import ImageRef
from support.platform import BOOT_SECTOR, FIRST_PORT, Platform, blob, booted, machine

pytestmark = [pytest.mark.vm, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    cpu = f"{EMULATED_CPU},svm=off"
    async with booted(tmp_path_factory.mktemp("platform"), cpu=cpu) as made:
        yield made


async def test_a_vm_runs_emulated_and_its_engine_says_so(
    platform: Platform, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    image = ImageRef(format="raw", blobs={"disk": blob(platform.link.owner.paths, disk)})
    await platform.apply(machine(platform, ports=[], memory_bytes=32 << 20, image=image))
    vm = await platform.until("machine", "running", timeout_s=120)
    assert vm is not None
    assert (vm.engine, vm.pid > 0) == ("qemu/tcg", True)
    session, said = await platform.session(), b""
    async with asyncio.timeout(120), session.console("machine") as console:
        async for data in console.chunks():
            said += data
            if b"disk boots" in said:
                break
    assert b"disk boots" in said, "it really runs"
    argv = await platform.shell(f"cat /proc/{vm.pid}/cmdline")
    assert "-accel\0tcg" in argv
    reason = await platform.shell("cat /run/supercloud/accelerator.json")
    assert reason == '"the platform\'s processor has neither SVM nor VMX"'


@pytest.mark.long  # two emulations, one inside the other: five minutes on a loaded machine
@pytest.mark.timeout(900, func_only=True)
async def test_the_example_serves_emulated(platform: Platform) -> None:
    await platform.apply(machine(platform, name="example", uid="example-1"))
    vm = await platform.until("example", "serving", timeout_s=800)
    assert vm is not None
    assert vm.engine == "qemu/tcg"
    assert b"hello from vm" in await platform.http(FIRST_PORT + 1, 120)
