"""The control plane's end of all agents' connections of one U-Cloud.

A connection comes as TLS that the API server accepted (ALPN ``supercloud-agent/1``), or as a raw
stream that a provider relays. Without a certificate an agent can do one thing, enrol; with one of
this U-Cloud and the role platform it says hello, which makes its session.
"""

import asyncio
import contextlib
import logging
import ssl
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from supercloud.model.errors import Busy, Denied, SupercloudError, Temporary
from supercloud.trust import tls
from supercloud.trust.authority import Authority, pin_of_request
from supercloud.trust.names import PLATFORM, Identity
from supercloud.upper.platform.link import blobs
from supercloud.upper.platform.link.owner import Owner
from supercloud.upper.platform.link.session import AgentSession
from supercloud.upper.platform.link.upgrade import accept_tls
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.messages import (
    AGENT_TO_CONTROL,
    PROTOCOL,
    Blob,
    Certificate,
    CsrResult,
    Deposited,
    Empty,
    Enroll,
    Hello,
    Welcome,
    handlers,
)
from supercloud.wire.peer import Call, Detach, Peer

ALPN: Final = "supercloud-agent/1"
HELLO_TIMEOUT_S: Final = 30.0
MAX_STRANGERS: Final = 32
"""Connections at once that have not said hello."""

MAX_FILES: Final = 8
"""Files at once on their way to one platform."""

log = logging.getLogger("supercloud.upper.platform.link")


@dataclass(slots=True)
class _Caller:
    """Who is at the other end of a connection. ``refusal``: why it may do nothing."""

    identity: Identity | None
    pin: str
    refusal: Denied | None
    introduced: "asyncio.Future[AgentSession | None]" = field(default_factory=asyncio.Future)
    session: AgentSession | None = None
    is_busy: bool = False

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """One thing at a time is begun on a connection: nobody would end what a second one opens.

        Denied, also when something was begun already.
        """
        if self.is_busy or self.introduced.done():
            raise Denied("hello was said already, or a file asked for")
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False


class LinkHub:
    """Serves agents until ``close``. ``sessions`` holds the newest one of each platform."""

    def __init__(self, authority: Authority, trust_directory: str, owner: Owner) -> None:
        self.authority, self.owner = authority, owner
        self._trust_directory = trust_directory
        self.sessions: dict[str, AgentSession] = {}
        self._peers: set[Peer] = set()
        self._strangers: set[Peer] = set()
        self._files: set[StreamWriter] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        self._context: ssl.SSLContext | None = None
        self._context_until_s = 0.0
        self._handlers = handlers(
            AGENT_TO_CONTROL,
            {
                "agent.enroll": self._enroll, "agent.hello": self._hello,
                "agent.renew": self._renew, "blob.get": self._blob,
                "blob.deposit": self._deposit,
                "checkpoint.snapshot": self._snapshot,
            },
        )  # fmt: skip

    @property
    def server_context(self) -> ssl.SSLContext:
        """TLS for agents; looked at again every hour, for the certificate is renewed in time."""
        if self._context is None or time.monotonic() > self._context_until_s:
            paths = self.authority.own_files(self._trust_directory)
            self._context = tls.server_context(*paths, self.authority.root_pem, None)
            self._context.set_alpn_protocols([ALPN])
            self._context_until_s = time.monotonic() + 3600
        return self._context

    def session(self, platform: str) -> AgentSession:
        """The platform's session; Temporary while its agent is not connected."""
        if platform not in self.sessions:
            raise Temporary(f"the agent of platform {platform} is not connected")
        return self.sessions[platform]

    # -- connections

    async def serve_relayed(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serve an agent whose TLS comes over a raw stream, to the end. For ``rendezvous``."""
        tls_reader, tls_writer = await accept_tls(reader, writer, self.server_context)
        await self.serve(tls_reader, tls_writer)
        writer.close()

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serve an agent over TLS of ``server_context``, to the end."""
        if len(self._strangers) >= MAX_STRANGERS:
            writer.transport.abort()
            raise Busy("too many agents that have not said hello")
        caller = self._caller(writer.get_extra_info("ssl_object"))
        peer = Peer(reader, writer, self._handlers, accepted=True, name="agent")
        known = caller.identity is not None or caller.refusal is not None
        peer.context.update(caller=caller, enrolled=known)
        self._peers.add(peer)
        self._strangers.add(peer)
        attending = asyncio.ensure_future(self._attend(peer, caller))
        try:
            await peer.run()
        finally:
            self._peers.discard(peer)
            self._strangers.discard(peer)
            writer.close()
            self._leave(attending, caller.session)

    def _caller(self, connection: ssl.SSLObject) -> _Caller:
        """Who it is; a certificate that does not serve here is told so, call by call."""
        try:
            identity = tls.peer_identity(connection)
            if identity is None:
                return _Caller(None, "", None)
            tls.demand(identity, ucloud=self.authority.ucloud, role=PLATFORM)
        except Denied as error:
            log.warning("an agent is refused: %s", error)
            return _Caller(None, "", error)
        return _Caller(identity, tls.pin_of_peer(connection), None)

    async def _attend(self, peer: Peer, caller: _Caller) -> None:
        """Close a connection that says no hello in time; tell the owner what a session reports."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                session = await asyncio.shield(caller.introduced)
        except TimeoutError:
            log.info("an agent said no hello in %g s (%s)", HELLO_TIMEOUT_S, caller.identity)
            peer.close()
            return
        self._strangers.discard(peer)
        if session is not None:
            await session.deliver()

    def _leave(self, attending: "asyncio.Task[None]", session: AgentSession | None) -> None:
        """End what belongs to a connection, in a task of its own: ``serve`` may be cancelled."""
        attending.cancel()
        if session is not None and self.sessions.get(session.platform) is session:
            del self.sessions[session.platform]
            farewell = asyncio.ensure_future(self._farewell(attending, session))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    async def _farewell(self, attending: "asyncio.Task[None]", session: AgentSession) -> None:
        """Tell the owner of the loss, after what it is being told and unless the agent is back."""
        await asyncio.gather(attending, return_exceptions=True)
        if session.platform in self.sessions:
            return
        try:
            await self.owner.lost(session)
        except SupercloudError as error:
            log.warning("%s: %s", session.platform, error)

    async def close(self) -> None:
        """End all connections; agents dial again."""
        for peer in list(self._peers):
            peer.close()
        for writer in self._files:
            writer.transport.abort()
        await asyncio.gather(*(peer.closed.wait() for peer in list(self._peers)))
        await asyncio.gather(*self._farewells, return_exceptions=True)

    # -- what agents call

    async def _enroll(self, call: Call, asked: Enroll) -> Certificate:
        caller = _of(call)
        if caller.identity is not None:
            raise Denied("this agent is enrolled already; a new certificate comes by agent.renew")
        if asked.ucloud != self.authority.ucloud:
            raise Denied(f"this is U-Cloud {self.authority.ucloud}, not {asked.ucloud}")
        identity = Identity(asked.ucloud, PLATFORM, asked.platform)
        await self.owner.redeem(asked, pin_of_request(asked.csr_pem))
        return self.authority.issue(asked.csr_pem, identity)

    async def _renew(self, call: Call, asked: CsrResult) -> Certificate:
        caller = _of(call)
        if caller.session is None or caller.identity is None:
            raise Denied("hello comes first")
        tls.check_pin(pin_of_request(asked.csr_pem), caller.pin, str(caller.identity))
        return self.authority.issue(asked.csr_pem, caller.identity)

    async def _hello(self, call: Call, hello: Hello) -> Welcome:
        caller = _of(call)
        if abs(hello.protocol - PROTOCOL) > 1:
            raise Denied(f"protocol {hello.protocol} is not spoken here, {PROTOCOL} is")
        tls.demand(caller.identity, ucloud=hello.ucloud, role=PLATFORM, name=hello.platform)
        with caller.beginning():
            await self.owner.admit(hello, caller.pin)
            session = caller.session = AgentSession(call.peer, hello, caller.pin, self.owner)
            older, self.sessions[hello.platform] = self.sessions.get(hello.platform), session
            caller.introduced.set_result(session)
        if older is not None:
            older.abandon()
        call.peer.name = f"agent {hello.platform}"
        return Welcome(protocol=min(PROTOCOL, hello.protocol), time_s=time.time())

    async def _snapshot(self, call: Call, asked: CheckpointSnapshot) -> Empty:
        """Of the newest session of a platform only: an older one's EE may have gone on since."""
        session = _of(call).session
        if session is None or self.sessions.get(session.platform) is not session:
            raise Denied("hello comes first")
        await self.owner.snapshot(session, asked)
        return Empty()

    async def _blob(self, call: Call, asked: Blob) -> Detach:
        """On a connection that is there for this file only, of a platform whose agent is here."""
        caller = _of(call)
        session = self.sessions.get(caller.identity.name) if caller.identity else None
        if session is None or session.pin != caller.pin or caller.introduced.done():
            raise Denied("hello comes first, on another connection")
        if session.files >= MAX_FILES:
            raise Busy(f"{session.platform} is being sent {MAX_FILES} files already")
        session.files += 1  # before anything is waited for: others ask meanwhile
        try:
            with caller.beginning():
                sending = await blobs.send(asked, await self.owner.blob(session, asked.digest))
                caller.introduced.set_result(None)
        except BaseException:
            session.files -= 1
            raise
        call.peer.name = f"a file for {session.platform}"
        then, abandoned = partial(self._send, session, sending), partial(_drop, session, sending)
        return Detach(sending.result, then, abandoned)

    async def _deposit(self, call: Call, asked: Blob) -> Deposited:
        """By the platform's host, on its disk; one at a time, for the disk has room for one."""
        session = _of(call).session
        if session is None:
            raise Denied("hello comes first")
        async with session.depositing:
            return await self.owner.deposit(session, asked)

    async def _send(
        self, session: AgentSession, sending: Detach, reader: StreamReader, writer: StreamWriter
    ) -> None:
        self._files.add(writer)
        try:
            await sending.then(reader, writer)
        finally:
            self._files.discard(writer)
            session.files -= 1


def _drop(session: AgentSession, sending: Detach) -> None:
    sending.abandoned()
    session.files -= 1


def _of(call: Call) -> _Caller:
    caller: Any = call.peer.context["caller"]
    if caller.refusal is not None:
        raise caller.refusal
    assert isinstance(caller, _Caller)  # noqa: S101 - serve puts nothing else there
    return caller
