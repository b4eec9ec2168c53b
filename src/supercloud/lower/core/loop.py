"""The core's event loop, and one domain's socket on it."""

import heapq
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable

from supercloud.wire.frames import REQUEST, Event, pack_answer

MAX_OFFENCES, MAX_QUEUED = 16, 64
Handler = Callable[[int], None]


class Loop:
    """Descriptors and timers, one thread. Each ready descriptor is served once per round.

    ``poll`` and not ``epoll``: it passes on that a sender is about to wait for the answer, so that
    the kernel keeps both ends of a call on one processor (a fourth of the time of a call).
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial, self.running = 0, True

    def watch(self, descriptor: int, handler: Handler, events: int = select.POLLIN) -> None:
        """Call ``handler(events)`` whenever one of these is the case."""
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Stop watching; to be called before the descriptor is closed."""
        if self._handlers.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call once after a delay."""
        self._serial += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._serial, action))

    def turn(self, timeout_s: float = 1.0) -> None:
        """One round: what is ready now, then what is due."""
        if self._timers:
            timeout_s = max(0.0, min(timeout_s, self._timers[0][0] - time.monotonic()))
        polled = self._poll.poll(timeout_s * 1000)
        for number, handler, events in [(n, self._handlers[n], e) for n, e in polled]:
            if self._handlers.get(number) is handler:  # not forgotten in this very round
                handler(events)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()


class Link:
    """The core's end of a domain's socket: the badge. Sends never wait.

    A domain that does not read gets no more of its requests read, and events beyond
    ``MAX_QUEUED`` are dropped and said to be. One that breaks the protocol ``MAX_OFFENCES`` times
    (garbage, wrong sizes, descriptors that nobody asked for) is given up: ``on_abuse``.
    """

    def __init__(
        self, loop: Loop, end: socket.socket, on_request: "Answer", on_abuse: Callable[[str], None]
    ) -> None:
        end.settimeout(0)
        self._loop, self._end = loop, end
        self._on_request, self._on_abuse = on_request, on_abuse
        self._queue: deque[tuple[bytes, int]] = deque()
        self._offences, self._overflowed = 0, False
        loop.watch(end.fileno(), self._ready)

    def close(self) -> None:
        """Forget the socket and what was queued on it."""
        self._loop.forget(self._end.fileno())
        self._end.close()
        while self._queue:
            _close(self._queue.popleft()[1])

    def send(self, frame: bytes, descriptor: int = -1) -> None:
        """Send an answer, with a copy of a descriptor if given; kept when the domain is slow."""
        if self._queue or not self._try(frame, descriptor):
            if not self._queue:
                self._loop.watch(self._end.fileno(), self._ready, select.POLLOUT)
            self._queue.append((frame, os.dup(descriptor) if descriptor >= 0 else -1))

    def event(self, event: Event, values: tuple[int, ...] = (), name: str = "") -> None:
        """Tell something unasked; dropped and marked so when too much is queued."""
        if len(self._queue) >= MAX_QUEUED:
            self._overflowed = True
        else:
            self.send(pack_answer(event, 0, 0, values, name.encode()))

    def offend(self, what: str) -> None:
        """Count a breach of the protocol."""
        self._offences += 1
        if self._offences == MAX_OFFENCES:
            self._on_abuse(what)

    def _ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
            return
        try:
            # without room for descriptors the kernel drops them: they never become ours
            data, _, flags, _ = self._end.recvmsg(REQUEST.size + 1)
        except BlockingIOError:
            return
        except OSError:
            data, flags, events = b"", 0, select.POLLHUP
        if not data and events & select.POLLHUP:  # closed: the domain wants no more calls
            self._loop.forget(self._end.fileno())
            return
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            self.offend("descriptors or an oversized frame")
        self._on_request(self, data)

    def _try(self, frame: bytes, descriptor: int) -> bool:
        """False when it must wait. Where an end is closed, nobody is there to be told."""
        try:
            if descriptor < 0:
                self._end.send(frame)
            else:
                socket.send_fds(self._end, [frame], [descriptor])
        except OSError as error:
            return not isinstance(error, BlockingIOError)
        return True

    def _flush(self) -> None:
        while self._queue:
            if not self._try(*self._queue[0]):
                return
            _close(self._queue.popleft()[1])
        self._loop.watch(self._end.fileno(), self._ready)
        if self._overflowed:
            self._overflowed = False
            self.event(Event.OVERFLOW)


Answer = Callable[[Link, bytes], None]


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
