"""The one seam through which the control plane touches anything outside its memory.

In production it only awaits. The crash tests put their own in, which kills the control plane
before or after the n-th effect.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from supercloud.control.store import Store

Result = TypeVar("Result")


class Seam:
    """Runs effects: ``await seam("provider.ensure_platform", act)`` is the result of ``act``."""

    async def __call__(self, what: str, act: Callable[[], Awaitable[Result]]) -> Result:  # noqa: ARG002
        """The seam of production only awaits."""
        return await act()


class SeamedStore:
    """A store whose writes are effects."""

    def __init__(self, store: Store, seam: Seam) -> None:
        """Reads go to ``store``, writes through ``seam``."""
        self._store, self._seam = store, seam
        self.get, self.list, self.watch, self.close = (
            store.get,
            store.list,
            store.watch,
            store.close,
        )

    async def put_if_version(self, key: str, value: bytes, version: int) -> int:
        """See :class:`Store`."""
        return await self._seam(
            f"store.put {key}", lambda: self._store.put_if_version(key, value, version)
        )

    async def delete_if_version(self, key: str, version: int) -> int:
        """See :class:`Store`."""
        return await self._seam(
            f"store.delete {key}", lambda: self._store.delete_if_version(key, version)
        )
