"""A call of the core against a raw socketpair ping of the same size; at most 2x.

The caller is a domain either way; the far end of the raw one is a plain loop that answers what it
gets, outside of the domain's groups like the core.
"""

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ab

from core_host import host

CALLS = 2000
RAW = f"""
ours = socket.socket(fileno=fds[0])
frame = bytes(200)
def raw():
    started = time.perf_counter()
    for _ in range({CALLS}):
        ours.send(frame); ours.recv(5000)
    return (time.perf_counter() - started) / {CALLS} * 1e6
def ping():
    started = time.perf_counter()
    for _ in range({CALLS}): core.ping()
    return (time.perf_counter() - started) / {CALLS} * 1e6
def bare():
    from supercloud.lower.client import Op, pack_request
    frame, s = pack_request(Op.PING, 1, ()), core._socket
    started = time.perf_counter()
    for _ in range({CALLS}):
        s.send(frame); s.recv(5000)
    return (time.perf_counter() - started) / {CALLS} * 1e6
def lookup():
    started = time.perf_counter()
    for _ in range({CALLS}): core.lookup("console")
    return (time.perf_counter() - started) / {CALLS} * 1e6
"""


def echo(end: socket.socket) -> NoReturn:
    while data := end.recv(300):
        end.send(data[:72])
    os._exit(0)


def main() -> int:
    options = ab.arguments(rounds=20)
    with host() as made:
        one = made.consoles["one"]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            echo(theirs)
        theirs.close()
        one(RAW, ours.detach())
        sides = [
            ab.Side("raw socketpair, 200 bytes there, 72 back", lambda: one("result = raw()")),
            ab.Side("core: PING, the core's own time", lambda: one("result = bare()"), at_most=2.0),
            ab.Side("core: ping() of the client", lambda: one("result = ping()")),
            ab.Side("core: lookup() of the client", lambda: one("result = lookup()")),
        ]
        return ab.run("core call", "us", sides, options)


if __name__ == "__main__":
    assert os.getuid() == 0, "needs uid 0"
    sys.exit(main())
