"""The one seam through which the control plane touches anything outside its memory.

In production it only awaits. The crash tests put their own in, which kills the control plane
before or after the n-th effect.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from supercloud.control.store import Row, Store, Watch

Result = TypeVar("Result")


class Seam(Protocol):
    """Runs an effect; ``what`` names it (``provider.ensure_platform``)."""

    async def __call__(self, what: str, act: Callable[[], Awaitable[Result]]) -> Result:
        """The result of ``act``."""
        ...


async def straight(_what: str, act: Callable[[], Awaitable[Result]]) -> Result:
    """The seam of production."""
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


__all__ = ["Row", "Seam", "SeamedStore", "Watch", "straight"]
