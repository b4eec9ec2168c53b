"""The reconciler of U-Clouds: its platforms and EEs are those of the decision, and no others."""

import functools
from collections.abc import Iterable, Sequence

from supercloud.control.controllers import template
from supercloud.control.controllers.failover import failover_key
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.platform import tag_of
from supercloud.control.controllers.tunnels import tunnels_key
from supercloud.control.desire import provider_key
from supercloud.control.documents import (
    CheckpointsDocument,
    EnvironmentDocument,
    Following,
    KeptBucket,
    PlatformDocument,
    ReplicaDocument,
    StoreDocument,
    StoreWish,
    UCloudDocument,
    VolumeDocument,
    VolumeWish,
    environment_key,
    platform_key,
    step_begin,
    store_key,
    volume_key,
)
from supercloud.control.kept import CheckpointsOf, Restore
from supercloud.model.events import Severity
from supercloud.model.resources import Checkpointing, Environment, Provider, replica_names
from supercloud.model.states import UCLOUD, observed
from supercloud.providers.base import PlatformObservation


class UCloudController:
    """Reconciles one U-Cloud at a time; see ``reconcile`` and ``sweep``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane

    async def reconcile(self, name: str) -> float | None:
        """One look; seconds until the next one, or None."""
        document = await self._plane.state.ucloud(name)
        if document is None:
            return None
        platforms = await self._plane.state.platforms(name)
        environments = await self._plane.state.environments(name)
        if document.deleting:
            await self._take_down(document, platforms, environments)
            return None
        await self._have_volumes(document)
        await self._have_store(document)
        await self._have_platforms(document, platforms)
        await self._have_environments(document, environments)
        await self._have_checkpoints(document)
        self._plane.look(tunnels_key(name), 0.0)
        self._plane.look(failover_key(name), 0.0)
        await self._retire_platforms(platforms, document.platforms.keys())
        await self._forget_providers(document, platforms)
        await self._sum_up(name)
        return None

    # -- what is to be there

    async def _have_volumes(self, document: UCloudDocument) -> None:
        """Before what uses them. One that the manifest has no more is kept as it is."""
        there = {item.name: item for item in await self._plane.state.volumes(document.name)}
        for name, wish in document.volumes.items():
            if name not in there:
                new = VolumeDocument(
                    ucloud=document.name,
                    name=name,
                    spec=wish.spec,
                    provider=wish.provider,
                    host=wish.host,
                    replica="r1" if wish.others else "",
                    others=[
                        ReplicaDocument(replica=f"r{n}", provider=other.provider, host=other.host)
                        for n, other in enumerate(wish.others, 2)
                    ],
                )
                await self._plane.state.add(new)
            else:
                await self._have_volume(there[name], wish)
        for name in there:
            self._plane.look(volume_key(document.name, name), 0.0)

    async def _have_store(self, document: UCloudDocument) -> None:
        """Likewise: a bucket that the manifest has no more is kept as it is."""
        there, wish = await self._plane.state.store_document(document.name), document.store
        if wish is not None and there is None:
            buckets = {spec.name: KeptBucket(spec=spec) for spec in wish.buckets}
            new = StoreDocument(
                ucloud=document.name, provider=wish.provider, host=wish.host, buckets=buckets
            )
            await self._plane.state.add(new)
        elif wish is not None and there is not None:
            await self._have_buckets(there, wish)
        self._plane.look(store_key(document.name), 0.0)

    async def _have_buckets(self, store: StoreDocument, wish: StoreWish) -> None:
        if store.deleting or store.host != wish.host:
            return  # it goes first, then it is made anew
        kept = {name: bucket.spec for name, bucket in store.buckets.items()}
        new = {spec.name: spec for spec in wish.buckets}
        if store.provider == wish.provider and kept == kept | new:
            return

        def changed(fresh: StoreDocument) -> None:
            fresh.provider, fresh.error = wish.provider, None
            for name, spec in new.items():
                bucket = fresh.buckets.setdefault(name, KeptBucket(spec=spec))
                if not bucket.deleting:
                    bucket.spec = spec

        await self._plane.state.change(store, changed)

    async def _release_store(self, document: UCloudDocument) -> bool:
        """Whether it is at rest; with ``drop_volumes``, and one never made: whether it is gone."""
        store = await self._plane.state.store_document(document.name)
        if store is None:
            return True
        if not store.deleting and (document.drop_volumes or not store.made):
            store = await self._plane.state.change(store, _mark)
        self._plane.look(store_key(document.name), 0.0)
        return not store.deleting and not store.running

    async def _have_volume(self, volume: VolumeDocument, wish: VolumeWish) -> None:
        there = {(volume.provider.name, volume.host): volume.provider}
        there |= {(other.provider.name, other.host): other.provider for other in volume.others}
        entries = {(other.provider.name, other.host): other.provider for other in wish.others}
        entries |= {(wish.provider.name, wish.host): wish.provider}
        same = (volume.spec, there) == (wish.spec, entries)
        if volume.deleting or there.keys() != entries.keys() or same:
            return  # one that is going goes first, then it is made anew

        def changed(fresh: VolumeDocument) -> None:
            fresh.spec = wish.spec
            for replica in fresh.replicas:
                replica.provider = entries[replica.provider.name, replica.host]
            if not fresh.halted:
                fresh.error = None

        await self._plane.state.change(volume, changed)

    async def _release_volumes(self, document: UCloudDocument) -> bool:
        """Whether all volumes are closed, and those that go with the U-Cloud gone.

        One that was never used holds nothing, and goes too.
        """
        volumes = await self._plane.state.volumes(document.name)
        for volume in volumes:
            if not volume.deleting and (document.drop_volumes or not volume.seal.root):
                await self._plane.state.change(volume, _mark)
            self._plane.look(volume_key(document.name, volume.name), 0.0)
        volumes = await self._plane.state.volumes(document.name)
        return not any(volume.deleting or volume.opened for volume in volumes)

    async def _have_platforms(
        self, document: UCloudDocument, platforms: Sequence[PlatformDocument]
    ) -> None:
        there = {platform.name: platform for platform in platforms}
        for wish in document.platforms.values():
            restore = document.restores.get(wish.name)
            if wish.name not in there:
                new = PlatformDocument(ucloud=document.name, name=wish.name, wish=wish)
                new.restore = restore
                await self._plane.state.add(new)
            elif restore not in (None, there[wish.name].restore):
                await self._plane.state.change(
                    there[wish.name], functools.partial(_restored, restore=restore)
                )

    async def _have_environments(
        self, document: UCloudDocument, environments: Sequence[EnvironmentDocument]
    ) -> None:
        specs = replicas(document.spec.environments)
        there = {item.name: item for item in environments}
        for name, spec in specs.items():
            if name not in there:
                new = EnvironmentDocument(
                    ucloud=document.name,
                    name=name,
                    spec=spec,
                    assignment=document.assignments[name],
                    mark=document.marks.get(spec.image, ""),
                    restore=document.restores.get(name),
                )
                step_begin(new.steps, "image")
                await self._plane.state.add(new)
            else:
                await self._have_environment(document, there[name], spec)
        for name, item in there.items():
            if name not in specs:
                await self._retire_environment(item)

    async def _have_environment(
        self, document: UCloudDocument, item: EnvironmentDocument, spec: Environment
    ) -> None:
        assignment, mark = document.assignments[item.name], document.marks.get(spec.image, "")
        restore = document.restores.get(item.name)
        was = (item.spec, item.assignment, item.mark, item.restore)
        same = was == (spec, assignment, mark, restore)
        if item.deleting or same:
            return  # one that is going goes first, then it is made anew

        def changed(fresh: EnvironmentDocument) -> None:
            fresh.spec, fresh.assignment, fresh.mark = spec, assignment, mark
            fresh.restore = restore
            fresh.error, fresh.current = None, False

        await self._plane.state.change(item, changed)

    async def _have_checkpoints(self, document: UCloudDocument) -> None:
        """A document for each that is to have some; what is no more has its own kept."""
        there = {item.name: item for item in await self._plane.state.checkpoints(document.name)}
        wanted = {} if document.deleting else policies(document)
        for name, (of, policy) in wanted.items():
            if name not in there:
                new = CheckpointsDocument(ucloud=document.name, name=name, of=of, policy=policy)
                await self._plane.state.add(new)
        for name, item in there.items():
            wish = wanted[name][1] if name in wanted else None
            if item.policy != wish:
                await self._plane.state.change(item, functools.partial(_under, policy=wish))

    async def _release_checkpoints(self, document: UCloudDocument) -> bool:
        """Whether those that go with the U-Cloud are gone."""
        await self._have_checkpoints(document)
        kept = await self._plane.state.checkpoints(document.name)
        for item in kept:
            if document.drop_volumes and not item.deleting:
                await self._plane.state.change(item, _mark)
        return not document.drop_volumes or not kept

    async def _retire_platforms(
        self, platforms: Sequence[PlatformDocument], wanted: Iterable[str]
    ) -> None:
        wanted = set(wanted)
        for platform in platforms:
            if platform.name not in wanted and not platform.deleting:
                await self._plane.state.change(platform, _mark)
                self._plane.look(platform_key(platform.ucloud, platform.name), 0.0)

    async def _retire_environment(self, item: EnvironmentDocument) -> None:
        if not item.deleting:
            await self._plane.state.change(item, _mark)
            self._plane.look(environment_key(item.ucloud, item.name), 0.0)

    async def _forget_providers(
        self, document: UCloudDocument, platforms: Sequence[PlatformDocument]
    ) -> None:
        """Providers that the manifest has no more are kept until nothing is left there."""
        used = {provider_key(platform.wish.provider) for platform in platforms}
        used |= {provider_key(provider) for provider in document.spec.providers}
        gone = {key: item for key, item in document.providers.items() if key not in used}
        if not gone:
            return
        await self._sweep(document.name, gone.values())

        def forget(fresh: UCloudDocument) -> None:
            for key in gone:
                fresh.providers.pop(key, None)

        await self._plane.state.change(document, forget)

    async def _sum_up(self, name: str) -> None:
        document = await self._plane.state.ucloud(name)
        if document is None or document.deleting:
            return
        platforms = await self._plane.state.platforms(name)
        environments = await self._plane.state.environments(name)
        volumes = await self._plane.state.volumes(name)
        store = await self._plane.state.store_document(name)
        state = summary(document, platforms, environments, volumes, store)

        def moved(fresh: UCloudDocument) -> None:
            if fresh.generation == document.generation and not fresh.deleting:
                fresh.state = observed(UCLOUD, fresh.state, state)

        changed = await self._plane.state.change(document, moved)
        if changed.state == "ready":
            await template.note(self._plane, changed)
        if changed.state != document.state:
            severity: Severity = "warning" if changed.state == "degraded" else "info"
            code, generation = f"ucloud.{changed.state}", changed.generation
            self._plane.tell(changed, code, severity=severity, generation=generation)

    # -- away

    async def _take_down(
        self,
        document: UCloudDocument,
        platforms: Sequence[PlatformDocument],
        environments: Sequence[EnvironmentDocument],
    ) -> None:
        if document.state != "deleting":
            document = await self._plane.state.change(document, _deleting)
        for item in environments:
            await self._retire_environment(item)
        await self._retire_platforms(platforms, ())
        released = await self._release_volumes(document)
        released = await self._release_checkpoints(document) and released
        if not await self._release_store(document) or not released or platforms or environments:
            return
        await self._sweep(document.name, document.providers.values())
        if not await self._removed(document):
            return
        await self._plane.agents.drop(document.name)
        await self._plane.pool.drop(document.name)
        self._plane.tell(document, "ucloud.deleted")

    async def _removed(self, document: UCloudDocument) -> bool:
        """Remove the U-Cloud unless somebody wants it again by now."""
        fresh = await self._plane.state.ucloud(document.name)
        if fresh is None or not fresh.deleting:
            return False
        await self._plane.state.remove(fresh)
        templates = await self._plane.state.templates(document.name)
        if templates is not None and fresh.drop_volumes:
            await self._plane.state.remove(templates)
        return True

    # -- orphans

    async def sweep(self, name: str) -> float | None:
        """Delete what providers have of this U-Cloud and no record wants; renew what is due."""
        document = await self._plane.state.ucloud(name)
        if document is None:
            return None
        if self._plane.authority.renewed(name):
            await self._plane.agents.drop(name)  # they dial again, and find the new chain
            await self._plane.pool.drop(name)
            for platform in await self._plane.state.platforms(name):
                self._plane.look(platform_key(name, platform.name), 0.0)
        await self._sweep(name, document.providers.values())
        return self._plane.pace.sweep_s

    async def _sweep(self, name: str, entries: Iterable[Provider]) -> None:
        for entry in entries:
            provider = self._plane.pool.get(name, entry)
            seen = [item.name for item in await provider.platforms() if _ours(item, name)]
            # Asked only now: a platform's record is written before the platform is made.
            wanted = {platform.name for platform in await self._plane.state.platforms(name)}
            for orphan in set(seen) - wanted:
                delete = functools.partial(provider.delete_platform, orphan)
                await self._plane.seam("provider.delete_platform", delete)


def _ours(seen: PlatformObservation, ucloud: str) -> bool:
    """Providers that know no tags show a U-Cloud its own platforms only."""
    return seen.tag in ("", tag_of(ucloud))


def _mark(document: Following) -> None:
    document.deleting = True


def _under(document: CheckpointsDocument, policy: Checkpointing | None) -> None:
    document.policy = policy


def _restored(document: PlatformDocument, restore: Restore | None) -> None:
    document.restore, document.error = restore, None


def policies(document: UCloudDocument) -> dict[str, tuple[CheckpointsOf, Checkpointing]]:
    """What checkpoints are to be taken of, by name: an EE or a platform, and how."""
    found: dict[str, tuple[CheckpointsOf, Checkpointing]] = {}
    for name, item in replicas(document.spec.environments).items():
        if item.checkpoint is not None:
            found[name] = ("environment", item.checkpoint)
    policy = document.spec.platform.checkpoint
    if policy is not None:
        found |= dict.fromkeys(document.platforms, ("platform", policy))
    return found


def _deleting(document: UCloudDocument) -> None:
    if document.deleting:
        document.state = observed(UCLOUD, document.state, "deleting")


def replicas(environments: Sequence[Environment]) -> dict[str, Environment]:
    """EE name -> the environment that it is a replica of."""
    return {name: item for item in environments for name in replica_names(item)}


def good(document: EnvironmentDocument) -> bool:
    """Whether the EE is as wished."""
    if document.deleting or not document.current:
        return False
    if document.state == "running":
        return not document.spec.ports
    if document.state == "exited":
        return document.exit_status == 0 and document.spec.restart != "always"
    return document.state == "serving"


def summary(
    document: UCloudDocument,
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    volumes: Sequence[VolumeDocument] = (),
    store: StoreDocument | None = None,
) -> str:
    """``ready`` when everything is as wished; ``degraded`` when it was or will not become so."""
    wanted = [item for item in platforms if item.name in document.platforms]
    whole = len(wanted) == len(document.platforms)
    whole = whole and {item.name for item in environments} == document.assignments.keys()
    there = all(item.state == "ready" and not item.deleting for item in wanted)
    refused = any(item.error for item in volumes if item.name in document.volumes)
    refused = refused or bool(store and document.store and store.error)
    if whole and there and not refused and all(good(item) for item in environments):
        return "ready"
    bad = any(item.error or item.state == "failed" for item in environments)
    bad = bad or refused or any(item.error for item in wanted)
    return "degraded" if bad or document.state in ("ready", "degraded") else "applying"
