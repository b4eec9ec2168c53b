"""Keeps mirrors leased, and writes down what they tell of their replicas.

What is told is in the record before the next renewal confirms it; nothing is granted to a mirror
whose volume is to be used elsewhere.
"""

import asyncio
import time
from collections.abc import Callable

from supercloud.control.controllers import record
from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.leases import Leases
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import Place, place_of
from supercloud.control.documents import VolumeDocument, volume_key
from supercloud.model.errors import Denied, NotFound, SupercloudError
from supercloud.model.events import Severity
from supercloud.wire.mirrors import MirrorStatus, ReplicaStatus


def lease_key(volume: VolumeDocument) -> str:
    """The work queue's key for renewing its lease."""
    return f"lease/{volume.ucloud}/{volume.name}"


def rejoin_key(volume: VolumeDocument) -> str:
    """The work queue's key for having replicas again."""
    return f"rejoin/{volume.ucloud}/{volume.name}"


class Leasing:
    """One volume at a time; see ``lease``. ``moving``: nothing is granted to them any more."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls
        self.leases = Leases(plane.pace.lease_valid_s)
        self.moving: set[tuple[str, str]] = set()
        self._rejoined_s: dict[tuple[str, str], float] = {}

    async def lease(self, ucloud: str, name: str) -> float | None:
        """Renew it, and write down what the mirror tells; when to do so again."""
        volume = await self._plane.state.volume(ucloud, name)
        if volume is None or not volume.mirroring or volume.halted:
            return None
        if not await self.is_home(volume):
            return None  # it is to be used elsewhere: nothing is granted here any more
        there = await self._calls.volumes(volume)
        if (ucloud, name) in self.moving:
            return None
        asked = self.leases.next(volume)
        try:
            async with asyncio.timeout(self._plane.pace.lease_valid_s):
                status = await there.lease(volume.host, asked)
        except (Denied, NotFound):  # it is over: the volume's state says so, too
            self.leases.drop(volume)
            self._plane.look(volume_key(ucloud, name), self._plane.pace.lease_s)
            return self._plane.pace.lease_s
        except (SupercloudError, TimeoutError):
            return self._plane.pace.lease_s / 2
        wait_s = await self._heard(volume, status)
        return wait_s if asked.valid_ms else 0.0

    async def _heard(self, volume: VolumeDocument, status: MirrorStatus) -> float:
        name = (volume.ucloud, volume.name)
        news: list[ReplicaStatus] = []
        if record.has_news(volume, status):

            def written(fresh: VolumeDocument) -> None:
                news[:] = record.write_down(fresh, status)

            volume = await self._change(volume, written)
            for one in news:
                severity: Severity = "warning" if one.standing == "failing" else "info"
                what = "stale" if one.standing == "failing" else "in_sync"
                self._tell(volume, what, f"replica {one.replica} {one.reason}".strip(), severity)
        waiting = record.written(volume, status)
        self.leases.heard(volume, status, waiting)
        self._plane.mirrors[name] = status
        away = any(not one.connected for one in status.replicas)
        now_s = time.monotonic()
        if away and now_s - self._rejoined_s.get(name, 0.0) > self._plane.pace.rejoin_s:
            self._rejoined_s[name] = now_s
            self._plane.look(rejoin_key(volume), 0.0)
        return 0.0 if waiting else self._plane.pace.lease_s

    async def home_of(self, volume: VolumeDocument) -> Place:
        """Where it is to be used, as decided."""
        owner = await self._plane.state.ucloud(volume.ucloud)
        wish = owner.volumes.get(volume.name) if owner is not None else None
        return place_of(volume) if wish is None else (wish.provider.name, wish.host)

    async def is_home(self, volume: VolumeDocument) -> bool:
        """Whether it is to be used where it is used now."""
        return await self.home_of(volume) == place_of(volume)

    async def _change(
        self, volume: VolumeDocument, mutate: Callable[[VolumeDocument], object]
    ) -> VolumeDocument:
        return await self._plane.state.change(volume, mutate)

    def _tell(self, volume: VolumeDocument, code: str, message: str, severity: Severity) -> None:
        self._plane.tell(volume, f"volume.replica_{code}", message, severity)
