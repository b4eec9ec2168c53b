"""Connections between the hosts of one U-Cloud: mutual TLS from user domain to user domain.

This domain has no network: the provider's uplink driver gives it a socket that is connecting, and
sees ciphertext. What is asked for at the other end is joined to that connection and relayed, each
direction waiting for the other side to take what it sent. What others may have here is what the
control plane said, and ends when it says otherwise.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.files import Files
from supercloud.lower.user_domain.identity import IdentityStore
from supercloud.lower.user_domain.rendezvous import relay
from supercloud.model.errors import (
    Busy,
    Denied,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
)
from supercloud.trust import tls
from supercloud.trust.names import HOST, user_server_name
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import Empty, Implementation, handlers
from supercloud.wire.peer import Call, Detach, Handler, Peer
from supercloud.wire.tunnel import TUNNEL, Kind, PeerHost, TunnelApply, TunnelOpen

MAX_TUNNELS: Final = 128
"""This many clients of the object store go out, and this many of whatever come in."""
MAX_REPLICAS: Final = 128
"""This many streams to replicas go out."""
CONNECT_TIMEOUT_S: Final = 20.0
READ_LIMIT_BYTES: Final = 256 << 10
_KEPT: Final = "apply"
# a host that is gone without a word is noticed after half a minute
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

ObjectClient = Callable[[str, socket.socket], None]
Replica = Callable[[str, str, int], Awaitable[socket.socket]]
"""(host that asks, volume, generation) -> a stream of the device; Denied, NotFound."""

log = logging.getLogger("supercloud.lower.user_domain.tunnel")


@dataclass(eq=False)
class _Given:
    """What another host has of this one; ending ``sock`` ends it."""

    host: str
    kind: str
    sock: socket.socket


class Tunnels:
    """Both ends: what this domain asks of other hosts, and what it lets them have."""

    def __init__(self, uplink: Channel, identity: IdentityStore, directory: str) -> None:
        self._uplink, self._identity = uplink, identity
        self._files = Files(directory)
        stored = self._files.read()
        self._applied = (
            decode(TunnelApply, stored[0], ignore_unknown=True) if stored else TunnelApply()
        )
        self._given: set[_Given] = set()
        self._opening = 0  # for others, not given yet
        self._going: set[asyncio.Task[None]] = set()
        self._out = Counter[Kind]()  # that go out or are about to
        self.object_client: ObjectClient = _no_store
        self.replica: Replica = _no_replica

    def apply(self, asked: TunnelApply) -> None:
        """From now on; what somebody has that is not to have it any more ends."""
        if asked == self._applied:
            return
        self._files.put(_KEPT, encode(asked))
        self._applied = asked
        for given in [*self._given]:
            if given.kind == "objects" and given.host not in asked.objects_to:
                _end(given.sock)

    # -- what others ask for

    def handlers(self) -> dict[str, Handler]:
        """What serves a host whose name is ``host`` of its connection's context."""
        implemented: dict[str, Implementation] = {"tunnel.open": self._open}
        return handlers(TUNNEL, implemented)

    async def _open(self, call: Call, asked: TunnelOpen) -> Detach:
        host = str(call.peer.context["host"])
        if len(self._given) + self._opening >= MAX_TUNNELS:
            raise Busy(f"{MAX_TUNNELS} connections of other hosts are open")
        self._opening += 1
        try:
            sock = await self._joined(host, asked)
        finally:
            self._opening -= 1
        given = _Given(host, asked.kind, sock)
        self._given.add(given)  # from now on it can be taken back

        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                _keep_alive(writer)
                await relay(sock, f"{asked.kind} for {host}", reader, writer)
            finally:
                self._given.discard(given)

        def abandoned() -> None:
            self._given.discard(given)
            sock.close()

        return Detach(encode(Empty()), run, abandoned)

    async def _joined(self, host: str, asked: TunnelOpen) -> socket.socket:
        if asked.kind == "replica":
            return await self.replica(host, asked.volume, asked.generation)
        if host not in self._applied.objects_to:
            raise Denied(f"host {host} is not one that may reach the object store here")
        ours, theirs = socket.socketpair()
        self.object_client(f"host {host}", theirs)
        return ours

    # -- what is asked of others

    def object_client_elsewhere(self, platform: str, sock: socket.socket) -> None:
        """A client of the object store on ``platform``, when the store is on another host."""
        peer = self._applied.objects_from
        if peer is None:
            _no_store(platform, sock)
            return
        self._relay_in_background(peer, TunnelOpen(kind="objects"), sock)

    async def reach_replica(self, peer: PeerHost, volume: str, generation: int) -> socket.socket:
        """A stream of the device of a volume there; it ends when the tunnel does. NoResources."""
        if self._out["replica"] >= MAX_REPLICAS:
            raise NoResources(
                f"volume {volume} is not reached at {peer.name}: {MAX_REPLICAS} replicas on other "
                "hosts are reached already, the most that there may be",
                hint="have fewer volumes with `replicas` used on this host",
            )
        asked = TunnelOpen(kind="replica", volume=volume, generation=generation)
        ours, theirs = socket.socketpair()
        self._out["replica"] += 1
        try:
            streams = await self._opened(peer, asked)
        except BaseException:
            self._out["replica"] -= 1
            ours.close()
            theirs.close()
            raise
        self._in_background("replica", relay(theirs, f"replica {volume} at {peer.name}", *streams))
        return ours

    def _relay_in_background(self, peer: PeerHost, asked: TunnelOpen, sock: socket.socket) -> None:
        if self._out[asked.kind] >= MAX_TUNNELS:
            log.warning("too many connections to other hosts: one was refused")
            sock.close()
            return
        self._out[asked.kind] += 1

        async def run() -> None:
            try:
                streams = await self._opened(peer, asked)
            except SupercloudError as error:
                log.warning("%s of host %s: %s", asked.kind, peer.name, error)
                sock.close()
                return
            await relay(sock, f"{asked.kind} at {peer.name}", *streams)

        self._in_background(asked.kind, run())

    async def _opened(
        self, peer: PeerHost, asked: TunnelOpen
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The raw streams, joined to what was asked for. Denied, Temporary."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await self._ask(peer, asked, *await self._shake_hands(peer))
        except TimeoutError:
            raise Temporary(f"host {peer.name} did not answer in {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, ssl.SSLError, EOFError) as error:
            raise Temporary(f"host {peer.name} cannot be reached: {error}") from error

    async def _ask(
        self,
        peer: PeerHost,
        asked: TunnelOpen,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        running: asyncio.Future[None] | None = None
        try:
            shown = tls.peer_identity(writer.get_extra_info("ssl_object"))
            tls.demand(shown, ucloud=self._identity.ucloud, role=HOST, name=peer.name)
            _keep_alive(writer)
            wire = Peer(reader, writer, accepted=False, name=f"host {peer.name}")
            running = asyncio.ensure_future(wire.run())
            _, reader, writer = await wire.call_detach("tunnel.open", encode(asked))
            await running
        except BaseException:
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            writer.transport.abort()
            raise
        return reader, writer

    async def _shake_hands(
        self, peer: PeerHost
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = self._identity.client_context()
        where = {"address": peer.address, "port": peer.port}
        reply = await self._uplink.call("uplink.dial", where)
        socks = [socket.socket(fileno=number) for number in reply.descriptors]
        if len(socks) != 1:
            for sock in socks:
                sock.close()
            raise Temporary("the provider's driver gave no connection")
        try:
            await _connected(socks[0])
        except BaseException:
            socks[0].close()
            raise
        return await asyncio.open_connection(
            sock=socks[0], limit=READ_LIMIT_BYTES, ssl=context,
            server_hostname=user_server_name(peer.user),
        )  # fmt: skip

    def _in_background(self, kind: Kind, work: Any) -> None:
        """It was counted as going out, and is until it is done."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._going.add(task)
        task.add_done_callback(functools.partial(self._done, kind))

    def _done(self, kind: Kind, task: asyncio.Task[None]) -> None:
        self._going.discard(task)
        self._out[kind] -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("a tunnel ended: %s", error)


async def _connected(sock: socket.socket) -> None:
    """Wait until it is connected; OSError."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def writable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock, writable)
    try:
        await ready
    finally:
        loop.remove_writer(sock)
    if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, "cannot connect")


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    for level, option, value in _KEEPALIVE:
        with contextlib.suppress(OSError):  # of TCP only
            sock.setsockopt(level, option, value)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _no_store(_client: str, sock: socket.socket) -> None:
    """There is no object store here."""
    sock.close()


async def _no_replica(_host: str, volume: str, _generation: int) -> socket.socket:
    raise NotFound(f"no replica of volume {volume} is served here")
