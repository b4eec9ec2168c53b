"""A container from created to running inside a running platform: the agent against a script with crun.

Both run in the same platform, with the image there already; times are the platform's own clock.
"""

import asyncio
import base64
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run

from supercloud.model.events import Event
from supercloud.upper.platform.agent import oci
from supercloud.upper.platform.agent.users import User
from supercloud.wire.messages import EnvironmentSpec
from support.platform import Platform, booted, nic, web

AT_MOST = 1.5
SCRIPT = ROOT / "bench" / "direct" / "container.sh"


class Bench:
    """One platform for both sides; ``keeper`` holds the image and the network in place."""

    def __init__(self, platform: Platform, runner: asyncio.Runner) -> None:
        self.platform, self.runner = platform, runner
        self.keeper = web(platform, name="keeper", uid="keeper-1", ports=[])
        self.number = 0

    async def prepare(self) -> None:
        await self.platform.apply(self.keeper)
        await self.platform.until("keeper", "running")
        await self.put(SCRIPT.read_bytes(), "/tmp/container.sh")
        await self.platform.shell("mkdir -p /tmp/bundle")
        await self.put(bundle(self.keeper), "/tmp/bundle/config.json")

    async def put(self, data: bytes, path: str) -> None:
        text = base64.b64encode(data).decode()
        for start in range(0, len(text), 3000):
            await self.platform.shell(f"printf %s {text[start : start + 3000]} >> {path}.b64")
        await self.platform.shell(f"base64 -d {path}.b64 > {path}; rm {path}.b64")

    def direct(self) -> float:
        return self.runner.run(self._direct())

    async def _direct(self) -> float:
        digest = self.keeper.image.blobs["root"].digest.removeprefix("sha256:")
        out = await self.platform.shell(f"sh /tmp/container.sh /var/lib/supercloud/blobs/{digest}")
        lines = [line.split() for line in out.splitlines() if line.startswith("took ")]
        assert lines, out
        return float(lines[0][2]) - float(lines[0][1])

    def agent(self) -> float:
        return self.runner.run(self._agent())

    async def _agent(self) -> float:
        self.number += 1
        seen, owner = {}, self.platform.link.owner
        spec = web(
            self.platform, name="timed", uid=f"timed-{self.number}", ports=[], nics=[nic(99)]
        )
        while not owner.seen.empty():
            owner.seen.get_nowait()
        await self.platform.apply(self.keeper, spec)
        while "running" not in seen:
            event = await owner.until("event")
            if isinstance(event, Event) and event.subject == "environment/timed":
                seen[event.code.rpartition(".")[2]] = event.time_s
        await self.platform.apply(self.keeper)
        await self.platform.until("timed", "gone")
        return seen["running"] - seen["preparing"]


def bundle(spec: EnvironmentSpec) -> bytes:
    """The agent's own configuration, its namespaces made by crun and iproute2 instead."""
    first = oci.first_process(spec, User(uid=0, gid=0, groups=[], home="/"))
    config = json.loads(oci.config(spec, first, root="rootfs", place="/x", cgroup="/direct"))
    config["linux"]["namespaces"] = [
        *({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "user")),
        {"type": "network", "path": "/run/netns/direct"},
    ]
    mapping = [{"containerID": 0, "hostID": 500_000_000, "size": 65_536}]
    config["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}
    del config["linux"]["sysctl"]  # the network namespace made by "ip netns" is not its own
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "bind"]
    return json.dumps(config).encode()


def main() -> int:
    options = arguments(rounds=8)
    with tempfile.TemporaryDirectory(prefix="container-start-") as work, asyncio.Runner() as runner:
        context = booted(Path(work))
        bench = Bench(runner.run(context.__aenter__()), runner)
        try:
            runner.run(bench.prepare())
            sides = [
                Side("by hand: mount, iproute2, crun", bench.direct),
                Side("the agent", bench.agent, at_most=AT_MOST),
            ]
            return run("container, created to running, inside a platform", "s", sides, options)
        finally:
            runner.run(context.__aexit__(None, None, None))


if __name__ == "__main__":
    sys.exit(main())
