"""A container from the wish to running, inside a running platform, against crun there with its bundle.

Ours is asked from outside, over the agent's link, and makes the network, the root and the namespaces
too; crun, by a shell in the platform, runs the bundle of a container that is there already, in its
namespaces and on its mounted root. Both are timed from outside.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from ab import Side, arguments, run

from supercloud.upper.platform.agent import paths
from support.platform import Platform, booted, nic, web

AT_MOST = 1.5
CRUN = "crun --cgroup-manager=cgroupfs"


class Containers:
    """Numbers its containers, so that every one is new."""

    def __init__(self, platform: Platform, loop: asyncio.AbstractEventLoop) -> None:
        self.platform, self.loop, self.number = platform, loop, 0
        self.first = web(platform, ports=[])

    def _wait(self, coroutine: object) -> object:
        return self.loop.run_until_complete(coroutine)  # type: ignore[arg-type]

    def prepare(self) -> None:
        """One container that stays: its bundle is what crun runs."""

        async def first() -> None:
            await self.platform.apply(self.first)
            await self.platform.until("web", "running", "serving")
            await self.platform.shell(
                f'mkdir -p /run/bench && sed \'s#"/ee/{self.first.uid}"#"/bench"#\' '
                f"{paths.RUN}/ee/{self.first.uid}/config.json > /run/bench/config.json"
            )

        self._wait(first())

    def ours(self) -> float:
        self.number += 1
        name = f"new-{self.number}"
        spec = web(self.platform, name=name, uid=name, ports=[], nics=[nic(20)])

        async def once() -> float:
            started = time.perf_counter()
            await self.platform.apply(self.first, spec)
            await self.platform.until(name, "running", "serving")
            took_s = time.perf_counter() - started
            await self.platform.apply(self.first)
            await self.platform.until(name, "gone")
            return took_s

        return float(self._wait(once()))  # type: ignore[arg-type]

    def crun(self) -> float:
        async def once() -> float:
            started = time.perf_counter()
            said = await self.platform.shell(
                f"{CRUN} run --detach --bundle /run/bench bench </dev/null >/dev/null 2>/run/bench/log"
                " && echo started"
            )
            took_s = time.perf_counter() - started
            assert "started" in said, await self.platform.shell("cat /run/bench/log")
            await self.platform.shell(f"{CRUN} delete --force bench")
            return took_s

        return float(self._wait(once()))  # type: ignore[arg-type]


def main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        loop = runner.get_loop()
        context = booted(Path(directory))
        platform = loop.run_until_complete(context.__aenter__())
        try:
            containers = Containers(platform, loop)
            containers.prepare()
            sides = [
                Side("crun run, the bundle there", containers.crun),
                Side("ours, from the wish", containers.ours, at_most=AT_MOST),
            ]
            return run("container: create to running", "s", sides, options)
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(context.__aexit__(None, None, None))


if __name__ == "__main__":
    sys.exit(main(arguments(rounds=12)))
