"""Where volumes live: on the host of what first uses them, from then on. Pure.

What is refused here is what a volume that there is already cannot become: smaller, of another
format, on another host; and volumes where no provider has any.
"""

from collections.abc import Mapping, Sequence

from supercloud.control.documents import VolumeWish
from supercloud.control.offers import Offer
from supercloud.model.errors import Invalid, NoResources, Unsupported
from supercloud.model.resources import Environment, UCloud, Volume
from supercloud.model.sizes import format_size
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


def homes_of(
    spec: UCloud, placed: Mapping[str, HostKey], kept: Mapping[str, VolumeWish]
) -> dict[str, VolumeWish]:
    """The volumes that are used or there already, each with its home.

    ``placed`` is where the EEs are; a volume that nobody uses is made when somebody does.
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
            homes[volume.name] = VolumeWish(spec=volume, provider=entry, host=there.host)
        elif volume.name in users:
            provider, host = placed[users[volume.name]]
            home = VolumeWish(spec=volume, provider=entries[provider], host=host)
            homes[volume.name] = home
    return homes


def _changes(new: Volume, old: Volume) -> None:
    where = f"volumes.{new.name}"
    if new.size_bytes < old.size_bytes:
        raise Invalid(
            f"found {format_size(new.size_bytes)}, allowed is at least "
            f"{format_size(old.size_bytes)}, which the volume has: none is made smaller",
            where=f"{where}.size",
            hint="copy what is in it to a new, smaller one",
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
