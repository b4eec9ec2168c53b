"""Requests to the S3 port on loopback in the service's own name, signed by AWS Signature 4.

Source: Amazon S3 API Reference, "Authenticating Requests (AWS Signature Version 4)".
"""

import hashlib
import hmac
import http.client
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

REGION: Final = "us-east-1"


@dataclass(frozen=True, slots=True)
class Credentials:
    """An access key and its secret; never printed."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return f"Credentials({self.access_key})"


def call(
    address: tuple[str, int],
    credentials: Credentials,
    method: str,
    path: str,
    query: str = "",
    body: bytes = b"",
    *,
    timeout_s: float = 20.0,
) -> tuple[int, bytes]:
    """(status, body). ``query`` is one name without a value, or encoded and in order. OSError."""
    host = f"{address[0]}:{address[1]}"
    path = quote(path)
    signed = f"{query}=" if query and "=" not in query else query
    headers = signed_headers(host, credentials, (method, path, signed), body)
    connection = http.client.HTTPConnection(*address, timeout=timeout_s)
    try:
        connection.request(method, f"{path}?{query}" if query else path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"the S3 server: {error!r}") from error
    finally:
        connection.close()


def signed_headers(
    host: str, credentials: Credentials, request: tuple[str, str, str], body: bytes
) -> dict[str, str]:
    """The headers of a request: ``request`` is its method, encoded path and canonical query."""
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    digest = hashlib.sha256(body).hexdigest()
    scope = f"{when[:8]}/{REGION}/s3/aws4_request"
    signed = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": when}
    names = ";".join(signed)
    lines = "".join(f"{name}:{value}\n" for name, value in signed.items())
    canonical = "\n".join([*request, lines, names, digest])
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    key = b"AWS4" + credentials.secret_key.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{when}\n{scope}\n{hashed}"
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    who = f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}"
    return {**signed, "Authorization": f"{who}, SignedHeaders={names}, Signature={signature}"}
