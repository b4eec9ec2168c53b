"""What the API shows of the documents: rows, steps, summaries (``wire.api``)."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from supercloud.control import held
from supercloud.control.controllers.plane import Seen, SeenStore
from supercloud.control.controllers.usage import users_of
from supercloud.control.documents import (
    CheckpointsDocument,
    EnvironmentDocument,
    PlatformDocument,
    ReplicaDocument,
    Step,
    StoreDocument,
    UCloudDocument,
    VolumeDocument,
    environment_key,
)
from supercloud.control.kept import KeptCheckpoint
from supercloud.control.rates import LATEST_S
from supercloud.control.seals import WINDOW_S
from supercloud.control.specs import host_port
from supercloud.model.errors import BadState, to_wire
from supercloud.wire import api
from supercloud.wire.mirrors import MirrorStatus
from supercloud.wire.objects import booked_bytes
from supercloud.wire.volumes import VolumeFigures

MESSAGES = {
    ("platform", "create"): "create the platform",
    ("platform", "boot"): "boot it and wait for its agent",
    ("volume", "open"): "open it",
    ("volume", "attach"): "attach it to its platform",
    ("objects", "start"): "start the object store",
    ("checkpoint", "take"): "take a checkpoint",
    ("environment", "image"): "prepare the image",
    ("environment", "start"): "start it",
}
StepState = Literal["waiting", "running", "done", "failed"]


def ucloud_view(
    ucloud: UCloudDocument,
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    fractions: Mapping[str, float],
    volumes: Sequence[VolumeDocument] = (),
    seen: Mapping[tuple[str, str], Seen] | None = None,
    store: StoreDocument | None = None,
    told: SeenStore | None = None,
    checkpoints: Sequence[CheckpointsDocument] = (),
) -> api.UCloudView:
    """A U-Cloud with all that is in it."""
    by_name = {platform.name: platform for platform in platforms}
    wanted = [volume for volume in volumes if volume.name in ucloud.volumes]
    kept = store if ucloud.store else None
    states = {item.name: item for item in checkpoints if item.of == "environment"}
    return api.UCloudView(
        name=ucloud.name,
        state=ucloud.state,
        generation=ucloud.generation,
        platforms=[platform_row(item) for item in platforms],
        environments=[
            environment_row(item, by_name, states.get(item.name)) for item in environments
        ],
        steps=_steps(platforms, environments, fractions, wanted, kept),
        error=_error(platforms, environments, wanted, kept),
        volumes=[volume_row(item, environments, (seen or {}).get(id_of(item))) for item in volumes],
        buckets=bucket_rows(store, environments, told) if store else [],
    )


def platform_row(platform: PlatformDocument) -> api.PlatformRow:
    """A row of the platforms."""
    wish = platform.wish
    return api.PlatformRow(
        name=platform.name,
        provider=wish.provider.name,
        host=wish.host,
        state=platform.state,
        reason=platform.reason,
        region=wish.region,
        jurisdiction=wish.jurisdiction,
        accelerator=platform.accelerator,
        created_s=platform.created_s,
    )


def environment_row(
    item: EnvironmentDocument,
    platforms: Mapping[str, PlatformDocument],
    kept: CheckpointsDocument | None = None,
) -> api.EnvironmentRow:
    """A row of ``ps``; ``kept`` are its checkpoints."""
    last = kept.kept[-1] if kept is not None and kept.kept else None
    platform = platforms.get(item.assignment.platform)
    wish = platform.wish if platform else None
    return api.EnvironmentRow(
        ucloud=item.ucloud,
        name=item.name,
        environment=item.spec.name,
        kind=item.spec.kind,
        state=item.state,
        reason=item.reason,
        provider=wish.provider.name if wish else "",
        host=wish.host if wish else "",
        platform=item.assignment.platform,
        address=item.assignment.address,
        urls=urls(item, platform) if platform else [],
        restarts=item.restarts,
        created_s=item.created_s,
        started_s=item.started_s,
        engine=item.engine,
        image=item.spec.image,
        checkpoint=last.sequence if last else 0,
        checkpoint_s=last.taken_ms / 1000 if last else 0.0,
    )


def id_of(volume: VolumeDocument) -> tuple[str, str]:
    """U-Cloud and name."""
    return volume.ucloud, volume.name


def volume_row(
    volume: VolumeDocument, environments: Sequence[EnvironmentDocument], seen: Seen | None
) -> api.VolumeRow:
    """A row of ``volumes``; ``seen`` is what its host last said of it."""
    return api.VolumeRow(**_volume_fields(volume, environments, seen))


def volume_view(
    volume: VolumeDocument,
    environments: Sequence[EnvironmentDocument],
    checkpoints: Sequence[CheckpointsDocument],
    seen: Seen | None,
) -> api.VolumeView:
    """A volume in all detail."""
    shown = _volume_fields(volume, environments, seen)
    return api.VolumeView(
        **shown,
        iops=volume.spec.iops,
        bytes_per_s=volume.spec.bytes_per_s,
        figures=seen.status.figures if seen else VolumeFigures(),
        seal=volume.seal,
        undetected_rollback=rollback_text(shown["seal_age_s"]),
        halted=volume.halted,
        found=volume.found,
        purposes=held.purposes(volume, checkpoints),
        wrapping_key=volume.wrapped_key.partition(":")[0],
        generation=volume.generation,
        copy_of=volume.spec.copy_of,
        copied_s=volume.copied_s,
        waits_for=seen.status.mirror.closed_by if seen and seen.status.mirror else "",
        steps=[_step(f"volume/{volume.name}", "volume", step, -1.0) for step in volume.steps],
    )


def _volume_fields(
    volume: VolumeDocument, environments: Sequence[EnvironmentDocument], seen: Seen | None
) -> dict[str, Any]:
    return {
        "ucloud": volume.ucloud,
        "name": volume.name,
        "state": volume.state,
        "reason": volume.reason or volume.waits,
        "size_bytes": volume.spec.size_bytes,
        "format": volume.spec.format,
        "provider": volume.provider.name,
        "host": volume.host,
        "platform": volume.platform,
        "slot": volume.slot,
        "mode": volume.mode,
        "used_by": [item.name for item in users_of(volume.name, environments)],
        "stored_bytes": volume.stored_bytes,
        "snapshots": volume.snapshots,
        "seal_age_s": seal_age_s(volume, seen),
        "evidence": volume.evidence,
        "created_s": volume.created_s,
        "replicas": replica_rows(volume, seen.status.mirror if seen else None),
        "rates": rates_of(volume, seen),
    }


def rates_of(volume: VolumeDocument, seen: Seen | None) -> api.VolumeRates | None:
    """What goes through it; None when that is not known (any more)."""
    if seen is None or seen.gauge is None or not volume.opened:
        return None
    return seen.gauge.rates if time.time() - seen.time_s <= LATEST_S else None


def replica_rows(volume: VolumeDocument, told: MirrorStatus | None) -> list[api.ReplicaRow]:
    """Its replicas, by name; ``told`` is what their mirror last said of them."""
    if not volume.others:
        return []
    standing = {one.replica: one for one in told.replicas} if told and volume.mirroring else {}
    rows = []
    for replica in volume.replicas:
        now = standing.get(replica.replica)
        kept = "in_sync" if replica.in_sync else "stale"
        refused = replica.refused if isinstance(replica, ReplicaDocument) else ""
        rows.append(
            api.ReplicaRow(
                replica=replica.replica,
                provider=replica.provider.name,
                host=replica.host,
                state="refused" if refused else now.standing if now else kept,
                source=replica is volume,
                connected=bool(now and now.connected),
                lacks_bytes=now.lacks_bytes if now else -1,
                reason=refused or (now.reason if now and now.reason else replica.reason),
            )
        )
    return sorted(rows, key=lambda row: row.replica)


def bucket_rows(
    store: StoreDocument,
    environments: Sequence[EnvironmentDocument],
    seen: SeenStore | None,
) -> list[api.BucketRow]:
    """Rows of ``buckets``; ``seen`` is what the store's host last said."""
    return [
        api.BucketRow(**_bucket_fields(store, name, environments, seen))
        for name in sorted(store.buckets)
    ]


def bucket_view(
    store: StoreDocument,
    name: str,
    environments: Sequence[EnvironmentDocument],
    seen: SeenStore | None,
) -> api.BucketView:
    """A bucket in all detail, with the store that it is in."""
    status = seen.status if seen else None
    age_s = -1.0
    if store.running and seen is not None:
        age_s = round(max(0.0, time.time() - seen.time_s), 1)
    return api.BucketView(
        **_bucket_fields(store, name, environments, seen),
        store_capacity_bytes=status.capacity_bytes if status else 0,
        store_booked_bytes=booked_bytes(status.capacity_bytes) if status else 0,
        store_disk_bytes=status.disk_bytes if status else 0,
        position=store.position,
        position_age_s=age_s,
        undetected_rollback=rollback_text(age_s),
        wrapping_key=store.wrapped_key.partition(":")[0],
    )


def _bucket_fields(
    store: StoreDocument,
    name: str,
    environments: Sequence[EnvironmentDocument],
    seen: SeenStore | None,
) -> dict[str, Any]:
    bucket = store.buckets[name]
    spec, status = bucket.spec, seen.status if seen else None
    usage = next((row for row in status.buckets if row.name == name), None) if status else None
    return {
        "ucloud": store.ucloud,
        "name": name,
        "state": "deleting" if bucket.deleting or store.deleting else store.state,
        "reason": store.reason,
        "quota_bytes": spec.quota_bytes,
        "versioning": spec.versioning,
        "expire_days": spec.expire_days,
        "provider": store.provider.name,
        "host": store.host,
        "used_by": {
            item.name: use.access
            for item in environments
            if not item.deleting
            for use in item.spec.buckets
            if use.name == name
        },
        "used_bytes": usage.charged_bytes if usage else -1,
        "entries": usage.entries if usage else -1,
        "created_s": store.created_s,
    }


def checkpoints_row(
    document: CheckpointsDocument, due_s: float | None, restoring: int
) -> api.CheckpointsRow:
    """A row of ``checkpoints``; ``due_s`` is when the next one is due."""
    return api.CheckpointsRow(
        ucloud=document.ucloud,
        name=document.name,
        of=document.of,
        state=document.state,
        reason=document.reason,
        hint=document.hint,
        every_s=document.policy.every_s if document.policy else 0,
        keep=document.policy.keep if document.policy else 0,
        kept=len(document.kept),
        last=document.kept[-1].sequence if document.kept else 0,
        last_s=document.kept[-1].taken_ms / 1000 if document.kept else 0.0,
        next_s=due_s or 0.0,
        new_bytes=sum(item.new_bytes for item in document.kept),
        failures=document.failures,
        restoring=restoring,
    )


def checkpoints_view(
    document: CheckpointsDocument, row: api.CheckpointsRow, shape: str
) -> api.CheckpointsView:
    """The checkpoints of an EE or platform, which now is of ``shape`` ("": that is not known)."""
    task, subject = document.task, f"{document.of}/{document.name}"
    return api.CheckpointsView(
        **{name: getattr(row, name) for name in row.__slots__},
        checkpoints=[_checkpoint_row(item, shape) for item in reversed(document.kept)],
        task=api.CheckpointTask(id=task.id, done=task.done, number=task.sequence, error=task.error)
        if task
        else None,
        steps=[_step(subject, "checkpoint", step, -1.0) for step in document.steps],
    )


def _checkpoint_row(kept: KeptCheckpoint, shape: str) -> api.CheckpointRow:
    other = bool(shape) and kept.shape != shape
    return api.CheckpointRow(
        number=kept.sequence,
        taken_s=kept.taken_ms / 1000,
        engine=kept.engine,
        provider=kept.provider,
        host=kept.host,
        pause_ms=kept.pause_ms,
        base=kept.base,
        memory_bytes=kept.memory_bytes,
        dirty_bytes=kept.dirty_bytes,
        disk_bytes=kept.disk_bytes,
        new_bytes=kept.new_bytes,
        details=kept.details,
        restorable="what it is of was changed since" if other else "",
        snapshots=kept.snapshots,
    )


def seal_age_s(volume: VolumeDocument, seen: Seen | None) -> float:
    """How long ago its host showed its seal; -1 while it is not open."""
    if not volume.opened or not volume.seal.root:
        return -1.0
    return round(max(0.0, time.time() - (seen.time_s if seen else volume.sealed_s)), 1)


def rollback_text(age_s: float) -> str:
    """How far back a copy of the volume may be that would pass for it."""
    if age_s < 0:
        return "none: its last state is known"
    return f"at most {max(WINDOW_S, age_s):g} s"


def mounted(
    item: EnvironmentDocument,
    volumes: Mapping[str, VolumeDocument],
    seen: Mapping[tuple[str, str], Seen],
) -> list[api.Mounted]:
    """The volumes of an EE."""
    found = []
    for use in item.spec.volumes:
        if (volume := volumes.get(use.name)) is None:
            continue
        age_s = seal_age_s(volume, seen.get(id_of(volume)))
        found.append(
            api.Mounted(
                name=use.name,
                path=use.path,
                read_only=use.read_only,
                state=volume.state,
                size_bytes=volume.spec.size_bytes,
                slot=volume.slot,
                mode=volume.mode,
                seal_age_s=age_s,
                undetected_rollback=rollback_text(age_s),
                replicas=replica_rows(volume, _mirror_in(seen.get(id_of(volume)))),
                rates=rates_of(volume, seen.get(id_of(volume))),
            )
        )
    return found


def _mirror_in(seen: Seen | None) -> MirrorStatus | None:
    return seen.status.mirror if seen else None


def urls(item: EnvironmentDocument, platform: PlatformDocument) -> list[str]:
    """Where its published ports are reached: ``http://`` for TCP, ``udp://`` for UDP."""
    found = []
    for port in item.spec.ports:
        number = host_port(item, platform, port.port, port.protocol)
        if port.publish and number and platform.address:
            host = f"[{platform.address}]" if ":" in platform.address else platform.address
            scheme = "http" if port.protocol == "tcp" else "udp"
            found.append(f"{scheme}://{host}:{number}")
    return found


def _steps(
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    fractions: Mapping[str, float],
    volumes: Sequence[VolumeDocument],
    store: StoreDocument | None,
) -> list[api.Step]:
    steps = [_step("objects", "objects", item, -1.0) for item in (store.steps if store else [])]
    for volume in volumes:
        subject = f"volume/{volume.name}"
        steps += [_step(subject, "volume", item, -1.0) for item in volume.steps]
    for platform in platforms:
        subject = f"platform/{platform.name}"
        steps += [_step(subject, "platform", item, -1.0) for item in platform.steps]
    for item in environments:
        subject = f"environment/{item.name}"
        fraction = fractions.get(environment_key(item.ucloud, item.name), -1.0)
        steps += [_step(subject, "environment", one, fraction) for one in item.steps]
    return sorted(steps, key=lambda step: step.started_s)


def _step(subject: str, kind: str, step: Step, fraction: float) -> api.Step:
    state: StepState = "running" if not step.ended_s else "done"
    if step.error:
        state = "failed"
    done = {"done": 1.0, "running": fraction if step.name == "image" else -1.0}
    text = MESSAGES.get((kind, step.name), step.name)
    return api.Step(
        subject=subject,
        message=f"{text}: {step.error}" if step.error else text,
        state=state,
        started_s=step.started_s,
        ended_s=step.ended_s,
        fraction=done.get(state, -1.0),
    )


def _error(
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    volumes: Sequence[VolumeDocument],
    store: StoreDocument | None,
) -> dict[str, Any] | None:
    errors = [item.error for item in platforms] + [item.error for item in volumes]
    errors += [store.error] if store else []
    for error in errors + [item.error for item in environments]:
        if error:
            return error
    for item in environments:
        if item.state == "failed":
            hint = f"supercloud logs {item.ucloud}/{item.name} prints what it said"
            failed = BadState(f"environment {item.name} failed: {item.reason}", hint=hint)
            return to_wire(failed)
    return None
