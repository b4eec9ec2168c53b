"""The host wire's end: connections from the front door, TLS, and the methods of ``HOST``."""

import asyncio
import json
import logging
import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.identity import IdentityStore
from supercloud.lower.user_domain.platforms import Platforms
from supercloud.lower.user_domain.templates import NO_TEMPLATES
from supercloud.lower.user_domain.tunnel import Tunnels
from supercloud.model.errors import Busy, SupercloudError
from supercloud.trust import tls
from supercloud.trust.names import HOST as HOST_ROLE
from supercloud.trust.names import Identity
from supercloud.wire.codec import encode
from supercloud.wire.host import (
    HOST,
    HostInfo,
    PlatformList,
    PlatformSpec,
    PlatformStatus,
    TemplateSpec,
    TemplateStatus,
)
from supercloud.wire.messages import (
    PROTOCOL,
    Blob,
    ByName,
    Certificate,
    CsrResult,
    Empty,
    Implementation,
    handlers,
)
from supercloud.wire.peer import Call, Detach, Peer, Stream
from supercloud.wire.tunnel import TunnelApply

MAX_CONNECTIONS: Final = 512
MAX_HOSTS: Final = 128
"""Connections of other hosts, of all that are open: they leave room for the control plane."""
HANDSHAKE_TIMEOUT_S: Final = 10.0
READ_LIMIT_BYTES: Final = 1 << 20
_CHUNK_BYTES: Final = 16 << 10

log = logging.getLogger("supercloud.lower.user_domain.service")


class Service:
    """Serves the control plane of one U-Cloud, and its other hosts.

    ``implemented`` are methods beside those that are here.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        identity: IdentityStore,
        platforms: Platforms,
        tunnels: Tunnels,
        implemented: Mapping[str, Implementation],
        feed: Feed,
    ) -> None:
        self._facts, self._identity = facts, identity
        self._platforms, self._feed = platforms, feed
        self._tls = identity.context()
        self._connections: set[asyncio.Task[None]] = set()
        self._tunnels, self._hosts = tunnels, 0
        self._handlers = handlers(
            HOST,
            {
                "host.info": self.info,
                "identity.request": self.identity_request,
                "identity.install": self.identity_install,
                "platform.create": self.platform_create,
                "platform.list": self.platform_list,
                "platform.delete": self.platform_delete,
                "template.prepare": self.template_prepare,
                "template.blob": self.template_blob,
                "platform.console": self.platform_console,
                "rendezvous.accept": self.rendezvous_accept,
                "events.watch": self.events_watch,
                "tunnel.apply": self.tunnel_apply,
                **implemented,
            },
        )

    # -- connections

    def connection(self, method: str, _untrusted: dict[str, Any], descriptors: list[int]) -> None:
        """The front door passed a socket."""
        if method != "connection" or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        sock = socket.socket(fileno=descriptors[0])
        if len(self._connections) >= MAX_CONNECTIONS:
            log.warning("too many connections: one was refused")
            sock.close()
            return
        task = asyncio.ensure_future(self._serve(sock))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            reader, writer = await self._shake_hands(sock)
        except (OSError, ssl.SSLError, TimeoutError) as error:
            log.info("no handshake: %s", error)
            return
        try:
            shown = tls.peer_identity(writer.get_extra_info("ssl_object"))
            if shown is not None and shown.role == HOST_ROLE:
                await self._serve_host(self._identity.admit_host(shown), reader, writer)
                return
            identity = self._identity.admit(shown)
            peer = Peer(reader, writer, self._handlers, accepted=True, name=str(identity))
            peer.context["enrolled"] = True
            await peer.run()
        except SupercloudError as error:
            log.warning("refused: %s", error)
        finally:
            writer.close()

    async def _serve_host(
        self, identity: Identity, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Another host: it may ask for tunnels, and for nothing else."""
        if self._hosts >= MAX_HOSTS:
            raise Busy("too many connections of other hosts")
        self._hosts += 1
        try:
            handlers = self._tunnels.handlers()
            peer = Peer(reader, writer, handlers, accepted=True, name=str(identity))
            peer.context.update(enrolled=True, host=identity.name)
            await peer.run()
        finally:
            self._hosts -= 1

    async def _shake_hands(
        self, sock: socket.socket
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        reader = asyncio.StreamReader(limit=READ_LIMIT_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol, sock, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S
        )
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    # -- methods

    async def info(self, _call: Call, _: Empty) -> HostInfo:
        """What the host is, holds and allows."""
        quota, used = self._platforms.quota()
        facts = self._facts
        kvm = f"{facts['accelerator']}: {facts['accelerator_reason']}"
        return HostInfo(
            instance=facts["instance"], protocol=PROTOCOL, region=facts["region"],
            jurisdiction=facts["jurisdiction"], accelerator=facts["accelerator"],
            kernel=facts["kernel"], runtime_sha256=facts["runtime_sha256"],
            images=facts["images"], quota=quota, used=used, cpus=facts["cpus"],
            features={
                "volumes": "",
                "objects": "",
                "checkpoints": "",
                "tunnel": "",
                "templates": NO_TEMPLATES if facts.get("templates") == "none" else "",
                "kvm": "" if facts["accelerator"] == "kvm" else kvm,
                "attestation": "not implemented: the domain's key is trusted at first use",
            },
        )  # fmt: skip

    async def identity_request(self, _call: Call, _: Empty) -> CsrResult:
        """The request for a certificate over this domain's key."""
        return CsrResult(csr_pem=await asyncio.to_thread(self._identity.request))

    async def identity_install(self, _call: Call, given: Certificate) -> Empty:
        """New connections are shown it."""
        await asyncio.to_thread(self._identity.install, given)
        self._tls = self._identity.context()
        self._feed.say("host", "host.identity.installed")
        return Empty()

    async def platform_create(self, _call: Call, spec: PlatformSpec) -> PlatformStatus:
        """Make and start a platform."""
        return await asyncio.shield(self._platforms.create(spec))

    async def platform_list(self, _call: Call, _: Empty) -> PlatformList:
        """All platforms."""
        return PlatformList(platforms=self._platforms.statuses())

    async def platform_delete(self, _call: Call, named: ByName) -> Empty:
        """Stop it and give everything back."""
        await asyncio.shield(self._platforms.delete(named.name))
        return Empty()

    async def template_prepare(self, _call: Call, spec: TemplateSpec) -> TemplateStatus:
        """Have a template for platforms like that."""
        return self._platforms.prepare(spec)

    async def template_blob(self, call: Call, blob: Blob) -> Empty:
        """A blob that a template is to have ready."""
        await self._platforms.take_blob(blob, call.accept(encode(Empty())))
        return Empty()

    async def platform_console(self, call: Call, named: ByName) -> Empty:
        """Its serial console, both ways."""
        with await self._platforms.console(named.name) as sock:
            sock.setblocking(False)
            await _relay_console(call.accept(encode(Empty())), sock)
        return Empty()

    async def rendezvous_accept(self, _call: Call, _: Empty) -> Detach:
        """Park this connection until a platform's agent dials."""
        return await self._platforms.rendezvous.accept()

    async def tunnel_apply(self, _call: Call, asked: TunnelApply) -> Empty:
        """What this host asks of others, and lets them have."""
        self._tunnels.apply(asked)
        return Empty()

    async def events_watch(self, call: Call, _: Empty) -> Empty:
        """What was kept, then all events, as JSON lines."""
        stream = call.accept(encode(Empty()))
        async for event in self._feed.watch():
            await stream.write(json.dumps(encode(event)).encode() + b"\n")
        return Empty()


async def _relay_console(stream: Stream, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    async def show() -> None:
        while data := await loop.sock_recv(sock, _CHUNK_BYTES):
            await stream.write(data)

    async def type_in() -> None:
        async for data in stream.chunks():
            await loop.sock_sendall(sock, data)

    ways = {asyncio.ensure_future(show()), asyncio.ensure_future(type_in())}
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
