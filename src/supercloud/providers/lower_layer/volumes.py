"""The volumes of a host, by the host wire."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from supercloud.model.errors import NotFound
from supercloud.wire.messages import ByName, Empty
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    Shared,
    VolumeFence,
    VolumeLease,
    VolumeRejoin,
)
from supercloud.wire.volumes import (
    VolumeAttach,
    VolumeCopy,
    VolumeList,
    VolumeOpen,
    VolumeServe,
    VolumeSnapshot,
    VolumeSpec,
    VolumeStatus,
)

TIMEOUT_S: Final = 120.0
LEASE_TIMEOUT_S: Final = 10.0
Ask = Callable[[str, Any, float], Awaitable[Any]]
"""Calls a declared method of the host wire: name, parameters, seconds."""


class HostVolumes:
    """Implements ``providers.base.Volumes`` for the one host of an entry."""

    def __init__(self, host: str, ask: Ask) -> None:
        self._host, self._ask = host, ask

    async def open(self, host: str, asked: VolumeOpen) -> VolumeStatus:
        """Have it, and its next epoch."""
        return await self._status(host, "volume.open", asked)

    async def serve(
        self,
        host: str,
        name: str,
        epoch: int,
        *,
        mirror: Mirror | None = None,
        shared: Shared | None = None,
    ) -> VolumeStatus:
        """Let it be used."""
        asked = VolumeServe(name=name, epoch=epoch, mirror=mirror, shared=shared)
        return await self._status(host, "volume.serve", asked)

    async def lease(self, host: str, asked: VolumeLease) -> MirrorStatus:
        """Let the mirror there answer."""
        self._check(host)
        status: MirrorStatus = await self._ask("volume.lease", asked, LEASE_TIMEOUT_S)
        return status

    async def rejoin(self, host: str, asked: VolumeRejoin) -> MirrorStatus:
        """A replica is there again."""
        self._check(host)
        status: MirrorStatus = await self._ask("volume.rejoin", asked, TIMEOUT_S)
        return status

    async def fence(self, host: str, asked: VolumeFence) -> None:
        """A mirror of an older generation there never answers again."""
        self._check(host)
        await self._ask("volume.fence", asked, LEASE_TIMEOUT_S)

    async def attach(
        self, host: str, name: str, platform: str, *, restorable: bool = False
    ) -> VolumeStatus:
        """Give it to a running platform."""
        asked = VolumeAttach(name=name, platform=platform, restorable=restorable)
        return await self._status(host, "volume.attach", asked)

    async def detach(self, host: str, name: str) -> VolumeStatus:
        """Take it from its platform."""
        return await self._status(host, "volume.detach", ByName(name=name))

    async def close(self, host: str, name: str) -> VolumeStatus:
        """What was written is on the disk."""
        return await self._status(host, "volume.close", ByName(name=name))

    async def delete(self, host: str, name: str) -> None:
        """With all that is in it."""
        self._check(host)
        await self._ask("volume.delete", ByName(name=name), TIMEOUT_S)

    async def change(self, host: str, spec: VolumeSpec) -> VolumeStatus:
        """Grow it, or throttle it otherwise."""
        return await self._status(host, "volume.change", spec)

    async def snapshot(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Make a snapshot."""
        return await self._of_snapshot(host, "volume.snapshot", name, snapshot)

    async def revert(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Go back to a snapshot."""
        return await self._of_snapshot(host, "volume.revert", name, snapshot)

    async def forget(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Delete a snapshot."""
        return await self._of_snapshot(host, "volume.forget", name, snapshot)

    async def fill(self, host: str, asked: VolumeCopy) -> VolumeStatus:
        """Have it hold what another one holds."""
        return await self._status(host, "volume.copy", asked)

    async def list(self) -> list[tuple[str, VolumeStatus]]:
        """All that the user domain has."""
        listed: VolumeList = await self._ask("volume.list", Empty(), TIMEOUT_S)
        return [(self._host, status) for status in listed.volumes]

    async def _of_snapshot(self, host: str, method: str, name: str, snapshot: str) -> VolumeStatus:
        return await self._status(host, method, VolumeSnapshot(name=name, snapshot=snapshot))

    async def _status(self, host: str, method: str, asked: Any) -> VolumeStatus:
        self._check(host)
        status: VolumeStatus = await self._ask(method, asked, TIMEOUT_S)
        return status

    def _check(self, host: str) -> None:
        if host != self._host:
            raise NotFound(f"{self._host} has no host {host}")
