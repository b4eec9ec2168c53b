"""Objects of a bucket: a thin S3 client, Signature Version 4 over http.client.

Only what Backend needs: PUT with ``If-None-Match: *``, GET of a range, ListObjectsV2, DELETE; paths
in path style. A request that fails on the way is tried again a few times; a PUT that found its key
taken on a later try looks whether it was itself.

Source: AWS General Reference, "Signature Version 4 signing process"; S3 API reference.
"""

import contextlib
import hashlib
import hmac
import html
import http.client
import queue
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from supercloud.model.errors import (
    Denied,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    Permanent,
    Temporary,
)
from supercloud.services.checkpoint.backend import Item, checked, checked_prefix

TRIES: Final = 5
_FIRST_DELAY_S: Final = 0.1
_MAX_LISTING_BYTES: Final = 8 << 20
_MAX_ERROR_BYTES: Final = 64 << 10
_LISTED: Final = re.compile(r"<Contents>(.*?)</Contents>", re.DOTALL)
_CONDITION_FAILED, _RANGE_BEYOND = 412, 416
_AGAIN: Final = frozenset({408, 409, 429, 500, 502, 503, 504})  # 409: two puts at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Where and as whom. ``context`` verifies the server of an https endpoint."""

    endpoint: str
    name: str
    access_key: str
    secret_key: str = field(repr=False)
    prefix: str = ""
    region: str = "us-east-1"
    context: ssl.SSLContext | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said."""

    status: int
    body: bytes


class S3:
    """The objects of one bucket below one prefix.

    ``dial`` makes a connected socket in place of one to the endpoint (through another domain, say).
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        dial: Callable[[], socket.socket] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bucket, self._dial, self._sleep = bucket, dial, sleep
        parts = urllib.parse.urlsplit(bucket.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise Invalid(f"{bucket.endpoint!r:.200} is not http(s)://host[:port]")
        self._secure, self._host = parts.scheme == "https", parts.netloc
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def close(self) -> None:
        """Close the connections that are kept."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def put(self, key: str, data: bytes | bytearray) -> None:
        """As Backend."""
        headers = {"if-none-match": "*", "content-type": "application/octet-stream"}
        answer, tries = self._request("PUT", self._key(key), body=data, headers=headers)
        if answer.status == _CONDITION_FAILED:
            if tries == 1 or self.get(key) != data:
                raise Exists(f"{key} is there already")
        else:
            _expect(answer, 200)

    def get(self, key: str, offset: int = 0, size: int | None = None) -> bytes:
        """As Backend."""
        if size == 0:
            return b""
        headers = {}
        if offset or size is not None:
            end = "" if size is None else offset + size - 1
            headers["range"] = f"bytes={offset}-{end}"
        most = size if size is not None else 1 << 40
        answer, _ = self._request("GET", self._key(key), headers=headers, most=most)
        if answer.status == _RANGE_BEYOND:
            return b""
        if answer.status == 200 and headers:  # a server that ignores ranges
            return answer.body[offset : offset + most]
        _expect(answer, 200, 206)
        return answer.body

    def list(self, prefix: str) -> Iterator[Item]:
        """As Backend: pages of a thousand, each after the last key of the one before."""
        query = {"list-type": "2", "prefix": self._bucket.prefix + checked_prefix(prefix)}
        while True:
            answer, _ = self._request("GET", "", query=query, most=_MAX_LISTING_BYTES)
            _expect(answer, 200)
            text = answer.body.decode("utf-8", "replace")
            items = [self._item(found) for found in _LISTED.findall(text)]
            yield from sorted(items, key=lambda item: item.key)
            if not items or _tag(text, "IsTruncated") != "true":
                return
            query["start-after"] = self._bucket.prefix + max(item.key for item in items)

    def delete(self, key: str) -> None:
        """As Backend."""
        answer, _ = self._request("DELETE", self._key(key))
        _expect(answer, 200, 204, 404)

    def _key(self, key: str) -> str:
        return self._bucket.prefix + checked(key)

    def _item(self, untrusted: str) -> Item:
        key, size = _tag(untrusted, "Key"), _tag(untrusted, "Size")
        if not key.startswith(self._bucket.prefix) or not size.isdecimal() or len(size) > 15:
            raise Permanent("the object service's listing makes no sense")
        return Item(checked(key[len(self._bucket.prefix) :]), int(size))

    def _request(
        self,
        method: str,
        key: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | bytearray = b"",
        most: int = _MAX_ERROR_BYTES,
    ) -> tuple[Answer, int]:
        """The answer, and how many tries it took."""
        path = f"/{self._bucket.name}/{key}" if key else f"/{self._bucket.name}"
        path = urllib.parse.quote(path, safe="/-_.~")
        digest = hashlib.sha256(body).hexdigest()
        reason = ""
        for tries in range(1, TRIES + 1):
            signed = signature(
                self._bucket, method, self._host, path, query or {}, headers or {}, digest
            )
            target = f"{path}?{_canonical_query(query)}" if query else path
            try:
                answer = self._once(method, target, signed, body, most)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if answer.status not in _AGAIN:
                    return answer, tries
                reason = f"status {answer.status}"
            if tries < TRIES:
                self._sleep(_FIRST_DELAY_S * 2 ** (tries - 1))
        raise Temporary(f"the object service at {self._host}: {reason}", delay_s=5.0)

    def _once(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | bytearray,
        most: int,
    ) -> Answer:
        connection = self._connection()
        try:
            connection.request(method, target, body or None, dict(headers))
            response = connection.getresponse()
            data = response.read(max(most, _MAX_ERROR_BYTES) + 1)
            if len(data) > max(most, _MAX_ERROR_BYTES):
                raise http.client.HTTPException("an answer longer than was asked for")
        except BaseException:
            connection.close()
            raise
        self._idle.put(connection)
        return Answer(response.status, data)

    def _connection(self) -> http.client.HTTPConnection:
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        connection = self._new_connection()
        if self._dial is not None:
            connection.auto_open = 0  # it would not be us who dials
            connection.sock = self._dial()
            connection.sock.settimeout(self._bucket.timeout_s)
        return connection

    def _new_connection(self) -> http.client.HTTPConnection:
        timeout_s = self._bucket.timeout_s
        if self._secure and self._dial is None:
            context = self._bucket.context or ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, timeout=timeout_s, context=context)
        return http.client.HTTPConnection(self._host, timeout=timeout_s)


def signature(
    bucket: Bucket,
    method: str,
    host: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    digest: str,
    *,
    now_s: float | None = None,
) -> dict[str, str]:
    """All headers of a request, signed; ``digest`` is the SHA-256 of its body in hex."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    full = {**headers, "host": host, "x-amz-date": stamp, "x-amz-content-sha256": digest}
    names = ";".join(sorted(full))
    canonical = "\n".join(
        [
            method,
            path,
            _canonical_query(query),
            *(f"{name}:{full[name].strip()}" for name in sorted(full)),
            "",
            names,
            digest,
        ]
    )
    scope = f"{stamp[:8]}/{bucket.region}/s3/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashed}"
    key = f"AWS4{bucket.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    value = hmac.new(key, text.encode(), "sha256").hexdigest()
    full["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={bucket.access_key}/{scope}, "
        f"SignedHeaders={names}, Signature={value}"
    )
    return full


def _canonical_query(query: Mapping[str, str] | None) -> str:
    pairs = sorted((query or {}).items())
    return urllib.parse.urlencode(pairs, quote_via=urllib.parse.quote, safe="-_.~")


def _tag(untrusted: str, name: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", untrusted)
    return html.unescape(found[1]) if found else ""


def _expect(answer: Answer, *statuses: int) -> None:
    if answer.status in statuses:
        return
    code = _tag(answer.body.decode("utf-8", "replace"), "Code")[:80]
    text = f"the object service answered {answer.status} {code}".strip()
    if answer.status == 404 and code != "NoSuchBucket":
        raise NotFound(text)
    if code == "QuotaExceeded":
        raise NoResources(
            "the checkpoints' bucket is full",
            hint="give it more room (checkpoint: capacity, in the manifest), or keep fewer of them",
        )
    if answer.status in (401, 403):
        raise Denied(text, hint="check the credentials of the checkpoints' bucket")
    raise Permanent(text)
