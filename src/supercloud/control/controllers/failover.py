"""What uses a volume that is kept on several hosts leaves a host that is lost.

Lost is a host whose platform is not connected and whose provider cannot be asked, for so long. Then
the U-Cloud is decided anew, as by ``up``, with all as it stands: but those volumes are at home
where they are in sync, and their users with them. It is written in one row; the volume itself goes
on when nothing may answer any more where it was (``replication.move``).
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import Place, place_of, whole_at
from supercloud.control.desire import Decision, decide
from supercloud.control.documents import (
    PlatformDocument,
    StoreWish,
    UCloudDocument,
    VolumeDocument,
    ucloud_key,
)
from supercloud.control.homes import at_home
from supercloud.control.offers import Offer
from supercloud.control.store import Conflict
from supercloud.model.errors import NoResources, NotFound, SupercloudError, UserError
from supercloud.model.resources import Provider as Entry
from supercloud.model.states import UCLOUD, observed
from supercloud.providers.base import HostCapacity

ASK_TIMEOUT_S = 5.0


def failover_key(ucloud: str) -> str:
    """The work queue's key."""
    return f"failover/{ucloud}"


@dataclass(frozen=True, slots=True)
class _There:
    """A U-Cloud as it stands. ``lost``: hosts whose platform is away for long enough."""

    document: UCloudDocument
    platforms: Sequence[PlatformDocument]
    volumes: Sequence[VolumeDocument]
    offers: Sequence[Offer]
    lost: frozenset[Place]


class FailoverController:
    """One U-Cloud at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane, self._deciding = plane, plane.deciding
        self._told: dict[str, str] = {}

    async def reconcile(self, ucloud: str) -> float | None:
        """One look; seconds until the next one, or None."""
        document = await self._plane.state.ucloud(ucloud)
        if document is None or document.deleting:
            return None
        if not any(wish.others for wish in document.volumes.values()):
            return None
        platforms = await self._plane.state.platforms(ucloud)
        if self._lost(platforms) and await self._fail_over(document):
            return self._plane.pace.settle_s
        return self._plane.pace.observe_s

    def _lost(self, platforms: Sequence[PlatformDocument]) -> frozenset[Place]:
        before_s = time.time() - self._plane.pace.failover_s
        return frozenset(
            (platform.wish.provider.name, platform.wish.host)
            for platform in platforms
            if platform.state == "lost" and platform.since_s < before_s
        )

    async def _fail_over(self, document: UCloudDocument) -> bool:
        """Whether something moves."""
        asked = (self._offer(document.name, entry) for entry in document.spec.providers)
        offers = await asyncio.gather(*asked)
        async with self._deciding:
            fresh = await self._plane.state.ucloud(document.name)
            if fresh is None or fresh.generation != document.generation:
                return False
            # read anew: one that was lost may have come back while its provider was asked
            platforms = await self._plane.state.platforms(document.name)
            volumes = await self._plane.state.volumes(document.name)
            there = _There(fresh, platforms, volumes, offers, self._lost(platforms))
            moved = _moved(there)
            if not moved:
                return False
            try:
                decision = await self._decision(there, moved)
                await self._store(fresh, decision)
            except (NoResources, UserError) as error:
                self._say(fresh, "ucloud.failover_refused", str(error))
                return False
            except (Conflict, NotFound):
                return False
        names = ", ".join(f"{name} to {'/'.join(place)}" for name, place in moved.items())
        self._say(fresh, "ucloud.failover", f"a host is lost: {names}")
        self._plane.look(ucloud_key(document.name), 0.0)
        return True

    async def _offer(self, ucloud: str, entry: Entry) -> Offer:
        provider = self._plane.pool.get(ucloud, entry)
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                return Offer(entry, await provider.hosts(), await provider.features())
        except (SupercloudError, TimeoutError) as error:
            return Offer(entry, (), unreachable=str(error) or "no answer")

    async def _decision(self, there: _There, moved: dict[str, Place]) -> Decision:
        document = there.document
        others = await self._plane.state.uclouds()
        taken = [
            item
            for other in others
            if other.name != document.name
            for item in other.networks.values()
        ]
        store = await self._plane.state.store_document(document.name)
        kept_store = None
        if store is not None and not store.deleting and document.store is not None:
            buckets = [bucket.spec for bucket in store.buckets.values() if not bucket.deleting]
            kept_store = StoreWish(provider=store.provider, host=store.host, buckets=buckets)
        homes = {
            name: at_home(wish, moved[name]) if name in moved else wish
            for name, wish in document.volumes.items()
        }
        engines = {(p.wish.provider.name, p.wish.host): p.engines for p in there.platforms}
        return decide(
            document.spec,
            _with_lost(there),
            document,
            taken,
            document.marks,
            homes,
            kept_store,
            engines=engines,
        )

    async def _store(self, document: UCloudDocument, decision: Decision) -> None:
        expected = document.generation

        def decided(fresh: UCloudDocument) -> None:
            if fresh.generation != expected or fresh.deleting:
                raise Conflict(ucloud_key(fresh.name), expected, fresh.generation)
            fresh.generation += 1
            fresh.state = observed(UCLOUD, fresh.state, "applying")
            fresh.platforms, fresh.assignments = decision.platforms, decision.assignments
            fresh.volumes = decision.volumes

        await self._plane.state.change(document, decided)

    def _say(self, document: UCloudDocument, code: str, message: str) -> None:
        if self._told.get(document.name) != message:
            self._told[document.name] = message
            self._plane.tell(document, code, message, severity="warning")


def _moved(there: _There) -> dict[str, Place]:
    """The volumes that leave a lost host, and where they go: all of an EE's to the same place."""
    silent = {offer.provider.name for offer in there.offers if offer.unreachable}
    reached = {(o.provider.name, h.name) for o in there.offers for h in o.hosts}
    away = {place for place in there.lost if place[0] in silent}
    by_name = {volume.name: volume for volume in there.volumes}
    moved: dict[str, Place] = {}
    for item in there.document.spec.environments:
        used = [by_name[use.name] for use in item.volumes if use.name in by_name]
        places = [whole_at(volume) & reached for volume in used]
        if not used or not any(_home(there.document, volume) in away for volume in used):
            continue
        for place in sorted(set.intersection(*places)):
            moved |= {volume.name: place for volume in used}
            break
    return moved


def _home(document: UCloudDocument, volume: VolumeDocument) -> Place:
    wish = document.volumes.get(volume.name)
    return (wish.provider.name, wish.host) if wish else place_of(volume)


def _with_lost(there: _There) -> list[Offer]:
    """What is offered; a provider that is silent offers what stands there already, no more."""
    offers = []
    for offer in there.offers:
        if offer.unreachable:
            wishes = [
                wish
                for wish in there.document.platforms.values()
                if wish.provider.name == offer.provider.name
            ]
            hosts = [
                HostCapacity(
                    name=wish.host,
                    region=wish.region,
                    jurisdiction=wish.jurisdiction,
                    cpus_total=0,
                    cpus_free=0,
                    memory_total_bytes=0,
                    memory_free_bytes=0,
                    disk_total_bytes=0,
                    disk_free_bytes=0,
                    platforms_free=0,
                    images=(wish.image,),
                )
                for wish in wishes
            ]
            offers.append(replace(offer, hosts=hosts, unreachable=""))
        else:
            offers.append(offer)
    return offers
