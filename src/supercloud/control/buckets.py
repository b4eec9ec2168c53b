"""What the API can be asked to do with buckets and services."""

import asyncio
import contextlib

from supercloud.control import views
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import StoreDocument, StoreWish, UCloudDocument, store_key
from supercloud.model.errors import BadState, NotFound, SupercloudError
from supercloud.model.resources import Provider
from supercloud.wire import api
from supercloud.wire.checkpoints import BUCKET
from supercloud.wire.objects import ServiceStatus

TIMEOUT_S = 10.0


class BucketService:
    """The operations. ``deciding`` is held while what there is must not change."""

    def __init__(self, plane: Plane, deciding: asyncio.Lock) -> None:
        """Acts through ``plane``."""
        self._plane, self._deciding = plane, deciding

    async def rows(self, ucloud: str = "") -> list[api.BucketRow]:
        """Those of a U-Cloud, or all: also of U-Clouds that are not up."""
        rows: list[api.BucketRow] = []
        for store in await self._plane.state.store_documents():
            if ucloud in ("", store.ucloud):
                environments = await self._plane.state.environments(store.ucloud)
                seen = self._plane.stores.get(store.ucloud)
                rows += views.bucket_rows(store, environments, seen)
        return rows

    async def bucket(self, ucloud: str, name: str) -> api.BucketView:
        """One in all detail; NotFound."""
        store = await self._store(ucloud, name)
        environments = await self._plane.state.environments(ucloud)
        return views.bucket_view(store, name, environments, self._plane.stores.get(ucloud))

    async def kept(self, ucloud: str, before: UCloudDocument | None) -> StoreWish | None:
        """The store that there is, with its home; one that is being deleted is none."""
        store = await self._plane.state.store_document(ucloud)
        if store is None:  # decided, perhaps, and not written down yet
            return before.store if before is not None and not before.deleting else None
        if store.deleting:
            return None
        buckets = [bucket.spec for bucket in store.buckets.values() if not bucket.deleting]
        return StoreWish(provider=store.provider, host=store.host, buckets=buckets)

    async def delete(self, ucloud: str, name: str) -> None:
        """With all that is in it. BadState while the manifest has it."""
        async with self._deciding:
            store = await self._store(ucloud, name)
            if name == BUCKET:
                hint = "supercloud checkpoints delete NAME"
                raise BadState(
                    f"{name} has the checkpoints, and goes with the last of them", hint=hint
                )
            owner = await self._plane.state.ucloud(ucloud)
            named = owner is not None and any(b.name == name for b in owner.spec.buckets)
            if owner is not None and not owner.deleting and named:
                raise BadState(
                    f"bucket {name} is in the manifest of {ucloud}, which is up",
                    hint=f"take it out of the manifest first, or supercloud down {ucloud}",
                )

            def going(fresh: StoreDocument) -> None:
                if name in fresh.buckets:
                    fresh.buckets[name].deleting = True
                in_use = owner is not None and not owner.deleting and owner.store is not None
                if not in_use and all(bucket.deleting for bucket in fresh.buckets.values()):
                    fresh.deleting = True

            with contextlib.suppress(NotFound):  # gone already is fine
                await self._plane.state.change(store, going)
            if owner is not None and owner.store is not None:
                await self._plane.state.change(owner, lambda fresh: _forget(fresh, name))
            self._plane.look(store_key(ucloud), 0.0)

    async def delete_all(self, ucloud: str) -> int:
        """The whole store of a U-Cloud that is going or gone; how many buckets."""
        store = await self._plane.state.store_document(ucloud)
        if store is None:
            return 0

        def absent(fresh: StoreDocument) -> None:
            fresh.deleting = True

        with contextlib.suppress(NotFound):
            await self._plane.state.change(store, absent)
        self._plane.look(store_key(ucloud), 0.0)
        return len(store.buckets)

    async def services(self, ucloud: str = "") -> list[api.ServiceRow]:
        """What its user's services on each host are, asked now; one who is silent is said to be."""
        found = await self._plane.state.uclouds()
        asked = [
            self._services_of(item.name, entry)
            for item in found
            if ucloud in ("", item.name)
            for entry in item.spec.providers
        ]
        return [row for rows in await asyncio.gather(*asked) for row in rows]

    async def _services_of(self, ucloud: str, entry: Provider) -> list[api.ServiceRow]:
        provider = self._plane.pool.get(ucloud, entry)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await provider.services()
        except (SupercloudError, TimeoutError) as error:
            reason = str(error) or f"no answer in {TIMEOUT_S:g} s"
            silent = api.ServiceRow(
                ucloud=ucloud, provider=entry.name, host="", kind="", state="unknown", reason=reason
            )
            return [silent]
        return [_service_row(ucloud, entry.name, host, status) for host, status in found]

    async def _store(self, ucloud: str, bucket: str) -> StoreDocument:
        store = await self._plane.state.store_document(ucloud)
        if store is None or bucket not in store.buckets:
            raise NotFound(
                f"U-Cloud {ucloud} has no bucket {bucket}", hint="supercloud buckets lists them"
            )
        return store


def _forget(ucloud: UCloudDocument, bucket: str) -> None:
    """A bucket that was kept beside the manifest's is wanted no more."""
    if ucloud.store is not None:
        ucloud.store.buckets = [item for item in ucloud.store.buckets if item.name != bucket]


def _service_row(ucloud: str, provider: str, host: str, status: ServiceStatus) -> api.ServiceRow:
    return api.ServiceRow(
        ucloud=ucloud,
        provider=provider,
        host=host,
        kind=status.kind,
        state=status.state,
        memory_bytes=status.memory_bytes,
        memory_limit_bytes=status.memory_limit_bytes,
        started_s=status.started_s,
    )
