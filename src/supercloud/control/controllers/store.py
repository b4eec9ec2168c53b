"""The reconciler of object stores: it serves while its U-Cloud is up and has buckets.

::

    apply (its certificate is signed) -> ready -> buckets as wished -> credentials of each user
        -> stop, or delete

Who uses it: EEs with buckets; and, while there is a bucket of checkpoints, who takes and who
removes those. It serves, too, while its U-Cloud is down and something in it is to be removed.
The host is asked every ``seal_s`` how far the store's journal is; that never goes back, and an
older one is refused when the store is started.
"""

import base64
import hashlib
import time
from collections.abc import Callable, Sequence

from supercloud.control import specs
from supercloud.control.controllers import access
from supercloud.control.controllers.plane import Plane, SeenStore
from supercloud.control.controllers.platform import tag_of
from supercloud.control.documents import (
    Access,
    CheckpointsDocument,
    EnvironmentDocument,
    StoreDocument,
    StoreWish,
    checkpoints_key,
    dump,
    environment_key,
    platform_key,
    step_begin,
    step_end,
    ucloud_key,
)
from supercloud.control.stores import capacity_of
from supercloud.model.errors import Permanent, Unsupported
from supercloud.model.events import Severity
from supercloud.model.states import KEPT_STORE, observed
from supercloud.providers.base import Objects
from supercloud.trust.authority import due_pem
from supercloud.wire.checkpoints import BUCKET
from supercloud.wire.objects import Access as Right
from supercloud.wire.objects import (
    BucketSpec,
    ObjectsApply,
    ObjectsCredentials,
    ObjectsStatus,
    Position,
)

START = "start"
POLL_S = 0.2
STATES = {
    "absent": "pending",
    "stopped": "kept",
    "starting": "starting",
    "ready": "ready",
    "restarting": "starting",
    "failed": "failed",
}
"""The host's states of a store, as the control plane's."""


class StoreController:
    """Reconciles one store at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane

    async def reconcile(self, ucloud: str) -> float | None:
        """One look; seconds until the next one, or None."""
        store = await self._plane.state.store_document(ucloud)
        if store is None:
            return None
        environments = await self._plane.state.environments(ucloud)
        clients = [item for item in environments if item.spec.buckets]
        owner = await self._plane.state.ucloud(ucloud)
        wish = owner.store if owner is not None and not owner.deleting else None
        kept = await self._plane.state.checkpoints(ucloud)
        store = await self._unneeded(store, wish, kept)
        if store.deleting:
            return await self._delete(store, clients)
        going = any(bucket.deleting for bucket in store.buckets.values())
        if wish is None and not going and not any(item.deleting for item in kept):
            return await self._stop(store, clients)
        platforms = await self._plane.state.platforms(ucloud)
        users = access.users_of(store, environments, platforms)
        store = await self._forget(store, set(users))
        store = await self._applied(await self._keyed(store), users)
        if store.state != "ready":
            return POLL_S if store.state in ("pending", "starting") else self._plane.pace.seal_s
        store = await self._buckets(store)
        await self._credentials(store, users)
        return self._plane.pace.seal_s

    async def _unneeded(
        self, store: StoreDocument, wish: StoreWish | None, kept: Sequence[CheckpointsDocument]
    ) -> StoreDocument:
        """Without the bucket of checkpoints, when there are none and there are to be none."""
        bucket = store.buckets.get(BUCKET)
        wanted = wish is not None and any(spec.name == BUCKET for spec in wish.buckets)
        if bucket is None or wanted or not all(item.deleting for item in kept):
            return store

        def going(fresh: StoreDocument) -> None:
            if BUCKET in fresh.buckets:
                fresh.buckets[BUCKET].deleting = True
            if wish is None and all(bucket.deleting for bucket in fresh.buckets.values()):
                fresh.deleting = True

        return await self._change(store, going)

    # -- towards use

    async def _keyed(self, store: StoreDocument) -> StoreDocument:
        """With a data key, all secrets under the present wrapping key."""
        keys = self._plane.keys(store.ucloud)
        made = "" if store.wrapped_key else keys.make()
        secret = "" if store.wrapped_secret or BUCKET not in store.buckets else keys.make()

        def keyed(fresh: StoreDocument) -> None:
            fresh.wrapped_key = fresh.wrapped_key or made
            fresh.wrapped_secret = fresh.wrapped_secret or secret
            access.rewrap(fresh, keys)  # who rotated may have died half-way

        return await self._change(store, keyed)

    async def _applied(self, store: StoreDocument, users: access.Users) -> StoreDocument:
        host = await self._objects(store)
        wish = self._wish(store, users)
        given = hashlib.sha256(dump((wish.capacity_bytes, wish.buckets, wish.users))).hexdigest()
        status = await host.state(store.host)
        stale = store.cert_pem and due_pem(store.cert_pem)
        if status.state == "failed":
            await self._plane.seam("provider.objects_stop", lambda: host.stop(store.host))
        elif status.state == "ready" and store.given == given and not stale:
            return await self._learn(store, status)

        def starting(fresh: StoreDocument) -> None:
            fresh.made = True
            if status.state != "ready":
                step_begin(fresh.steps, START)

        store = await self._change(store, starting)
        if store.csr_pem and stale:
            store, wish = await self._certified(store, wish, store.csr_pem)
        status = await self._told(store, host, wish)
        if status.csr_pem:
            store, wish = await self._certified(store, wish, status.csr_pem)
            status = await self._told(store, host, wish)
        return await self._learn(store, status, given if status.state == "ready" else "")

    async def _told(self, store: StoreDocument, host: Objects, wish: ObjectsApply) -> ObjectsStatus:
        try:
            return await self._plane.seam(
                "provider.objects_apply", lambda: host.apply(store.host, wish)
            )
        except Permanent as error:  # what is there is not what it was
            raise Permanent(
                f"the object store is refused: {error}; put back what its host had, or give up all "
                f"that is in it: supercloud down {store.ucloud} --volumes"
            ) from error

    async def _certified(
        self, store: StoreDocument, wish: ObjectsApply, csr_pem: str
    ) -> tuple[StoreDocument, ObjectsApply]:
        """The request signed: what is asked of the host then, and what is kept of it."""
        identity = access.store_identity(store.ucloud)
        made = self._plane.authority(store.ucloud).issue(csr_pem, identity)

        def certified(fresh: StoreDocument) -> None:
            fresh.csr_pem, fresh.cert_pem = csr_pem, made.cert_pem

        store = await self._change(store, certified)
        asked = ObjectsApply(
            capacity_bytes=wish.capacity_bytes,
            key_base64=wish.key_base64,
            buckets=wish.buckets,
            users=wish.users,
            least=wish.least,
            tag=wish.tag,
            cert_pem=made.cert_pem,
            chain_pem=made.chain_pem,
        )
        return store, asked

    def _wish(self, store: StoreDocument, users: access.Users) -> ObjectsApply:
        key = self._plane.keys(store.ucloud).unwrap(store.wrapped_key)
        there = [bucket.spec for bucket in store.buckets.values()]
        staying = [bucket.spec for bucket in store.buckets.values() if not bucket.deleting]
        return ObjectsApply(
            capacity_bytes=capacity_of(there),
            key_base64=base64.b64encode(key).decode(),
            buckets=[
                BucketSpec(
                    name=spec.name,
                    quota_bytes=spec.quota_bytes,
                    versioning=spec.versioning,
                    expire_days=spec.expire_days,
                )
                for spec in staying
            ],
            users=sorted(users),
            least=store.position,
            tag=tag_of(store.ucloud),
        )

    async def _learn(
        self, store: StoreDocument, status: ObjectsStatus, given: str | None = None
    ) -> StoreDocument:
        """Keep what the host says of it; an event for what is new."""
        before = store

        def taken(fresh: StoreDocument) -> None:
            _move(fresh, STATES[status.state])
            fresh.reason, fresh.error = status.reason, None
            fresh.position = _later(fresh.position, status.position)
            fresh.running = status.state not in ("absent", "stopped")
            fresh.given = fresh.given if given is None else given
            if fresh.state == "ready":
                step_end(fresh.steps, START)

        store = await self._change(store, taken)
        self._plane.stores[store.ucloud] = SeenStore(status)
        if store.state == "ready" and before.state != "ready":
            await self._look_at_users(store)
        if store.state != before.state:
            severity: Severity = "warning" if store.state == "failed" else "info"
            self._plane.tell(store, f"objects.{store.state}", store.reason, severity)
        return store

    async def _buckets(self, store: StoreDocument) -> StoreDocument:
        """Those that are to go are gone."""
        for name, bucket in store.buckets.items():
            if bucket.deleting:
                store = await self._without(store, name)
        return store

    async def _without(self, store: StoreDocument, name: str) -> StoreDocument:
        host = await self._objects(store)
        await self._plane.seam("provider.objects_delete", lambda: host.delete(store.host, name))

        def gone(fresh: StoreDocument) -> None:
            if name in fresh.buckets and fresh.buckets[name].deleting:
                del fresh.buckets[name]

        self._plane.tell(store, "objects.bucket_deleted", name)
        store = await self._change(store, gone)
        if name == BUCKET:
            await self._look_at_users(store)
        return store

    async def _credentials(self, store: StoreDocument, users: access.Users) -> None:
        for name, buckets in users.items():
            there = buckets.keys() <= store.buckets.keys()
            if there and not access.has_access(name, buckets, store):
                await self._grant(store, name, buckets)

    async def _grant(self, store: StoreDocument, name: str, wanted: dict[str, Right]) -> None:
        """Let somebody use buckets, and have all looked at that may have waited for it."""
        host = await self._objects(store)
        asked = ObjectsCredentials(name=name, buckets=wanted)
        secret = await self._plane.seam(
            "provider.objects_credentials", lambda: host.credentials(store.host, asked)
        )
        known = Access(
            buckets=dict(wanted),
            access_key=secret.access_key,
            wrapped_secret=self._plane.keys(store.ucloud).wrap(secret.secret_key.encode()),
            region=secret.region,
        )

        def granted(fresh: StoreDocument) -> None:
            fresh.access[name] = known

        await self._change(store, granted)
        await self._look_at_users(store)

    async def _look_at_users(self, store: StoreDocument) -> None:
        for item in await self._plane.state.environments(store.ucloud):
            if item.spec.buckets or specs.restoring(item):
                self._plane.look(environment_key(store.ucloud, item.name), 0.0)
        for platform in await self._plane.state.platforms(store.ucloud):
            self._plane.look(platform_key(store.ucloud, platform.name), 0.0)
        for kept in await self._plane.state.checkpoints(store.ucloud):
            self._plane.look(checkpoints_key(store.ucloud, kept.name), 0.0)

    async def _forget(self, store: StoreDocument, names: set[str]) -> StoreDocument:
        """Without those who are no more, before the host revokes them.

        The other way round a death in between would leave keys here that are no good there.
        """
        if store.access.keys() <= names:
            return store

        def forgotten(fresh: StoreDocument) -> None:
            for name in fresh.access.keys() - names:
                del fresh.access[name]

        return await self._change(store, forgotten)

    # -- away

    async def _stop(
        self, store: StoreDocument, users: Sequence[EnvironmentDocument]
    ) -> float | None:
        if not store.running:
            return None
        if users:
            return self._plane.pace.release_s  # they may have something to put yet
        store = await self._change(store, lambda fresh: _move(fresh, "stopping"))
        host = await self._objects(store)
        status = await self._plane.seam("provider.objects_stop", lambda: host.stop(store.host))
        await self._forget(await self._learn(store, status, ""), set())
        self._plane.look(ucloud_key(store.ucloud), self._plane.pace.settle_s)
        return None

    async def _delete(
        self, store: StoreDocument, users: Sequence[EnvironmentDocument]
    ) -> float | None:
        if any(not item.deleting or item.ready_on for item in users):
            return self._plane.pace.release_s
        store = await self._change(store, lambda fresh: _move(fresh, "deleting"))
        if store.made:  # otherwise its host never heard of it
            host = await self._objects(store)
            await self._plane.seam("provider.objects_delete", lambda: host.delete(store.host))
        await self._plane.state.remove(store)
        self._plane.stores.pop(store.ucloud, None)
        await self._look_at_users(store)
        self._plane.tell(store, "objects.deleted")
        self._plane.look(ucloud_key(store.ucloud), 0.0)
        return None

    # -- helpers

    async def _objects(self, store: StoreDocument) -> Objects:
        provider = self._plane.pool.get(store.ucloud, store.provider)
        if provider.objects is None:
            reason = (await provider.features()).get("objects", "")
            raise Unsupported(
                f"provider {store.provider.name} has no object stores: {reason}",
                hint="buckets and checkpoints need a provider of the kind lower_layer with one",
            )
        return provider.objects

    async def _change(
        self, store: StoreDocument, mutate: Callable[[StoreDocument], object]
    ) -> StoreDocument:
        return await self._plane.state.change(store, mutate)


def _later(one: Position, other: Position) -> Position:
    pairs = [(item.segment, item.records) for item in (one, other)]
    return other if pairs[1] > pairs[0] else one


def _move(store: StoreDocument, to: str) -> None:
    if store.state != to:
        store.state = observed(KEPT_STORE, store.state, to)
        store.since_s = time.time()
