"""What EEs are told of their U-Cloud's object store; their secrets are unwrapped here only."""

from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import EnvironmentDocument, StoreDocument
from supercloud.trust.names import SERVICE, Identity
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.messages import ObjectAccess
from supercloud.wire.objects import STORE, Access


def store_identity(ucloud: str) -> Identity:
    """Whose certificate the store shows."""
    return Identity(ucloud, SERVICE, STORE)


def buckets_of(item: EnvironmentDocument) -> dict[str, Access]:
    """``read`` or ``write`` by bucket, as the EE is to have it."""
    return {use.name: use.access for use in item.spec.buckets}


def has_access(item: EnvironmentDocument, store: StoreDocument | None) -> bool:
    """Whether the store knows the EE with all that it is to have."""
    access = store.access.get(item.name) if store is not None else None
    return access is not None and access.buckets == buckets_of(item)


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
    }


def rewrap(store: StoreDocument, keys: VolumeKeys) -> None:
    """All that is wrapped in the document, under the present wrapping key."""
    if store.wrapped_key:
        store.wrapped_key = keys.rewrapped(store.wrapped_key)
    for known in store.access.values():
        known.wrapped_secret = keys.rewrapped(known.wrapped_secret)


def wrapped_in(store: StoreDocument) -> list[str]:
    """All that is wrapped in the document."""
    return [store.wrapped_key, *(known.wrapped_secret for known in store.access.values())]
