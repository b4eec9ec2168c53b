"""The provider objects in use: one for each U-Cloud and provider entry, made when asked for."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from supercloud.control.desire import provider_key
from supercloud.control.store import Conflict, Store
from supercloud.model.errors import Exists
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import Accept, PinStore, Provider

log = logging.getLogger("supercloud.control.pool")

Make = Callable[[str, Entry, PinStore, Path], Provider]
"""Makes a provider object: U-Cloud, entry, where its pins are kept, its own state directory."""


class StorePins:
    """Pins of one U-Cloud's provider entry, as rows ``pin/U/KEY/NAME``."""

    def __init__(self, store: Store, prefix: str) -> None:
        """``prefix`` ends with ``/``."""
        self._store, self._prefix = store, prefix

    async def get(self, name: str) -> str | None:
        """The pin under ``name``."""
        row = await self._store.get(self._prefix + name)
        return None if row is None else row.value.decode()

    async def put(self, name: str, pin: str) -> None:
        """Keep the pin; Exists when there is another one under ``name``."""
        try:
            await self._store.put_if_version(self._prefix + name, pin.encode(), 0)
        except Conflict as error:
            if await self.get(name) != pin:
                raise Exists(f"another key is pinned for {name} already") from error


class _Entry:
    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.listening: asyncio.Task[None] | None = None


class ProviderPool:
    """Hands out provider objects, and keeps their rendezvous open for those that have platforms."""

    def __init__(self, make: Make, store: Store, directory: Path) -> None:
        """``directory`` is the parent of every entry's state directory."""
        self._make, self._store, self._directory = make, store, directory
        self._entries: dict[tuple[str, str], _Entry] = {}

    def get(self, ucloud: str, entry: Entry) -> Provider:
        """The provider object of ``entry`` in ``ucloud``. Raises what its settings do."""
        return self._entry(ucloud, entry).provider

    def listen(self, ucloud: str, entry: Entry, accept: Accept) -> None:
        """Keep taking agents' connections from this provider; once is enough."""
        item = self._entry(ucloud, entry)
        if item.listening is None or item.listening.done():
            name = f"rendezvous {ucloud}/{entry.name}"
            work = item.provider.rendezvous(accept)
            item.listening = asyncio.get_running_loop().create_task(_guard(name, work), name=name)

    async def drop(self, ucloud: str) -> None:
        """Close the providers of a U-Cloud that is gone."""
        await self._close([key for key in self._entries if key[0] == ucloud])

    async def close(self) -> None:
        """Close all of them."""
        await self._close(list(self._entries))

    def _entry(self, ucloud: str, entry: Entry) -> _Entry:
        name = provider_key(entry)
        key = (ucloud, name)
        if key not in self._entries:
            directory = self._directory / ucloud / name
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            pins = StorePins(self._store, f"pin/{ucloud}/{name}/")
            self._entries[key] = _Entry(self._make(ucloud, entry, pins, directory))
        return self._entries[key]

    async def _close(self, keys: list[tuple[str, str]]) -> None:
        items = [self._entries.pop(key) for key in keys]
        tasks = [item.listening for item in items if item.listening is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(item.provider.close() for item in items))


async def _guard(name: str, work: Awaitable[None]) -> None:
    """A rendezvous that ends by itself is a bug; its platforms' reconciler starts it again."""
    try:
        await work
    except Exception:
        log.exception("%s ended", name)
