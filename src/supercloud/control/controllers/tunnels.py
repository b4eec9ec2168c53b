"""Says to the hosts of a U-Cloud which of the others they reach, and whom they let in.

So what runs on one host has the object store that is on another one. Hosts keep what they were
told; they are told again now and then, for one may have been made anew.
"""

import asyncio
import contextlib

from supercloud.control.controllers.plane import Plane
from supercloud.control.desire import provider_key
from supercloud.control.documents import PlatformDocument, StoreDocument
from supercloud.model.errors import NotFound, SupercloudError
from supercloud.model.resources import Provider as Entry
from supercloud.wire.tunnel import TunnelApply

Place = tuple[str, str]
"""The key of a provider's entry, and a host there."""


def tunnels_key(ucloud: str) -> str:
    """The work queue's key."""
    return f"tunnels/{ucloud}"


class TunnelController:
    """One U-Cloud at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane
        self._told: dict[tuple[str, Place], tuple[float, TunnelApply]] = {}

    async def reconcile(self, ucloud: str) -> float | None:
        """One look; seconds until the next one, or None."""
        owner = await self._plane.state.ucloud(ucloud)
        if owner is None or owner.deleting:
            return None
        places = _places(await self._plane.state.platforms(ucloud))
        store = await self._plane.state.store_document(ucloud)
        home = _home(store)
        if store is not None and home is not None:
            places[home] = store.provider
        if len(places) < 2 and not any(name == ucloud for name, _ in self._told):
            return None
        wishes = await self._wishes(ucloud, places, home)
        told = [self._tell(ucloud, places[place], place, wishes[place]) for place in places]
        failed = [one for one in await asyncio.gather(*told, return_exceptions=True) if one]
        for error in failed:
            if not isinstance(error, SupercloudError):
                raise error
        return self._plane.pace.observe_s if failed else self._plane.pace.sweep_s

    async def _wishes(
        self, ucloud: str, places: dict[Place, Entry], home: Place | None
    ) -> dict[Place, TunnelApply]:
        wishes = dict.fromkeys(places, TunnelApply())
        if home is None:
            return wishes
        peers = {
            place: await self._plane.pool.get(ucloud, entry).peer(place[1])
            for place, entry in places.items()
        }
        wishes = dict.fromkeys(places, TunnelApply(objects_from=peers[home]))
        others = sorted(peer.name for place, peer in peers.items() if place != home)
        return wishes | {home: TunnelApply(objects_to=others)}

    async def _tell(self, ucloud: str, entry: Entry, place: Place, wish: TunnelApply) -> None:
        now, name = asyncio.get_running_loop().time(), (ucloud, place)
        last_s, last = self._told.get(name, (0.0, None))
        if last == wish and now - last_s < self._plane.pace.sweep_s:
            return
        provider = self._plane.pool.get(ucloud, entry)
        with contextlib.suppress(NotFound):  # an older host, which has no tunnels
            await self._plane.seam("provider.tunnels", lambda: provider.tunnels(place[1], wish))
        self._told[name] = (now, wish)


def _places(platforms: list[PlatformDocument]) -> dict[Place, Entry]:
    found = [platform.wish for platform in platforms if not platform.deleting]
    return {(provider_key(wish.provider), wish.host): wish.provider for wish in found}


def _home(store: StoreDocument | None) -> Place | None:
    if store is None or store.deleting:
        return None
    return (provider_key(store.provider), store.host)
