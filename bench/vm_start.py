"""A VM inside a running platform, from asked for to serving: out of memory against its boot.

Both are restarts of the same VM in the same platform; for the boot its spare is taken away. The
time is from the end of the one before, as the agent sees it, and on the platform's own clock.
"""

import asyncio
import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run

from supercloud.model.events import Event
from support.platform import Platform, booted, machine

AT_MOST = 0.6
SPARES = "/run/supercloud/spares"
APPEND = "random.trust_cpu=off random.trust_bootloader=off"


class Bench:
    """The platform and its VM."""

    def __init__(self, platform: Platform, runner: asyncio.Runner) -> None:
        self.platform, self.runner, self.restarts = platform, runner, 0

    async def prepare(self) -> None:
        spec = machine(self.platform)
        append = f"{spec.image.append} {APPEND}"
        told = replace(spec, image=replace(spec.image, identity=True, append=append))
        await self.platform.apply(told)
        await self.platform.until("machine", "serving", timeout_s=120)
        await (await self.platform.session()).restart("machine")
        self.restarts += 1
        await self.platform.until("machine", "serving", timeout_s=120, restarts=1)

    def boot(self) -> float:
        return self.runner.run(self._restart("boot"))

    def memory(self) -> float:
        return self.runner.run(self._restart("memory"))

    async def _restart(self, how: str) -> float:
        while not await self.platform.shell(f"ls {SPARES}/*/state 2>/dev/null"):  # noqa: ASYNC110 -- inside it
            await asyncio.sleep(0.2)
        if how == "boot":
            await self.platform.shell(f"rm -r {SPARES}/*")
        event: object = None
        seen, owner = dict[str, float](), self.platform.link.owner
        while not owner.seen.empty():
            owner.seen.get_nowait()
        await (await self.platform.session()).restart("machine")
        self.restarts += 1
        while "serving" not in seen:
            with contextlib.suppress(TimeoutError):
                event = await owner.until("event")
            if isinstance(event, Event) and event.subject == "environment/machine":
                seen[event.code.rpartition(".")[2]] = event.time_s
        status = await self.platform.until("machine", "serving", restarts=self.restarts)
        assert status is not None
        assert status.started_from == how, status
        return seen["serving"] - seen["starting"]


def main() -> int:
    options = arguments(rounds=6)
    with tempfile.TemporaryDirectory(prefix="vm-start-") as name, asyncio.Runner() as runner:
        made = booted(Path(name))
        platform = runner.run(made.__aenter__())
        try:
            bench = Bench(platform, runner)
            runner.run(bench.prepare())
            sides = [
                Side("its boot", bench.boot),
                Side("out of memory", bench.memory, AT_MOST),
            ]
            return run("a VM in a running platform, to serving", "s", sides, options)
        finally:
            runner.run(made.__aexit__(None, None, None))


if __name__ == "__main__":
    sys.exit(main())
