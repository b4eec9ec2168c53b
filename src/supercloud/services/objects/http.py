"""Heads of HTTP/1.1 messages, read strictly: what two readers could take for two things is refused.

Source: RFC 9112. A head is at most ``MAX_HEAD_BYTES``; line folding, a length beside chunks,
two lengths and unknown codings are refused.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from supercloud.model.errors import Invalid

MAX_HEAD_BYTES: Final = 64 << 10
BLOCK_BYTES: Final = 256 << 10
_REQUEST: Final = re.compile(rb"([A-Z]{3,10}) ([\x21-\x7e]{1,16384}) HTTP/1\.1")
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\x20-\x7e\x80-\xff]*")
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\x80-\xff\t]*)")
MAX_LENGTH_BYTES: Final = 5 << 40
_BODILESS: Final = frozenset((204, 304))


@dataclass(slots=True)
class Head:
    """Of a request (``method``, ``target``) or an answer (``status``); names in lower case."""

    raw: bytes
    method: str = ""
    target: str = ""
    status: int = 0
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        """Bytes of the body; None when it comes in chunks, or ends with the connection."""
        value = self.fields.get("content-length")
        if value is None:
            return 0 if self.method and not self.chunked else None
        if not value.isascii() or not value.isdigit() or int(value) > MAX_LENGTH_BYTES:
            raise Invalid("a content-length that is no number")
        return int(value)

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "transfer-encoding" in self.fields

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        return "close" in self.fields.get("connection", "").lower()


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head, None at the end; Invalid."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise Invalid("a head that ends early") from error
        return None
    except asyncio.LimitOverrunError as error:
        raise Invalid("a head too large") from error
    if len(raw) > MAX_HEAD_BYTES:
        raise Invalid("a head too large")
    return parse(raw)


def parse(raw: bytes) -> Head:
    """A head from its bytes, the empty line included; Invalid."""
    first, *lines = raw[:-4].split(b"\r\n")
    head = Head(raw)
    if match := _REQUEST.fullmatch(first):
        head.method, head.target = match[1].decode(), match[2].decode()
    elif match := _STATUS.fullmatch(first):
        head.status = int(match[1])
    else:
        raise Invalid("neither a request nor an answer of HTTP/1.1")
    for line in lines:
        found = _FIELD.fullmatch(line)
        if found is None:
            raise Invalid("a malformed header field")
        name, value = found[1].decode().lower(), found[2].decode("latin-1").strip()
        if name in head.fields and head.method:
            raise Invalid(f"header field {name} comes twice")
        head.fields[name] = value
    _check_framing(head)
    return head


def _check_framing(head: Head) -> None:
    if head.chunked and head.fields["transfer-encoding"].lower() != "chunked":
        raise Invalid("a transfer-encoding other than chunked")
    if head.chunked and "content-length" in head.fields:
        raise Invalid("a length beside chunks")
    _ = head.length


def has_body(head: Head, method: str) -> bool:
    """Whether an answer to a request of ``method`` has one (RFC 9112, 6.3)."""
    return method != "HEAD" and head.status >= 200 and head.status not in _BODILESS


async def body(reader: asyncio.StreamReader, head: Head) -> AsyncIterator[bytes]:
    """The body's bytes as they are on the wire, framing included; EOFError, Invalid."""
    if head.chunked:
        async for block in _chunks(reader):
            yield block
        return
    left = head.length
    while left is None or left:
        block = await reader.read(BLOCK_BYTES if left is None else min(left, BLOCK_BYTES))
        if not block:
            if left is None:
                return
            raise EOFError("a body that ends early")
        left = None if left is None else left - len(block)
        yield block


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await _line(reader)
        size_text = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,10}", size_text):
            raise Invalid("a malformed chunk")
        yield line
        left = int(size_text, 16)
        if not left:
            break
        left += 2
        while left:
            block = await reader.read(min(left, BLOCK_BYTES))
            if not block:
                raise EOFError("a chunk that ends early")
            left -= len(block)
            yield block
    total = 0
    while True:
        line = await _line(reader)  # trailers, and the empty line
        total += len(line)
        if total > MAX_HEAD_BYTES:
            raise Invalid("trailers too large")
        yield line
        if line == b"\r\n":
            return


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n")
    except asyncio.IncompleteReadError as error:
        raise EOFError("a chunk that ends early") from error
    except asyncio.LimitOverrunError as error:
        raise Invalid("a line too long") from error
