"""The object store of a host, by the host wire."""

from typing import Final

from supercloud.model.errors import NotFound
from supercloud.providers.lower_layer.volumes import Ask
from supercloud.wire.messages import Empty
from supercloud.wire.objects import (
    ObjectsApply,
    ObjectsCredentials,
    ObjectsDelete,
    ObjectsSecret,
    ObjectsStatus,
)

TIMEOUT_S: Final = 120.0


class HostObjects:
    """Implements ``providers.base.Objects`` for the one host of an entry."""

    def __init__(self, host: str, ask: Ask) -> None:
        self._host, self._ask = host, ask

    async def apply(self, host: str, asked: ObjectsApply) -> ObjectsStatus:
        """Bring it closer to what it is to be."""
        return await self._status(host, "objects.apply", asked)

    async def state(self, host: str) -> ObjectsStatus:
        """As it is now."""
        return await self._status(host, "objects.state", Empty())

    async def credentials(self, host: str, asked: ObjectsCredentials) -> ObjectsSecret:
        """Let somebody use buckets."""
        self._check(host)
        secret: ObjectsSecret = await self._ask("objects.credentials", asked, TIMEOUT_S)
        return secret

    async def delete(self, host: str, bucket: str = "") -> ObjectsStatus:
        """A bucket with all that is in it; "" is the whole store."""
        return await self._status(host, "objects.delete", ObjectsDelete(bucket=bucket))

    async def stop(self, host: str) -> ObjectsStatus:
        """Serve no more."""
        return await self._status(host, "objects.stop", Empty())

    async def _status(self, host: str, method: str, asked: object) -> ObjectsStatus:
        self._check(host)
        status: ObjectsStatus = await self._ask(method, asked, TIMEOUT_S)
        return status

    def _check(self, host: str) -> None:
        if host != self._host:
            raise NotFound(f"{self._host} has no host {host}")
