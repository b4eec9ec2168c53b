"""The volume as an NBD server, for one connection of whoever uses it.

Half trusted: the user's own block service. What breaks the protocol's bounds ends the connection;
what asks for too much at once is not read on until it has had answers.
"""

import errno
import socket
from collections.abc import Callable
from typing import Final, Protocol

from supercloud.services.replication import nbd
from supercloud.services.replication.members import Done
from supercloud.services.replication.stream import Bytes, Stream
from supercloud.wire.reactor import Reactor

MOST_REQUESTS: Final = 128
MOST_BYTES: Final = 8 << 20
_FLAGS: Final = (
    nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.SEND_TRIM | nbd.SEND_ZEROES | nbd.MULTI
)
_RANGED: Final = (nbd.READ, nbd.WRITE, nbd.TRIM, nbd.ZEROES)


class Volume(Protocol):
    """What requests go to."""

    size_bytes: int

    def submit(
        self, kind: int, offset: int, length: int, data: Bytes, flags: int, done: Done
    ) -> None:
        """Serve it; ``done`` may never be called when nothing may be answered any more."""


class Front:
    """One connection. ``gone`` is called when the other side has ended it."""

    def __init__(
        self, reactor: Reactor, sock: socket.socket, volume: Volume, gone: Callable[[], None]
    ) -> None:
        self._volume, self._gone = volume, gone
        self._requests = self._bytes = self._options = 0
        self._zeroes = True
        self._stream = Stream(reactor, sock, lambda _why: gone())
        greeting = (nbd.MAGIC, nbd.OPTION_MAGIC, nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
        self._stream.send(nbd.GREETING.pack(*greeting))
        self._stream.want(4, self._flagged)

    def close(self) -> None:
        """End it; requests that are under way get no answer."""
        self._stream.close()

    # -- options

    def _flagged(self, data: bytearray) -> None:
        flags = int.from_bytes(data, "big")
        if not flags & nbd.FIXED_NEWSTYLE or flags > 3:
            self._broken()
            return
        self._zeroes = not flags & nbd.NO_ZEROES
        self._stream.want(nbd.OPTION.size, self._option)

    def _option(self, data: bytearray) -> None:
        magic, option, length = nbd.OPTION.unpack(data)
        self._options += 1
        if (
            magic != nbd.OPTION_MAGIC
            or length > nbd.MAX_OPTION_BYTES
            or self._options > nbd.MAX_OPTIONS
        ):
            self._broken()
        elif length:
            self._stream.want(length, lambda more: self._served(option, more))
        else:
            self._served(option, bytearray())

    def _served(self, option: int, data: bytearray) -> None:
        if option == nbd.OPT_EXPORT_NAME:
            size = self._volume.size_bytes.to_bytes(8, "big") + _FLAGS.to_bytes(2, "big")
            self._stream.send(size, bytes(124 if self._zeroes else 0))
            self._stream.want(nbd.REQUEST.size, self._request)
            return
        self._stream.want(nbd.OPTION.size, self._option)
        if option == nbd.OPT_ABORT:
            self._reply(option, nbd.REP_ACK)
            self._broken()
        elif option == nbd.OPT_LIST and not data:
            self._reply(option, nbd.REP_SERVER, bytes(4))
            self._reply(option, nbd.REP_ACK)
        elif option in (nbd.OPT_INFO, nbd.OPT_GO) and _sound(data):
            self._inform(option)
        elif option in (nbd.OPT_LIST, nbd.OPT_INFO, nbd.OPT_GO):
            self._reply(option, nbd.REP_INVALID)
        else:
            self._reply(option, nbd.REP_UNSUPPORTED)

    def _inform(self, option: int) -> None:
        size, most = self._volume.size_bytes, nbd.MAX_PAYLOAD_BYTES
        flags = _FLAGS.to_bytes(2, "big")
        self._reply(option, nbd.REP_INFO, b"\0\0" + size.to_bytes(8, "big") + flags)
        blocks = b"".join(n.to_bytes(4, "big") for n in (1, nbd.BLOCK_BYTES, most))
        self._reply(option, nbd.REP_INFO, nbd.INFO_BLOCK_SIZE.to_bytes(2, "big") + blocks)
        self._reply(option, nbd.REP_ACK)
        if option == nbd.OPT_GO:
            self._stream.want(nbd.REQUEST.size, self._request)

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        head = nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data))
        self._stream.send(head, data)

    # -- requests

    def _request(self, head: bytearray) -> None:
        magic, flags, kind, cookie, offset, length = nbd.REQUEST.unpack(head)
        payload = length if kind == nbd.WRITE else 0
        if magic != nbd.REQUEST_MAGIC or payload > nbd.MAX_PAYLOAD_BYTES or kind == nbd.DISCONNECT:
            self._broken()
        elif payload:
            self._stream.want(
                length, lambda data: self._serve(flags, kind, cookie, offset, length, data)
            )
        else:
            self._serve(flags, kind, cookie, offset, length, b"")

    def _serve(
        self, flags: int, kind: int, cookie: int, offset: int, length: int, data: Bytes
    ) -> None:
        self._stream.want(nbd.REQUEST.size, self._request)
        error = self._refusal(kind, offset, length)
        if error:
            self._answer(cookie, error, b"")
            return
        weight = length if kind in (nbd.READ, nbd.WRITE) else 0
        self._account(1, weight)

        def done(error: int, read: Bytes) -> None:
            self._account(-1, -weight)
            self._answer(cookie, error, read)

        if kind == nbd.FLUSH:
            offset = length = 0
        self._volume.submit(kind, offset, length, data, flags & nbd.FUA, done)

    def _refusal(self, kind: int, offset: int, length: int) -> int:
        if kind not in (*_RANGED, nbd.FLUSH):
            return errno.EINVAL
        if kind in _RANGED and (not length or offset + length > self._volume.size_bytes):
            return errno.ENOSPC if kind in (nbd.WRITE, nbd.ZEROES) and length else errno.EINVAL
        return errno.EOVERFLOW if kind == nbd.READ and length > nbd.MAX_PAYLOAD_BYTES else 0

    def _answer(self, cookie: int, error: int, data: Bytes) -> None:
        code = error if not error or error in nbd.ERRORS else errno.EIO
        self._stream.send(nbd.REPLY.pack(nbd.REPLY_MAGIC, code, cookie), b"" if error else data)

    def _account(self, requests: int, weight: int) -> None:
        self._requests += requests
        self._bytes += weight
        self._stream.pause(self._requests >= MOST_REQUESTS or self._bytes >= MOST_BYTES)

    def _broken(self) -> None:
        if not self._stream.ended:
            self._stream.close()
            self._gone()


def _sound(data: bytearray) -> bool:
    """Whether that is the data of INFO or GO: a name, a count of wishes and the wishes."""
    if len(data) < 6:
        return False
    name = int.from_bytes(data[:4], "big")
    wishes = int.from_bytes(data[4 + name : 6 + name], "big")
    return len(data) == 6 + name + 2 * wishes
