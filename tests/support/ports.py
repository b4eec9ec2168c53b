"""Numbers of TCP ports of 127.0.0.1 that are free, and stay so until they are listened on.

They are below those that the kernel gives to who connects, and beside those of object stores. Each
process of pytest has numbers of its own, and gives them in turn.
"""

import itertools
import os
import socket

FIRST_PORT, PORTS = 10_000, 1_300
FIRST_OF_HOSTS, PORTS_OF_HOSTS = 24_000, 2_304
_WORKERS = ("gw0", "gw1")  # whoever else there is shares what is left, from a place by its pid
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
_index = _WORKERS.index(_worker) if _worker in _WORKERS else len(_WORKERS)
_begin = 0 if _worker in _WORKERS else os.getpid() * 37 % PORTS
_numbers = itertools.cycle([*range(_begin, PORTS), *range(_begin)])


def free_port() -> int:
    """A port that nobody listens on."""
    for number in itertools.islice(_numbers, PORTS):
        port = FIRST_PORT + _index * PORTS + number
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no port of this process's is free")


def host_ports(number: int, count: int) -> range:
    """As many ports for a host's platforms; ``number`` tells this process's hosts apart."""
    within = (os.getpid() * 4 + number) * count % PORTS_OF_HOSTS
    first = FIRST_OF_HOSTS + _index * PORTS_OF_HOSTS + within
    return range(first, first + count)
