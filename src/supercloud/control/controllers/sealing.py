"""Asking the hosts of open volumes after their seals, often enough for what is promised."""

import asyncio
from collections.abc import Iterable

from supercloud.control.controllers.hostcalls import HostCalls, Valid
from supercloud.control.controllers.others import Others
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.platform import tag_of
from supercloud.control.controllers.record import Replica
from supercloud.control.desire import provider_key
from supercloud.control.documents import ReplicaDocument, VolumeDocument
from supercloud.control.seals import WINDOW_S
from supercloud.model.errors import NotFound, SupercloudError
from supercloud.model.resources import Provider
from supercloud.wire.volumes import VolumeStatus

USABLE = frozenset({"served", "attached"})


def seals_keys(volume: VolumeDocument) -> set[str]:
    """The work queue's keys for asking the providers of the volume and of its replicas."""
    return {f"seals/{volume.ucloud}/{provider_key(r.provider)}" for r in volume.replicas}


class Sealing:
    """Asks one provider of a U-Cloud at a time; see ``poll``."""

    def __init__(self, plane: Plane, calls: HostCalls, others: Others) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls, self._others = plane, calls, others
        self._silent: set[tuple[str, str]] = set()  # who does not answer
        self._unknown: set[tuple[str, str]] = set()  # volumes of no record, told of already

    async def poll(self, ucloud: str, provider: str) -> float | None:
        """Ask the provider of this key after the open volumes there; when to ask again."""
        volumes = [
            volume
            for volume in await self._plane.state.volumes(ucloud)
            if volume.state in USABLE
            and any(provider_key(replica.provider) == provider for replica in volume.replicas)
        ]
        if not volumes:
            return None
        (entry, *_) = [
            replica.provider
            for replica in volumes[0].replicas
            if provider_key(replica.provider) == provider
        ]
        await self._hear(volumes, entry)
        return self._plane.pace.seal_s

    async def _hear(self, volumes: list[VolumeDocument], entry: Provider) -> None:
        """One that does not answer is told of once: the window grows until it does."""
        name = (volumes[0].ucloud, entry.name)
        try:
            async with asyncio.timeout(WINDOW_S):
                await self._ask(volumes, entry)
        except NotFound:
            return  # one of them was deleted meanwhile
        except (SupercloudError, TimeoutError) as error:
            message = str(error) or f"no answer in {WINDOW_S:g} s"
            for volume in volumes if name not in self._silent else ():
                self._plane.tell(volume, "volume.silent", message, severity="warning")
            self._silent.add(name)
        else:
            self._silent.discard(name)

    async def _ask(self, volumes: list[VolumeDocument], entry: Provider) -> None:
        valid = {volume.name: self._calls.quiet(volume) for volume in volumes}
        there = await self._calls.volumes_of(volumes[0].ucloud, entry)
        listed = {(host, status.name): status for host, status in await there.list()}
        await self._strangers(volumes[0], entry, listed.values())
        for volume in volumes:
            for replica in volume.replicas:
                if replica.provider.name == entry.name:
                    status = listed.get((replica.host, volume.name))
                    await self._shown(volume, replica, status, valid[volume.name])

    async def _shown(
        self, volume: VolumeDocument, replica: Replica, status: VolumeStatus | None, valid: Valid
    ) -> None:
        if isinstance(replica, ReplicaDocument):
            if status is not None:
                await self._others.learn_listed(volume, replica.replica, status, valid)
        elif status is not None:
            await self._calls.learn(volume, status, valid)
        elif volume.seal.root:
            lost = NotFound("its host does not have it any more")
            await self._calls.halt(volume, lost, valid)

    async def _strangers(
        self, volume: VolumeDocument, entry: Provider, listed: Iterable[VolumeStatus]
    ) -> None:
        """Say of volumes that are marked as this U-Cloud's and have no record; touch none."""
        ucloud = volume.ucloud
        known = {item.name for item in await self._plane.state.volumes(ucloud)}
        for status in listed:
            if status.tag != tag_of(ucloud) or status.name in known:
                continue
            if (ucloud, status.name) not in self._unknown:
                self._unknown.add((ucloud, status.name))
                message = f"{entry.name} has a volume {status.name} of no record"
                self._plane.tell(volume, "volume.unknown", message, severity="warning")
