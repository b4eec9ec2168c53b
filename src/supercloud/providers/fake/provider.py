"""The provider protocol on top of the pretended world."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Literal

from supercloud.model.errors import SupercloudError, Unsupported
from supercloud.providers.base import (
    FEATURES,
    Accept,
    Checkpoints,
    Console,
    HostCapacity,
    Objects,
    PlatformObservation,
    PlatformRequest,
    Templates,
    Volumes,
)
from supercloud.providers.context import Context
from supercloud.providers.fake.agent import FakeAgent, dial, raw_streams
from supercloud.providers.fake.cloud import FakeCloud
from supercloud.providers.fake.options import options_of
from supercloud.trust.names import check_label
from supercloud.wire.objects import ServiceStatus
from supercloud.wire.tunnel import PeerHost, TunnelApply

log = logging.getLogger("supercloud.providers.fake")


def from_context(context: Context) -> "FakeProvider":
    """The fake provider of a manifest entry; its world is in the entry's state directory."""
    entry = context.entry
    return FakeProvider(FakeCloud(entry.name, options_of(entry), context.state_directory))


class FakeProvider:
    """Implements ``providers.base.Provider``. Several may stand on one ``FakeCloud``."""

    def __init__(self, cloud: FakeCloud) -> None:
        self.cloud = cloud
        self._agents: dict[str, FakeAgent] = {}
        self.volumes: Volumes | None = cloud.volumes if cloud.options.volumes else None
        self.objects: Objects | None = cloud.objects if cloud.options.objects else None
        has = cloud.options.checkpoints
        self.checkpoints: Checkpoints | None = cloud.checkpoints if has else None
        self.templates: Templates | None = cloud.templates if cloud.options.templates else None

    async def features(self) -> dict[str, str]:
        """Everything but speed: there is no machine to have KVM."""
        pretended = dict.fromkeys(FEATURES, "")
        has: dict[str, object] = {
            "volumes": self.volumes,
            "objects": self.objects,
            "templates": self.templates,
            "checkpoints": self.checkpoints,
            "tunnel": self.cloud.options.tunnel,
        }
        lacks = {name: "" if there else "its options say so" for name, there in has.items()}
        return pretended | {"kvm": "nothing really runs here"} | lacks

    async def hosts(self) -> list[HostCapacity]:
        """The pretended hosts."""
        await self.cloud.pretend("hosts")
        return self.cloud.hosts()

    async def ensure_platform(self, request: PlatformRequest) -> PlatformObservation:
        """Create or find."""
        check_label(request.name, "name")
        await self.cloud.pretend("create")
        return self.cloud.create(request).observation()

    async def platforms(self) -> list[PlatformObservation]:
        """All of them."""
        await self.cloud.pretend("platforms")
        return [platform.observation() for platform in self.cloud.platforms.values()]

    async def delete_platform(self, name: str) -> None:
        """Forget it, and end its agent's connection."""
        await self.cloud.pretend("delete")
        self.cloud.delete(name)

    async def deposit(self, name: str, size_bytes: int, content: AsyncIterator[bytes]) -> None:
        """Unsupported: pretended platforms have no disk."""
        del size_bytes, content
        raise Unsupported(f"platform {self.cloud.find(name).name} has no disk: it is pretended")

    @contextlib.asynccontextmanager
    async def console(self, name: str) -> AsyncIterator[Console]:
        """A console that greets and echoes."""
        yield EchoConsole(self.cloud.find(name).name)

    async def services(self) -> list[tuple[str, ServiceStatus]]:
        """The object stores; volumes need none here."""
        await self.cloud.pretend("services")
        found = []
        for host, store in self.cloud.objects.stores.items():
            state: Literal["running", "not running"] = "running" if store.running else "not running"
            memory_bytes = store.status().memory_bytes
            status = ServiceStatus(kind="objects", state=state, memory_bytes=memory_bytes)
            found.append((host, status))
        return found

    async def peer(self, host: str) -> PeerHost:
        """Who it is; nobody listens there."""
        self.cloud.host(host)
        return PeerHost(name=host, user="pretended", address=self.cloud.directory, port=1)

    async def tunnels(self, host: str, asked: TunnelApply) -> None:
        """Note it."""
        await self.cloud.pretend("tunnels")
        self.cloud.host(host)
        self.cloud.tunnels[host] = asked

    async def rendezvous(self, accept: Accept) -> None:
        """Keep every running platform's agent dialling."""
        dialling: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                changed = self.cloud.changed
                await self._follow(dialling, accept)
                await changed.wait()
        finally:
            await _cancel(*dialling.values())
            await self._stop_agents()

    async def close(self) -> None:
        """Stop what the agents do on their own."""
        await self._stop_agents()

    async def _stop_agents(self) -> None:
        agents, self._agents = list(self._agents.values()), {}
        for agent in agents:
            await agent.stop()

    async def _follow(self, dialling: dict[str, asyncio.Task[None]], accept: Accept) -> None:
        running = [p for p in self.cloud.platforms.values() if p.state == "running"]
        wanted = {p.name: p for p in running if not self.cloud.down}
        for name in dialling.keys() - wanted.keys():
            await _cancel(dialling.pop(name))
            if agent := self._agents.pop(name, None):
                await agent.stop()
        for name in wanted.keys() & dialling.keys():
            if self._agents[name].platform is not wanted[name]:  # deleted and made anew
                await _cancel(dialling.pop(name))
                await self._agents.pop(name).stop()
        for name in wanted.keys() - dialling.keys():
            agent = self._agents[name] = FakeAgent(self.cloud, wanted[name])
            dialling[name] = asyncio.ensure_future(self._keep_dialling(agent, accept))

    async def _keep_dialling(self, agent: FakeAgent, accept: Accept) -> None:
        options = self.cloud.options
        if options.boot_ms:
            await asyncio.sleep(options.boot_ms / 1000)
        agent.resume()
        while True:
            enrolling = not agent.enrolled()
            await _connect(agent, accept)
            if not (enrolling and agent.enrolled()):
                await asyncio.sleep(options.reconnect_ms / 1000)


async def _connect(agent: FakeAgent, accept: Accept) -> None:
    """One connection: the agent at one end of a socket pair, the control plane at the other."""
    ours, theirs = socket.socketpair()
    streams = await raw_streams(ours)
    serving = asyncio.ensure_future(_accept(agent.platform.name, accept, streams))
    try:
        await dial(agent, theirs)
        await asyncio.wait([serving], timeout=5)  # it sees the end of the stream
    finally:
        await _cancel(serving)
        streams[1].close()


async def _accept(
    name: str, accept: Accept, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
    try:
        await accept(*streams)
    except (SupercloudError, OSError, EOFError) as error:
        log.debug("%s: the control plane let its agent go: %s", name, error)


async def _cancel(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EchoConsole:
    """Greets, then echoes what is typed, a line feed after every carriage return."""

    def __init__(self, name: str) -> None:
        self._out: asyncio.Queue[bytes] = asyncio.Queue()
        self._out.put_nowait(f"supercloud platform {name} (pretended)\r\n".encode())

    async def read(self) -> bytes:
        """What it shows next."""
        return await self._out.get()

    async def write(self, data: bytes) -> None:
        """Type."""
        self._out.put_nowait(data.replace(b"\r", b"\r\n"))
