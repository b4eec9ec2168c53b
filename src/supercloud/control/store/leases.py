"""Leases on any store: who may act for a name, until when.

Expiry is judged by the reader's clock, so a lease wants clocks that agree within its slack; the
holder stops acting on it before it ends.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from supercloud.control.store.base import Conflict, Row, Store
from supercloud.model.errors import Busy


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease that ``holder`` has on ``name`` until ``expires_s`` (seconds since the epoch)."""

    name: str
    holder: str
    expires_s: float
    version: int


class Leases:
    """Acquire, renew and release leases, kept as rows ``lease/NAME``."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        """``clock`` gives seconds since the epoch."""
        self._store, self._clock = store, clock

    async def acquire(self, name: str, holder: str, ttl_s: float) -> Lease:
        """The lease, if it is free, expired, or ``holder``'s already. Raises Busy."""
        row = await self._store.get(_key(name))
        held = _read(name, row) if row else None
        if held and held.holder != holder and held.expires_s > self._clock():
            left_s = held.expires_s - self._clock()
            raise Busy(f"{name} is held by {held.holder} for another {left_s:.0f} s")
        return await self._write(name, holder, ttl_s, row.version if row else 0)

    async def renew(self, lease: Lease, ttl_s: float) -> Lease:
        """The lease for another ``ttl_s`` from now. Raises Busy when it went to somebody else."""
        return await self._write(lease.name, lease.holder, ttl_s, lease.version)

    async def release(self, lease: Lease) -> None:
        """Give it back; nothing happens when it is somebody else's by now."""
        try:
            await self._store.delete_if_version(_key(lease.name), lease.version)
        except Conflict:
            return

    async def _write(self, name: str, holder: str, ttl_s: float, version: int) -> Lease:
        expires_s = self._clock() + ttl_s
        value = json.dumps({"holder": holder, "expires_s": expires_s}).encode()
        try:
            version = await self._store.put_if_version(_key(name), value, version)
        except Conflict as error:
            raise Busy(f"{name} was taken by somebody else meanwhile") from error
        return Lease(name, holder, expires_s, version)


def _key(name: str) -> str:
    return f"lease/{name}"


def _read(name: str, row: Row) -> Lease:
    value = json.loads(row.value)
    return Lease(name, value["holder"], value["expires_s"], row.version)
