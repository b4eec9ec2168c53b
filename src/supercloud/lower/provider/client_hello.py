"""The server name in a TLS ClientHello, from bytes that were only peeked at (RFC 8446, RFC 6066).

Reads nothing else and decrypts nothing: it is all that the provider's front door sees of a
connection. The bytes are anybody's.
"""

from supercloud.model.errors import Invalid

MAX_HELLO_BYTES = 16 << 10
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _HOST_NAME = 0, 0
_RECORD_HEAD, _MESSAGE_HEAD = 5, 4
_MAX_RECORD_BYTES = 1 << 14
_MAX_NAME_BYTES = 253


class Short(Exception):
    """More bytes are needed to tell."""


class _Reader:
    """Takes fields off the front of bytes; Invalid when they do not fit in."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise Invalid("a field of the ClientHello is longer than what it is in")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """A field after its length of ``size`` bytes."""
        return self.take(self.number(size))

    def __bool__(self) -> bool:
        return self._at < len(self._data)


def server_name(untrusted: bytes) -> str:
    """The host name asked for, in lower case. Short: wait for more; Invalid: not such a hello."""
    return _name_in(_message(untrusted))


def _message(untrusted: bytes) -> bytes:
    """The body of the ClientHello, put together from one or more records."""
    handshake = b""
    at = 0
    while True:
        head = untrusted[at : at + _RECORD_HEAD]
        if head[:1] not in (b"", bytes([_HANDSHAKE])) or head[1:2] not in (b"", b"\x03"):
            raise Invalid("not TLS")
        if len(head) < _RECORD_HEAD:
            return _short(untrusted)
        length = int.from_bytes(head[3:], "big")
        if not 0 < length <= _MAX_RECORD_BYTES:
            raise Invalid("a TLS record of a wrong size")
        handshake += untrusted[at + _RECORD_HEAD : at + _RECORD_HEAD + length]
        at += _RECORD_HEAD + length
        if (body := _complete(handshake)) is not None:
            return body
        if at > len(untrusted):
            return _short(untrusted)


def _complete(handshake: bytes) -> bytes | None:
    if handshake[:1] not in (b"", bytes([_CLIENT_HELLO])):
        raise Invalid("not a ClientHello")
    if len(handshake) < _MESSAGE_HEAD:
        return None
    length = int.from_bytes(handshake[1:_MESSAGE_HEAD], "big")
    if length > MAX_HELLO_BYTES:
        raise Invalid("a ClientHello too large")
    body = handshake[_MESSAGE_HEAD : _MESSAGE_HEAD + length]
    return body if len(body) == length else None


def _short(untrusted: bytes) -> bytes:
    if len(untrusted) >= MAX_HELLO_BYTES:
        raise Invalid("a ClientHello too large")
    raise Short


def _name_in(hello: bytes) -> str:
    fields = _Reader(hello)
    fields.take(2 + 32)  # legacy version, random
    fields.vector(1)  # legacy session id
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression
    extensions = _Reader(fields.vector(2)) if fields else _Reader(b"")
    while extensions:
        kind, data = extensions.number(2), extensions.vector(2)
        if kind == _SERVER_NAME:
            return _host_name(data)
    raise Invalid("no server name was asked for")


def _host_name(extension: bytes) -> str:
    names = _Reader(_Reader(extension).vector(2))
    while names:
        kind, name = names.number(1), names.vector(2)
        if kind == _HOST_NAME:
            if not 0 < len(name) <= _MAX_NAME_BYTES or not name.isascii():
                raise Invalid("a server name that is none")
            return name.decode("ascii").lower()
    raise Invalid("no host name among the server names")
