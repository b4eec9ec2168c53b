"""Where a U-Cloud's object store lives: on the host of what first uses a bucket, for good. Pure.

There is one, so all buckets of a U-Cloud are on one host, and what uses them is placed there.
Checkpoints are in a bucket of it, too. What is refused here: buckets and checkpoints where no
provider has a store, where the store's host cannot be used, and more of them than the disk quota
has room for.
"""

from collections.abc import Mapping, Sequence

from supercloud.control.documents import StoreWish
from supercloud.control.offers import Offer
from supercloud.model.errors import Invalid, NoResources, Unsupported
from supercloud.model.resources import GIB, Bucket, Environment, UCloud, replica_names
from supercloud.model.sizes import format_size
from supercloud.providers.base import HostCapacity
from supercloud.upper.federation.placement import HostKey
from supercloud.wire.checkpoints import BUCKET
from supercloud.wire.objects import MIN_QUOTA_BYTES, booked_bytes


def checkpointed(spec: UCloud) -> list[Environment]:
    """The environments of which, or of whose platform, checkpoints are taken."""
    whole = spec.platform.checkpoint is not None
    return [item for item in spec.environments if (whole or item.checkpoint) and item.replicas]


def users_of(spec: UCloud) -> list[Environment]:
    """The environments that need the store, by buckets or by checkpoints, if they have replicas."""
    buckets = [item for item in spec.environments if item.buckets and item.replicas]
    return buckets + [item for item in checkpointed(spec) if not item.buckets]


def buckets_wanted(spec: UCloud, kept: StoreWish | None) -> list[Bucket]:
    """Those of the manifest, and the one of checkpoints, which never becomes smaller."""
    if not checkpointed(spec):
        return list(spec.buckets)
    had = [bucket.quota_bytes for bucket in kept.buckets if bucket.name == BUCKET] if kept else []
    quota_bytes = spec.checkpoint.capacity_bytes or max(_enough_bytes(spec), *had, 0)
    return [*spec.buckets, Bucket(name=BUCKET, quota_bytes=quota_bytes)]


def _enough_bytes(spec: UCloud) -> int:
    """Three times all that is to be checkpointed, in whole GiB: what a store has at most of it."""
    memory_bytes = sum(
        item.memory_bytes * item.replicas for item in spec.environments if item.checkpoint
    )
    if spec.platform.checkpoint is not None:
        memory_bytes += spec.platform.memory_bytes
    return -(-3 * memory_bytes // GIB) * GIB


def capacity_of(buckets: Sequence[Bucket]) -> int:
    """What a store with these buckets has room for."""
    return max(MIN_QUOTA_BYTES, sum(bucket.quota_bytes for bucket in buckets))


def why_no_store(spec: UCloud, offer: Offer, host: HostCapacity) -> str:
    """Why the U-Cloud's object store cannot be made there, or ``""``."""
    if why := offer.features.get("objects", ""):
        return f"its provider has none: {why}"
    return spec.services.objects.refused(
        offer.provider.name,
        host.region or offer.provider.region,
        host.jurisdiction or offer.provider.jurisdiction,
    )


def check_store(spec: UCloud, offers: Sequence[Offer], kept: StoreWish | None) -> None:
    """Raise NoResources or Unsupported for what cannot be, at its place."""
    users = users_of(spec)
    if users:
        _offered(users[0], offers)
    for environment in checkpointed(spec)[:1]:
        _takes(environment, offers)
    if kept is not None and (spec.buckets or users):
        _reachable(spec, offers, kept)


def check_names(spec: UCloud, platforms: Sequence[str], kept: Mapping[str, str]) -> None:
    """Invalid for an EE that has the name of a platform: their checkpoints are told apart by it.

    ``kept`` says of what there are checkpoints, by name: ``environment`` or ``platform``.
    """
    whole = set(platforms) if spec.platform.checkpoint is not None else set()
    taken = whole | {name for name, of in kept.items() if of == "platform"}
    for item in spec.environments:
        if clash := taken.intersection(replica_names(item)):
            raise Invalid(
                f"found {min(clash)!r}, the name of a platform of which there are checkpoints",
                where=f"environments.{item.name}.name",
            )
    if clash := whole.intersection(name for name, of in kept.items() if of == "environment"):
        raise Invalid(
            f"there are checkpoints of an environment {min(clash)!r}, the name of a platform",
            where="platform.checkpoint",
            hint=f"supercloud checkpoints delete {spec.name}/{min(clash)}",
        )


def store_of(
    spec: UCloud,
    offers: Sequence[Offer],
    placed: Mapping[str, HostKey],
    kept: StoreWish | None,
) -> StoreWish | None:
    """The store that the U-Cloud is to have; None without buckets, or while nobody uses one.

    ``placed`` is where the EEs are. Buckets that the manifest has no more stay, and count.
    """
    wanted = buckets_wanted(spec, kept)
    if not wanted:
        return None
    users = [item.name for item in users_of(spec) if _may_hold(spec, offers, placed[item.name])]
    entries = {entry.name: entry for entry in spec.providers}
    if kept is not None:
        named = {bucket.name for bucket in wanted} | {BUCKET}
        others = [bucket for bucket in kept.buckets if bucket.name not in named]
        entry = entries.get(kept.provider.name, kept.provider)
        wish = StoreWish(provider=entry, host=kept.host, buckets=[*wanted, *others])
    elif users:
        provider, host = placed[users[0]]
        wish = StoreWish(provider=entries[provider], host=host, buckets=wanted)
    else:
        return None
    _fits(wish, offers, kept)
    return wish


def _offered(environment: Environment, offers: Sequence[Offer]) -> None:
    """Unsupported when no provider that answers has object stores."""
    reasons = {o.provider.name: o.features.get("objects", "") for o in offers if not o.unreachable}
    if reasons and all(reasons.values()):
        what = "buckets" if environment.buckets else "checkpoints"
        raise Unsupported(
            f"environment {environment.name} uses {what}: "
            + "; ".join(f"provider {name} has no store: {why}" for name, why in reasons.items()),
            hint=f"add a provider that has object stores, or remove the {what}",
            where=_where(environment) if what == "checkpoints" else _buckets_of(environment),
        )


def _takes(environment: Environment, offers: Sequence[Offer]) -> None:
    """Unsupported when no provider that answers can take checkpoints and remove them."""
    answers = [offer for offer in offers if not offer.unreachable]
    reasons = {o.provider.name: o.features.get("checkpoints", "") for o in answers}
    if reasons and all(reasons.values()):
        raise Unsupported(
            f"environment {environment.name} is to be checkpointed: "
            + "; ".join(f"provider {name} cannot: {why}" for name, why in reasons.items()),
            hint="add a provider that has checkpoints, or remove `checkpoint`",
            where=_where(environment),
        )


def _where(environment: Environment) -> str:
    inner = environment.checkpoint is not None
    return f"environments.{environment.name}.checkpoint" if inner else "platform.checkpoint"


def _buckets_of(environment: Environment) -> str:
    return f"environments.{environment.name}.buckets"


def _reachable(spec: UCloud, offers: Sequence[Offer], kept: StoreWish) -> None:
    offer, host = _host(offers, kept)
    if offer is not None and host is not None and (why := why_no_store(spec, offer, host)):
        raise Invalid(
            f"{why}, and the object store is at {kept.provider.name}/{kept.host}",
            where="services.objects",
            hint="a store is not moved: leave the wish out, or delete its buckets and checkpoints "
            "first (supercloud buckets, supercloud checkpoints)",
        )
    if host is None:
        silent = {o.provider.name: o.unreachable for o in offers}
        name = kept.provider.name
        why = silent.get(name, "the manifest has no such provider") or "it has no such host"
        raise NoResources(
            f"the object store is at {name}/{kept.host}, which cannot be used now: {why}",
            where=f"buckets.{spec.buckets[0].name}" if spec.buckets else _where(users_of(spec)[0]),
            hint="buckets and checkpoints stay where they are; supercloud buckets and supercloud "
            "checkpoints list them, and delete what you name",
        )


def _fits(wish: StoreWish, offers: Sequence[Offer], kept: StoreWish | None) -> None:
    _, host = _host(offers, wish)
    if host is None:
        return
    booked = booked_bytes(capacity_of(kept.buckets)) if kept else 0
    more = booked_bytes(capacity_of(wish.buckets)) - booked
    own = wish.buckets[0].name == BUCKET
    if more > host.disk_free_bytes:
        raise NoResources(
            f"the store of all buckets takes {format_size(more + booked)} of the disk quota at "
            f"{wish.provider.name}/{wish.host}, {format_size(host.disk_free_bytes + booked)} "
            "are left for it",
            where="checkpoint.capacity" if own else f"buckets.{wish.buckets[0].name}.quota",
            hint="lower the quotas of buckets and the capacity of checkpoints, or ask the provider "
            "for a larger quota",
        )


def _may_hold(spec: UCloud, offers: Sequence[Offer], place: HostKey) -> bool:
    offer, host = _find(offers, place)
    return offer is None or host is None or not why_no_store(spec, offer, host)


def _host(
    offers: Sequence[Offer], wish: StoreWish
) -> tuple[Offer, HostCapacity] | tuple[None, None]:
    return _find(offers, (wish.provider.name, wish.host))


def _find(
    offers: Sequence[Offer], place: HostKey
) -> tuple[Offer, HostCapacity] | tuple[None, None]:
    for offer in offers:
        for host in offer.hosts:
            if (offer.provider.name, host.name) == place:
                return offer, host
    return None, None
