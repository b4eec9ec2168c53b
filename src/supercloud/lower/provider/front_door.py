"""The host's front door: accepts connections and passes each on to the user's domain by its SNI.

It peeks at the ClientHello (``MSG_PEEK``) and never takes a byte off a connection, so that the
user's domain ends the TLS on an untouched socket. Who sends nothing, too much, nonsense or the
name of nobody is disconnected.
"""

import logging
import os
import socket
import time
from dataclasses import dataclass

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.lower.provider.client_hello import MAX_HELLO_BYTES, Short, server_name
from supercloud.model.errors import Invalid, SupercloudError
from supercloud.wire import portal
from supercloud.wire.reactor import Timer

HELLO_TIMEOUT_S = 5.0
MAX_WAITING = 128
MAX_WAITING_OF_ONE_ADDRESS = 64
ACCEPTS_A_TURN = 32
USER_PREFIX = "user:"
USER_DOMAIN = ".user.supercloud.internal"
_PAUSE_S = 0.2

log = logging.getLogger("supercloud.lower.front_door")


@dataclass(slots=True, eq=False)
class Visitor:
    """A connection whose ClientHello has not come in full yet."""

    sock: socket.socket
    address: str
    deadline: Timer
    since_s: float


class FrontDoor(Component):
    """Waiting connections, and the channels to users' domains (named ``user:NAME``)."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.serve(USER_PREFIX, {})
        self._waiting: set[Visitor] = set()
        self._listener = socket.socket(fileno=core.take(core.lookup("listener").selector))
        self._listener.setblocking(False)
        self.reactor.watch(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors, or it went away at once
                log.warning("accept: %s", error)
                self.reactor.forget(self._listener)
                self.reactor.after(
                    _PAUSE_S, lambda: self.reactor.watch(self._listener, self._accept)
                )
                return
            self._welcome(sock, address[0])

    def _welcome(self, sock: socket.socket, address: str) -> None:
        if not self._has_room(address):
            sock.close()
            return
        sock.setblocking(False)
        deadline = self.reactor.after(HELLO_TIMEOUT_S, lambda: self._dismiss(visitor))
        visitor = Visitor(sock, address, deadline, time.monotonic())
        self._waiting.add(visitor)
        self.reactor.watch(sock, lambda: self._peek(visitor))

    def _has_room(self, address: str) -> bool:
        of_this = sum(visitor.address == address for visitor in self._waiting)
        return len(self._waiting) < MAX_WAITING and of_this < MAX_WAITING_OF_ONE_ADDRESS

    def _peek(self, visitor: Visitor) -> None:
        try:
            seen = visitor.sock.recv(MAX_HELLO_BYTES, socket.MSG_PEEK)
            if seen:
                self._pass_on(visitor, server_name(seen))
                return
        except BlockingIOError:
            return
        except Short:
            # readable again only once there is more, else this would spin
            visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)
            return
        except (Invalid, OSError) as error:
            log.info("%s: %s", visitor.address, error)
        self._dismiss(visitor)

    def _pass_on(self, visitor: Visitor, untrusted_name: str) -> None:
        user = untrusted_name.removesuffix(USER_DOMAIN)
        channel = self.channels.get(USER_PREFIX + user)
        if channel is None or user == untrusted_name:
            raise Invalid("nobody of that name here")
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        message = {"m": "connection", "p": {"address": visitor.address}}
        try:
            portal.send(channel, message, [visitor.sock.fileno()])
        except (BlockingIOError, SupercloudError, OSError) as error:
            raise Invalid(f"the domain of {user} does not take it: {error}") from error
        self._dismiss(visitor)

    def _dismiss(self, visitor: Visitor) -> None:
        visitor.deadline.cancel()
        self._waiting.discard(visitor)
        self.reactor.forget(visitor.sock)
        visitor.sock.close()


if __name__ == "__main__":
    os.umask(0o077)
    FrontDoor(Core()).run()
