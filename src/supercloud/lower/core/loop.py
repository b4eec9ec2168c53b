"""The core's event loop, and one domain's socket on it."""

import fcntl
import select
import socket
import sys
import termios
import time
from collections.abc import Callable

from supercloud.wire.frames import REQUEST, Event, pack_answer

MAX_OFFENCES, MAX_UNREAD_BYTES = 16, 1 << 16  # bytes as the kernel counts, of some 200 KiB
Handler = Callable[[int], None]


class Loop:
    """Descriptors and timers, one thread. Each ready descriptor is served once per round.

    ``poll`` and not ``epoll``: it passes on that a sender is about to wait for the answer, so that
    the kernel keeps both ends of a call on one processor (a fourth of the time of a call).
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.running = True

    def watch(self, descriptor: int, handler: Handler) -> None:
        """Call ``handler(events)`` whenever there is something to read, or its end."""
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, select.POLLIN)

    def forget(self, descriptor: int) -> None:
        """Stop watching; to be called before the descriptor is closed."""
        if self._handlers.pop(descriptor, None):
            self._poll.unregister(descriptor)

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call once after a delay."""
        self._timers.append((time.monotonic() + delay_s, action))

    def turn(self, timeout_s: float = 1.0) -> None:
        """One round: what is ready now, then what is due."""
        until_s = min([time.monotonic() + timeout_s, *(due_s for due_s, _ in self._timers)])
        polled = self._poll.poll(max(0.0, until_s - time.monotonic()) * 1000)
        for number, handler, events in [(n, self._handlers[n], e) for n, e in polled]:
            if self._handlers.get(number) is handler:  # not forgotten in this very round
                handler(events)
        for timer in [timer for timer in self._timers if timer[0] <= time.monotonic()]:
            self._timers.remove(timer)
            timer[1]()


class Link:
    """The core's end of a domain's socket: the badge. Sends never wait.

    Events that would take the room of answers from a domain that does not read are dropped, and
    said to be. One that breaks the protocol ``MAX_OFFENCES`` times (garbage, wrong sizes,
    descriptors that nobody asked for) or does not read its answers is given up: ``on_abuse``.
    """

    def __init__(
        self, loop: Loop, end: socket.socket,
        on_request: Callable[["Link", bytes], None], on_abuse: Callable[[str], None],
    ) -> None:  # fmt: skip
        end.settimeout(0)
        self._loop, self._end = loop, end
        self._on_request, self._on_abuse = on_request, on_abuse
        self._offences, self._overflowed = 0, False
        loop.watch(end.fileno(), self._ready)

    def close(self) -> None:
        """Forget the socket."""
        self._loop.forget(self._end.fileno())
        self._end.close()

    def send(self, frame: bytes, descriptor: int = -1) -> None:
        """Send an answer, with a copy of a descriptor if given."""
        try:
            if descriptor < 0:
                self._end.send(frame)
            else:
                socket.send_fds(self._end, [frame], [descriptor])
        except OSError as error:  # else it has closed its end: nobody is there to be told
            if isinstance(error, BlockingIOError):
                self.offend("it does not read its answers", MAX_OFFENCES)

    def event(self, event: Event, values: tuple[int, ...] = (), name: str = "") -> None:
        """Tell something unasked; dropped and noted when too much is unread."""
        unread = fcntl.ioctl(self._end, termios.TIOCOUTQ, bytes(4))
        if int.from_bytes(unread, sys.byteorder) < MAX_UNREAD_BYTES:
            self.send(pack_answer(event, 0, 0, values, name.encode()))
        else:
            self._overflowed = True

    def catch_up(self) -> None:
        """Say that events were dropped, once there is room again; to be called now and then."""
        if self._overflowed:
            self._overflowed = False
            self.event(Event.OVERFLOW)

    def offend(self, what: str, count: int = 1) -> None:
        """Count breaches of the protocol; too many, and nothing more is read of the domain."""
        self._offences += count
        if self._offences >= MAX_OFFENCES:
            self._loop.forget(self._end.fileno())
            self._on_abuse(what)

    def _ready(self, events: int) -> None:
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
