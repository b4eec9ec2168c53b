"""A platform out of a template against a cold boot of the same image by plain QEMU.

To answering as itself: ours from ``platform.create`` over the host wire to the agent's word that it
is the new one (its answer to a nonce); by plain QEMU from the start of the process to the agent's
line that it has its boot data and its network. To the link: until mutual TLS stands and the agent
has said hello. Memory: PSS of the machines' QEMUs, and the whole template, against as many cold ones.
Run as root.
"""

import argparse
import asyncio
import base64
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run
from memory import pss_mib

from supercloud.control import bootdata
from supercloud.providers.lower_layer.dial import Connection
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from support.link import Link
from support.lower import ControlPlane, RunningHost, images, pids_of_session, running_host
from support.platform import Platform
from support.slots import vm_slots

ANSWERS_AT_MOST, LINK_AT_MOST, MEMORY_AT_MOST = 0.12, 0.2, 0.35
MACHINES = int(os.environ.get("SUPERCLOUD_BENCH_MACHINES", "8"))
MIB, GIB = 1 << 20, 1 << 30
SHAPE = {"memory_bytes": GIB, "scratch_bytes": 4 * GIB, "cpus": 1}
UP = "supercloud.agent: platform {} of"


class Cold:
    """Plain QEMU, its networks in QEMU itself."""

    def __init__(self, work: Path, link: Link) -> None:
        self.work, self.link, self.number = work, link, 0

    @contextlib.asynccontextmanager
    async def machine(self) -> AsyncIterator[Platform]:
        self.number += 1
        place = self.work / f"cold-{self.number}"
        place.mkdir()
        name = f"c{self.number}"
        async with Platform(place, self.link, images=images(), name=name).running() as platform:
            yield platform
        (place / "scratch").unlink()

    async def answering(self) -> float:
        started = time.perf_counter()
        async with self.machine() as platform:
            await until(lambda: UP.format(platform.name) in console(platform))
            return time.perf_counter() - started

    async def linked(self) -> float:
        started = time.perf_counter()
        async with self.machine() as platform:
            await platform.session()
            took = time.perf_counter() - started
        await until(lambda: not self.link.hub.sessions)
        return took


class Warm:
    """Our host, a template there."""

    def __init__(self, plane: ControlPlane, link: Link) -> None:
        self.plane, self.link, self.number = plane, link, 0
        self.shape: dict[str, object] = dict(SHAPE)
        self.connection: Connection | None = None
        self.started = 0.0

    async def prepare(self) -> None:
        self.shape["image"] = await self.plane.image()
        while (found := await self.call("template.prepare", self.shape))["state"] != "ready":
            assert found["state"] == "making", found
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)

    async def call(self, method: str, parameters: Any) -> Any:
        """Over one connection, as the control plane has it."""
        if self.connection is None:
            self.connection = await self.plane.dialer.connect()
        return await self.connection.peer.call(method, parameters, timeout_s=60)

    async def start(self) -> str:
        self.number += 1
        name = f"w{self.number}"
        token = self.link.owner.expect(name)
        data = bootdata.user_data("demo", name, token, self.plane.ca_pem, ["169.254.77.1:7444"])
        config = base64.b64encode(bootdata.config_iso("demo", name, data)).decode()
        asked = {"name": name, "config_base64": config, "ports": 4, **self.shape}
        self.started = time.perf_counter()
        made = await self.call("platform.create", asked)
        assert made["started_from"] == "memory"
        return name

    async def state(self, name: str) -> str:
        listed = (await self.call("platform.list", {}))["platforms"]
        return next(p["state"] for p in listed if p["name"] == name)

    async def answering(self) -> float:
        name = await self.start()
        while await self.state(name) != "running":  # noqa: ASYNC110 -- a process of another's
            await asyncio.sleep(0.01)
        took = time.perf_counter() - self.started
        await self.call("platform.delete", {"name": name})
        return took

    async def linked(self) -> float:
        name = await self.start()
        await until(lambda: name in self.link.hub.sessions)
        took = time.perf_counter() - self.started
        await self.call("platform.delete", {"name": name})
        await until(lambda: name not in self.link.hub.sessions)
        return took


def console(platform: Platform) -> str:
    path = platform.directory / "console"
    return path.read_text(errors="replace") if path.exists() else ""


async def until(true: Callable[[], bool], timeout_s: float = 90) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 -- a file or a process of another's
            await asyncio.sleep(0.005)


def qemus(host: RunningHost) -> list[int]:
    return [
        pid
        for pid in pids_of_session(host.pid)
        if Path(f"/proc/{pid}/comm").read_text().startswith("qemu")
    ]


async def memory(cold: Cold, warm: Warm, host: RunningHost) -> tuple[float, float]:
    """MiB of as many cold machines, and of the clones with their template; all run at once."""
    async with contextlib.AsyncExitStack() as stack:
        pids = []
        for _ in range(MACHINES):
            platform = await stack.enter_async_context(cold.machine())
            await platform.session()
            assert platform.process is not None
            pids.append(platform.process.pid)
        await asyncio.sleep(10)
        booted = sum(map(pss_mib, pids))
    names = [await warm.start() for _ in range(MACHINES)]
    await until(lambda: set(names) <= set(warm.link.hub.sessions))
    await asyncio.sleep(10)
    clones = sum(pss_mib(pid) for pid in qemus(host))
    unmapped = template_mib(host) - shared_mib(qemus(host))
    print(f"cold: {booted:.0f} MiB; clones: {clones:.0f}; template not mapped: {unmapped:.0f}")
    for name in names:
        await warm.call("platform.delete", {"name": name})
    return booted, clones + max(0.0, unmapped)


def template_mib(host: RunningHost) -> float:
    """Pages that the template's RAM really has, by a clone's descriptor of it."""
    for pid in qemus(host):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/fd/{number}")
                if found.st_size == SHAPE["memory_bytes"]:
                    return found.st_blocks * 512 / MIB
    return 0.0


def shared_mib(pids: list[int]) -> float:
    """Pages of the template that the clones' PSS accounts for."""
    total = 0.0
    for pid in pids:
        mapped = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0]:
                mapped = "memfd:memory" in line
            elif mapped and line.startswith("Pss:"):
                total += int(line.split()[1]) / 1024
            elif mapped and line.startswith("Anonymous:"):
                total -= int(line.split()[1]) / 1024
    return total


FIGURES = (
    ("answering as itself", "answering", ANSWERS_AT_MOST),
    ("a mutual TLS link", "linked", LINK_AT_MOST),
)


def compare(
    runner: asyncio.Runner, cold: Cold, warm: Warm, what: str, method: str, limit: float,
    options: argparse.Namespace,
) -> int:  # fmt: skip
    sides = [
        Side("cold boot by plain QEMU", lambda: runner.run(getattr(cold, method)())),
        Side("out of a template", lambda: runner.run(getattr(warm, method)()), limit),
    ]
    return run(f"a platform, from nothing to {what}", "s", sides, options)


def main() -> int:
    options = arguments(rounds=6)
    with (
        vm_slots(), tempfile.TemporaryDirectory(prefix="template-") as work,
        running_host(Path(work), "bench-template") as host, asyncio.Runner() as runner,
    ):  # fmt: skip
        plane = ControlPlane(Path(work), host, "demo")
        around = {"cpu_permille": 2000, "disk_bytes": 64 * GIB}
        plane.enrol(memory_bytes=(MACHINES + 3) * GIB, vms=MACHINES + 2, **around)
        link = Link(plane.directory, "demo")
        context = link.listening()
        runner.run(context.__aenter__())
        parked = Rendezvous(plane.dialer, link.hub.serve_relayed).run()
        parking = runner.get_loop().create_task(parked)
        cold, warm = Cold(Path(work), link), Warm(plane, link)
        try:
            runner.run(warm.prepare())
            statuses = [compare(runner, cold, warm, *row, options) for row in FIGURES]
            before, after = runner.run(memory(cold, warm, host))
            ratio = after / before
            print(f"memory of {MACHINES} machines: {after:.0f} of {before:.0f} MiB, ratio "
                  f"{ratio:.2f}, at most {MEMORY_AT_MOST}")  # fmt: skip
            return max(*statuses, int(ratio > MEMORY_AT_MOST))
        finally:
            parking.cancel()
            if warm.connection is not None:
                runner.run(warm.connection.close())
            runner.run(context.__aexit__(None, None, None))


if __name__ == "__main__":
    sys.exit(main())
