"""What platforms are told of their U-Cloud's object store and checkpoints.

Secrets are unwrapped here only. Who uses the store has a name there: an EE its own, who takes
checkpoints one that no EE can have, for it begins with a digit.
"""

import logging
from collections.abc import Sequence

from supercloud.control import held, specs
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import (
    CheckpointsDocument,
    EnvironmentDocument,
    PlatformDocument,
    StoreDocument,
)
from supercloud.control.kept import Restore
from supercloud.model.errors import Denied, NotFound, Temporary
from supercloud.trust.names import SERVICE, Identity
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.checkpoints import BUCKET, GoesBack, RestoreFrom, StoreAccess
from supercloud.wire.messages import Apply, ObjectAccess
from supercloud.wire.objects import STORE, Access

COLLECTOR = "0-collector"
"""Who removes checkpoints: the host, not a platform."""
UP = frozenset({"running", "serving", "unready"})
"""States of an EE that has started."""
log = logging.getLogger("supercloud.control.controllers.access")

STORE_WAIT_S = 1.0  # what waits is looked at sooner when it can go on

Users = dict[str, dict[str, Access]]
"""``read`` or ``write`` by bucket, by who may."""


def store_identity(ucloud: str) -> Identity:
    """Whose certificate the store shows."""
    return Identity(ucloud, SERVICE, STORE)


def taker_of(platform: str) -> str:
    """Who takes the checkpoints of a platform and of what runs there."""
    return f"0-{platform}"


def buckets_of(item: EnvironmentDocument) -> dict[str, Access]:
    """``read`` or ``write`` by bucket, as the EE is to have it."""
    return {use.name: use.access for use in item.spec.buckets}


def users_of(
    store: StoreDocument,
    environments: Sequence[EnvironmentDocument],
    platforms: Sequence[PlatformDocument],
) -> Users:
    """All that are to use the store; checkpoints are taken and removed while they have a bucket."""
    users: Users = {item.name: buckets_of(item) for item in environments if item.spec.buckets}
    kept = store.buckets.get(BUCKET)
    if kept is not None and not kept.deleting:
        takers = [taker_of(platform.name) for platform in platforms]
        users |= {name: {BUCKET: "write"} for name in (COLLECTOR, *takers)}
    return users


def has_access(name: str, buckets: dict[str, Access], store: StoreDocument | None) -> bool:
    """Whether the store knows somebody with all that they are to have."""
    access = store.access.get(name) if store is not None else None
    return access is not None and access.buckets == buckets


def plain(plane: Plane, ucloud: str) -> ObjectAccess:
    """The same for all EEs, without anybody's keys."""
    ca_pem = plane.authority(ucloud).root_pem
    return ObjectAccess(server_name=store_identity(ucloud).dns, ca_pem=ca_pem)


async def access_of(plane: Plane, ucloud: str) -> dict[str, ObjectAccess]:
    """By EE, with its keys."""
    store = await plane.state.store_document(ucloud)
    if store is None or not store.access:
        return {}
    keys, common = plane.keys(ucloud), plain(plane, ucloud)
    return {
        name: ObjectAccess(
            server_name=common.server_name,
            ca_pem=common.ca_pem,
            access_key=access.access_key,
            secret_key=keys.unwrap(access.wrapped_secret).decode(),
            region=access.region,
        )
        for name, access in store.access.items()
        if BUCKET not in access.buckets
    }


async def checkpoint_access(plane: Plane, ucloud: str, taker: str) -> StoreAccess:
    """Where checkpoints are, and what they are sealed under. Temporary until the store is ready."""
    store = await plane.state.store_document(ucloud)
    if store is None or store.state != "ready" or not store.wrapped_secret:
        state = f"is {store.state} {store.reason}".rstrip() if store else "is not there"
        raise Temporary(f"waits for its object store, which {state}", delay_s=STORE_WAIT_S)
    access = store.access.get(taker)
    if access is None:
        raise Temporary("waits to be known by its object store", delay_s=STORE_WAIT_S)
    keys, common = plane.keys(ucloud), plain(plane, ucloud)
    return StoreAccess(
        secret=keys.unwrap(store.wrapped_secret).hex(),
        server_name=common.server_name,
        ca_pem=common.ca_pem,
        access_key=access.access_key,
        secret_key=keys.unwrap(access.wrapped_secret).decode(),
        region=access.region,
    )


async def restore_from(
    plane: Plane,
    ucloud: str,
    name: str,
    platform: str,
    restore: Restore,
    volumes: Sequence[GoesBack] = (),
) -> RestoreFrom:
    """What an EE or a platform begins from that is to be restored. Temporary until it can be said.

    Its newest checkpoint vouches for the one that was chosen. ``volumes`` go back with a platform.
    """
    kept = await plane.state.checkpoints_of(ucloud, name)
    if kept is None or kept.head is None:
        raise Temporary(f"the checkpoints of {name} are not there", delay_s=STORE_WAIT_S)
    store = await checkpoint_access(plane, ucloud, taker_of(platform))
    return RestoreFrom(
        ee=name, store=store, head=kept.head, sequence=restore.sequence, volumes=[*volumes]
    )


async def verify(plane: Plane, document: CheckpointsDocument, sequence: int) -> None:
    """Have all of a checkpoint read, where the store is. Denied with the reason; Temporary.

    A host that is older than this is not asked for more than it can.
    """
    ucloud, head = document.ucloud, document.head
    access = await checkpoint_access(plane, ucloud, COLLECTOR)
    store = await plane.state.store_document(ucloud)
    host = plane.pool.get(ucloud, store.provider).checkpoints if store is not None else None
    if store is None or host is None or head is None:
        raise Temporary(f"the checkpoints of {document.name} are not there", delay_s=STORE_WAIT_S)
    place, reader = store.host, host
    asked = RestoreFrom(ee=document.name, store=access, head=head, sequence=sequence)
    try:
        await plane.seam("provider.checkpoint_verify", lambda: reader.verify(place, asked))
    except NotFound as error:
        log.warning("checkpoint %d of %s is not read: %s", sequence, document.name, error)
    except Denied as error:
        message = f"checkpoint {sequence}: {error.message}"
        plane.tell(document, "checkpoint.refused", message, severity="warning")
        raise


async def apply_of(
    plane: Plane,
    platform: PlatformDocument,
    environments: Sequence[EnvironmentDocument],
    generation: int = 0,
) -> Apply:
    """What the platform is to be told now."""
    ucloud = platform.ucloud
    restores: dict[str, RestoreFrom | None] = {}
    for item in environments:
        if specs.runs_on(item, platform.name) and item.current and specs.restoring(item):
            restores |= await _beginning(plane, item, platform.name)
    volumes = await plane.state.volumes(ucloud)
    access = await access_of(plane, ucloud)
    return specs.apply_for(platform, environments, generation, volumes, access, restores)


async def _beginning(
    plane: Plane, item: EnvironmentDocument, platform: str
) -> dict[str, RestoreFrom | None]:
    """By the EE's name: what it begins from, None when it has begun. Nothing: it has to wait."""
    if item.restore is None or item.ready is None:
        return {}
    status = plane.agents.status(item.ucloud, platform, item.ready.uid)
    if status is not None and status.state in UP:
        return {item.name: None}
    if await _is_going_back(plane, item):
        return {}
    try:
        found = await restore_from(plane, item.ucloud, item.name, platform, item.restore)
    except Temporary:
        return {}
    return {item.name: found}


async def _is_going_back(plane: Plane, item: EnvironmentDocument) -> bool:
    """Whether some volume of it is not yet as it was at the checkpoint."""
    documents = await plane.state.checkpoints(item.ucloud)
    volumes = [await plane.state.volume(item.ucloud, name) for name in held.written(item.spec)]
    return any(volume and held.going_back(volume, [item], documents) for volume in volumes)


def rewrap(store: StoreDocument, keys: VolumeKeys) -> None:
    """All that is wrapped in the document, under the present wrapping key."""
    if store.wrapped_key:
        store.wrapped_key = keys.rewrapped(store.wrapped_key)
    if store.wrapped_secret:
        store.wrapped_secret = keys.rewrapped(store.wrapped_secret)
    for known in store.access.values():
        known.wrapped_secret = keys.rewrapped(known.wrapped_secret)


def wrapped_in(store: StoreDocument) -> list[str]:
    """All that is wrapped in the document."""
    known = [access.wrapped_secret for access in store.access.values()]
    return [store.wrapped_key, *filter(None, [store.wrapped_secret]), *known]
