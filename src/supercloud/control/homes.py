"""Where volumes live: on the host of what first uses them, from then on. Pure.

One that is kept on several hosts has the others chosen here, far from each other where there is a
choice. What is refused is what a volume that there is already cannot become: smaller, of another
format, on another host; and volumes where no provider has any.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from supercloud.control.documents import ReplicaWish, VolumeWish
from supercloud.control.offers import Offer
from supercloud.model.errors import Invalid, NoResources, Unsupported
from supercloud.model.resources import Environment, UCloud, Volume
from supercloud.model.sizes import format_size
from supercloud.providers.base import HostCapacity
from supercloud.upper.federation.placement import HostKey

ELSEWHERE = "a volume stays where it is; supercloud volumes lists them, and deletes what you name"


def check_volumes(spec: UCloud, offers: Sequence[Offer], kept: Mapping[str, VolumeWish]) -> None:
    """Raise Invalid, NoResources or Unsupported for what cannot be, at its place."""
    for volume in spec.volumes:
        if volume.name in kept:
            _changes(volume, kept[volume.name].spec)
    for environment in spec.environments:
        if environment.volumes and environment.replicas:
            _offered(environment, offers)
            _reachable(environment, offers, kept)


def with_clones(spec: UCloud, kept: Mapping[str, VolumeWish]) -> dict[str, VolumeWish]:
    """``kept``, and with it the clones that are new: they are where what they are clones of is."""
    found = dict(kept)
    for volume in spec.volumes:
        if volume.clone is None or volume.name in kept:
            continue
        where, source = f"volumes.{volume.name}.clone.of", kept.get(volume.clone.of)
        if source is None or source.others:
            raise Invalid(
                f"found {volume.clone.of!r}, allowed is a volume that there is, on one host",
                where=where,
                hint="supercloud volumes lists them; make it, and its snapshot, before the clone",
            )
        if volume.size_bytes != source.spec.size_bytes:
            raise Invalid(
                f"found a size of {format_size(volume.size_bytes)}, allowed is "
                f"{format_size(source.spec.size_bytes)}, which {volume.clone.of} has",
                where=f"volumes.{volume.name}.size",
                hint="it can grow once it is made",
            )
        found[volume.name] = VolumeWish(spec=volume, provider=source.provider, host=source.host)
    return found


def homes_of(
    spec: UCloud,
    offers: Sequence[Offer],
    placed: Mapping[str, HostKey],
    kept: Mapping[str, VolumeWish],
) -> dict[str, VolumeWish]:
    """The volumes that are used or there already, each with its home.

    ``placed`` is where the EEs are; a volume that nobody uses is made when somebody does.
    NoResources when there are too few hosts to keep it on.
    """
    entries = {entry.name: entry for entry in spec.providers}
    users = {
        use.name: item.name for item in spec.environments if item.replicas for use in item.volumes
    }
    homes = {}
    for volume in spec.volumes:
        there = kept.get(volume.name)
        if there is not None:
            entry = entries.get(there.provider.name, there.provider)
            others = [
                replace(other, provider=entries.get(other.provider.name, other.provider))
                for other in there.others
            ]
            home = VolumeWish(spec=volume, provider=entry, host=there.host, others=others)
            homes[volume.name] = home
        elif volume.name in users:
            provider, host = placed[users[volume.name]]
            others = others_of(volume, (provider, host), offers)
            home = VolumeWish(spec=volume, provider=entries[provider], host=host, others=others)
            homes[volume.name] = home
    for volume in spec.volumes:  # nothing uses a backup: it is where what it is of is
        home_of = homes.get(volume.copy_of)
        if volume.backup and home_of is not None and volume.name not in homes:
            homes[volume.name] = replace(home_of, spec=volume, others=[])
    return homes


def at_home(wish: VolumeWish, place: HostKey) -> VolumeWish:
    """The same volume, used at another of its hosts."""
    before = ReplicaWish(provider=wish.provider, host=wish.host)
    for other in wish.others:
        if (other.provider.name, other.host) == place:
            others = [before if item is other else item for item in wish.others]
            return replace(wish, provider=other.provider, host=other.host, others=others)
    return wish


def reached_home(wish: VolumeWish, whole: Iterable[HostKey], offers: Sequence[Offer]) -> VolumeWish:
    """The same volume, used where it is ``whole`` if its own host is not offered now."""
    offered = {(offer.provider.name, host.name) for offer in offers for host in offer.hosts}
    if not wish.others or (wish.provider.name, wish.host) in offered:
        return wish
    places = sorted(set(whole) & offered)
    return at_home(wish, places[0]) if places else wish


def others_of(volume: Volume, home: HostKey, offers: Sequence[Offer]) -> list[ReplicaWish]:
    """The other hosts that it is kept on: at other providers, in other regions, with much room."""
    chosen: list[ReplicaWish] = []
    if volume.replicas == 1:
        return chosen
    reasons: list[str] = []
    rooms = {}
    for offer in offers:
        lacks = offer.unreachable or _lacks(offer)
        for host in offer.hosts:
            key = (offer.provider.name, host.name)
            if lacks or host.disk_free_bytes < volume.size_bytes:
                free = f"{format_size(host.disk_free_bytes)} of disk are free"
                reasons.append(f"{'/'.join(key)}: {lacks or free}")
            else:
                rooms[key] = (offer, host)
        if offer.unreachable:
            reasons.append(f"{offer.provider.name}: {offer.unreachable}")
    used, regions = {home[0]}, {_region(*rooms[home])} if home in rooms else set()
    left = {key: room for key, room in rooms.items() if key != home}
    while left and len(chosen) + 1 < volume.replicas:
        key = min(left, key=lambda key: _nearness(key, left[key], used, regions))
        offer, host = left.pop(key)
        used.add(key[0])
        regions.add(_region(offer, host))
        chosen.append(ReplicaWish(provider=offer.provider, host=host.name))
    if len(chosen) + 1 < volume.replicas or home not in rooms:
        raise NoResources(
            f"found {volume.replicas}, and there are {len(rooms)} hosts to keep it on"
            + ("".join(f"; {reason}" for reason in reasons)),
            where=f"volumes.{volume.name}.replicas",
            hint="add a provider, or keep it on fewer hosts",
        )
    return chosen


def _nearness(
    key: HostKey, room: tuple[Offer, HostCapacity], used: set[str], regions: set[str]
) -> tuple[bool, bool, int, HostKey]:
    offer, host = room
    return (key[0] in used, _region(offer, host) in regions, -host.disk_free_bytes, key)


def _region(offer: Offer, host: HostCapacity) -> str:
    return host.region or offer.provider.region


def _lacks(offer: Offer) -> str:
    for feature in ("volumes", "tunnel"):
        if reason := offer.features.get(feature, ""):
            return f"it has no {feature}: {reason}"
    return ""


def _changes(new: Volume, old: Volume) -> None:
    where = f"volumes.{new.name}"
    if (new.clone and not old.copy_of) or (new.backup and not old.backup):
        what = "clone" if new.clone else "backup"
        raise Invalid(
            f"found a {what} of {new.copy_of}, and volume {new.name} is there already and has what "
            "was written to it, which is not copied over",
            where=f"{where}.{what}",
            hint="give the copy a name of its own, or delete the volume first",
        )
    if new.size_bytes < old.size_bytes:
        raise Invalid(
            f"found {format_size(new.size_bytes)}, allowed is at least "
            f"{format_size(old.size_bytes)}, which the volume has: none is made smaller",
            where=f"{where}.size",
            hint="copy what is in it to a new, smaller one",
        )
    if new.replicas != old.replicas:
        raise Invalid(
            f"found {new.replicas}, allowed is {old.replicas}, which the volume has",
            where=f"{where}.replicas",
            hint="copy what is in it to a new one",
        )
    if new.format != old.format:
        raise Invalid(
            f"found {new.format}, allowed is {old.format}, which the volume has",
            where=f"{where}.format",
            hint="copy what is in it to a new one",
        )


def _offered(environment: Environment, offers: Sequence[Offer]) -> None:
    """Unsupported when no provider that answers has volumes."""
    reasons = {o.provider.name: o.features.get("volumes", "") for o in offers if not o.unreachable}
    if reasons and all(reasons.values()):
        raise Unsupported(
            f"environment {environment.name} uses volumes: "
            + "; ".join(f"provider {name} has none: {why}" for name, why in reasons.items()),
            hint="add a provider that has volumes, or remove them from the environment",
            where=f"environments.{environment.name}.volumes",
        )


def _reachable(
    environment: Environment, offers: Sequence[Offer], kept: Mapping[str, VolumeWish]
) -> None:
    """All its volumes must be at one host, which is offered."""
    homes = {
        use.name: (kept[use.name].provider.name, kept[use.name].host)
        for use in environment.volumes
        if use.name in kept
    }
    where = f"environments.{environment.name}.volumes"
    if len(set(homes.values())) > 1:
        listed = ", ".join(f"{name} at {'/'.join(home)}" for name, home in homes.items())
        raise NoResources(
            f"its volumes are on several hosts: {listed}", where=where, hint=ELSEWHERE
        )
    offered = {(o.provider.name, host.name) for o in offers for host in o.hosts}
    for name, home in homes.items():
        if home not in offered:
            silent = {o.provider.name: o.unreachable for o in offers}
            why = silent.get(home[0], "the manifest has no such provider") or "it has no such host"
            raise NoResources(
                f"its volume {name} is at {'/'.join(home)}, which cannot be used now: {why}",
                where=where,
                hint=ELSEWHERE,
            )
