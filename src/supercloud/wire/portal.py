"""Requests and answers between two domains: one SEQPACKET message each, JSON, with descriptors.

A request is ``{"i": id, "m": method, "p": parameters}``, its answer ``{"i": id, "r": result}`` or
``{"i": id, "e": error}``; a request without an id is a notification and gets no answer. A message
has at most ``MAX_MESSAGE_BYTES`` and ``MAX_DESCRIPTORS``. What the other side sent is untrusted:
descriptors that a method did not ask for are closed.
"""

import contextlib
import json
import logging
import os
import re
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from supercloud.model.errors import Invalid, NotFound, SupercloudError, Temporary
from supercloud.model.errors import from_wire as error_from_wire
from supercloud.model.errors import to_wire as error_to_wire
from supercloud.model.events import event_id

MAX_MESSAGE_BYTES = 96 << 10
MAX_DESCRIPTORS = 16
CALL_TIMEOUT_S = 30.0

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

log = logging.getLogger("supercloud.wire.portal")


class Closed(Temporary):
    """The other domain is gone, or the channel was made anew."""


@dataclass(slots=True)
class Message:
    """One message as it came; ``descriptors`` belong to whoever handles it."""

    untrusted: dict[str, Any]
    descriptors: list[int]

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.descriptors:
            os.close(self.descriptors.pop())


@dataclass(slots=True)
class Request:
    """What a handler gets. ``untrusted`` are the parameters; take descriptors with ``take``."""

    peer: str
    method: str
    untrusted: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)

    def text(self, name: str, *, most: int = 4096) -> str:
        """A text parameter of at most ``most`` characters; Invalid."""
        value = self.untrusted.get(name)
        if not isinstance(value, str) or len(value) > most:
            raise Invalid(f"{name} must be a text of at most {most} characters", where=name)
        return value

    def number(self, name: str, least: int = 0, most: int = 1 << 62) -> int:
        """A whole number within bounds; Invalid."""
        value = self.untrusted.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Invalid(f"{name} must be a number {least}..{most}", where=name)
        return value

    def name(self, name: str) -> str:
        """An RFC 1123 label; Invalid."""
        value = self.text(name, most=63)
        if not _LABEL.fullmatch(value):
            raise Invalid(f"{value!r} is not a name (a-z, 0-9, -; at most 63)", where=name)
        return value

    def take(self) -> list[int]:
        """The descriptors, now the caller's."""
        taken, self.descriptors = self.descriptors, []
        return taken


@dataclass(slots=True)
class Reply:
    """A result with descriptors; the sender closes ``descriptors`` once they are sent."""

    result: Any = None
    descriptors: list[int] = field(default_factory=list)


Handler = Callable[[Request], Any]


def send(
    sock: socket.socket, message: dict[str, Any], descriptors: list[int] | None = None
) -> None:
    """Send one message; Invalid when it is too large, Closed when nobody is there."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES or len(descriptors or ()) > MAX_DESCRIPTORS:
        raise Invalid(f"a message of {len(data)} bytes is too large")
    try:
        socket.send_fds(sock, [data], descriptors or [])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed("the other domain is gone") from error


def receive(sock: socket.socket) -> Message | None:
    """The next message, or None at the end. Malformed ones raise Invalid, their descriptors closed.

    BlockingIOError passes through when the socket does not block.
    """
    try:
        data, descriptors, flags, _ = socket.recv_fds(
            sock, MAX_MESSAGE_BYTES + 1, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    if not data and not descriptors:
        if not _hung_up(sock):
            raise Invalid("an empty message")  # which looks like the end, but is not
        return None
    message = Message({}, list(descriptors))
    try:
        if len(data) > MAX_MESSAGE_BYTES or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Invalid("a message too large")
        untrusted = json.loads(data)
        if not isinstance(untrusted, dict):
            raise Invalid("a message that is not an object")
    except (ValueError, RecursionError) as error:
        message.close()
        raise Invalid("a message that is not JSON") from error
    except Invalid:
        message.close()
        raise
    message.untrusted = untrusted
    return message


def _hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def answer(
    sock: socket.socket, peer: str, message: Message, handlers: Mapping[str, Handler]
) -> None:
    """Serve one request: call its handler, send its answer. Errors go to the caller."""
    untrusted_id = message.untrusted.get("i")
    call_id = untrusted_id if isinstance(untrusted_id, int) else None
    parameters = message.untrusted.get("p") or {}
    method = str(message.untrusted.get("m"))[:128]
    request = Request(peer, method, parameters if isinstance(parameters, dict) else {})
    request.descriptors, message.descriptors = message.descriptors, []
    reply = Reply()
    try:
        reply = _handled(request, handlers)
        response = {"i": call_id, "r": reply.result}
    except SupercloudError as error:
        response = {"i": call_id, "e": error_to_wire(error)}
    except Exception as error:
        bug = event_id()
        log.exception("bug %s in %s for %s", bug, method, peer)
        response = {"i": call_id, "e": error_to_wire(error, bug_id=bug)}
    try:
        if call_id is not None:
            send(sock, response, reply.descriptors)
    finally:
        for descriptor in [*reply.descriptors, *request.descriptors]:
            os.close(descriptor)


def _handled(request: Request, handlers: Mapping[str, Handler]) -> Reply:
    handler = handlers.get(request.method)
    if handler is None:
        raise NotFound(f"no method {request.method!r}")
    result = handler(request)
    return result if isinstance(result, Reply) else Reply(result)


class Portal:
    """The calling end of a channel, blocking. Notifications that come in between are dropped."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket, self.name = sock, name
        self._socket.setblocking(True)
        # answers to a caller before us on this channel, who did not wait for them, are not ours
        self._last_id = int.from_bytes(os.urandom(6), "big")

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def call(
        self,
        method: str,
        parameters: dict[str, Any] | None = None,
        descriptors: list[int] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """The result; the other side's error is raised, Closed when it is gone.

        Descriptors that come with the answer are closed; use ``call_for_descriptors``.
        """
        reply = self.call_for_descriptors(method, parameters, descriptors, timeout_s)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result

    def call_for_descriptors(
        self,
        method: str,
        parameters: dict[str, Any] | None = None,
        descriptors: list[int] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Reply:
        """As ``call``; the descriptors of the answer are the caller's to close."""
        self._last_id += 1
        request = {"i": self._last_id, "m": method, "p": parameters or {}}
        send(self._socket, request, descriptors)
        deadline_s = time.monotonic() + timeout_s
        while True:
            message = self._next(method, deadline_s)
            if message.untrusted.get("i") == self._last_id:
                return result_of(message)
            message.close()  # late answer to a call that timed out, or a notification

    def _next(self, method: str, deadline_s: float) -> Message:
        left_s = max(0.0, deadline_s - time.monotonic())
        if not select.select([self._socket], [], [], left_s)[0]:
            raise Temporary(f"{self.name}: no answer to {method}")
        message = receive(self._socket)
        if message is None:
            raise Closed(f"{self.name} is gone")
        return message


def result_of(message: Message) -> Reply:
    """The result in an answer with its descriptors; raises the error that it carries."""
    if "e" in message.untrusted:
        message.close()
        raise error_from_wire(message.untrusted["e"])
    return Reply(message.untrusted.get("r"), message.descriptors)


@contextlib.contextmanager
def closing(descriptors: list[int]) -> Any:
    """Close the descriptors at the end."""
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
