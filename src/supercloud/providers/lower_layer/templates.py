"""The templates of a host, by the host wire."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from supercloud.model.errors import NotFound
from supercloud.wire.codec import encode
from supercloud.wire.host import TemplateSpec, TemplateStatus
from supercloud.wire.messages import Blob
from supercloud.wire.peer import Stream

TIMEOUT_S: Final = 60.0
Ask = Callable[[str, Any, float], Awaitable[Any]]
Open = Callable[[str, Any], Awaitable[AbstractAsyncContextManager[Stream]]]


class HostTemplates:
    """Implements ``providers.base.Templates`` for the one host of an entry."""

    def __init__(self, host: str, ask: Ask, open_stream: Open) -> None:
        self._host, self._ask, self._open = host, ask, open_stream

    async def prepare(self, host: str, asked: TemplateSpec) -> TemplateStatus:
        """Begin to make one, or see how far it is."""
        self._check(host)
        status: TemplateStatus = await self._ask("template.prepare", asked, TIMEOUT_S)
        return status

    async def offer(self, host: str, blob: Blob, content: AsyncIterator[bytes]) -> None:
        """Send a blob."""
        self._check(host)
        await send(await self._open("template.blob", encode(blob)), content)

    def _check(self, host: str) -> None:
        if host != self._host:
            raise NotFound(f"{self._host} has no host {host}")


async def send(opened: AbstractAsyncContextManager[Stream], content: AsyncIterator[bytes]) -> None:
    """All of ``content`` as a call's stream; returns when it was taken, or raises why not."""
    async with opened as stream:
        async for data in content:
            await stream.write(data)
        stream.end()
        while await stream.read() is not None:
            pass  # its end, or what was wrong
