"""The provider's admin console: answers ``supercloud-host`` on the admin socket.

It has no privilege and no capability to any user's domain: it can ask the multiplexing and the
drivers, and these decide. Who may connect is decided by the mode of the socket (root of the host).
"""

import json
import logging
import os
import socket
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.lower.names import DRIVERS
from supercloud.model.errors import Invalid, NotFound, SupercloudError, to_wire
from supercloud.wire import admin as wire
from supercloud.wire.reactor import READ, WRITE

MAX_CLIENTS = 16
CLIENT_TIMEOUT_S = 60.0
ARRIVAL_S = 1.0
_TO_MULTIPLEXING = {"user.add", "user.remove", "user.list", "user.quota", "host.domains"}

log = logging.getLogger("supercloud.lower.admin")


class AdminConsole(Component):
    """Connections of the admin socket, and portals to those that do the work."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._facts = json.loads(os.environ["SUPERCLOUD_HOST"])
        self._clients = 0
        self._listener = socket.socket(fileno=core.take(core.lookup("listener").selector))
        self._listener.setblocking(False)
        self.reactor.watch(self._listener, self._accept)

    def say_ready(self) -> None:
        """Tell whoever started the host, once, that all components answer."""
        while "multiplexing" not in {entry.name for entry in self.core.entries()}:
            list(self.core.events(ARRIVAL_S))  # it makes our channels, its own as the last
        status = self.status()
        line = f"serving {status['instance']} on {status['listen']}\n"
        descriptor = self.core.take(self.core.lookup("ready").selector)
        try:
            os.write(descriptor, line.encode())
        except OSError as error:  # nobody waits any more: a restarted console
            log.info("ready: %s", error)
        finally:
            os.close(descriptor)

    def status(self) -> dict[str, Any]:
        """Facts of the host and what is in use."""
        users = self.ask("multiplexing", "user.list", {})
        return {
            **self._facts,
            "usage": self.ask("multiplexing", "host.usage", {}),
            "users": len(users),
            "drivers": [driver["driver"] for driver in self.drivers()],
        }

    def drivers(self) -> list[dict[str, Any]]:
        """What each driver says of itself."""
        return [self.ask(driver, "driver.status", {}) for driver in DRIVERS]

    def answer(self, untrusted: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        try:
            return {"r": self._call(untrusted)}
        except SupercloudError as error:
            return {"e": to_wire(error)}

    def _call(self, untrusted: dict[str, Any]) -> Any:
        method, parameters = untrusted.get("m"), untrusted.get("p") or {}
        if not isinstance(method, str) or method not in wire.METHODS:
            raise NotFound(f"no method {method!r:.80}")
        if not isinstance(parameters, dict) or not set(parameters) <= set(wire.METHODS[method]):
            raise Invalid(f"{method} takes {', '.join(wire.METHODS[method]) or 'nothing'}")
        if method in _TO_MULTIPLEXING:
            return self.ask("multiplexing", method, parameters)
        return self.status() if method == "status" else self.drivers()

    # -- connections

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.info("accept: %s", error)
            return
        if self._clients >= MAX_CLIENTS:
            sock.close()
            return
        _Client(self, sock)
        self._clients += 1

    def left(self) -> None:
        """A client is gone."""
        self._clients -= 1


class _Client:
    """One connection: reads a request, writes its answer, closes."""

    def __init__(self, console: AdminConsole, sock: socket.socket) -> None:
        self._console, self._sock = console, sock
        self._data = b""
        sock.setblocking(False)
        self._deadline = console.reactor.after(CLIENT_TIMEOUT_S, self._close)
        console.reactor.watch(sock, self._read, READ)

    def _read(self) -> None:
        try:
            more = self._sock.recv(1 << 16)
            self._data += more
            complete = wire.unpack(self._data)
            if complete is not None:
                self._data = wire.pack(self._console.answer(complete[0]))
                self._console.reactor.watch(self._sock, self._write, WRITE)
            elif not more:
                self._close()
        except BlockingIOError:
            return
        except (OSError, SupercloudError) as error:
            log.info("client: %s", error)
            self._close()

    def _write(self) -> None:
        try:
            self._data = self._data[self._sock.send(self._data) :]
        except BlockingIOError:
            return
        except OSError:
            self._data = b""
        if not self._data:
            self._close()

    def _close(self) -> None:
        self._deadline.cancel()
        self._console.reactor.forget(self._sock)
        self._sock.close()
        self._console.left()


if __name__ == "__main__":
    os.umask(0o077)
    console = AdminConsole(Core())
    console.say_ready()
    console.run()
