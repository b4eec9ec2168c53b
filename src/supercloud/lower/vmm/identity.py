"""The port ``identity`` of a machine: a template's agent waits there, a clone's is told who it is.

One line each way. The guest says ``waiting``, is sent a JSON object, and answers ``ready NONCE``
when it has become that. What the guest says is untrusted: two words of known length, or nothing.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable

from supercloud.wire.reactor import Reactor

VERSION = 1
SEED_BYTES = 64
_MAX_LINE_BYTES = 128

Said = Callable[[str], None]


class IdentityPort:
    """Our end. ``said`` gets ``waiting`` or ``ready``, once each at most."""

    def __init__(self, reactor: Reactor, sock: socket.socket, said: Said) -> None:
        self._reactor, self._sock, self._said = reactor, sock, said
        self._data, self._nonce = b"", ""
        sock.setblocking(False)
        reactor.watch(sock, self._read)

    def close(self) -> None:
        """No more of it."""
        if self._sock.fileno() >= 0:
            self._reactor.forget(self._sock)
            self._sock.close()

    def tell(self, uplink_mac: str, link_mac: str) -> None:
        """Who the clone is, the time, and what its random numbers start from."""
        self._nonce = os.urandom(8).hex()
        told = {
            "version": VERSION,
            "nonce": self._nonce,
            "seed": os.urandom(SEED_BYTES).hex(),
            "time_s": time.time(),
            "macs": [uplink_mac, link_mac],
        }
        self._sock.send(json.dumps(told).encode() + b"\n")

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                data = self._sock.recv(_MAX_LINE_BYTES)
            except ConnectionResetError:
                data = b""
            self._data += data
            if not data or len(self._data) > _MAX_LINE_BYTES:
                self.close()  # the machine is gone, or talks nonsense
                return
            *lines, self._data = self._data.split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, untrusted: bytes) -> None:
        if untrusted == b"waiting":
            self._said("waiting")
        elif self._nonce and untrusted == b"ready " + self._nonce.encode():
            self._nonce = ""
            self._said("ready")
