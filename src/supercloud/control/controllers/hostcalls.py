"""Calls to the hosts of volumes, and what is learned from what they answer.

A host's list of its volumes is asked for beside the calls. What it says of a volume counts only
while no call on that volume goes on: that call's answer is newer, or will be.
"""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace

from supercloud.control.controllers import learning
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.platform import tag_of
from supercloud.control.documents import VolumeDocument, platform_key, volume_key
from supercloud.model.errors import Unsupported, UserError
from supercloud.model.resources import Provider
from supercloud.providers.base import Volumes
from supercloud.wire.volumes import VolumeSpec, VolumeStatus

Call = Callable[[Volumes], Awaitable[VolumeStatus]]
Valid = Callable[[], bool]
"""Asked at the moment at which something is written."""


def always() -> bool:
    """It is valid."""
    return True


class HostCalls:
    """The way to the hosts of all volumes."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane
        self._begun: Counter[tuple[str, str]] = Counter()
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._turns: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    def quiet(self, volume: VolumeDocument) -> Valid:
        """Valid for as long as no call on the volume goes on, from now."""
        name = (volume.ucloud, volume.name)
        begun, is_calm = self._begun[name], not self._under_way[name]
        return lambda: is_calm and self._begun[name] == begun

    async def volumes(self, volume: VolumeDocument) -> Volumes:
        """Those of the volume's provider. Unsupported, with its reason."""
        return await self.volumes_of(volume.ucloud, volume.provider)

    async def volumes_of(self, ucloud: str, entry: Provider) -> Volumes:
        """Likewise, of any provider."""
        provider = self._plane.pool.get(ucloud, entry)
        if provider.volumes is None:
            reason = (await provider.features()).get("volumes", "")
            raise Unsupported(
                f"provider {entry.name} has no volumes: {reason}",
                hint="put what uses them at another one: placement.provider",
            )
        return provider.volumes

    async def act(self, volume: VolumeDocument, what: str, call: Call) -> VolumeDocument:
        """Call, and keep what the host answers: one at a time, so that no answer overtakes another.

        For a volume's snapshots are taken beside what its reconciler does.
        """
        async with self._turns[volume.ucloud, volume.name]:
            with self.calling(volume):
                return await self.learn(volume, await self.call(volume, what, call))

    async def call(self, volume: VolumeDocument, what: str, call: Call) -> VolumeStatus:
        """Only call."""
        there = await self.volumes(volume)
        return await self._plane.seam(f"provider.volume_{what}", lambda: call(there))

    @contextlib.contextmanager
    def calling(self, volume: VolumeDocument) -> Iterator[None]:
        """While a call is under way, and until what it told is kept."""
        name = (volume.ucloud, volume.name)
        self._begun[name] += 1
        self._under_way[name] += 1
        try:
            yield
        finally:
            self._under_way[name] -= 1

    async def learn(
        self, volume: VolumeDocument, status: VolumeStatus, valid: Valid = always
    ) -> VolumeDocument:
        """Keep what the host says of it; events, and looks, for what is new."""
        before = volume

        def taken(fresh: VolumeDocument) -> None:
            nonlocal before
            before = replace(fresh)
            if valid():
                learning.take(fresh, status)

        volume = await self._plane.state.change(volume, taken)
        if valid():
            self._plane.sees(volume, status)
        for code, message, severity in learning.news(before, volume, status):
            self._plane.tell(volume, f"volume.{code}", message, severity)
        self._look(before, volume)
        return volume

    def _look(self, before: VolumeDocument, after: VolumeDocument) -> None:
        if (after.platform, after.slot) != (before.platform, before.slot):
            for name in {after.platform, before.platform} - {""}:
                self._plane.look(platform_key(after.ucloud, name), 0.0)
        if (after.state, after.snapshots) != (before.state, before.snapshots):
            self._plane.look(volume_key(after.ucloud, after.name), 0.0)

    async def halt(self, volume: VolumeDocument, error: UserError, valid: Valid = always) -> None:
        """Leave it alone until its user acts; an event the first time."""
        found, new = learning.found_in(error), False

        def halted(fresh: VolumeDocument) -> None:
            nonlocal new
            new = valid() and not fresh.halted
            if new:
                learning.halt(fresh, error.message, found)

        volume = await self._plane.state.change(volume, halted)
        if new:
            self._plane.tell(volume, "volume.refused", error.message, severity="error")


def wire_spec(volume: VolumeDocument) -> VolumeSpec:
    """The volume as its host is told of it."""
    spec = volume.spec
    return VolumeSpec(
        name=volume.name,
        size_bytes=spec.size_bytes,
        format=spec.format,
        iops=spec.iops,
        bytes_per_s=spec.bytes_per_s,
        tag=tag_of(volume.ucloud),
    )
