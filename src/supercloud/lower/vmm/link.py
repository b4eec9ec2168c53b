"""Process 1 of a platform's link domain: where the platform's link NIC ends.

passt, its child, makes TCP connections of the guest's frames; the guest reaches nothing but the
rendezvous and the U-Cloud's object store, on the loopback of this domain's own network. Each
connection there is passed as it is, with the port that it came to, to the user's domain over the
channel ``link``, which thereby knows whose it is.
"""

import logging
import os
import socket
from typing import Final

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.model.errors import SupercloudError
from supercloud.wire import portal
from supercloud.wire.children import Children, how_it_ended
from supercloud.wire.places import OBJECTS_LINK_PORT

GUEST_ADDRESS: Final = "169.254.77.2"
RENDEZVOUS_ADDRESS: Final = "169.254.77.1"
RENDEZVOUS_PORT: Final = 7444
PASST: Final = "/usr/bin/passt"
BACKLOG: Final = 16

log = logging.getLogger("supercloud.lower.vmm.link")


def passt_command(descriptor: int) -> list[str]:
    """Command line of passt; the rendezvous' address is the loopback of this network."""
    return [
        *(PASST, "--foreground", "--quiet", "--ipv4-only", "--fd", str(descriptor)),
        *("--address", GUEST_ADDRESS, "--netmask", "30", "--gateway", RENDEZVOUS_ADDRESS),
        *("--map-host-loopback", RENDEZVOUS_ADDRESS),
        *("--no-dhcp", "--no-ra", "--no-ndp", "--no-dhcpv6", "--no-icmp", "--no-udp"),
        *("--tcp-ports", "none", "--dns", "none", "--search", "none"),
    ]


class Link(Component):
    """The listener, passt, and the channel to the user's domain."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.serve("link", {})
        for port in (RENDEZVOUS_PORT, OBJECTS_LINK_PORT):
            self._listen(port)
        guest = core.take(core.lookup("guest").selector)
        try:
            Children(self.reactor).start(passt_command(guest), [guest], self._passt_ended)
        finally:
            os.close(guest)

    def _listen(self, port: int) -> None:
        listener = socket.create_server(("127.0.0.1", port), backlog=BACKLOG)
        listener.setblocking(False)
        self.reactor.watch(listener, lambda: self._accept(listener, port))

    def _accept(self, listener: socket.socket, port: int) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            log.warning("accept: %s", error)
            return
        with sock:
            channel = self.channels.get("link")
            if channel is None:
                return  # the user's domain is just being started again: the agent dials again
            try:
                portal.send(channel, {"m": "connection", "p": {"port": port}}, [sock.fileno()])
            except (OSError, SupercloudError) as error:
                log.warning("a connection was dropped: %s", error)

    def _passt_ended(self, status: int) -> None:
        log.info("passt ended: %s", how_it_ended(status))
        self.reactor.stop()


if __name__ == "__main__":
    os.umask(0o077)
    Link(Core()).run()
