"""What ``up`` would change: the difference between two decisions, in words."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from supercloud.control.desire import Decision
from supercloud.control.documents import StoreWish, UCloudDocument, VolumeWish
from supercloud.control.offers import Offer
from supercloud.control.stores import checkpointed
from supercloud.model.durations import format_duration
from supercloud.model.resources import Bucket, Checkpointing, Environment, UCloud, replica_names
from supercloud.wire.api import Change, Plan
from supercloud.wire.checkpoints import BUCKET

_OF_THE_GROUP = ("name", "replicas", "placement")  # what does not make an EE anew


def plan(
    decision: Decision,
    before: UCloudDocument | None,
    offers: Sequence[Offer],
    kept: Mapping[str, VolumeWish] | None = None,
    kept_store: StoreWish | None = None,
    kept_checkpoints: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
) -> Plan:
    """The changes from ``before`` (None: nothing is there) to ``decision``.

    ``kept`` are the volumes and ``kept_store`` the object store that there are, whether ``before``
    has them or not; ``kept_checkpoints`` says of what there are checkpoints, ``shared`` of which
    platforms there can be none before these volumes are attached anew.
    """
    old = before if before is not None and not before.deleting else None
    changes = [
        *_networks(decision.networks, old.networks if old else {}),
        *_platforms(decision, old),
        *_volumes(decision.volumes, old.volumes if old else {}, kept or {}),
        *_buckets(decision, old, kept_store),
        *_environments(decision, old),
        *_checkpoints(decision, old, kept_checkpoints or {}),
    ]
    warnings = [*_warnings(decision, offers), *_attached_before(decision, shared or {})]
    return Plan(ucloud=decision.spec.name, changes=changes, warnings=warnings)


def _networks(new: Mapping[str, str], old: Mapping[str, str]) -> list[Change]:
    return _compare("network", {k: [v] for k, v in new.items()}, {k: [v] for k, v in old.items()})


def _platforms(decision: Decision, old: UCloudDocument | None) -> list[Change]:
    def shown(wishes: Mapping[str, Any]) -> dict[str, list[str]]:
        return {
            name: [
                f"at {wish.provider.name}/{wish.host}",
                f"memory {size_text(wish.size.memory_bytes)}",
                f"cpus {wish.size.cpus}",
            ]
            for name, wish in wishes.items()
        }

    return _compare("platform", shown(decision.platforms), shown(old.platforms if old else {}))


def _environments(decision: Decision, old: UCloudDocument | None) -> list[Change]:
    new_specs, old_specs = _by_replica(decision.spec.environments), {}
    if old is not None:
        old_specs = _by_replica(old.spec.environments)
    changes = []
    for name, spec in new_specs.items():
        subject, place = f"environment/{name}", decision.assignments[name].platform
        if name not in old_specs:
            details = [spec.kind, f"image {spec.image}", f"on {place}"]
            details += [_policy(spec.checkpoint)] if spec.checkpoint else []
            changes.append(Change(action="create", subject=subject, details=details))
            continue
        details = _differences(old_specs[name], spec)
        if old and old.marks.get(spec.image, "") != decision.marks.get(spec.image, ""):
            details += [] if details else [f"content of image {spec.image}"]
        was = old.assignments[name].platform if old and name in old.assignments else ""
        if was != place:
            details.append(f"platform {was} -> {place}")
        if details:
            changes.append(Change(action="change", subject=subject, details=details))
    gone = [name for name in old_specs if name not in new_specs]
    return changes + [Change(action="delete", subject=f"environment/{name}") for name in gone]


def _checkpoints(
    decision: Decision, old: UCloudDocument | None, kept: Mapping[str, str]
) -> list[Change]:
    """Of platforms, which stay what they are; and those that outlive what they are of."""
    new, was = decision.spec.platform.checkpoint, old.spec.platform.checkpoint if old else None
    changes = []
    if new != was:
        details = [_difference("checkpoint", was, new)]
        changes = [
            Change(
                action="change" if old else "create", subject=f"checkpoints/{name}", details=details
            )
            for name in decision.platforms
        ]
    wanted = {
        name for name, spec in _by_replica(decision.spec.environments).items() if spec.checkpoint
    }
    wanted |= decision.platforms.keys() if new is not None else set()
    had = (
        {name for name, spec in _by_replica(old.spec.environments).items() if spec.checkpoint}
        if old
        else set()
    )
    details = ["are kept until supercloud checkpoints delete"]
    return changes + [
        Change(action="change", subject=f"checkpoints/{name}", details=details)
        for name in kept
        if name in had and name not in wanted
    ]


def _policy(policy: Checkpointing | None) -> str:
    if policy is None:
        return "no checkpoints"
    every = f"every {format_duration(policy.every_s)}" if policy.every_s else "when asked for"
    return f"checkpoints {every}, {policy.keep} kept"


def _volumes(
    new: Mapping[str, VolumeWish], old: Mapping[str, VolumeWish], kept: Mapping[str, VolumeWish]
) -> list[Change]:
    changes = []
    for name, wish in new.items():
        subject, before = f"volume/{name}", old.get(name)
        if before is not None:
            details = _volume_differences(before, wish)
            if details:
                changes.append(Change(action="change", subject=subject, details=details))
        elif name in kept:
            details = ["the kept one, with its data", *_volume_details(wish)]
            changes.append(Change(action="change", subject=subject, details=details))
        else:
            details = _volume_details(wish)
            changes.append(Change(action="create", subject=subject, details=details))
    gone = [name for name in old if name not in new]
    details = ["is kept with its data until supercloud volumes delete"]
    return changes + [
        Change(action="change", subject=f"volume/{name}", details=details) for name in gone
    ]


def _buckets(
    decision: Decision, old: UCloudDocument | None, kept: StoreWish | None
) -> list[Change]:
    store = decision.store
    named = _named(decision.spec, store)
    before = _named(old.spec, old.store) if old else {}
    there = {bucket.name: bucket for bucket in kept.buckets} if kept else {}
    changes = []
    for name, bucket in named.items():
        subject = f"bucket/{name}"
        details = [size_text(bucket.quota_bytes)]
        details += [f"at {store.provider.name}/{store.host}"] if store else []
        if name in before:
            details = _bucket_differences(before[name], bucket)
            if details:
                changes.append(Change(action="change", subject=subject, details=details))
        elif name in there:
            details = ["the kept one, with its objects", *details]
            changes.append(Change(action="change", subject=subject, details=details))
        else:
            changes.append(Change(action="create", subject=subject, details=details))
    details = ["is kept with its objects until supercloud buckets delete"]
    gone = [name for name in before if name not in named and name != BUCKET]
    return changes + [
        Change(action="change", subject=f"bucket/{name}", details=details) for name in gone
    ]


def _named(spec: UCloud, store: StoreWish | None) -> dict[str, Bucket]:
    """The buckets of the manifest, and that of checkpoints."""
    names = {bucket.name for bucket in spec.buckets} | {BUCKET}
    return {item.name: item for item in store.buckets if item.name in names} if store else {}


def _bucket_differences(old: Bucket, new: Bucket) -> list[str]:
    return [
        _difference(item.name, before, after)
        for item in fields(new)
        if (before := getattr(old, item.name)) != (after := getattr(new, item.name))
    ]


def _volume_details(wish: VolumeWish) -> list[str]:
    spec = wish.spec
    others = [f"and at {other.provider.name}/{other.host}" for other in wish.others]
    home = f"at {wish.provider.name}/{wish.host}"
    origin = [f"a clone of {spec.clone.of} at {spec.clone.snapshot}"] if spec.clone else []
    origin += [f"a backup of {spec.backup.of}"] if spec.backup else []
    return [size_text(spec.size_bytes), spec.format, home, *others, *origin]


def _volume_differences(old: VolumeWish, new: VolumeWish) -> list[str]:
    return [
        _difference(item.name, before, after)
        for item in fields(new.spec)
        if (before := getattr(old.spec, item.name)) != (after := getattr(new.spec, item.name))
    ]


def _by_replica(environments: Sequence[Environment]) -> dict[str, Environment]:
    return {name: item for item in environments for name in replica_names(item)}


def _differences(old: Environment, new: Environment) -> list[str]:
    found = []
    for item in fields(Environment):
        before, after = getattr(old, item.name), getattr(new, item.name)
        if item.name not in _OF_THE_GROUP and before != after:
            found.append(_difference(item.name, before, after))
    return found


def _difference(name: str, before: Any, after: Any) -> str:
    if name == "env":  # may hold secrets
        return f"env of {', '.join(sorted(before.keys() | after.keys()))}"
    if name == "checkpoint":
        return f"{_policy(before)} -> {_policy(after)}"
    if name == "buckets":
        before, after = ([f"{use.name}:{use.access}" for use in uses] for uses in (before, after))
    if name in ("ports", "volumes"):
        key = "port" if name == "ports" else "name"
        before, after = [getattr(p, key) for p in before], [getattr(p, key) for p in after]
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')} {size_text(before)} -> {size_text(after)}"
    return f"{name} {before} -> {after}"


def _compare(kind: str, new: Mapping[str, list[str]], old: Mapping[str, list[str]]) -> list[Change]:
    changes = []
    for name, details in new.items():
        if name not in old:
            changes.append(Change(action="create", subject=f"{kind}/{name}", details=details))
        elif old[name] != details:
            changed = [f"{a} -> {b}" for a, b in zip(old[name], details, strict=True) if a != b]
            changes.append(Change(action="change", subject=f"{kind}/{name}", details=changed))
    gone = [name for name in old if name not in new]
    return changes + [Change(action="delete", subject=f"{kind}/{name}") for name in gone]


def _warnings(decision: Decision, offers: Sequence[Offer]) -> list[str]:
    used = {wish.provider.name for wish in decision.platforms.values()}
    warnings = [
        f"volume {volume.name} is used by no environment: it is made when one does"
        for volume in decision.spec.volumes
        if volume.name not in decision.volumes
    ]
    if decision.spec.buckets and decision.store is None:
        warnings.append("buckets are used by no environment: they are made when one does")
    for offer in offers:
        name = offer.provider.name
        if offer.unreachable:
            warnings.append(f"provider {name} cannot be reached: {offer.unreachable}")
        if name not in used:
            continue
        for feature, reason in sorted(offer.features.items()):
            asked = {
                "volumes": decision.spec.volumes,
                "objects": decision.spec.buckets,
                "tunnel": False,  # what needs one is refused
                "checkpoints": checkpointed(decision.spec),
            }
            if reason and asked.get(feature, True):
                warnings.append(f"provider {name} has no {feature}: {reason}")
        warnings += _disagreements(offer)
    return warnings


def _attached_before(decision: Decision, shared: Mapping[str, str]) -> list[str]:
    """What stands in the way of checkpoints of platforms, and stays while somebody uses it."""
    if decision.spec.platform.checkpoint is None:
        return []
    name = decision.spec.name
    return [
        f"platform {platform}: no checkpoint of it can be taken yet, for volume {volume} was "
        "attached before they were wished for, and could not be restored with it; to have it "
        f"attached anew: supercloud down {name}, then up again"
        for volume, platform in sorted(shared.items())
        if volume in decision.volumes and platform in decision.platforms
    ]


def _disagreements(offer: Offer) -> list[str]:
    found = []
    for what in ("region", "jurisdiction"):
        said = getattr(offer.provider, what)
        for host in offer.hosts:
            own = getattr(host, what)
            if said and own and own != said:
                found.append(
                    f"host {offer.provider.name}/{host.name} says that its {what} is {own}, "
                    f"the manifest says {said}; the host's word is taken"
                )
    return found


def size_text(size_bytes: int) -> str:
    """``64MiB``, ``1GiB``: the largest unit that divides the size."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"
