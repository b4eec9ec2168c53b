"""Where a U-Cloud's object store lives: on the host of what first uses a bucket, for good. Pure.

There is one, so all buckets of a U-Cloud are on one host, and what uses them is placed there. What
is refused here: buckets where no provider has a store, where the store's host cannot be used, and
more of them than the disk quota has room for.
"""

from collections.abc import Mapping, Sequence

from supercloud.control.documents import StoreWish
from supercloud.control.offers import Offer
from supercloud.model.errors import NoResources, Unsupported
from supercloud.model.resources import Bucket, Environment, UCloud
from supercloud.model.sizes import format_size
from supercloud.providers.base import HostCapacity
from supercloud.upper.federation.placement import HostKey
from supercloud.wire.objects import MIN_QUOTA_BYTES, booked_bytes


def capacity_of(buckets: Sequence[Bucket]) -> int:
    """What a store with these buckets has room for."""
    return max(MIN_QUOTA_BYTES, sum(bucket.quota_bytes for bucket in buckets))


def check_store(spec: UCloud, offers: Sequence[Offer], kept: StoreWish | None) -> None:
    """Raise NoResources or Unsupported for what cannot be, at its place."""
    users = [item for item in spec.environments if item.buckets and item.replicas]
    if users:
        _offered(users[0], offers)
    if kept is not None and spec.buckets:
        _reachable(spec, offers, kept)


def store_of(
    spec: UCloud,
    offers: Sequence[Offer],
    placed: Mapping[str, HostKey],
    kept: StoreWish | None,
) -> StoreWish | None:
    """The store that the U-Cloud is to have; None without buckets, or while nobody uses one.

    ``placed`` is where the EEs are. Buckets that the manifest has no more stay, and count.
    """
    if not spec.buckets:
        return None
    users = [item.name for item in spec.environments if item.buckets and item.replicas]
    entries = {entry.name: entry for entry in spec.providers}
    if kept is not None:
        named = {bucket.name for bucket in spec.buckets}
        others = [bucket for bucket in kept.buckets if bucket.name not in named]
        entry = entries.get(kept.provider.name, kept.provider)
        wish = StoreWish(provider=entry, host=kept.host, buckets=[*spec.buckets, *others])
    elif users:
        provider, host = placed[users[0]]
        wish = StoreWish(provider=entries[provider], host=host, buckets=list(spec.buckets))
    else:
        return None
    _fits(wish, offers, kept)
    return wish


def _offered(environment: Environment, offers: Sequence[Offer]) -> None:
    """Unsupported when no provider that answers has object stores."""
    reasons = {o.provider.name: o.features.get("objects", "") for o in offers if not o.unreachable}
    if reasons and all(reasons.values()):
        raise Unsupported(
            f"environment {environment.name} uses buckets: "
            + "; ".join(f"provider {name} has no store: {why}" for name, why in reasons.items()),
            hint="add a provider that has object stores, or remove the buckets",
            where=f"environments.{environment.name}.buckets",
        )


def _reachable(spec: UCloud, offers: Sequence[Offer], kept: StoreWish) -> None:
    if _host(offers, kept) is None:
        silent = {o.provider.name: o.unreachable for o in offers}
        name = kept.provider.name
        why = silent.get(name, "the manifest has no such provider") or "it has no such host"
        raise NoResources(
            f"the buckets are at {name}/{kept.host}, which cannot be used now: {why}",
            where=f"buckets.{spec.buckets[0].name}",
            hint="buckets stay where they are; supercloud buckets lists them, and deletes what "
            "you name",
        )


def _fits(wish: StoreWish, offers: Sequence[Offer], kept: StoreWish | None) -> None:
    host = _host(offers, wish)
    if host is None:
        return
    booked = booked_bytes(capacity_of(kept.buckets)) if kept else 0
    more = booked_bytes(capacity_of(wish.buckets)) - booked
    if more > host.disk_free_bytes:
        raise NoResources(
            f"the store of all buckets takes {format_size(more + booked)} of the disk quota at "
            f"{wish.provider.name}/{wish.host}, {format_size(host.disk_free_bytes + booked)} "
            "are left for it",
            where=f"buckets.{wish.buckets[0].name}.quota",
            hint="lower the quotas of buckets, or ask the provider for a larger one",
        )


def _host(offers: Sequence[Offer], wish: StoreWish) -> HostCapacity | None:
    for offer in offers:
        for host in offer.hosts:
            if (offer.provider.name, host.name) == (wish.provider.name, wish.host):
                return host
    return None
