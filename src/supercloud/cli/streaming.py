"""The API's answers that keep coming, by the standard library's HTTP client."""

import contextlib
import http.client
import socket
from collections.abc import Iterator

from supercloud.cli.client import error_of, reaching, socket_path

ERROR_MAX_BYTES = 1 << 20


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


@contextlib.contextmanager
def stream(path: str, *, timeout_s: float | None) -> Iterator[http.client.HTTPResponse]:
    """What a GET answers, to be read as it comes; ``timeout_s`` None: it may be quiet for ever."""
    connection = _Connection(socket_path(), timeout_s)
    try:
        with reaching(), _as_connection_errors():
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status >= 400:
                raise error_of(response.status, response.read(ERROR_MAX_BYTES))
        with reaching(reading=True), _as_connection_errors():
            yield response
    finally:
        connection.close()


@contextlib.contextmanager
def _as_connection_errors() -> Iterator[None]:
    try:
        yield
    except http.client.HTTPException as error:
        raise ConnectionError(
            f"its answer is not right: {error or type(error).__name__}"
        ) from error
