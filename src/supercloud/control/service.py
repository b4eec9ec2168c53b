"""What the API can be asked to do: plan, up, down, and to show what there is."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from supercloud.control import views
from supercloud.control.buckets import BucketService
from supercloud.control.checkpoints import CheckpointService
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.ucloud import replicas
from supercloud.control.desire import Decision, Move, decide, provider_key
from supercloud.control.documents import StoreWish, UCloudDocument, VolumeWish, ucloud_key
from supercloud.control.fits import at_its_place, check_sizes
from supercloud.control.images import mark_of
from supercloud.control.kept import Restore
from supercloud.control.looking import check_registries
from supercloud.control.manifest import parse
from supercloud.control.offers import Offer
from supercloud.control.plan import plan
from supercloud.control.restores import RestoreService, nature
from supercloud.control.store import Conflict
from supercloud.control.volumes import VolumeService
from supercloud.model.errors import Busy, Invalid, NotFound, Temporary
from supercloud.model.resources import Provider, UCloud
from supercloud.model.states import UCLOUD, observed
from supercloud.upper.federation.placement import HostKey
from supercloud.upper.platform.link.session import AgentSession
from supercloud.wire import api

OFFER_TIMEOUT_S = 20.0
TRIES = 5
_SHOWN = "supercloud ps shows what there is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest as the CLI sends it. ``file`` is for messages, ``directory`` for its paths."""

    manifest: str
    file: str = "manifest"
    directory: str = "/"


@dataclass(frozen=True, slots=True)
class Kept:
    """What there is and holds data, whatever the manifest says."""

    volumes: dict[str, VolumeWish]
    store: StoreWish | None
    checkpoints: dict[str, str]  # of an ``environment`` or a ``platform``
    engines: dict[HostKey, dict[str, str]]  # of the platforms, by host
    shared: dict[str, str]  # the platforms of volumes that share their RAM, by volume


May = Callable[[str], None]


def anything(_ucloud: str) -> None:
    """No limit."""


class Service:
    """The operations. Everything that can be refused is refused before any effect."""

    def __init__(self, plane: Plane, ca_pem: Callable[[], str]) -> None:
        """``ca_pem`` gives the user's root certificate."""
        self._plane, self._look, self.ca_pem = plane, plane.look, ca_pem
        self.events = plane.events
        self._deciding = plane.deciding  # two U-Clouds must not get the same range
        self.volumes = VolumeService(plane, self._deciding)
        self.buckets = BucketService(plane, self._deciding)
        self.checkpoints = CheckpointService(plane, self._deciding)
        self.restores = RestoreService(plane, self.checkpoints, self._moved)

    # -- changing

    async def plan(self, asked: Manifest, may: May = anything) -> api.Plan:
        """What ``up`` would do. ``may`` raises Denied for a U-Cloud that is not the caller's."""
        spec = await self._checked(asked, may)
        offers, marks = await self._offers(spec), await self._marks(spec)
        before = await self._plane.state.ucloud(spec.name)
        taken, kept = await self._taken(spec.name), await self._kept(spec.name, before, offers)
        decision = _decided(asked, spec, offers, before, taken, marks, kept)
        return _planned(decision, before, offers, kept)

    async def up(self, asked: Manifest, may: May = anything) -> api.Applied:
        """Store the wish and the decision for it; the reconcilers do the rest."""
        spec = await self._checked(asked, may)
        offers, marks = await self._offers(spec), await self._marks(spec)
        async with self._deciding:
            for _ in range(TRIES):
                before = await self._plane.state.ucloud(spec.name)
                taken = await self._taken(spec.name)
                kept = await self._kept(spec.name, before, offers)
                decision = _decided(asked, spec, offers, before, taken, marks, kept)
                try:
                    document = await self._store(decision, before, asked)
                except (Conflict, NotFound):  # it was changed, or went away, meanwhile
                    continue
                self._look(ucloud_key(spec.name), 0.0)
                done = _planned(decision, before, offers, kept)
                return api.Applied(ucloud=spec.name, generation=document.generation, plan=done)
        raise Busy(
            f"U-Cloud {spec.name} is being changed by others",
            hint="supercloud up again when their command is done",
        )

    async def down(self, name: str) -> api.UCloudView:
        """The desired state is absence; volumes and buckets with data are kept."""
        return await self._down(await self._ucloud(name), drop_volumes=False)

    async def purge(self, name: str) -> api.UCloudView | None:
        """Likewise, and volumes and buckets go with all in them; None when only those were left."""
        async with self._deciding:  # nobody decides to keep one of them meanwhile
            document = await self._plane.state.ucloud(name)
            view = await self._down(document, drop_volumes=True) if document else None
            deleted = await self.volumes.delete_all(name)
            deleted += await self.buckets.delete_all(name)
            deleted += await self.checkpoints.delete_all(name)
            if document is None:
                await self._forget_templates(name)  # no data of anybody's: not worth a word
        if view is None and not deleted:
            raise NotFound(f"there is no U-Cloud {name}, and nothing kept of one", hint=_SHOWN)
        return view

    async def _forget_templates(self, name: str) -> None:
        """Those of a U-Cloud that is gone: nobody asks for them any more."""
        templates = await self._plane.state.templates(name)
        if templates is not None:
            await self._plane.state.remove(templates)

    async def _down(self, document: UCloudDocument, *, drop_volumes: bool) -> api.UCloudView:
        name = document.name

        def absent(fresh: UCloudDocument) -> None:
            fresh.drop_volumes = fresh.drop_volumes or drop_volumes
            if not fresh.deleting:
                fresh.deleting = True
                fresh.generation += 1

        await self._plane.state.change(document, absent)
        self._look(ucloud_key(name), 0.0)
        return await self.ucloud(name)

    async def _kept(self, name: str, before: UCloudDocument | None, offers: list[Offer]) -> Kept:
        platforms = await self._plane.state.platforms(name)
        return Kept(
            volumes=await self.volumes.kept(name, before, offers),
            store=await self.buckets.kept(name, before),
            checkpoints=await self.checkpoints.kept(name),
            engines={(p.wish.provider.name, p.wish.host): p.engines for p in platforms},
            shared=await self.volumes.shared(name),
        )

    async def _moved(self, before: UCloudDocument, moves: dict[str, Move]) -> Decision:
        """The decision for what there is, with some EEs at other providers."""
        asked = Manifest(manifest=before.manifest, file=before.file, directory=before.directory)
        offers = await self._offers(before.spec)
        taken, kept = await self._taken(before.name), await self._kept(before.name, before, offers)
        return _decided(asked, before.spec, offers, before, taken, before.marks, kept, moves)

    async def name(self, asked: Manifest, may: May = anything) -> api.Named:
        """The U-Cloud that a manifest is of, whether its images are there or not."""
        spec = await self._parsed(asked, images=False)
        may(spec.name)
        return api.Named(ucloud=spec.name)

    async def _checked(self, asked: Manifest, may: May) -> UCloud:
        """With all refused that can be without asking its providers."""
        spec = await self._parsed(asked)
        may(spec.name)
        await check_registries(self._plane, spec, asked.manifest, asked.file)
        return spec

    async def _parsed(self, asked: Manifest, *, images: bool = True) -> UCloud:
        directory = Path(asked.directory)
        if not directory.is_absolute():
            raise Invalid("is not an absolute path", where="directory")
        return await asyncio.to_thread(
            parse, asked.manifest, file=asked.file, directory=directory, images=images
        )

    async def _store(
        self, decision: Decision, before: UCloudDocument | None, asked: Manifest
    ) -> UCloudDocument:
        spec = decision.spec
        if before is None:
            document = UCloudDocument(name=spec.name, spec=spec)
            _decide(document, decision, asked)
            await self._plane.state.add(document)
            return document
        expected = before.generation

        def decided(fresh: UCloudDocument) -> None:
            if fresh.generation != expected:
                raise Conflict(ucloud_key(spec.name), expected, fresh.generation)
            if not _same(fresh, decision):
                fresh.generation += 1
                fresh.state = observed(UCLOUD, fresh.state, "applying")
            _decide(fresh, decision, asked)

        return await self._plane.state.change(before, decided)

    async def _marks(self, spec: UCloud) -> dict[str, str]:
        references = sorted({item.image for item in spec.environments})
        return await asyncio.to_thread(lambda: {item: mark_of(item) for item in references})

    async def _offers(self, spec: UCloud) -> list[Offer]:
        return list(await asyncio.gather(*(self._offer(spec, item) for item in spec.providers)))

    async def _offer(self, spec: UCloud, entry: Provider) -> Offer:
        provider = self._plane.pool.get(spec.name, entry)
        try:
            async with asyncio.timeout(OFFER_TIMEOUT_S):
                hosts = await provider.hosts()
                return Offer(entry, hosts, await provider.features())
        except TimeoutError:
            return Offer(entry, (), unreachable=f"no answer in {OFFER_TIMEOUT_S:g} s")
        except Temporary as error:
            return Offer(entry, (), unreachable=str(error))

    async def _taken(self, name: str) -> list[str]:
        others = await self._plane.state.uclouds()
        return [item for other in others if other.name != name for item in other.networks.values()]

    # -- showing

    async def uclouds(self, only: str = "") -> list[api.UCloudView]:
        """All U-Clouds, or only this one."""
        found = await self._plane.state.uclouds()
        return [await self._view(item) for item in found if only in ("", item.name)]

    async def ucloud(self, name: str) -> api.UCloudView:
        """One U-Cloud; NotFound."""
        return await self._view(await self._ucloud(name))

    async def state(self, name: str, left: str, wait_s: float) -> str:
        """Of one U-Cloud, as soon as it is not ``left``, at the latest after ``wait_s``; NotFound.

        The last one that it had, when it goes meanwhile.
        """
        _, revision = await self._plane.state.store.list(ucloud_key(name))
        state = (await self._ucloud(name)).state
        changes = self._plane.state.store.watch(ucloud_key(name), revision)
        try:
            async with asyncio.timeout(wait_s):
                while state == left:
                    await anext(changes)
                    state = (await self._ucloud(name)).state
        except (TimeoutError, StopAsyncIteration):  # the latter: the control plane ends
            return state
        finally:
            changes.close()
        return state

    async def environments(self, ucloud: str = "") -> list[api.EnvironmentRow]:
        """The rows of ``ps``."""
        if ucloud:
            await self._ucloud(ucloud)
        rows: list[api.EnvironmentRow] = []
        for item in await self._plane.state.uclouds():
            if ucloud in ("", item.name):
                rows += (await self._view(item)).environments
        return rows

    async def environment(self, ucloud: str, name: str) -> dict[str, object]:
        """One EE: its row and its spec; NotFound."""
        await self._ucloud(ucloud)
        document = await self._plane.state.environment(ucloud, name)
        if document is None:
            raise NotFound(f"U-Cloud {ucloud} has no environment {name}", hint=_SHOWN)
        platform = await self._plane.state.platform(ucloud, document.assignment.platform)
        known = {platform.name: platform} if platform else {}
        checkpoints = await self._plane.state.checkpoints_of(ucloud, name)
        row = views.environment_row(document, known, checkpoints)
        shown = {name: getattr(row, name) for name in row.__slots__}
        status = await self._plane.agents.status_now(
            ucloud, document.ready_on, document.ready.uid if document.ready else ""
        )
        return shown | {
            "spec": document.spec,
            "uid": document.ready.uid if document.ready else "",
            "mac": document.assignment.mac,
            "network": document.assignment.network,
            "exit_status": document.exit_status,
            "accelerator": platform.accelerator if platform else "",
            "memory_used_bytes": status.memory_bytes if status else 0,
            "cpu_used_s": status.cpu_s if status else 0.0,
            "started_from": status.started_from if status else "",
            "volumes": await self.volumes.mounted(document),
            "buckets": {use.name: use.access for use in document.spec.buckets},
            "checkpoints": await self.checkpoints.view(ucloud, name) if checkpoints else None,
        }

    async def session(self, ucloud: str, name: str) -> AgentSession:
        """The agent of the platform that runs an EE. NotFound, Temporary."""
        await self._ucloud(ucloud)
        document = await self._plane.state.environment(ucloud, name)
        if document is None:
            raise NotFound(f"U-Cloud {ucloud} has no environment {name}", hint=_SHOWN)
        if not document.ready_on:
            raise Temporary(f"environment {name} is {document.state}: it does not run yet")
        return self._plane.agents.hub(ucloud).session(document.ready_on)

    async def _ucloud(self, name: str) -> UCloudDocument:
        document = await self._plane.state.ucloud(name)
        if document is None:
            raise NotFound(f"there is no U-Cloud {name}", hint=_SHOWN)
        return document

    async def _view(self, document: UCloudDocument) -> api.UCloudView:
        platforms = await self._plane.state.platforms(document.name)
        environments = await self._plane.state.environments(document.name)
        volumes = await self._plane.state.volumes(document.name)
        fractions, seen = self._plane.fractions, self._plane.seen
        store = await self._plane.state.store_document(document.name)
        told = self._plane.stores.get(document.name)
        kept = await self._plane.state.checkpoints(document.name)
        return views.ucloud_view(
            document, platforms, environments, fractions, volumes, seen, store, told, kept
        )


def _decided(
    asked: Manifest,
    spec: UCloud,
    offers: list[Offer],
    before: UCloudDocument | None,
    taken: list[str],
    marks: dict[str, str],
    kept: Kept,
    moves: dict[str, Move] | None = None,
) -> Decision:
    """The decision; what refuses it is told with its place in the manifest."""
    with at_its_place(asked.manifest, asked.file):
        check_sizes(spec, offers)
        return decide(
            spec,
            offers,
            before,
            taken,
            marks,
            kept.volumes,
            kept.store,
            kept.checkpoints,
            kept.engines,
            moves,
        )


def _planned(
    decision: Decision, before: UCloudDocument | None, offers: list[Offer], kept: Kept
) -> api.Plan:
    return plan(decision, before, offers, kept.volumes, kept.store, kept.checkpoints, kept.shared)


def _decide(document: UCloudDocument, decision: Decision, asked: Manifest) -> None:
    document.restores = {} if document.deleting else _restores(document, decision)
    document.deleting = document.drop_volumes = False
    document.manifest, document.file, document.directory = (
        asked.manifest,
        asked.file,
        asked.directory,
    )
    document.spec, document.networks = decision.spec, decision.networks
    document.platforms, document.assignments = decision.platforms, decision.assignments
    document.marks, document.volumes = decision.marks, decision.volumes
    document.store = decision.store
    document.providers |= {provider_key(item): item for item in decision.spec.providers}


def _restores(document: UCloudDocument, decision: Decision) -> dict[str, Restore]:
    """Those of what stays as it is: another image, say, has not been restored."""
    old, new = replicas(document.spec.environments), replicas(decision.spec.environments)
    same = set(decision.platforms)
    for name in old.keys() & new.keys():
        marks = [marks.get(new[name].image, "") for marks in (document.marks, decision.marks)]
        if nature(old[name]) == nature(new[name]) and marks[0] == marks[1]:
            same.add(name)
    return {name: restore for name, restore in document.restores.items() if name in same}


def _same(document: UCloudDocument, decision: Decision) -> bool:
    return (
        not document.deleting
        and document.spec == decision.spec
        and document.platforms == decision.platforms
        and document.assignments == decision.assignments
        and document.networks == decision.networks
        and document.marks == decision.marks
        and document.volumes == decision.volumes
        and document.store == decision.store
    )
