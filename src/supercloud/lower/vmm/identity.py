"""The port ``identity`` of a machine: a template's agent waits there, a clone's is told who it is.

One line each way. The guest says ``waiting``, is sent a JSON object, and answers ``ready NONCE``
when it has become that. A machine that runs is asked there to be still for a checkpoint, and
answers ``paused NONCE`` or ``refused NONCE``; then it is told to go on. What the guest says is
untrusted: two words of known length, or nothing.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable

from supercloud.lower.vmm.machine import Machine
from supercloud.model.errors import Temporary
from supercloud.wire.codec import encode
from supercloud.wire.reactor import Reactor

VERSION = 1
SEED_BYTES = 64
_MAX_LINE_BYTES = 128
_ANSWERS = (b"ready", b"paused", b"refused")

Said = Callable[[str], None]


class IdentityPort:
    """Our end. ``said`` gets the first word of what is legal; each answer to a question once."""

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

    def tell(self, machine: Machine) -> None:
        """Who the clone is, the time, and what its random numbers start from."""
        self._send(
            "resume",  # which one that was restored goes by
            seed=os.urandom(SEED_BYTES).hex(),
            time_s=time.time(),
            macs=[machine.uplink_mac, machine.link_mac],
            lease=encode(machine.lease),
        )

    def pause(self) -> None:
        """Ask its agent to be still; ``paused`` or ``refused`` is said, or nothing at all."""
        self._send("pause")

    def resume(self) -> None:
        """Tell its agent to go on; an answer to what was asked before comes too late."""
        self._send("resume")
        self._nonce = ""

    def _send(self, do: str, **more: object) -> None:
        if self._sock.fileno() < 0:
            raise Temporary("the platform's agent is not there")
        self._nonce = os.urandom(8).hex()
        told = {"version": VERSION, "do": do, "nonce": self._nonce, **more}
        try:
            self._sock.send(json.dumps(told).encode() + b"\n")
        except OSError as error:
            raise Temporary("the platform's agent does not listen") from error

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
            return
        word, _, nonce = untrusted.partition(b" ")
        if self._nonce and nonce == self._nonce.encode() and word in _ANSWERS:
            self._nonce = ""
            self._said(word.decode())
