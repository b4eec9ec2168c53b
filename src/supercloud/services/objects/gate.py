"""The one way in: TLS, one request at a time, quota, and on to weed's S3 port with every byte kept.

Signatures cover what the client sent, so nothing is changed on the way; weed checks them. Each
connection of a client has one to weed, made when it is needed.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

from supercloud.model.errors import Denied, Invalid, NoResources, NotFound, UserError
from supercloud.services.objects import http, requests
from supercloud.services.objects.quota import Book, Reservation

MAX_CONNECTIONS: Final = 256
_IDLE_S: Final = 120.0
_HANDSHAKE_S: Final = 20.0
_CLOSE_S: Final = 5.0
_DRAIN_S: Final = 1.0
_LIMIT_BYTES: Final = 1 << 20

# what the client is told: S3's code and the status
_CODES: Final[dict[type[Exception], tuple[int, str, str]]] = {
    NoResources: (403, "Forbidden", "QuotaExceeded"),
    Denied: (403, "Forbidden", "AccessDenied"),
    NotFound: (404, "Not Found", "NoSuchBucket"),
    Invalid: (400, "Bad Request", "InvalidRequest"),
    ConnectionError: (503, "Service Unavailable", "ServiceUnavailable"),
}

log = logging.getLogger("supercloud.services.objects.gate")


@dataclass
class Gate:
    """``upstream`` is weed's (host, port); ``stored_bytes`` as in ``requests.classify``."""

    context: ssl.SSLContext
    book: Book
    stored_bytes: Callable[[bytes], int]
    upstream: tuple[str, int]
    _sessions: set[asyncio.Task[None]] = field(default_factory=set)

    async def accept(self, connection: socket.socket) -> None:
        """Serve a connection of a client until it ends; it is the gate's from now on."""
        if len(self._sessions) >= MAX_CONNECTIONS:
            connection.close()
            raise NoResources(f"there are {MAX_CONNECTIONS} connections to the object store")
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def close(self) -> None:
        """End all connections."""
        for task in self._sessions:
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=_LIMIT_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self.context,
                ssl_handshake_timeout=_HANDSHAKE_S,
            )
        except (OSError, ssl.SSLError) as error:
            log.info("no TLS: %s", error)
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        session = _Session(self, reader, writer)
        try:
            await session.run()
        except (OSError, EOFError, ssl.SSLError, TimeoutError) as error:
            log.info("a connection ended: %r", error)
        finally:
            await session.close()


class _Session:
    """One client's connection."""

    def __init__(
        self, gate: Gate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._gate, self._reader, self._writer = gate, reader, writer
        self._weed: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def close(self) -> None:
        self._hang_up()
        self._writer.close()
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), _CLOSE_S)

    def _hang_up(self) -> None:
        if self._weed is not None:
            self._weed[1].close()
            self._weed = None

    async def run(self) -> None:
        """Serve requests until one ends the connection."""
        while True:
            head: http.Head | None = None
            try:
                head = await asyncio.wait_for(http.read_head(self._reader), _IDLE_S)
                if head is None or not await self._one(head):
                    return
            except (UserError, ConnectionError) as error:
                await self._refuse(error, head)
                return  # its body was not read

    async def _one(self, head: http.Head) -> bool:
        """Serve one request; whether another may follow."""
        asked = requests.classify(head, self._gate.stored_bytes)
        if asked.bucket and asked.bucket not in self._gate.book.quotas:
            raise NotFound(f"there is no bucket {asked.bucket}")
        reservation = self._gate.book.reservation(asked.bucket)
        try:
            if asked.charge_bytes is not None:
                await reservation.grow(asked.charge_bytes)
            return await self._forward(head, reservation, asked.promised_bytes)
        finally:
            reservation.release()

    async def _forward(
        self, head: http.Head, reservation: Reservation, promised_bytes: int | None
    ) -> bool:
        reader, writer = await self._connected()
        writer.write(head.raw)
        sending = asyncio.create_task(self._send(head, writer, reservation, promised_bytes))
        try:
            return await self._answer(head, reader, sending)
        except BaseException:
            self._hang_up()  # what weed has of the body is not whole: it stores nothing
            raise
        finally:
            if not sending.done():
                sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError, EOFError, UserError):
                await sending

    async def _send(
        self,
        head: http.Head,
        writer: asyncio.StreamWriter,
        reservation: Reservation,
        promised_bytes: int | None,
    ) -> None:
        sent_bytes = 0
        async for block in http.body(self._reader, head):
            sent_bytes += len(block)
            if promised_bytes is not None and sent_bytes > promised_bytes:
                await reservation.grow(sent_bytes - promised_bytes)
                promised_bytes = sent_bytes
            writer.write(block)
            await writer.drain()

    async def _answer(
        self, asked: http.Head, reader: asyncio.StreamReader, sending: asyncio.Task[None]
    ) -> bool:
        while True:
            answer = await self._next_head(reader, sending)
            self._writer.write(answer.raw)
            if answer.status >= 200:
                break
        if http.has_body(answer, asked.method):
            async for block in http.body(reader, answer):
                self._writer.write(block)
                await self._writer.drain()
        await self._writer.drain()
        await asyncio.sleep(0)  # the sender's turn to see its end
        whole = sending.done() and not sending.cancelled() and sending.exception() is None
        if not whole:  # answered before the body had ended: refused
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await self._drain_body()
        if ends := answer.closes or asked.closes or not whole:
            self._hang_up()
        return not ends

    async def _next_head(
        self, reader: asyncio.StreamReader, sending: asyncio.Task[None]
    ) -> http.Head:
        """Weed's next head; what goes wrong with the body that is sent is raised."""
        reading = asyncio.create_task(http.read_head(reader))
        try:
            waits = {reading, sending} if not sending.done() else {reading}
            done, _ = await asyncio.wait(
                waits, timeout=_IDLE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if reading not in done:
                if not done:
                    raise TimeoutError("nothing moves")
                sending.result()
            head = await asyncio.wait_for(reading, _IDLE_S)
        finally:
            reading.cancel()
        if head is None:
            raise ConnectionResetError("the S3 server ended the connection")
        return head

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._weed is not None and not self._weed[0].at_eof():
            return self._weed
        self._hang_up()
        self._weed = await asyncio.open_connection(*self._gate.upstream, limit=_LIMIT_BYTES)
        return self._weed

    async def _refuse(self, error: Exception, head: http.Head | None) -> None:
        status, words, code = next(v for k, v in _CODES.items() if isinstance(error, k))
        text = error.message if isinstance(error, UserError) else "the S3 server is starting"
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f"<Error><Code>{code}</Code><Message>{escape(text)}</Message></Error>"
        ).encode()
        answer = (
            f"HTTP/1.1 {status} {words}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        self._writer.write(answer + (b"" if head and head.method == "HEAD" else body))
        await self._writer.drain()
        if head is None or head.chunked or head.length:
            await self._drain_body()

    async def _drain_body(self) -> None:
        """Read on for a moment: a client that still sends would miss the answer."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_DRAIN_S):
                while await self._reader.read(http.BLOCK_BYTES):
                    pass
