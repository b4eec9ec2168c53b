"""What a request to the S3 port asks for, as far as it matters before weed sees it.

Everything that configures buckets, identities or the server is refused here: that is the service's
own, over ``bucket.apply`` and ``objects.credentials``. The rest is weed's to authenticate and
serve. What would be stored is put as an upper bound, so that a quota can be held hard.
Source: Amazon S3 API Reference.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote, unquote_to_bytes

from supercloud.model.errors import Denied, Invalid
from supercloud.services.objects.http import MAX_LENGTH_BYTES, Head
from supercloud.services.objects.tables import RECORD_BYTES

BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_LIST_QUERY: Final = re.compile(r"x-id|max-buckets|prefix|continuation-token|X-Amz-[A-Za-z-]+")
_METHODS: Final = frozenset(("GET", "HEAD", "PUT", "POST", "DELETE"))
_CHUNKS_PART: Final = 12  # records of chunks: at most one part in 2**12 of the content
_FRAMES_PART: Final = 6  # of chunks of 8 KiB or more, with their signatures
# names in the query of a request for an object that change no content
_NO_CONTENT: Final = frozenset(("tagging", "acl", "retention", "legal-hold"))
_OBJECT_POSTS: Final = frozenset(("uploads", "uploadId"))


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's bucket, and how many bytes it may take there (None: it writes nothing).

    Of a body in chunks ``promised_bytes`` are in that; what comes beyond is counted as it passes.
    """

    bucket: str
    charge_bytes: int | None = None
    promised_bytes: int | None = None


def classify(head: Head, stored_bytes: Callable[[bytes], int]) -> Asked:
    """What is asked; Denied, Invalid. ``stored_bytes(path)``: the size of what is to be copied."""
    if head.method not in _METHODS:
        raise Denied(f"{head.method} is not served here")
    bucket, key = _place(head.target.partition("?")[0])
    query = {name for name, _ in parse_qsl(head.target.partition("?")[2], keep_blank_values=True)}
    if not bucket:
        if head.method == "GET" and all(map(_LIST_QUERY.fullmatch, query)):
            return Asked("")
        raise Denied("only the list of buckets is served here")
    writes = (_object if key else _of_bucket)(head.method, query)
    if not writes:
        return Asked(bucket)
    content = _content_bytes(head, query, stored_bytes)
    records = 2 * len(head.raw) + (3 + key.count("/")) * RECORD_BYTES
    charge = content + (content >> _CHUNKS_PART) + records
    return Asked(bucket, charge, content if head.chunked else None)


def _place(path: str) -> tuple[str, str]:
    """(bucket, key), empty where the path ends before."""
    if not path.startswith("/") or "#" in path:
        raise Invalid("a path must begin with /")
    if path == "/":
        return "", ""
    name, _, key = path[1:].partition("/")
    if not BUCKET.fullmatch(name):
        raise Invalid(f"{name[:64]!r} is not the name of a bucket")
    if any(unquote(part) in (".", "..") for part in re.split("/|%2[fF]", key)):
        raise Invalid("a key must not have . or .. between slashes")
    return name, unquote_to_bytes(key).decode("utf-8", "surrogateescape")


def _of_bucket(method: str, query: set[str]) -> bool:
    """Whether a request for a bucket itself writes; Denied."""
    if method in ("GET", "HEAD") or (method == "POST" and "delete" in query):
        return False
    if method == "POST" and not query:
        return True  # a form with an object
    raise Denied("buckets are made and configured by the manifest", hint="supercloud up")


def _object(method: str, query: set[str]) -> bool:
    """Whether a request for an object writes; Denied."""
    if method == "POST" and not query & _OBJECT_POSTS:
        raise Denied("only multipart uploads are posted to a key")
    return method in ("PUT", "POST")


def _content_bytes(head: Head, query: set[str], stored_bytes: Callable[[bytes], int]) -> int:
    if query & _NO_CONTENT or (head.method == "POST" and query):
        return 0  # a list of parts, tags: in the record
    if source := head.fields.get("x-amz-copy-source"):
        return _copied_bytes(source, stored_bytes)
    return _promised_bytes(head) if head.chunked else head.length or 0


def _promised_bytes(head: Head) -> int:
    """Of a body in chunks: what it says to hold, and what chunks and signatures add to that."""
    text = head.fields.get("x-amz-decoded-content-length", "0")
    if not text.isascii() or not text.isdigit() or len(text) > len(str(MAX_LENGTH_BYTES)):
        raise Invalid("x-amz-decoded-content-length is no number")
    return int(text) + (int(text) >> _FRAMES_PART) + RECORD_BYTES


def _copied_bytes(source: str, stored_bytes: Callable[[bytes], int]) -> int:
    """The size of what is to be copied, however its name is read: a plus may be a space."""
    path = unquote_to_bytes(source.partition("?")[0]).lstrip(b"/")
    if {b".", b"..", b""} & {*path.split(b"/")}:
        raise Invalid("a source to copy must not have . or .. or nothing between slashes")
    return max(stored_bytes(b"/buckets/" + p) for p in (path, path.replace(b"+", b" ")))
