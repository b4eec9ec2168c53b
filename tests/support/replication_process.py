"""The replication service in a process of its own, on a channel that is descriptor 3."""

import socket
from collections.abc import Mapping
from typing import Any

from supercloud.services.replication.service import make
from supercloud.wire import portal
from supercloud.wire.reactor import Reactor


def main() -> None:
    channel = socket.socket(fileno=3)
    reactor = Reactor()

    def tell(method: str, parameters: Mapping[str, Any]) -> None:
        portal.send(channel, {"m": method, "p": dict(parameters)})

    service = make(reactor, tell)

    def serve() -> None:
        message = portal.receive(channel)
        if message is None:
            reactor.stop()
        else:
            portal.answer(channel, "owner", message, service.handlers())

    reactor.watch(channel, serve)
    reactor.run()


if __name__ == "__main__":
    main()
