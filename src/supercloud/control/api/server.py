"""The API's sockets: a unix socket, and TCP with TLS that agents share by ALPN."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import time
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from supercloud.control.api.access import Access
from supercloud.control.api.declare import MAX_BODY_BYTES, Asked, Route, params_of
from supercloud.control.api.routes import Routes, encode
from supercloud.control.app import ControlPlane
from supercloud.control.settings import Settings
from supercloud.control.snapshot import Snapshot
from supercloud.model.errors import (
    STATUS,
    Invalid,
    NotFound,
    Permanent,
    SupercloudError,
    to_wire,
)
from supercloud.model.events import event_id
from supercloud.trust import tls
from supercloud.trust.names import DOMAIN
from supercloud.upper.platform.link.hub import ALPN

HTTP_ALPN = "http/1.1"
CONTEXT_LIFETIME_S = 3600.0
READ_LIMIT_BYTES = 1 << 20
SHUTDOWN_S = 0.5

log = logging.getLogger("supercloud.control.api")


class Server:
    """Serves a control plane; ``start`` it, ``stop`` it."""

    def __init__(self, plane: ControlPlane, settings: Settings) -> None:
        """Listens where ``settings`` say."""
        self._plane, self._settings = plane, settings
        self._access = Access(settings)
        self._routes = Routes(plane.service, Snapshot(plane.service, plane.store), plane.doctor)
        self._runner: web.AppRunner | None = None
        self._tcp: asyncio.Server | None = None
        self._contexts: dict[str, tuple[float, ssl.SSLContext]] = {}
        self._ucloud_of: WeakKeyDictionary[ssl.SSLContext, str] = WeakKeyDictionary()
        self._agents: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        for route in self._routes.all:
            application.router.add_route(route.method, route.path, self._handler(route))
        application.router.add_route("*", "/{rest:.*}", self._nowhere)
        self._runner = web.AppRunner(
            application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_S
        )
        await self._runner.setup()
        path = self._settings.socket
        site = web.SockSite(self._runner, unix_socket(path, self._settings.socket_group))
        await site.start()
        if address := self._settings.address:
            await self._listen(*address)

    async def stop(self) -> None:
        """Stop listening, end what is being served."""
        self._plane.plane.events.end_followers()
        if self._tcp is not None:
            self._tcp.close()
        for task in self._agents:
            task.cancel()
        await asyncio.gather(*self._agents, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        with contextlib.suppress(FileNotFoundError):
            self._settings.socket.unlink()

    @property
    def port(self) -> int:
        """The TCP port that it listens on; 0 when it does not."""
        return int(self._tcp.sockets[0].getsockname()[1]) if self._tcp else 0

    # -- requests

    def _handler(self, route: Route) -> Any:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                return await self._serve(route, request)
            except (SupercloudError, web.HTTPException, OSError) as error:
                return _refusal(error)
            except Exception as error:
                bug = event_id()
                log.exception("bug %s in %s %s", bug, route.method, route.path)
                return _answer(to_wire(error, bug_id=bug))

        return handle

    async def _serve(self, route: Route, request: web.Request) -> web.StreamResponse:
        caller = self._access.caller(request)
        at = dict(request.match_info)
        for name, value in at.items():
            if len(value) > 128:
                raise NotFound(
                    f"there is no {name} of that name", hint="no name has over 128 characters"
                )
        if "ucloud" in at:
            caller.may(at["ucloud"])
        asked = Asked(request, caller, await params_of(route, request), at)
        result = await route.handle(asked)
        if isinstance(result, web.StreamResponse):
            return result
        return web.Response(body=encode(result), content_type="application/json")

    async def _nowhere(self, request: web.Request) -> web.StreamResponse:
        try:
            self._access.caller(request)
        except SupercloudError as error:
            return _refusal(error)
        hint = "supercloud version shows whether this control plane is older than who asks"
        return _refusal(NotFound(f"there is no {request.method} {request.path[:200]}", hint=hint))

    # -- TCP

    async def _listen(self, host: str, port: int) -> None:
        context = tls.by_server_name(self._first_context(), self._context)
        loop = asyncio.get_running_loop()
        try:
            self._tcp = await loop.create_server(
                lambda: _Switch(self), host, port, ssl=context, ssl_handshake_timeout=20.0
            )
        except OSError as error:
            raise Invalid(f"cannot listen on {host}:{port}: {error}", where="--listen") from error

    def _first_context(self) -> ssl.SSLContext:
        """What a connection has until its SNI is known: no certificate.

        How a client is verified is this context's for good: OpenSSL's change of context takes
        over certificate and trust, but neither mode nor flags.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        context.load_verify_locations(cadata=self._plane.service.ca_pem())
        return context

    def _context(self, server_name: str) -> ssl.SSLContext | None:
        """TLS of the U-Cloud whose control plane is asked for; None: there is no such."""
        parts = server_name.removesuffix(f".{DOMAIN}").split(".")
        if not server_name.endswith(f".{DOMAIN}") or len(parts) != 3:
            return None
        ucloud = parts[2]
        if parts[:2] != ["control", "control"] or ucloud not in self._plane.known:
            return None
        made, context = self._contexts.get(ucloud, (0.0, None))
        if context is None or time.monotonic() - made > CONTEXT_LIFETIME_S:
            context = self._plane.server_context(ucloud)
            context.set_alpn_protocols([ALPN, HTTP_ALPN])
            self._contexts[ucloud] = (time.monotonic(), context)
            self._ucloud_of[context] = ucloud
        return context

    def http_protocol(self) -> asyncio.Protocol:
        """A new connection of the HTTP server."""
        if self._runner is None or self._runner.server is None:
            raise Permanent("the API was stopped")
        return self._runner.server()

    def agent_protocol(self, ssl_object: ssl.SSLObject) -> asyncio.Protocol:
        """A new connection of an agent."""
        ucloud = self._ucloud_of[ssl_object.context]
        reader = asyncio.StreamReader(limit=READ_LIMIT_BYTES)

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._agent(ucloud, reader, writer))
            self._agents.add(task)
            task.add_done_callback(self._agents.discard)

        return asyncio.StreamReaderProtocol(reader, connected)

    async def _agent(
        self, ucloud: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await self._plane.plane.agents.hub(ucloud).serve(reader, writer)
        except (SupercloudError, OSError, EOFError) as error:
            log.info("an agent of %s was let go: %s", ucloud, error)
        finally:
            writer.close()


class _Switch(asyncio.Protocol):
    """Becomes the protocol that the two sides agreed upon."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        ssl_object: ssl.SSLObject = transport.get_extra_info("ssl_object")
        chosen = ssl_object.selected_alpn_protocol()
        if chosen == ALPN:
            protocol = self._server.agent_protocol(ssl_object)
        elif chosen in (HTTP_ALPN, None):
            protocol = self._server.http_protocol()
        else:
            transport.close()
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def unix_socket(path: Path, group: str) -> socket.socket:
    """A bound unix socket: mode 0600, or 0660 for ``group``. Takes a dead one's place."""
    try:
        path.parent.mkdir(mode=0o750 if group else 0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # the state's lock says that its owner is gone
        sock = _bound(path)
    except OSError as error:
        raise Invalid(f"cannot listen on {path}: {error.strerror}", where="--socket") from error
    if group:
        shutil.chown(path, group=group)
        path.chmod(0o660)
    return sock


def _bound(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _refusal(error: BaseException) -> web.Response:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        error = Invalid(f"the body is larger than {MAX_BODY_BYTES} bytes")
    elif isinstance(error, web.HTTPException):
        error = Invalid(error.reason)
    elif isinstance(error, OSError):
        log.warning("%s", error)
        error = Permanent(f"{error.strerror or error}")
    return _answer(to_wire(error))


def _answer(wire: dict[str, Any]) -> web.Response:
    status, _ = STATUS.get(str(wire["code"]), STATUS["internal"])
    body = json.dumps({"error": wire}).encode()
    return web.Response(status=status, body=body, content_type="application/json")
