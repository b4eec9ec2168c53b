"""A machine's serial console: the last of it in a ring, and copies to whoever watches."""

import contextlib
import socket
from collections.abc import Callable

from supercloud.model.errors import Busy
from supercloud.wire.reactor import Reactor

RING_BYTES = 64 << 10
MAX_WATCHERS = 8
_CHUNK_BYTES = 16 << 10
_MAX_INPUT_BYTES = 4 << 10


class Console:
    """Our end of the serial port; ``wake`` (if set) sees each piece of output."""

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self._reactor, self._sock = reactor, sock
        self._ring = bytearray()
        self._watchers: list[socket.socket] = []
        self.wake: Callable[[bytes], None] = lambda _data: None
        sock.setblocking(False)
        reactor.watch(sock, self._read)

    def attach(self) -> socket.socket:
        """The other end of a new watcher: first what is in the ring, then all that comes.

        What is written to it goes into the serial port. A watcher that does not keep up misses
        output. Busy when there are too many.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise Busy(f"{MAX_WATCHERS} watch this console already")
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * RING_BYTES)
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            ours.send(self._ring)
        if self._sock.fileno() < 0:
            ours.close()  # the machine is gone: what there was, and the end
            return theirs
        self._watchers.append(ours)
        self._reactor.watch(ours, lambda: self._typed(ours))
        return theirs

    def close(self) -> None:
        """The machine is gone: no more output; the ring stays for who asks."""
        if self._sock.fileno() >= 0:
            self._reactor.forget(self._sock)
            self._sock.close()
        for watcher in [*self._watchers]:
            self._drop(watcher)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._ring += data
        del self._ring[:-RING_BYTES]
        self.wake(data)
        for watcher in [*self._watchers]:
            self._show(watcher, data)

    def _show(self, watcher: socket.socket, data: bytes) -> None:
        try:
            watcher.send(data)
        except BlockingIOError:
            return  # too slow: it misses this
        except OSError:
            self._drop(watcher)

    def _typed(self, watcher: socket.socket) -> None:
        try:
            data = watcher.recv(_MAX_INPUT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or self._sock.fileno() < 0:
            self._drop(watcher)
            return
        with contextlib.suppress(OSError):  # a full serial port drops keys, as real ones do
            self._sock.send(data)

    def _drop(self, watcher: socket.socket) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            self._reactor.forget(watcher)
            watcher.close()
