"""The snapshots of volumes, taken while an EE or a platform stands still for its checkpoint.

Its agent asks for them in the middle of its own call, when what the EE wrote is on the disks. The
EE waits for the answer, so there is nothing here but the hosts' calls, all at once. Those of a
platform are taken by its host, which says of which volumes.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.subjects import Subject
from supercloud.control.documents import VolumeDocument, volume_key
from supercloud.model.errors import BadState, Denied, Permanent
from supercloud.wire.checkpoints import CheckpointSnapshot


class Standstill:
    """One expected request for snapshots called ``name``. ``taken`` is by volume, when it is."""

    def __init__(self, plane: Plane, calls: HostCalls, subject: Subject, name: str) -> None:
        """For one checkpoint of ``subject``; acts through ``plane`` and ``calls``."""
        self._plane, self._calls, self._subject, self._name = plane, calls, subject, name
        self._is_asked = False
        self._taken: dict[str, str] | None = None

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """While the EE's agent may ask."""
        platform, waiting = self._subject.platform, self._plane.agents.snapshots
        key = (platform.ucloud, platform.name, self._subject.uid)
        waiting[key] = self._snapshot
        try:
            yield
        finally:
            if waiting.get(key) == self._snapshot:
                del waiting[key]

    async def told(self, names: Iterable[str]) -> None:
        """A platform's host has taken snapshots of these; asked once more it says that they are."""
        if not self._subject.whole:
            return
        volumes = [await self._volume(name) for name in names]
        await asyncio.gather(*map(self._one, volumes))
        self._taken = {volume.name: self._name for volume in volumes}

    @property
    def taken(self) -> dict[str, str]:
        """The snapshots' names by volume. Permanent when they were never asked for."""
        if not self._subject.volumes and not self._subject.whole:
            return {}
        if self._taken is None:
            raise Permanent("its agent has not asked for snapshots of its volumes")
        return self._taken

    async def _snapshot(self, asked: CheckpointSnapshot) -> None:
        if asked.snapshot != self._name or self._is_asked:
            raise Denied(f"no snapshot {asked.snapshot} is to be taken, or was asked for already")
        self._is_asked = True
        volumes = [await self._volume(name) for name in self._subject.volumes]
        done = await asyncio.gather(*map(self._one, volumes), return_exceptions=True)
        for failure in done:
            if isinstance(failure, BaseException):
                raise failure
        self._taken = dict.fromkeys(self._subject.volumes, self._name)

    async def _volume(self, name: str) -> VolumeDocument:
        platform = self._subject.platform
        volume = await self._plane.state.volume(platform.ucloud, name)
        here = (platform.name, platform.incarnation)
        if volume is None or volume.halted or (volume.platform, volume.incarnation) != here:
            raise BadState(
                f"volume {name} is not attached to {platform.name}",
                hint=f"supercloud volumes inspect {platform.ucloud}/{name} says how it is",
            )
        return volume

    async def _one(self, volume: VolumeDocument) -> None:
        told = await self._calls.act(
            volume,
            "snapshot",
            lambda host: host.snapshot(volume.host, volume.name, self._name),
        )
        if self._name not in told.snapshots:
            raise Permanent(f"volume {volume.name} was not given the snapshot {self._name}")


async def look_at_volumes(plane: Plane, ucloud: str) -> None:
    """Some snapshots are of no use any more."""
    for volume in await plane.state.volumes(ucloud):
        if volume.snapshots:
            plane.look(volume_key(ucloud, volume.name), 0.0)
