"""A channel to another domain under asyncio: calls, and what the other side tells unasked."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from supercloud.model.errors import Invalid, SupercloudError, Temporary
from supercloud.wire import portal
from supercloud.wire.portal import Closed, Message, Reply

Told = Callable[[str, dict[str, Any], list[int]], None]
"""(notification, untrusted parameters, descriptors: the callee's to close)."""

log = logging.getLogger("supercloud.lower.user_domain.channel")


class Channel:
    """One end; ``use`` gives it a socket, again when the other domain was started again."""

    def __init__(
        self, name: str, told: Told | None = None, lost: Callable[[], None] = lambda: None
    ) -> None:
        self.name, self._lost = name, lost
        self._told = told or _ignore
        self._socket: socket.socket | None = None
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._last_id = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a socket to speak over."""
        return self._socket is not None

    def use(self, descriptor: int) -> None:
        """Speak over this socket from now on; calls on the old one fail."""
        self.close()
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def close(self) -> None:
        """Close it; calls that wait fail with Closed."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Closed(f"{self.name} is gone"))

    async def call(
        self,
        method: str,
        parameters: dict[str, Any] | None = None,
        descriptors: list[int] | None = None,
        *,
        timeout_s: float = portal.CALL_TIMEOUT_S,
    ) -> Reply:
        """The answer, its descriptors the caller's; the other side's error, Closed, Temporary."""
        if self._socket is None:
            raise Closed(f"{self.name} is not there")
        self._last_id += 1
        call_id = self._last_id
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        try:
            request = {"i": call_id, "m": method, "p": parameters or {}}
            portal.send(self._socket, request, descriptors)
            async with asyncio.timeout(timeout_s):
                return await future
        except BlockingIOError as error:
            raise Temporary(f"{self.name} does not read") from error
        except TimeoutError:
            _discard(future)
            raise Temporary(f"{self.name}: no answer to {method}") from None
        except asyncio.CancelledError:
            _discard(future)
            raise
        finally:
            self._waiting.pop(call_id, None)

    async def result(self, method: str, parameters: dict[str, Any] | None = None) -> Any:
        """The answer of a call that brings no descriptors."""
        reply = await self.call(method, parameters)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            message = portal.receive(self._socket)
        except BlockingIOError:
            return
        except Invalid as error:
            log.warning("%s: %s", self.name, error)
            return
        if message is None:
            self.close()
            self._lost()
        elif "m" in message.untrusted:
            self._tell(message)
        else:
            self._answered(message)

    def _tell(self, message: Message) -> None:
        parameters = message.untrusted.get("p")
        descriptors, message.descriptors = message.descriptors, []
        checked = parameters if isinstance(parameters, dict) else {}
        self._told(str(message.untrusted["m"])[:64], checked, descriptors)

    def _answered(self, message: Message) -> None:
        call_id = message.untrusted.get("i")
        future = self._waiting.get(call_id) if isinstance(call_id, int) else None
        if future is None or future.done():
            message.close()  # an answer that nobody waits for any more
            return
        try:
            future.set_result(portal.result_of(message))
        except SupercloudError as error:
            future.set_exception(error)


def _discard(answer: asyncio.Future[Reply]) -> None:
    """Close what came in the very moment in which nobody waited for it any more."""
    if answer.done() and not answer.cancelled() and answer.exception() is None:
        for descriptor in answer.result().descriptors:
            os.close(descriptor)


def _ignore(_method: str, _parameters: dict[str, Any], descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
