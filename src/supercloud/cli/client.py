"""The control plane's API over its unix socket: what it answers at once. See also ``streaming``."""

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from supercloud.cli.failure import Unavailable
from supercloud.model.errors import Permanent, SupercloudError, from_wire

SYSTEM_SOCKET = "/run/supercloud/api.sock"
TIMEOUT_S = 60.0
ANSWER_MAX_BYTES = 64 << 20


def socket_path() -> str:
    """Where the control plane listens, or would."""
    if given := os.environ.get("SUPERCLOUD_SOCKET"):
        return given
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    mine = os.path.join(runtime, "supercloud", "api.sock") if runtime else ""
    if mine and (os.path.exists(mine) or not os.path.exists(SYSTEM_SOCKET)):
        return mine
    return SYSTEM_SOCKET


def path(*parts: str, **query: Any) -> str:
    """``/v1/...`` of parts that are quoted, and of those query values that are not empty."""
    given = {key: str(value) for key, value in query.items() if value not in ("", None)}
    if _plain((*parts, *given.values())):
        quoted, encoded = "/".join(parts), "&".join(f"{k}={v}" for k, v in given.items())
    else:
        from urllib.parse import quote, urlencode  # noqa: PLC0415 - for odd names only

        quoted, encoded = "/".join(quote(part, safe="") for part in parts), urlencode(given)
    return f"/v1/{quoted}{'?' if encoded else ''}{encoded}"


def _plain(texts: Iterable[str]) -> bool:
    """Whether these are names as all ours are: nothing to quote."""
    return all(text.isascii() and text.replace("-", "").isalnum() for text in texts)


def get(path: str, *, start: bool = False) -> Any:
    """The JSON answer to a GET; raises the error that the control plane answers."""
    return call("GET", path, start=start)


def call(
    method: str,
    path: str,
    body: Any = None,
    *,
    start: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """The JSON answer. ``start``: start the control plane when it is not running."""
    if start:
        from supercloud.cli.start import ensure_running  # noqa: PLC0415 - subprocess is heavy

        ensure_running(socket_path())
    with reaching(timeout_s=timeout_s):
        status, untrusted = _exchange(method, path, body, timeout_s)
    if status >= 400:
        raise error_of(status, untrusted)
    try:
        return json.loads(untrusted)
    except ValueError:
        raise Permanent(f"{method} {path}: the control plane's answer is not JSON") from None


def _exchange(method: str, path: str, body: Any, timeout_s: float) -> tuple[int, bytes]:
    """Status and content of an answer, by HTTP/1.0: one request, one answer, and the end.

    ``http.client`` takes longer to import than all else that ``ps`` does.
    """
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode("ascii") + payload
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(socket_path())
        connection.sendall(request)
        return _parsed(_until_end(connection))


def _until_end(connection: socket.socket) -> bytes:
    answer = bytearray()
    while data := connection.recv(1 << 18):
        answer += data
        if len(answer) > ANSWER_MAX_BYTES:
            raise ConnectionError(f"an answer of more than {ANSWER_MAX_BYTES} bytes")
    return bytes(answer)


def _parsed(untrusted: bytes) -> tuple[int, bytes]:
    head, separator, content = untrusted.partition(b"\r\n\r\n")
    first, *headers = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not separator or len(words) < 2 or not first.startswith("HTTP/") or len(words[1]) != 3:
        raise ConnectionError("its answer is not HTTP" if untrusted else "it gave no answer")
    for header in headers:
        name, _, value = header.partition(":")
        if name.lower() == "content-length" and value.strip() != str(len(content)):
            raise ConnectionError("its answer was cut short")
    return int(words[1]) if words[1].isdecimal() else 500, content


def error_of(status: int, untrusted: bytes) -> SupercloudError:
    """The error that an answer of that status means."""
    try:
        wire = json.loads(untrusted)["error"]
    except (ValueError, KeyError, TypeError):
        return Permanent(f"the control plane answered with status {status}")
    return from_wire(wire)


@contextlib.contextmanager
def reaching(*, reading: bool = False, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Failures of the connection, as the user is to see them.

    While ``reading``, a broken pipe is our own output's, for reading a socket gives none.
    """
    place = socket_path()
    try:
        yield
    except (FileNotFoundError, ConnectionRefusedError):
        raise Unavailable(
            f"the control plane is not running (nothing listens on {place})",
            hint="supercloud up FILE starts it",
        ) from None
    except PermissionError:
        raise Unavailable(
            f"you may not use the control plane at {place}",
            hint="run as its user, or set SUPERCLOUD_SOCKET to your own",
        ) from None
    except TimeoutError:
        raise Unavailable(
            f"the control plane did not answer in {timeout_s:g} s", hint="see its log"
        ) from None
    except ConnectionError as error:
        if reading and isinstance(error, BrokenPipeError):
            raise
        raise Unavailable(
            f"the control plane went away: {str(error) or type(error).__name__:.200}",
            hint="run the command again; what it was doing goes on when it is back",
        ) from None
