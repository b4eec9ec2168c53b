"""Connections that a user's domain asks for: it has no network, and gets a socket instead.

The socket is handed on while it is still connecting, so that nobody waits here, and what goes over
it is TLS between two domains of the user's. Where to is the provider's policy: ``elsewhere`` is
what a platform's uplink reaches too, and not this machine's own loopback.
"""

import errno
import ipaddress
import socket
import time
from typing import Final

from supercloud.model.errors import Busy, Denied, Invalid, Temporary

POLICIES: Final = ("elsewhere", "any", "none")
BURST: Final = 64
EACH_S: Final = 0.5
METADATA: Final = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "168.63.129.16", "100.100.100.200"))
)
"""Of clouds that a provider may itself run in, beside those that are link-local."""

_UNDER_WAY: Final = (0, errno.EINPROGRESS)


def check(untrusted_address: str, policy: str) -> str:
    """The address when users' domains may dial it; Invalid, Denied."""
    try:
        found = ipaddress.ip_address(untrusted_address)
    except ValueError as error:
        raise Invalid(f"{untrusted_address!r:.80} is no IP address", where="address") from error
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        raise Denied(f"{found} is on one link only")  # nor is it an address to connect_ex
    if policy == "none":
        raise Denied("this provider lets users' domains dial nobody")
    nowhere = found.is_unspecified or found.is_multicast or found.is_link_local
    own = found.is_loopback or found.is_reserved or found in METADATA
    if nowhere or (policy != "any" and own):
        raise Denied(
            f"{found} is not to be dialled from here",
            hint="the provider's supercloud-host run --dial says what is",
        )
    return str(found)


def begin(address: str, port: int) -> socket.socket:
    """A socket that is connecting, or connected; Temporary."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    code = sock.connect_ex((address, port))
    if code not in _UNDER_WAY:
        sock.close()
        raise Temporary(f"{address}:{port} cannot be reached: {errno.errorcode.get(code, code)}")
    return sock


class Allowance:
    """``BURST`` connections at once, and one each ``EACH_S`` from then on, for each user."""

    def __init__(self) -> None:
        self._free_s: dict[str, float] = {}  # when all of a user's burst is there again

    def take(self, user: str, now_s: float | None = None) -> None:
        """One of them; Busy."""
        now_s = time.monotonic() if now_s is None else now_s
        free_s = max(self._free_s.get(user, 0.0), now_s)
        if free_s - now_s > (BURST - 1) * EACH_S:
            raise Busy(f"{user} dials too often")
        self._free_s[user] = free_s + EACH_S
