"""Bytes in and out of a connected socket on the reactor, without ever blocking.

Reading is by wishes: ``want(n, then)`` calls ``then`` with exactly ``n`` bytes once they are there,
and ``then`` says what is wanted next. ``on_end`` is called once, never from within ``send``.
"""

import contextlib
import functools
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from supercloud.wire.reactor import READ, WRITE, Reactor

CHUNK_BYTES: Final = 256 << 10
_MOST_BUFFERS: Final = 64

Bytes = bytes | bytearray | memoryview
Then = Callable[[bytearray], None]


class Stream:
    """One connection. What is sent stays referenced until the kernel has taken it."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, on_end: Callable[[str], None]
    ) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # of TCP only
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reactor, self._socket, self._on_end = reactor, sock, on_end
        self._out: deque[memoryview] = deque()
        self._in, self._at = bytearray(), 0
        self._wanted = 0
        self._then: Then = _nothing
        self._large: bytearray | None = None
        self._filled = 0
        self._events = 0
        self._broken = False
        self.paused = self.ended = False
        self._interest()

    def want(self, count: int, then: Then) -> None:
        """Call ``then`` with the next ``count`` bytes (at least 1)."""
        self._wanted, self._then = count, then
        if count > CHUNK_BYTES:  # straight to where it belongs
            have = self._in[self._at : self._at + count]
            self._at += len(have)
            self._large, self._filled = bytearray(count), len(have)
            self._large[: len(have)] = have

    def send(self, *parts: Bytes) -> None:
        """Send them in order; what cannot be sent any more is dropped."""
        if self.ended or self._broken:
            return
        idle = not self._out
        self._out.extend(memoryview(part) for part in parts if len(part))
        if idle:
            self._flush()
        self._interest()

    def pause(self, paused: bool) -> None:
        """Take nothing more from the socket for now, or take it again."""
        if paused != self.paused and not self.ended:
            self.paused = paused
            self._interest()
            if not paused and len(self._in) > self._at:
                self._reactor.after(0, self._serve)

    def close(self) -> None:
        """At once; ``on_end`` is not called any more."""
        if not self.ended:
            self.ended = True
            self._reactor.forget(self._socket)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._out.clear()

    # --

    def _interest(self) -> None:
        if self.ended:
            return
        events = (0 if self.paused else READ) | (WRITE if self._out else 0)
        if events == self._events:
            return
        self._events = events
        if events:
            self._reactor.watch(self._socket, self._ready, events)
        else:
            self._reactor.forget(self._socket)

    def _ready(self) -> None:
        self._flush()
        if not self.paused:
            self._read()
        self._interest()

    def _flush(self) -> None:
        try:
            while self._out and not self.ended:
                buffers = [self._out[i] for i in range(min(len(self._out), _MOST_BUFFERS))]
                self._sent(self._socket.sendmsg(buffers))
        except BlockingIOError:
            pass
        except OSError as error:
            self._out.clear()
            self._broken = True
            self._reactor.after(0, functools.partial(self._end, str(error)))

    def _sent(self, count: int) -> None:
        while count:
            first = self._out[0]
            if count < len(first):
                self._out[0] = first[count:]
                return
            count -= len(first)
            self._out.popleft()

    def _read(self) -> None:
        if self.ended:
            return
        try:
            if self._large is not None:
                count = self._socket.recv_into(memoryview(self._large)[self._filled :])
                self._filled += count
            else:
                data = self._socket.recv(CHUNK_BYTES)
                count = len(data)
                self._in += data
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if count:
            self._serve()
        else:
            self._end("the other side has closed the connection")

    def _serve(self) -> None:
        while self._wanted and not self.ended and not self.paused:
            if self._large is not None:
                if self._filled < self._wanted:
                    break
                data, self._large = self._large, None
            elif len(self._in) - self._at >= self._wanted:
                data = self._in[self._at : self._at + self._wanted]
                self._at += self._wanted
            else:
                break
            then, self._wanted = self._then, 0
            then(data)
        if self._at:
            del self._in[: self._at]
            self._at = 0

    def _end(self, reason: str) -> None:
        if not self.ended:
            self.close()
            self._on_end(reason)


def _nothing(_data: bytearray) -> None:
    """Nobody wants anything yet."""
