"""VMs that start again from memory in a booted platform, and whose memory that is."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from supercloud.wire.messages import EnvironmentSpec, EnvironmentStatus
from support.platform import FIRST_PORT, Platform, booted, machine, nic, web

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300, func_only=True),
    pytest.mark.asyncio(loop_scope="module"),
]

SPARES = "/run/supercloud/spares"
# what the kernel of the example draws from its generator
RANDOM = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with booted(tmp_path_factory.mktemp("platform")) as made:
        yield made


def told(platform: Platform, **changes: object) -> EnvironmentSpec:
    """The example VM, whose guest waits to be told who it is."""
    spec = machine(platform, **changes)
    append = f"{spec.image.append} random.trust_cpu=off random.trust_bootloader=off"
    return replace(spec, image=replace(spec.image, identity=True, append=append))


async def spares(platform: Platform) -> list[str]:
    return (await platform.shell(f"ls {SPARES}/*/state 2>/dev/null")).split()


async def until_spares(platform: Platform, count: int) -> None:
    async with asyncio.timeout(120):
        while len(await spares(platform)) != count:
            await asyncio.sleep(0.2)


async def serving(platform: Platform, **fields: object) -> EnvironmentStatus:
    found = await platform.until("machine", "serving", timeout_s=120, **fields)
    assert found is not None
    assert b"hello from vm machine" in await platform.http(FIRST_PORT + 1)
    return found


async def restart(platform: Platform, number: int) -> EnvironmentStatus:
    await (await platform.session()).restart("machine")
    return await serving(platform, restarts=number)


async def drawn(platform: Platform) -> set[str]:
    """Random numbers of the guest; what its console said before is seen as well."""
    out, mark = b"", secrets.token_hex(4)
    line = f"{RANDOM}; echo {mark[:4]}''{mark[4:]}\n".encode()
    async with asyncio.timeout(60), (await platform.session()).console("machine") as stream:
        for at in range(0, len(line), 8):  # a serial port takes sixteen at a time
            await stream.write(line[at : at + 8])
            await asyncio.sleep(0.05)
        while f"\n{mark}" not in (text := out.replace(b"\r", b"").decode(errors="replace")):
            item = await stream.read()
            assert isinstance(item, bytes), out
            out += item
    found = [word.strip() for word in text.partition(f"\n{mark}")[0].split("\n")[-2:]]
    assert [len(word) for word in found] == [36, 47], text
    return set(found)


async def kill_agent(platform: Platform) -> None:
    old = await platform.session()
    await platform.shell(f"kill -9 {await platform.agent_pid()}")
    async with asyncio.timeout(60):
        while platform.link.hub.sessions.get(platform.name) in (None, old):
            await asyncio.sleep(0.1)


async def test_who_starts_again_and_again_does_from_memory_and_each_is_another(
    platform: Platform,
) -> None:
    await platform.apply(told(platform))
    assert (await serving(platform)).started_from == "boot"
    assert await spares(platform) == [], "a first start is not held up"
    assert (await restart(platform, 1)).started_from == "boot"
    numbers = [await drawn(platform)]
    await until_spares(platform, 1)
    for count in (2, 3):
        assert (await restart(platform, count)).started_from == "memory"
        numbers.append(await drawn(platform))
    assert len(set.union(*numbers)) == 6, "no two share a random number"


async def test_a_spare_outlives_the_agent_and_its_environment(platform: Platform) -> None:
    before = await serving(platform)
    await kill_agent(platform)
    after = await serving(platform)
    assert (after.pid, after.started_from) == (before.pid, "memory")
    assert (await restart(platform, after.restarts + 1)).started_from == "memory"
    await platform.apply()
    await platform.until("machine", "gone")
    await platform.apply(told(platform, uid="machine-2"))
    assert (await serving(platform, uid="machine-2")).started_from == "memory"


async def test_another_machine_does_not_start_from_it(platform: Platform) -> None:
    await platform.apply(told(platform, uid="machine-3", nics=[nic(12)]))
    before = await serving(platform, uid="machine-3")
    assert before.started_from == "boot"
    await until_spares(platform, 1)
    assert (await restart(platform, before.restarts + 1)).started_from == "boot"
    await until_spares(platform, 2)


async def test_what_an_agent_left_half_made_is_none_and_its_guest_is_told(
    platform: Platform,
) -> None:
    await platform.shell(f"rm -r {SPARES}/*")
    before = await serving(platform)
    await (await platform.session()).restart("machine")
    await platform.until("machine", "running", restarts=before.restarts + 1)
    await platform.shell(f"mkdir -p {SPARES}/left; echo half > {SPARES}/left/ram")
    await kill_agent(platform)
    assert (await serving(platform, restarts=before.restarts + 1)).started_from == "boot"
    assert "left" not in await platform.shell(f"ls {SPARES}")


async def test_a_spare_that_cannot_be_gone_on_from_is_dropped_and_it_boots(
    platform: Platform,
) -> None:
    before = await serving(platform)
    made = await restart(platform, before.restarts + 1)
    while not await spares(platform):
        await asyncio.sleep(0.2)
    await platform.shell(f"for f in {SPARES}/*/state; do echo nonsense > $f; done")
    await (await platform.session()).restart("machine")
    after = await serving(platform, restarts=made.restarts + 1)
    assert (after.started_from, after.pid == made.pid) == ("boot", False)


async def test_its_memory_is_given_back_when_an_environment_may_use_it(platform: Platform) -> None:
    while not await spares(platform):
        await asyncio.sleep(0.2)
    big = web(platform, uid="big", nics=[nic(20)], memory_bytes=700 << 20, ports=[])
    await platform.apply(told(platform, uid="machine-3", nics=[nic(12)]), big)
    await platform.until("web", "running", "serving")
    assert await spares(platform) == []
    before = await serving(platform)
    assert (await restart(platform, before.restarts + 1)).started_from == "boot"
    assert await spares(platform) == [], "there is no room for one"
