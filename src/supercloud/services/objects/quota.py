"""Hard quotas: what is to be written is reserved before its first byte goes on.

A bucket's charge (``tables.Usage``) is exact at each moment, since every entry is made through our
metadata store. What is under way is in the reservations. Their sum never exceeds the quota, so
neither does the bucket. Where the sum does not fit but what is there would, the request waits for
those under way to end, and only then is it refused.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from supercloud.model.errors import NoResources

_PATIENCE_S: Final = 20.0


class Reservation:
    """Bytes kept for one request; ``release`` when it has ended, whatever became of it."""

    def __init__(self, book: "Book", bucket: str) -> None:
        self._book, self._bucket, self._bytes = book, bucket, 0

    async def grow(self, wanted_bytes: int) -> None:
        """Reserve so much more; NoResources."""
        await self._book.fit(self._bucket, wanted_bytes, self._bytes)
        self._book.reserved[self._bucket] = self._book.reserved.get(self._bucket, 0) + wanted_bytes
        self._bytes += wanted_bytes

    def release(self) -> None:
        """Give back; what was written is in the usage by now."""
        left = self._book.reserved.get(self._bucket, 0) - self._bytes
        self._book.reserved.pop(self._bucket, None)
        if left:
            self._book.reserved[self._bucket] = left
        self._bytes = 0
        self._book.wake()


class Book:
    """Quotas and reservations by bucket. ``charged(bucket)`` is what is there; one loop's."""

    def __init__(self, charged: Callable[[str], int]) -> None:
        self.quotas: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self._charged = charged
        self._waiting: set[asyncio.Future[None]] = set()

    def reservation(self, bucket: str) -> Reservation:
        """An empty one."""
        return Reservation(self, bucket)

    async def fit(self, bucket: str, wanted_bytes: int, own_bytes: int) -> None:
        """Return, in the same turn, when so much fits; NoResources when it will not.

        ``own_bytes`` are reserved for the same request: no end of another will free them.
        """
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            quota, there = self.quotas.get(bucket, 0), self._charged(bucket)
            under_way = self.reserved.get(bucket, 0)
            if there + under_way + wanted_bytes <= quota:
                return
            patience_s = deadline_s - time.monotonic()
            alone = there + own_bytes + wanted_bytes
            if alone > quota or under_way <= own_bytes or patience_s <= 0:
                raise NoResources(
                    f"bucket {bucket}: {own_bytes + wanted_bytes} bytes more do not fit in"
                    f" its quota of {quota}, {there} are taken",
                    hint="delete objects (all their versions), or raise the quota",
                )
            await self._next_change(patience_s)

    def wake(self) -> None:
        """Something was released or deleted: those who wait may look again."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def _next_change(self, timeout_s: float) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await asyncio.wait([waiting], timeout=timeout_s)
        finally:
            self._waiting.discard(waiting)
