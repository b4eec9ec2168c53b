"""Objects: ours (encrypted, names too, durable, TLS, quotas) against ``weed mini`` as it comes.

One client, one connection, one request at a time; 4 KiB and 1 MiB of random bytes. ``weed mini``
acknowledges before anything is on the disk and speaks plain HTTP, so its figures are those of less.
Our clients' way in is one connection over a descriptor, with TLS and no relay in between.
"""

import contextlib
import http.client
import itertools
import os
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ab import Side, arguments, run, seconds

from supercloud.services.objects.sigv4 import Credentials, signed_headers
from support.object_store import MIB, client_of, eventually, object_store, plain_weed

BUCKET = "bench"
SIZES = {"4 KiB": 4096, "1 MiB": MIB}
EACH = {"4 KiB": 20, "1 MiB": 4}
AT_MOST = {
    ("PUT", "4 KiB"): 4.5,
    ("GET", "4 KiB"): 2.5,
    ("PUT", "1 MiB"): 4.0,
    ("GET", "1 MiB"): 6.0,
}


class Descriptor(http.client.HTTPConnection):
    """HTTP over TLS over a connected socket."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        super().__init__("objects", 443)
        self.sock = context.wrap_socket(connection, server_hostname="127.0.0.1")


class Client:
    """Signed requests over one connection."""

    def __init__(self, connection: http.client.HTTPConnection, who: Credentials) -> None:
        self.connection, self.who, self.keys = connection, who, itertools.count()

    def put(self, size: int) -> str:
        path = f"/{BUCKET}/{size}/{next(self.keys)}"
        self.request("PUT", path, os.urandom(size))
        return path

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        port = "" if self.connection.port == 443 else f":{self.connection.port}"
        name = f"{self.connection.host}{port}"
        headers = signed_headers(name, self.who, (method, path, ""), body)
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        data = answer.read()
        assert answer.status == 200, (answer.status, data)
        return data


def put(client: Client, size: int, times: int) -> Callable[[], None]:
    def action() -> None:
        for _ in range(times):
            client.put(size)

    return action


def get(client: Client, size: int, times: int) -> Callable[[], None]:
    path = client.put(size)

    def action() -> None:
        for _ in range(times):
            assert len(client.request("GET", path)) == size

    return action


def main() -> int:
    options, worst = arguments(15), 0
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="objects-")))
        (place / "ours").mkdir()
        store = stack.enter_context(object_store(place / "ours", capacity_bytes=4096 * MIB))
        endpoint, secret = stack.enter_context(plain_weed(place / "plain", 31_000))
        theirs = client_of(endpoint, secret)
        eventually(lambda: theirs.create_bucket(Bucket=BUCKET))
        eventually(lambda: theirs.put_object(Bucket=BUCKET, Key="ready", Body=b"1"))
        store.call("bucket.apply", {"name": BUCKET, "quota_bytes": 4000 * MIB})
        mine = store.credentials("bench", {BUCKET: "write"})
        context = ssl.create_default_context(cafile=str(store.identity))
        host, port = endpoint.removeprefix("http://").split(":")
        plain = http.client.HTTPConnection(host, int(port))
        sides = {
            "weed mini": Client(plain, Credentials(secret["access_key"], secret["secret_key"])),
            "ours": Client(
                Descriptor(store.connect(), context),
                Credentials(mine["access_key"], mine["secret_key"]),
            ),
        }
        for (words, size), (verb, action) in itertools.product(
            SIZES.items(), {"PUT": put, "GET": get}.items()
        ):
            times = EACH[words]
            measured = [
                Side(name, seconds(action(client, size, times))) for name, client in sides.items()
            ]
            measured[-1].at_most = AT_MOST[verb, words]
            worst = max(worst, run(f"{verb} {words}, {times} of them", "s", measured, options))
    return worst


if __name__ == "__main__":
    sys.exit(main())
