"""TLS, server side, inside a byte stream that carries something already (usually TLS itself)."""

import asyncio
import ssl
import sys
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from contextlib import suppress
from typing import Final, cast

from supercloud.model.errors import Denied

HANDSHAKE_TIMEOUT_S: Final = 20.0
READ_LIMIT_BYTES: Final = 1 << 20
"""What a reader buffers before it pauses: a few of the largest frames."""


async def accept_tls(
    reader: StreamReader, writer: StreamWriter, context: ssl.SSLContext
) -> tuple[StreamReader, StreamWriter]:
    """The streams of a TLS server over the given ones; Denied when the handshake fails.

    The caller keeps the given writer for as long as it uses the new one: a forgotten one closes
    its transport. ``loop.start_tls`` alone would lose what the old reader had buffered, and that
    is the ClientHello more often than not.
    """
    loop = asyncio.get_running_loop()
    transport = cast("asyncio.Transport", writer.transport)
    if hasattr(transport, "_ssl_protocol") and sys.version_info < (3, 12):
        # its own gives abort() an argument that it does not take: a TypeError instead of an end
        transport._force_close = lambda _: _abort(transport)  # type: ignore[attr-defined] # noqa: SLF001
    transport.pause_reading()
    reader.feed_eof()  # nothing more comes into it: read() gives at once what is there
    early = await reader.read()
    new_reader = StreamReader(limit=READ_LIMIT_BYTES)
    protocol = StreamReaderProtocol(new_reader)
    starting = asyncio.ensure_future(
        loop.start_tls(
            transport, protocol, context, server_side=True,
            ssl_handshake_timeout=2 * HANDSHAKE_TIMEOUT_S,
        )
    )  # fmt: skip
    try:
        await asyncio.sleep(0)  # start_tls has set its protocol and queued its connection_made
        loop.call_soon(_feed, transport, early)
        # the time limit is our own: asyncio's does not say that it was that
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            inner = await starting
    except (OSError, EOFError) as error:  # ssl.SSLError and TimeoutError are OSErrors
        _abort(transport)
        raise Denied(f"the TLS handshake failed: {reason_of(error)}") from error
    except BaseException:
        starting.cancel()
        _abort(transport)
        raise
    assert inner is not None  # noqa: S101 - typeshed: only a closed transport gives None
    protocol.connection_made(inner)
    return new_reader, StreamWriter(inner, protocol, new_reader, loop)


def _abort(transport: asyncio.Transport) -> None:
    """End it at once, whatever has been done to it.

    Python 3.11's TLS transport forgets its protocol when it is closed after its connection was
    lost, as ``start_tls`` does on failure, and then cannot be aborted; nothing is left to abort.
    """
    with suppress(AttributeError):
        transport.abort()


def _feed(transport: asyncio.WriteTransport, early: bytes) -> None:
    """Give bytes that came before the upgrade to the protocol that now reads the transport."""
    protocol = transport.get_protocol()
    if not isinstance(protocol, asyncio.BufferedProtocol):
        transport.abort()
        return
    view = memoryview(early)
    while view and not transport.is_closing():
        buffer = memoryview(protocol.get_buffer(len(view)))
        part = view[: len(buffer)]
        buffer[: len(part)] = part
        protocol.buffer_updated(len(part))
        view = view[len(part) :]


def reason_of(error: BaseException) -> str:
    """What went wrong in a handshake, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, TimeoutError):
        return "it took too long"
    return str(error) or type(error).__name__
