"""The control plane's API over its unix socket, by the standard library's HTTP client."""

import contextlib
import http.client
import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from supercloud.cli.failure import Unavailable
from supercloud.model.errors import Permanent, from_wire

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
    given = {key: value for key, value in query.items() if value not in ("", None)}
    return (
        "/v1/"
        + "/".join(quote(part, safe="") for part in parts)
        + ("?" + urlencode(given) if given else "")
    )


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def get(path: str, *, start: bool = False) -> Any:
    """The JSON answer to a GET; raises the error that the control plane answers."""
    return call("GET", path, start=start)


def call(method: str, path: str, body: Any = None, *, start: bool = False) -> Any:
    """The JSON answer. ``start``: start the control plane when it is not running."""
    with answer(method, path, body, start=start) as response:
        untrusted = response.read(ANSWER_MAX_BYTES)
        if response.length:  # more was announced: read with a limit does not notice
            raise http.client.IncompleteRead(untrusted, response.length)
    try:
        return json.loads(untrusted)
    except ValueError:
        raise Permanent(f"{method} {path}: the control plane's answer is not JSON") from None


@contextlib.contextmanager
def answer(
    method: str,
    path: str,
    body: Any = None,
    *,
    start: bool = False,
    timeout_s: float | None = TIMEOUT_S,
) -> Iterator[http.client.HTTPResponse]:
    """The response, unread; no ``timeout_s``: it may be quiet for ever (what is followed)."""
    if start:
        from supercloud.cli.start import ensure_running  # noqa: PLC0415 - subprocess is heavy

        ensure_running(socket_path())
    connection = _Connection(socket_path(), timeout_s)
    try:
        with _reaching():
            response = _ask(connection, method, path, body)
        with _reaching(reading=True):
            yield response
    finally:
        connection.close()


def _ask(connection: _Connection, method: str, path: str, body: Any) -> http.client.HTTPResponse:
    payload = None if body is None else json.dumps(body).encode()
    headers = {} if payload is None else {"Content-Type": "application/json"}
    connection.request(method, path, payload, headers)
    response = connection.getresponse()
    if response.status >= 400:
        raise _error(response)
    return response


@contextlib.contextmanager
def _reaching(*, reading: bool = False) -> Iterator[None]:
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
            f"the control plane did not answer in {TIMEOUT_S:g} s", hint="see its log"
        ) from None
    except (ConnectionError, http.client.HTTPException) as error:
        if reading and isinstance(error, BrokenPipeError):
            raise
        raise Unavailable(
            f"the control plane went away: {str(error) or type(error).__name__:.200}",
            hint="run the command again; what it was doing goes on when it is back",
        ) from None


def _error(response: http.client.HTTPResponse) -> Exception:
    untrusted = response.read(1 << 20)
    try:
        wire = json.loads(untrusted)["error"]
    except (ValueError, KeyError, TypeError):
        return Permanent(f"the control plane answered {response.status} {response.reason}")
    return from_wire(wire)
