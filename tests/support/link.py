"""An owner of platforms in memory, agents dialled by hand, and servers for both on loopback."""

import asyncio
import contextlib
import datetime as dt
import secrets
import ssl
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from supercloud.control import bootdata
from supercloud.model.errors import Denied, NotFound, Unsupported
from supercloud.model.events import Event
from supercloud.providers.base import PlatformRequest, Provider
from supercloud.trust import keys, tls
from supercloud.trust.authority import Authority
from supercloud.trust.names import Identity, control_of
from supercloud.upper.platform.agent.fetch import Source
from supercloud.upper.platform.link.hub import ALPN, LinkHub
from supercloud.upper.platform.link.owner import check_token, token_hash
from supercloud.upper.platform.link.session import AgentSession
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import (
    PROTOCOL,
    Blob,
    Certificate,
    Deposited,
    Enroll,
    Hello,
    PlatformReport,
)
from supercloud.wire.peer import Handler, Peer


async def _refuse(asked: CheckpointSnapshot) -> None:
    raise Denied(f"no checkpoint of {asked.name} is being taken")


class MemoryOwner:
    """What the control plane does for a hub, without a store. ``seen`` gets all it is told."""

    def __init__(self) -> None:
        self.token_hashes: dict[str, str] = {}
        self.pins: dict[str, str] = {}
        self.paths: dict[str, Path] = {}
        self.snapshotting: Callable[[CheckpointSnapshot], Awaitable[None]] = _refuse
        self.seen: asyncio.Queue[tuple[str, str, object]] = asyncio.Queue()

    def expect(self, platform: str) -> str:
        """A token for the platform."""
        token = secrets.token_hex(32)
        self.token_hashes[platform] = token_hash(token)
        return token

    async def until(self, what: str, platform: str = "") -> object:
        """The next ``what`` (of ``platform``), dropping whatever comes before it."""
        async with asyncio.timeout(90):
            while True:
                kind, name, value = await self.seen.get()
                if kind == what and platform in ("", name):
                    return value

    async def redeem(self, asked: Enroll, pin: str) -> None:
        kept, enrolled = (
            self.token_hashes.get(asked.platform, ""),
            self.pins.get(asked.platform, ""),
        )
        check_token(asked.token, kept, enrolled, pin)
        self.pins[asked.platform] = pin

    async def admit(self, hello: Hello, pin: str) -> None:
        if self.pins.get(hello.platform) != pin:
            raise Denied(f"platform {hello.platform} enrolled with another key")

    async def blob(self, _session: AgentSession, digest: str) -> str:
        if digest not in self.paths:
            raise NotFound(f"no blob {digest}")
        return str(self.paths[digest])

    async def deposit(self, _session: AgentSession, _asked: Blob) -> Deposited:
        raise Unsupported("nothing is laid down on disks here")

    async def snapshot(self, session: AgentSession, asked: CheckpointSnapshot) -> None:
        self.seen.put_nowait(("snapshot", session.platform, asked))
        await self.snapshotting(asked)

    async def connected(self, session: AgentSession) -> None:
        self.seen.put_nowait(("connected", session.platform, session))

    async def lost(self, session: AgentSession) -> None:
        self.seen.put_nowait(("lost", session.platform, session))

    async def report(self, session: AgentSession, report: PlatformReport) -> None:
        self.seen.put_nowait(("report", session.platform, report))

    async def event(self, session: AgentSession, event: Event) -> None:
        self.seen.put_nowait(("event", session.platform, event))


class Link:
    """A hub that listens on loopback, and its U-Cloud's authority."""

    def __init__(self, directory: Path, ucloud: str = "demo") -> None:
        self.directory, self.ucloud = directory, ucloud
        self.authority = Authority.ensure(str(directory), ucloud)
        self.owner = MemoryOwner()
        self.hub = LinkHub(self.authority, str(directory), self.owner)
        self.port = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["Link"]:
        server = await asyncio.start_server(
            self.hub.serve, "127.0.0.1", 0, ssl=self.hub.server_context, limit=1 << 20
        )
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await self.hub.close()
            await server.wait_closed()

    def leaf(
        self,
        role: str = "platform",
        name: str = "p1",
        lifetime: dt.timedelta = dt.timedelta(days=1),
    ) -> tuple[str, str]:
        """Paths of a certificate (with chain) and key of this U-Cloud, as keys.py makes them."""
        return leaf(self.authority, self.directory, Identity(self.ucloud, role, name), lifetime)

    def context(self, files: tuple[str, str] = ("", "")) -> ssl.SSLContext:
        return tls.client_context(self.authority.root_pem, *files, alpn=ALPN)

    @contextlib.asynccontextmanager
    async def dial(
        self, context: ssl.SSLContext, handlers: dict[str, Handler] | None = None
    ) -> AsyncIterator[Peer]:
        """An agent's connection, running."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1",
            self.port,
            ssl=context,
            server_hostname=control_of(self.ucloud).dns,
            limit=1 << 20,
        )
        async with running(reader, writer, handlers or {}) as peer:
            yield peer

    def source(self, files: tuple[str, str]) -> Source:
        """As an agent's link has it."""
        name = control_of(self.ucloud).dns
        return Source("127.0.0.1", self.port, name, self.context(files))

    async def enroll(self, platform: str, token: str) -> tuple[str, str]:
        """Enrol over a connection of its own, as an agent does; paths of certificate and key."""
        identity = Identity(self.ucloud, "platform", platform)
        key = self.directory / f"{platform}-{secrets.token_hex(4)}.key"
        keys.make_key(str(key))
        asked = Enroll(
            ucloud=self.ucloud,
            platform=platform,
            token=token,
            csr_pem=keys.make_request(str(key), identity.uri, identity.dns),
        )
        async with self.dial(self.context()) as peer:
            got = decode(Certificate, await peer.call("agent.enroll", encode(asked), timeout_s=60))
        key.with_suffix(".pem").write_text(got.cert_pem + got.chain_pem)
        return str(key.with_suffix(".pem")), str(key)

    def hello(self, platform: str = "p1", **changes: object) -> dict[str, object]:
        hello = Hello(
            ucloud=self.ucloud,
            platform=platform,
            protocol=PROTOCOL,
            version="test",
            boot_id="1",
            engines={},
            accelerator="tcg",
            memory_bytes=1 << 30,
            cpus=1,
        )
        return {**encode(hello), **changes}


def leaf(
    authority: Authority, directory: Path, identity: Identity, lifetime: dt.timedelta
) -> tuple[str, str]:
    key = directory / f"{identity.name}-{secrets.token_hex(4)}.key"
    keys.make_key(str(key))
    csr = keys.make_request(str(key), identity.uri, identity.dns)
    made = authority.issue(csr, identity, lifetime)
    key.with_suffix(".pem").write_text(made.cert_pem + made.chain_pem)
    return str(key.with_suffix(".pem")), str(key)


@contextlib.asynccontextmanager
async def running(
    reader: StreamReader, writer: StreamWriter, handlers: dict[str, Handler]
) -> AsyncIterator[Peer]:
    """A peer of the connecting side, running; closed afterwards."""
    peer = Peer(reader, writer, handlers, accepted=False, name="test agent")
    task = asyncio.ensure_future(peer.run())
    try:
        yield peer
    finally:
        peer.close()
        await asyncio.wait([task], timeout=60)


def request(link: Link, host: str, name: str = "p1", **changes: object) -> PlatformRequest:
    """A request for a platform whose agent may enrol at ``link``. The token is the first one's."""
    token = link.owner.expect(name) if name not in link.owner.token_hashes else "0" * 64
    user = bootdata.user_data(
        link.ucloud, name, token, link.authority.root_pem, ["169.254.77.1:7444"]
    )
    values: dict[str, object] = {
        "name": name,
        "host": host,
        "image": "sha256:" + "0" * 64,
        "cpus": 1,
        "memory_bytes": 512 << 20,
        "scratch_bytes": 1 << 30,
        "ports": 16,
        "tag": "test/1",
        "config_iso": bootdata.config_iso(link.ucloud, name, user),
    }
    return PlatformRequest(**{**values, **changes})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def at_rendezvous(provider: Provider, hub: LinkHub) -> AsyncIterator[None]:
    """The hub takes what comes to the provider's rendezvous."""
    task = asyncio.ensure_future(provider.rendezvous(hub.serve_relayed))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await hub.close()
