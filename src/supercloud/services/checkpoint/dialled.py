"""Connections to the object service that somebody else makes: asked for, and waited for.

The checkpointing service has no network. Whoever launched it hears ``connection.wanted``, and calls
``connection`` with a connected socket; TLS is between this and the object service.
"""

import os
import queue
import socket
import ssl
from typing import Final

from supercloud.model.errors import Invalid
from supercloud.services.base import Tell
from supercloud.wire.portal import Request
from supercloud.wire.reactor import Reactor

PATIENCE_S: Final = 20.0
HANDSHAKE_S: Final = 20.0


class Dialled:
    """``dial`` is for ``s3.S3``; any thread may call it but the reactor's."""

    def __init__(self, reactor: Reactor, tell: Tell) -> None:
        self._tell = tell
        self._given: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context: ssl.SSLContext | None = None
        self._server_name = ""
        reactor.watch(self, self._ask)

    def fileno(self) -> int:
        """Readable when some thread waits for a connection."""
        return self._event

    def expect(self, server_name: str, ca_pem: str) -> None:
        """Who is at the other end: has a certificate of that name from this authority."""
        self._context = ssl.create_default_context(cadata=ca_pem)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._server_name = server_name

    def dial(self) -> socket.socket:
        """A connection, TLS on it. OSError."""
        if self._context is None:
            raise Invalid("nobody is expected at the other end")
        os.eventfd_write(self._event, 1)
        try:
            descriptor = self._given.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise TimeoutError("nobody gave a connection to the object store") from None
        plain = socket.socket(fileno=descriptor)
        plain.settimeout(HANDSHAKE_S)
        return self._context.wrap_socket(plain, server_hostname=self._server_name)

    def give(self, request: Request) -> None:
        """The method ``connection``: one that was asked for."""
        if len(request.descriptors) != 1:
            raise Invalid("a connection is one descriptor")
        self._given.put(request.take()[0])

    def _ask(self) -> None:
        self._tell("connection.wanted", {"count": os.eventfd_read(self._event)})
