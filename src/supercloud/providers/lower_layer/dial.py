"""Connections to a user domain: TLS through the provider's front door, first contact, the pin.

The front door passes the socket on by SNI. The user domain's key is pinned when it is first seen;
its certificate is then signed over that key, and from there on both chain and pin must hold. What
the pin is worth is what the first contact was worth: nothing attests the domain yet.
"""

import asyncio
import logging
import ssl
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from supercloud.model.errors import Denied, Temporary
from supercloud.providers.base import PinStore
from supercloud.trust import authority as authorities
from supercloud.trust import tls
from supercloud.trust.authority import Authority
from supercloud.trust.names import HOST, Identity, user_server_name
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import CsrResult
from supercloud.wire.peer import ConnectionLost, Peer

CONNECT_TIMEOUT_S: Final = 20.0
CALL_TIMEOUT_S: Final = 30.0
READ_LIMIT_BYTES: Final = 1 << 20
PIN: Final = "host"

log = logging.getLogger("supercloud.providers.lower_layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom to reach: ``address``:``port`` is the front door, ``name`` the manifest's."""

    name: str
    address: str
    port: int
    user: str

    def __str__(self) -> str:
        return f"{self.name} ({self.user} at {self.address}:{self.port})"


class Connection:
    """A connection with its running peer."""

    def __init__(self, peer: Peer, writer: StreamWriter) -> None:
        self.peer, self.writer = peer, writer
        self._running = asyncio.ensure_future(peer.run())

    @property
    def alive(self) -> bool:
        """Whether calls have a chance."""
        return not self.peer.closed.is_set()

    async def close(self) -> None:
        """Close it, unless its raw stream was handed on."""
        self.peer.close()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)


class Dialer:
    """Opens connections to one user domain; keeps its certificate signed."""

    def __init__(
        self, target: Target, authority: Authority, trust_directory: str, pins: PinStore
    ) -> None:
        self.target = target
        self._authority, self._trust_directory, self._pins = authority, trust_directory, pins
        self._identity = Identity(authority.ucloud, HOST, target.name)
        self._introducing = asyncio.Lock()

    async def connect(self) -> Connection:
        """A connection whose other end is proven to be our user domain.

        Denied when its key is not the pinned one, or when it refuses us; Temporary when it cannot
        be reached.
        """
        connection = await self._verified()
        if connection is None:
            async with self._introducing:  # of several connections one makes the introduction
                connection = await self._verified()
                if connection is None:
                    await self._introduce()
                    connection = await self._verified()
        if connection is None:
            raise Denied(f"{self.target} does not show the certificate that it was given")
        return connection

    # -- an enrolled user domain

    async def _verified(self) -> Connection | None:
        """A connection to a domain that shows a certificate of ours; None when it does not."""
        files = self._authority.own_files(self._trust_directory)
        context = tls.client_context(self._authority.root_pem, *files, check_hostname=False)
        try:
            reader, writer = await self._open(context)
        except ssl.SSLCertVerificationError as error:
            log.info("%s has no certificate of ours (yet): %s", self.target, error.verify_message)
            return None
        return await self._checked(reader, writer)

    async def _checked(self, reader: StreamReader, writer: StreamWriter) -> Connection:
        shown = writer.get_extra_info("ssl_object")
        pin = tls.pin_of_peer(shown)
        try:
            identity = tls.demand(tls.peer_identity(shown), ucloud=self._identity.ucloud, role=HOST)
            await self._check_pin(pin)
        except Denied:
            writer.transport.abort()
            raise
        certificate = x509.load_der_x509_certificate(shown.getpeercert(binary_form=True))
        connection = self._start(reader, writer)
        if identity != self._identity or authorities.due(certificate):  # an entry was renamed
            await self._sign(connection, pin)
        return connection

    # -- first contact

    async def _introduce(self) -> None:
        """Pin the domain's key, or check it against the pin, and sign a certificate over it."""
        files = self._authority.own_files(self._trust_directory)
        reader, writer = await self._open(tls.unverified_client_context(*files))
        pin = tls.pin_of_peer(writer.get_extra_info("ssl_object"))
        try:
            await self._check_pin(pin)
        except Denied:
            writer.transport.abort()
            raise
        connection = self._start(reader, writer)
        try:
            await self._sign(connection, pin)
        finally:
            await connection.close()

    async def _sign(self, connection: Connection, pin: str) -> None:
        """Have the domain's request signed and installed; the key must be the connection's own."""
        try:
            answer = await connection.peer.call("identity.request", timeout_s=CALL_TIMEOUT_S)
            asked = decode(CsrResult, answer, "identity.request", ignore_unknown=True)
            tls.check_pin(authorities.pin_of_request(asked.csr_pem), pin, str(self.target))
            signed = self._authority.issue(asked.csr_pem, self._identity)
            await connection.peer.call("identity.install", encode(signed), timeout_s=CALL_TIMEOUT_S)
        except ConnectionLost as error:
            raise self._why_lost(connection) from error

    async def _check_pin(self, pin: str) -> None:
        pinned = await self._pins.get(PIN)
        if pinned is None:
            await self._pins.put(PIN, pin)
            log.info("%s: its key %s is pinned at first contact", self.target, pin)
        else:
            tls.check_pin(pin, pinned, str(self.target))

    # -- sockets

    def _start(self, reader: StreamReader, writer: StreamWriter) -> Connection:
        return Connection(Peer(reader, writer, accepted=False, name=str(self.target)), writer)

    async def _open(self, context: ssl.SSLContext) -> tuple[StreamReader, StreamWriter]:
        """Connect; lets certificate errors through, makes the others Temporary."""
        target = self.target
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(
                    target.address, target.port, limit=READ_LIMIT_BYTES, ssl=context,
                    server_hostname=user_server_name(target.user),
                )  # fmt: skip
        except ssl.SSLCertVerificationError:
            raise
        except TimeoutError as error:
            raise Temporary(f"{target} did not answer in {CONNECT_TIMEOUT_S:g} s") from error
        except (ConnectionResetError, ConnectionAbortedError, ssl.SSLEOFError) as error:
            raise Temporary(f"{target} hung up: is {target.user} enrolled there?") from error
        except (OSError, EOFError) as error:
            raise Temporary(f"{target} cannot be reached: {error}") from error

    def _why_lost(self, connection: Connection) -> Exception:
        """Of a connection that was lost before it carried anything: a refusal, most probably.

        The alert that would say so is overtaken when the domain closes with our request unread.
        """
        return why_lost(connection, str(self.target)) or Temporary(
            f"{self.target} hung up: was {self.target.user} enrolled there "
            "with the certificate that `supercloud ca` prints?"
        )


def why_lost(connection: Connection, whom: str) -> Denied | None:
    """Under TLS 1.3 a refused client learns it only when it reads: the reason, if that was it."""
    error = connection.peer.reader.exception()
    if not isinstance(error, ssl.SSLError):
        return None
    reason = (error.reason or str(error)).replace("_", " ").lower()
    return Denied(
        f"{whom} refuses our certificate: {reason}", hint="was the user enrolled with it?"
    )
