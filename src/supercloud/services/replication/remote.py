"""One replica over NBD: our client's end of a connected stream, without ever blocking.

The other side is half trusted (the user's own protection service, perhaps at another provider):
answers that nobody asked for, or of the wrong form, end the connection.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from supercloud.services.replication import nbd
from supercloud.services.replication.members import Done
from supercloud.services.replication.stream import Bytes, Stream
from supercloud.wire.reactor import Reactor

_NEEDED: Final = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_ZEROES
_READ_ONLY: Final = 2
_MAX_REPLY_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class _Asked:
    done: Done
    length: int  # of the data that come with the answer
    since_s: float


class Remote:
    """Requests are queued until the other side has shown a device of ``size_bytes``."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, size_bytes: int, gone: Callable[[str], None]
    ) -> None:
        self._size_bytes, self._gone, self._reactor = size_bytes, gone, reactor
        self._asked: dict[int, _Asked] = {}
        self._cookie = 0
        self._ready, self._seen = False, 0
        self._early: list[Bytes] = []
        self._since_s = time.monotonic()
        self._stream = Stream(reactor, sock, self._ended)
        self._stream.want(nbd.GREETING.size, self._greeted)

    def send(
        self, kind: int, offset: int, length: int, data: Bytes, flags: int, done: Done
    ) -> None:
        """See ``members.Link``."""
        self._cookie += 1
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, self._cookie, offset, length)
        expected = length if kind == nbd.READ else 0
        self._asked[self._cookie] = _Asked(done, expected, time.monotonic())
        if self._ready:
            self._stream.send(head, data)
        else:
            self._early += [head, data]

    def waiting_s(self) -> float:
        """See ``members.Link``: since the oldest request that has no answer."""
        if not self._ready:
            return time.monotonic() - self._since_s
        oldest = next(iter(self._asked.values()), None)
        return time.monotonic() - oldest.since_s if oldest else 0.0

    def close(self) -> None:
        """See ``members.Link``."""
        if not self._stream.ended and self._ready:
            self._stream.send(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.DISCONNECT, 0, 0, 0))
        self._stream.close()
        self._asked.clear()

    # -- the beginning

    def _greeted(self, data: bytearray) -> None:
        magic, option_magic, flags = nbd.GREETING.unpack(data)
        if (magic, option_magic) != (nbd.MAGIC, nbd.OPTION_MAGIC) or not flags & 1:
            self._broken("no NBD server of ours")
            return
        self._stream.send(
            (nbd.FIXED_NEWSTYLE | flags & nbd.NO_ZEROES).to_bytes(4, "big"),
            nbd.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, 6),
            bytes(6),
        )
        self._stream.want(nbd.OPTION_REPLY.size, self._option_replied)

    def _option_replied(self, data: bytearray) -> None:
        magic, option, kind, length = nbd.OPTION_REPLY.unpack(data)
        if magic != nbd.OPTION_REPLY_MAGIC or option != nbd.OPT_GO or length > _MAX_REPLY_BYTES:
            self._broken("an answer of the wrong form")
        elif kind == nbd.REP_ACK and not length:
            self._agreed()
        elif kind == nbd.REP_INFO and length >= 2:
            self._stream.want(length, self._informed)
        else:
            self._broken(f"the device is refused ({kind:#x})")

    def _informed(self, data: bytearray) -> None:
        if data[:2] == b"\0\0" and len(data) == 12:
            size_bytes, flags = int.from_bytes(data[2:10], "big"), int.from_bytes(data[10:], "big")
            if size_bytes < self._size_bytes or flags & _NEEDED != _NEEDED or flags & _READ_ONLY:
                self._broken(f"a device of {size_bytes} bytes, flags {flags:#x}: will not do")
                return
            self._seen = size_bytes
        self._stream.want(nbd.OPTION_REPLY.size, self._option_replied)

    def _agreed(self) -> None:
        if not self._seen:
            self._broken("a device without a size")
            return
        self._ready = True
        early, self._early = self._early, []
        self._stream.send(*early)
        self._stream.want(nbd.REPLY.size, self._replied)

    # -- answers

    def _replied(self, data: bytearray) -> None:
        magic, error, cookie = nbd.REPLY.unpack(data)
        asked = self._asked.get(cookie)
        if magic != nbd.REPLY_MAGIC or asked is None:
            self._broken("an answer that nobody asked for")
        elif error or not asked.length:
            self._answer(cookie, error, b"")
        else:
            self._stream.want(asked.length, lambda data: self._answer(cookie, 0, data))

    def _answer(self, cookie: int, error: int, data: Bytes) -> None:
        asked = self._asked.pop(cookie)
        self._stream.want(nbd.REPLY.size, self._replied)
        asked.done(error, data)

    def _broken(self, reason: str) -> None:
        self._stream.close()
        self._reactor.after(0, lambda: self._ended(reason))

    def _ended(self, reason: str) -> None:
        self._asked.clear()
        self._gone(reason)
