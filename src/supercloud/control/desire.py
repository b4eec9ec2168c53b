"""From a manifest, the hosts as they are, and what was decided before, to the whole decision.

Pure. Everything that can be refused is refused here, before anything is touched.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from supercloud.control import allot
from supercloud.control.documents import (
    Assignment,
    PlatformWish,
    StoreWish,
    UCloudDocument,
    VolumeWish,
)
from supercloud.control.homes import check_volumes, homes_of, with_clones
from supercloud.control.kept import Place
from supercloud.control.offers import Offer
from supercloud.control.stores import check_names, check_store, store_of, why_no_store
from supercloud.model.errors import NoResources
from supercloud.model.resources import PlatformSize, Provider, UCloud
from supercloud.providers.base import HostCapacity
from supercloud.upper.federation.placement import Host, HostKey, instances_of, place


@dataclass(frozen=True, slots=True)
class Decision:
    """What a U-Cloud is to be, in every detail."""

    spec: UCloud
    networks: dict[str, str]
    platforms: dict[str, PlatformWish]
    assignments: dict[str, Assignment]
    marks: dict[str, str]  # of images, by reference
    volumes: dict[str, VolumeWish] = field(default_factory=dict)
    store: StoreWish | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """An EE goes to ``provider``, and comes back to its ``place`` in the network."""

    provider: str
    place: Place | None


def _back(move: Move | None) -> Place | None:
    return move.place if move is not None else None


def provider_key(provider: Provider) -> str:
    """A name for this entry that changes when it means another provider."""
    return f"{provider.name}-{_digest(provider)[:8]}"


def platform_name(provider: Provider, host: str, size: PlatformSize) -> str:
    """The deterministic name of the platform of that size on that host."""
    readable = host if host.startswith(provider.name) else f"{provider.name}-{host}"
    return f"{readable[:50].strip('-')}-{_digest([provider, host, size])[:8]}"


_KEY = "checkpoint:"


def decide(
    spec: UCloud,
    offers: Sequence[Offer],
    before: UCloudDocument | None,
    taken: Iterable[str],
    marks: dict[str, str],
    kept: Mapping[str, VolumeWish] | None = None,
    kept_store: StoreWish | None = None,
    kept_checkpoints: Mapping[str, str] | None = None,
    engines: Mapping[HostKey, Mapping[str, str]] | None = None,
    moves: Mapping[str, Move] | None = None,
) -> Decision:
    """The decision for ``spec``; ``taken`` are network ranges of other U-Clouds.

    ``marks`` are those of the images as they are now, ``kept`` the volumes that there are, and
    ``kept_store`` the object store. ``kept_checkpoints`` says of what there are checkpoints: of an
    ``environment`` or a ``platform``. ``engines`` is what platforms said that they have.

    Raises NoResources, saying of each host why not; Invalid and Unsupported for volumes.
    """
    kept, moves = with_clones(spec, kept or {}), moves or {}
    check_volumes(spec, offers, kept)
    check_store(spec, offers, kept_store)
    platforms = before.platforms if before else {}
    assignments = before.assignments if before else {}
    networks = allot.ranges(spec.networks, before.networks if before else {}, taken)
    hosts = _hosts(spec, offers, platforms, engines or {})
    placed = _place(spec, offers, hosts, assignments, platforms, kept, kept_store, moves)
    wishes = _wishes(spec, offers, set(placed.values()), platforms, networks)
    check_names(spec, [wish.name for wish in wishes.values()], kept_checkpoints or {})
    addresses = allot.Addresses(networks, assignments)
    return Decision(
        spec=spec,
        networks=networks,
        platforms={wish.name: wish for wish in wishes.values()},
        assignments={
            item.name: addresses.assign(
                item.name, item.environment, wishes[placed[item.name]], _back(moves.get(item.name))
            )
            for item in instances_of(spec.environments)
        },
        marks=marks,
        volumes=homes_of(spec, offers, placed, kept),
        store=store_of(spec, offers, placed, kept_store),
    )


def _place(
    spec: UCloud,
    offers: Sequence[Offer],
    hosts: Sequence[Host],
    assignments: Mapping[str, Assignment],
    platforms: Mapping[str, PlatformWish],
    kept: Mapping[str, VolumeWish],
    store: StoreWish | None,
    moves: Mapping[str, Move],
) -> dict[str, HostKey]:
    standing = {
        name: (platforms[item.platform].provider.name, platforms[item.platform].host)
        for name, item in assignments.items()
        if item.platform in platforms and name not in moves
    }
    only = {name: move.provider for name, move in moves.items()}
    whole = spec.platform.checkpoint is not None
    volumes = {name: (wish.provider.name, wish.host) for name, wish in kept.items()}
    try:
        home = (store.provider.name, store.host) if store else None
        return place(spec.environments, hosts, standing, volumes, home, only=only, platforms=whole)
    except NoResources as error:
        silent = "; ".join(f"{o.provider.name}: {o.unreachable}" for o in offers if o.unreachable)
        if silent and not hosts:
            raise NoResources(
                f"no provider can be reached: {silent}",
                hint="see that its host runs, and that you are enrolled there (supercloud ca)",
                where=error.where,
            ) from error
        if silent:
            error.message += f"; not reachable: {silent}"
            error.args = (error.message,)
        raise


def _hosts(
    spec: UCloud,
    offers: Sequence[Offer],
    platforms: Mapping[str, PlatformWish],
    engines: Mapping[HostKey, Mapping[str, str]],
) -> list[Host]:
    found = []
    for offer in offers:
        for host in offer.hosts:
            name = platform_name(offer.provider, host.name, spec.platform.size)
            found.append(
                Host(
                    provider=offer.provider.name,
                    name=host.name,
                    region=host.region or offer.provider.region,
                    jurisdiction=host.jurisdiction or offer.provider.jurisdiction,
                    size=spec.platform.size,
                    standing=name in platforms,
                    volumes=offer.features.get("volumes", ""),
                    objects=why_no_store(spec, offer, host),
                    tunnel=offer.features.get("tunnel", "nothing joins it to other hosts"),
                    checkpoints=_checkpoints(
                        offer, engines.get((offer.provider.name, host.name), {})
                    ),
                    refusal=_refusal(spec.platform.size, host, _freed(offer, host, platforms)),
                )
            )
    return found


def _checkpoints(offer: Offer, engines: Mapping[str, str]) -> dict[str, str]:
    """Why no checkpoints can be taken there, of each kind: what the host and a platform say."""
    unable = offer.features.get("checkpoints", "")
    said = {key.partition(":")[2]: why for key, why in engines.items() if key.startswith(_KEY)}
    return {kind: unable or said.get(kind, "") for kind in ("container", "vm", "platform")}


def _freed(
    offer: Offer, host: HostCapacity, platforms: Mapping[str, PlatformWish]
) -> list[PlatformSize]:
    """The sizes of our platforms of another size there: a new one would replace them."""
    return [
        wish.size
        for wish in platforms.values()
        if wish.host == host.name and wish.provider.name == offer.provider.name
    ]


def _refusal(size: PlatformSize, host: HostCapacity, freed: Sequence[PlatformSize]) -> str:
    """Why no new platform fits on the host; "" when one does."""
    if not host.images:
        return "it holds no L1 image"
    memory_bytes = host.memory_free_bytes + sum(item.memory_bytes for item in freed)
    disk_bytes = host.disk_free_bytes + sum(item.scratch_bytes for item in freed)
    cpus = host.cpus_free + sum(item.cpus for item in freed)
    if host.platforms_free + len(freed) < 1:
        return "its quota of platforms is used up"
    if size.memory_bytes > memory_bytes:
        return (
            f"a platform of {size.memory_bytes >> 20} MiB does not fit, "
            f"{memory_bytes >> 20} MiB are free"
        )
    if size.scratch_bytes > disk_bytes:
        return (
            f"a scratch disk of {size.scratch_bytes >> 20} MiB does not fit, "
            f"{disk_bytes >> 20} MiB are free"
        )
    if size.cpus > cpus:
        return f"a platform of {size.cpus} processors does not fit, {cpus:g} are free"
    return ""


def _wishes(
    spec: UCloud,
    offers: Sequence[Offer],
    used: set[HostKey],
    before: Mapping[str, PlatformWish],
    networks: Mapping[str, str],
) -> dict[HostKey, PlatformWish]:
    limit = allot.platforms_in(networks.values())
    numbers = {wish.index for wish in before.values()}
    wishes: dict[HostKey, PlatformWish] = {}
    for offer in offers:
        for host in offer.hosts:
            key = (offer.provider.name, host.name)
            if key not in used:
                continue
            name = platform_name(offer.provider, host.name, spec.platform.size)
            number = allot.index(name, before, numbers, limit)
            numbers.add(number)
            new = _wish(spec, offer, host, name, number)
            # a platform keeps the image that it runs, until its host does not hold that any more
            old = before[name].image if name in before else ""
            wishes[key] = replace(new, image=old) if old in host.images else new
    return wishes


def _wish(spec: UCloud, offer: Offer, host: HostCapacity, name: str, number: int) -> PlatformWish:
    return PlatformWish(
        name=name,
        provider=offer.provider,
        host=host.name,
        region=host.region or offer.provider.region,
        jurisdiction=host.jurisdiction or offer.provider.jurisdiction,
        index=number,
        size=spec.platform.size,
        image=host.images[0] if host.images else "",
    )


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()
