"""The rows of ``ps``, encoded once for as long as nothing changes."""

import msgspec

from supercloud.control.service import Service
from supercloud.control.store import Store

_PREFIXES = ("ucloud/", "platform/", "environment/", "checkpoints/")


class Snapshot:
    """Encoded rows by U-Cloud, valid for the versions of the rows that they were made from."""

    def __init__(self, service: Service, store: Store) -> None:
        """Rows are ``service``'s; ``store`` tells whether they are still true."""
        self._service, self._store = service, store
        self._versions: tuple[int, ...] = ()
        self._encoded: dict[str, bytes] = {}

    async def environments(self, ucloud: str) -> bytes:
        """The JSON of ``GET /v1/environments``; "" is all U-Clouds. NotFound."""
        versions = await self._now()
        if versions != self._versions:
            self._versions, self._encoded = versions, {}
        if ucloud not in self._encoded:
            rows = await self._service.environments(ucloud)
            self._encoded[ucloud] = msgspec.json.encode(rows)
        return self._encoded[ucloud]

    async def _now(self) -> tuple[int, ...]:
        versions: list[int] = []
        for prefix in _PREFIXES:
            rows, _ = await self._store.list(prefix)
            versions += [row.version for row in rows]
        return tuple(versions)
