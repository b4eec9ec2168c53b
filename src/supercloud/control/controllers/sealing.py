"""Asking the hosts of open volumes after their seals, often enough for what is promised."""

import asyncio
from collections.abc import Iterable

from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.platform import tag_of
from supercloud.control.desire import provider_key
from supercloud.control.documents import VolumeDocument
from supercloud.control.seals import WINDOW_S
from supercloud.model.errors import NotFound, SupercloudError
from supercloud.wire.volumes import VolumeStatus

USABLE = frozenset({"served", "attached"})


def seals_key(volume: VolumeDocument) -> str:
    """The work queue's key for asking the volume's provider."""
    return f"seals/{volume.ucloud}/{provider_key(volume.provider)}"


class Sealing:
    """Asks one provider of a U-Cloud at a time; see ``poll``."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls
        self._silent: set[tuple[str, str]] = set()  # who does not answer
        self._unknown: set[tuple[str, str]] = set()  # volumes of no record, told of already

    async def poll(self, ucloud: str, provider: str) -> float | None:
        """Ask the provider of this key after the open volumes there; when to ask again."""
        volumes = [
            volume
            for volume in await self._plane.state.volumes(ucloud)
            if volume.state in USABLE and provider_key(volume.provider) == provider
        ]
        if not volumes:
            return None
        await self._hear(volumes)
        return self._plane.pace.seal_s

    async def _hear(self, volumes: list[VolumeDocument]) -> None:
        """One that does not answer is told of once: the window grows until it does."""
        name = (volumes[0].ucloud, volumes[0].provider.name)
        try:
            async with asyncio.timeout(WINDOW_S):
                await self._ask(volumes)
        except NotFound:
            return  # one of them was deleted meanwhile
        except (SupercloudError, TimeoutError) as error:
            message = str(error) or f"no answer in {WINDOW_S:g} s"
            for volume in volumes if name not in self._silent else ():
                self._plane.tell(volume, "volume.silent", message, severity="warning")
            self._silent.add(name)
        else:
            self._silent.discard(name)

    async def _ask(self, volumes: list[VolumeDocument]) -> None:
        valid = {volume.name: self._calls.quiet(volume) for volume in volumes}
        there = await self._calls.volumes(volumes[0])
        listed = {(host, status.name): status for host, status in await there.list()}
        await self._strangers(volumes[0], listed.values())
        for volume in volumes:
            status = listed.get((volume.host, volume.name))
            if status is not None:
                await self._calls.learn(volume, status, valid[volume.name])
            elif volume.seal.root:
                lost = NotFound("its host does not have it any more")
                await self._calls.halt(volume, lost, valid[volume.name])

    async def _strangers(self, volume: VolumeDocument, listed: Iterable[VolumeStatus]) -> None:
        """Say of volumes that are marked as this U-Cloud's and have no record; touch none."""
        ucloud = volume.ucloud
        known = {item.name for item in await self._plane.state.volumes(ucloud)}
        for status in listed:
            if status.tag != tag_of(ucloud) or status.name in known:
                continue
            if (ucloud, status.name) not in self._unknown:
                self._unknown.add((ucloud, status.name))
                message = f"{volume.provider.name} has a volume {status.name} of no record"
                self._plane.tell(volume, "volume.unknown", message, severity="warning")
