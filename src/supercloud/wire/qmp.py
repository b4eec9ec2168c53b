"""QEMU's machine protocol over a stream socket: commands with callbacks, and events."""

import json
import logging
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from supercloud.model.errors import Permanent, Temporary
from supercloud.wire.reactor import Reactor

MAX_LINE_BYTES = 4 << 20
_CHUNK_BYTES = 1 << 16

log = logging.getLogger("supercloud.wire.qmp")

Answered = Callable[[dict[str, Any]], None]


class Refused(Permanent):
    """QEMU answered with an error; the message is its description."""


class Gone(Temporary):
    """The connection has ended."""


class Qmp:
    """One monitor connection. ``on_event`` gets (name, data); ``on_closed`` comes once."""

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        on_event: Callable[[str, dict[str, Any]], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._reactor, self._sock = reactor, sock
        self._on_event, self._on_closed = on_event, on_closed
        self._data = b""
        self._last_id = 0
        self._waiting: dict[int, Answered] = {}
        self.is_open = True
        self.event_s = 0.0  # when what is told as an event was, by QEMU's clock
        sock.setblocking(False)
        reactor.watch(sock, self._read)

    @property
    def is_behind(self) -> bool:
        """Whether something that was asked is not answered yet."""
        return bool(self._waiting)

    def command(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        answered: Answered = lambda _: None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a command; ``answered`` gets the whole answer (``return`` or ``error``).

        Commands are small and few: one that does not fit in the socket means that QEMU does not
        read, and is dropped, for the watchdog to notice.
        """
        self._last_id += 1
        line = json.dumps({"execute": name, "id": self._last_id, "arguments": arguments or {}})
        self._waiting[self._last_id] = answered
        try:
            socket.send_fds(self._sock, [line.encode() + b"\n"], descriptors)
        except OSError as error:
            log.warning("%s could not be sent: %s", name, error)

    def ask(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        *,
        descriptors: Sequence[int] = (),
        timeout_s: float = 10.0,
    ) -> Any:
        """Send a command and wait for its result. Events that come meanwhile go to ``on_event``.

        Raises Refused (QEMU's words), Gone, and Temporary when there is no answer in time.
        """
        answers: list[dict[str, Any]] = []
        self.command(name, arguments, answers.append, descriptors)
        if not self.wait(lambda: bool(answers), timeout_s):
            raise Temporary(f"no answer to {name} within {timeout_s:g} s")
        if "error" in answers[0]:
            raise Refused(str((answers[0]["error"] or {}).get("desc", "no reason given")))
        return answers[0].get("return")

    def wait(self, until: Callable[[], bool], timeout_s: float) -> bool:
        """Read until something is so; False when the time is over first. Raises Gone."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            if not self.is_open:
                raise Gone("it has ended")
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            if select.select([self._sock], [], [], left_s)[0]:
                self._read()
        return True

    def close(self) -> None:
        """Close; ``on_closed`` is called."""
        if self.is_open:
            self.is_open = False
            self._reactor.forget(self._sock)
            self._sock.close()
            self._on_closed()

    def _read(self) -> None:
        try:
            more = self._sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        self._data += more
        *lines, self._data = self._data.split(b"\n")
        for line in lines:
            if line.strip():
                self._take(line)
        if not more or len(self._data) > MAX_LINE_BYTES:
            self.close()

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            log.warning("QEMU sent what is not JSON")
            return
        if not isinstance(message, dict):
            return
        if "QMP" in message:
            self.command("qmp_capabilities", answered=lambda _: self._on_event("GREETING", {}))
        elif "event" in message:
            self.event_s = _seconds(message.get("timestamp"))
            self._on_event(str(message["event"]), message.get("data") or {})
        else:
            answered = self._waiting.pop(message.get("id", 0), None)
            if answered is not None:
                answered(message)


def _seconds(timestamp: Any) -> float:
    """Of an event; now, if it does not say."""
    try:
        return float(timestamp["seconds"]) + float(timestamp["microseconds"]) / 1e6
    except (TypeError, KeyError, ValueError):
        return time.time()
