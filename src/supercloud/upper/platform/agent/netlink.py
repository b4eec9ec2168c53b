"""The part of rtnetlink that the agent needs: links, addresses, routes.

Talking to the kernel directly costs well under a millisecond a request; under emulation every
``ip`` process costs 50 to 150. Layouts are of linux/rtnetlink.h, if_link.h and veth.h.
"""

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from typing import Final, Self

from supercloud.model.records import dataclass

_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _GETADDR, _DELADDR, _NEWROUTE = 20, 22, 21, 24
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE, _REPLACE = 1, 4, 0x300, 0x200, 0x400, 0x100
_ERROR, _DONE = 2, 3
_UP: Final = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_NET_NS_FD, _IFLA_EXT_MASK = 28, 29
_WITHOUT_COUNTERS: Final = struct.pack("=I", 1 << 3)  # RTEXT_FILTER_SKIP_STATS
_RECEIVE_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Link:
    """One network device."""

    index: int
    name: str
    mac: str
    up: bool


def attribute(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded to four bytes."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def attributes(untrusted: bytes) -> dict[int, bytes]:
    """Attributes by type; nesting and byte-order flags are dropped."""
    found, at = {}, 0
    while at + 4 <= len(untrusted):
        length, kind = struct.unpack_from("=HH", untrusted, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = untrusted[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


_ANY_LINK: Final = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _WITHOUT_COUNTERS)


def mac_bytes(mac: str) -> bytes:
    """Six bytes of ``02:5c:...``."""
    return bytes.fromhex(mac.replace(":", ""))


class Netlink:
    """A route socket. It belongs to the network namespace that it was opened in, wherever used."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _talk(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        self._sequence += 1
        flags |= _REQUEST | (0 if flags & _DUMP == _DUMP else _ACK)
        head = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.send(head + body)
        answers: list[bytes] = []
        while True:
            data, at = self._socket.recv(_RECEIVE_BYTES), 0
            while at + _HEADER.size <= len(data):
                length, what, _, sequence, _ = _HEADER.unpack_from(data, at)
                payload = data[at + _HEADER.size : at + length]
                at += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if what == _ERROR:
                    number = -int(struct.unpack_from("=i", payload)[0])
                    if number:
                        raise OSError(number, f"netlink {kind}: {os.strerror(number)}")
                    return answers
                if what == _DONE:
                    return answers
                answers.append(payload)

    # -- links

    def links(self) -> list[Link]:
        """All devices of the namespace."""
        return [_link(payload) for payload in self._talk(_GETLINK, _DUMP, _ANY_LINK)]

    def find(self, name: str) -> Link | None:
        """The device of that name."""
        try:
            found = self._talk(_GETLINK, 0, _ANY_LINK + attribute(_IFLA_IFNAME, _text(name)))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        return _link(found[0])

    def add_bridge(self, name: str) -> None:
        """Make a bridge that forwards at once (no spanning tree)."""
        forward_delay = attribute(1, struct.pack("=I", 0))
        info = attribute(1, b"bridge") + attribute(2, forward_delay)
        body = _LINK.pack(0, 0, 0, _UP, _UP) + attribute(_IFLA_IFNAME, _text(name))
        self._talk(_NEWLINK, _CREATE | _EXCL, body + attribute(_IFLA_LINKINFO, info))

    def add_veth(self, name: str, *, master: int, peer: str, peer_mac: str, namespace: int) -> None:
        """Make a pair: ``name`` here, up, in the bridge ``master``; ``peer`` in ``namespace``."""
        far = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _text(peer))
        far += attribute(_IFLA_ADDRESS, mac_bytes(peer_mac))
        far += attribute(_IFLA_NET_NS_FD, struct.pack("=I", namespace))
        info = attribute(1, b"veth") + attribute(2, attribute(1, far))
        body = _LINK.pack(0, 0, 0, _UP, _UP) + attribute(_IFLA_IFNAME, _text(name))
        body += attribute(_IFLA_MASTER, struct.pack("=I", master))
        self._talk(_NEWLINK, _CREATE | _EXCL, body + attribute(_IFLA_LINKINFO, info))

    def set_up(self, index: int, *, master: int = 0, mtu: int = 0) -> None:
        """Bring a device up, and into a bridge."""
        body = _LINK.pack(0, 0, index, _UP, _UP)
        if master:
            body += attribute(_IFLA_MASTER, struct.pack("=I", master))
        if mtu:
            body += attribute(_IFLA_MTU, struct.pack("=I", mtu))
        self._talk(_NEWLINK, 0, body)

    def set_mac(self, index: int, mac: str) -> None:
        """Give a device another hardware address."""
        body = _LINK.pack(0, 0, index, 0, 0) + attribute(_IFLA_ADDRESS, mac_bytes(mac))
        self._talk(_NEWLINK, 0, body)

    def delete(self, name: str) -> None:
        """Remove a device; nothing happens when it is not there."""
        try:
            body = _LINK.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _text(name))
            self._talk(_DELLINK, 0, body)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    # -- addresses and routes

    def set_address(self, index: int, interface: str) -> None:
        """Make ``interface`` (address/prefix length) the only IPv4 address of the device."""
        self.set_addresses(index, [interface])

    def set_addresses(self, index: int, interfaces: Iterable[str]) -> None:
        """Make these (address/prefix length) the IPv4 addresses of the device, and no others."""
        wanted = {str(ipaddress.IPv4Interface(interface)) for interface in interfaces}
        present = set(self._addresses(index))
        for other in sorted(present - wanted):
            self._talk(_DELADDR, 0, _address_body(index, ipaddress.IPv4Interface(other)))
        for new in sorted(wanted - present):
            self._talk(
                _NEWADDR, _CREATE | _REPLACE, _address_body(index, ipaddress.IPv4Interface(new))
            )

    def _addresses(self, index: int) -> list[str]:
        found = []
        for payload in self._talk(_GETADDR, _DUMP, _ADDRESS.pack(socket.AF_INET, 0, 0, 0, 0)):
            _, prefix, _, _, of = _ADDRESS.unpack_from(payload)
            local = attributes(payload[_ADDRESS.size :]).get(2, b"")
            if of == index and len(local) == 4:
                found.append(f"{socket.inet_ntoa(local)}/{prefix}")
        return found

    def set_default_route(self, index: int, gateway: str) -> None:
        """Replace the default route (protocol static, scope universe, table main)."""
        head = _ROUTE.pack(socket.AF_INET, 0, 0, 0, 254, 4, 0, 1, 0)
        body = attribute(5, socket.inet_aton(gateway)) + attribute(4, struct.pack("=I", index))
        self._talk(_NEWROUTE, _CREATE | _REPLACE, head + body)


def _link(payload: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(payload)
    values = attributes(payload[_LINK.size :])
    name = values.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
    return Link(index, name, values.get(_IFLA_ADDRESS, b"").hex(":"), bool(flags & _UP))


def _address_body(index: int, interface: ipaddress.IPv4Interface) -> bytes:
    head = _ADDRESS.pack(socket.AF_INET, interface.network.prefixlen, 0, 0, index)
    packed = interface.ip.packed
    body = head + attribute(2, packed) + attribute(1, packed)
    return body + attribute(4, interface.network.broadcast_address.packed)
