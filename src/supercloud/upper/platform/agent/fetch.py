"""A file from the control plane, over a connection of its own: blocking, for a thread.

The agent's own connection is asyncio's, which costs the interpreter some twenty steps for each
record of TLS; here a record is one call. Half of what the first EE of a platform waits for.
"""

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Callable

from supercloud.model.errors import Invalid, Temporary, from_wire
from supercloud.model.records import dataclass
from supercloud.wire.codec import encode
from supercloud.wire.messages import Blob
from supercloud.wire.peer import HEADER, MAX_JSON_BYTES, REQUEST, RESPONSE, ConnectionLost

PATIENCE_S = 30.0
_PIECE_BYTES = 256 << 10
_CALL = 1


@dataclass(frozen=True, slots=True)
class Source:
    """Where the control plane is, and as whom it is asked."""

    host: str
    port: int
    server_name: str
    context: ssl.SSLContext


class Fetch:
    """One blob from one source. ``run`` blocks; ``cancel`` may be called by any thread."""

    def __init__(self, source: Source, wanted: Blob) -> None:
        self._source, self._wanted = source, wanted
        self._socket: socket.socket | None = None
        self._cancelled = False

    def run(self, take: Callable[[memoryview], None]) -> None:
        """Give each piece to ``take``, from the offset on, until the other side ends.

        Raises what the control plane answers, Temporary when it is silent for 30 s or goes away
        before it has answered. Whether all came is for the caller to see.
        """
        source = self._source
        try:
            plain = _connected(source.host, source.port)
        except OSError as error:
            raise Temporary(f"the control plane cannot be reached: {error}") from error
        # a duplicate to shut down: wrapping takes the descriptor away from the plain one
        with plain, socket.socket(fileno=os.dup(plain.fileno())) as self._socket:
            if self._cancelled:
                self.cancel()
            with contextlib.closing(self._secured(plain)) as secured:
                self._ask(secured)
                piece = memoryview(bytearray(_PIECE_BYTES))
                while count := _fill(secured, piece):
                    take(piece[:count])

    def cancel(self) -> None:
        """Make ``run`` end soon, with Temporary or as at the end of the file."""
        self._cancelled = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _secured(self, plain: socket.socket) -> ssl.SSLSocket:
        try:
            # names as bytes need no IDNA codec with its tables: 50 ms of the first pull, twice
            name = self._source.server_name.encode()
            return self._source.context.wrap_socket(plain, server_hostname=name)
        except OSError as error:
            raise Temporary(f"the control plane cannot be reached: {error}") from error

    def _ask(self, secured: ssl.SSLSocket) -> None:
        asked = json.dumps({"m": "blob.get", "p": encode(self._wanted)}).encode()
        try:
            secured.sendall(HEADER.pack(len(asked), REQUEST, _CALL) + asked)
            length, kind, call = HEADER.unpack(_exactly(secured, HEADER.size))
            if length > MAX_JSON_BYTES or (kind, call) != (RESPONSE, _CALL):
                raise Invalid(f"a frame of type {kind} and {length} bytes in answer to blob.get")
            answer = json.loads(_exactly(secured, length))
        except OSError as error:
            raise ConnectionLost(f"no answer to blob.get: {error}") from error
        if not isinstance(answer, dict) or "e" in answer:
            raise from_wire(answer["e"] if isinstance(answer, dict) else {})


def _connected(host: str, port: int) -> socket.socket:
    """To the first of its addresses that answers; OSError of the last."""
    error: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host.encode(), port, type=socket.SOCK_STREAM
    ):
        found = socket.socket(family, kind, protocol)
        try:
            found.settimeout(PATIENCE_S)
            found.connect(address)
        except OSError as refused:
            found.close()
            error = refused
        else:
            return found
    raise error


def _exactly(secured: ssl.SSLSocket, size: int) -> bytes:
    """``size`` bytes; ConnectionLost when fewer come."""
    found = bytearray()
    while len(found) < size:
        data = secured.recv(size - len(found))
        if not data:
            raise ConnectionLost("the connection was lost before blob.get was answered")
        found += data
    return bytes(found)


def _fill(secured: ssl.SSLSocket, piece: memoryview) -> int:
    """Bytes put into ``piece``: fewer than it takes only at the end."""
    count = 0
    while count < len(piece):
        try:
            got = secured.recv_into(piece[count:])
        except OSError as error:  # a connection that breaks ends the file here as well
            raise Temporary(f"the connection was lost in the middle: {error}") from error
        if not got:
            break
        count += got
    return count
