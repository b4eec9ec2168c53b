"""The control plane as a whole: everything put together, started, driven by changes, stopped."""

import asyncio
import contextlib
import functools
import logging
import ssl
from pathlib import Path

from supercloud.control import convert
from supercloud.control.agents import Agents
from supercloud.control.authorities import Authorities
from supercloud.control.bootdata import Tokens
from supercloud.control.controllers.checkpoint import CheckpointController
from supercloud.control.controllers.environment import EnvironmentController
from supercloud.control.controllers.failover import FailoverController
from supercloud.control.controllers.plane import Pace, Plane
from supercloud.control.controllers.platform import PlatformController
from supercloud.control.controllers.store import StoreController
from supercloud.control.controllers.template import TemplateController
from supercloud.control.controllers.tunnels import TunnelController
from supercloud.control.controllers.ucloud import UCloudController
from supercloud.control.controllers.volume import VolumeController
from supercloud.control.deposits import deposit
from supercloud.control.documents import TEMPLATES, Following, VolumeDocument, ucloud_key
from supercloud.control.effects import Seam, SeamedStore
from supercloud.control.events import EventLog
from supercloud.control.images import Convert, Images
from supercloud.control.pool import Make, ProviderPool
from supercloud.control.reconcile import WorkQueue
from supercloud.control.service import Service
from supercloud.control.state import State, kind_of
from supercloud.control.store import Compacted, Store
from supercloud.model.errors import NotFound, Permanent, UserError, to_wire
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import PinStore, Provider
from supercloud.trust import tls
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.api import Check

RENDEZVOUS = "169.254.77.1:7444"
"""Where an L1 platform on a Lower Layer host finds its user domain, which relays to us."""

STOP_TIMEOUT_S = 10.0

log = logging.getLogger("supercloud.control.app")


class ControlPlane:
    """Everything but the API's sockets. ``start`` it, ``stop`` it."""

    def __init__(
        self,
        store: Store,
        state_directory: Path,
        cache: Path,
        *,
        seam: Seam | None = None,
        pace: Pace | None = None,
        convert_image: Convert | None = None,
        make_provider: Make | None = None,
        own_endpoint: str = "",
    ) -> None:
        """The defaults are production's; tests put their own in."""
        seam = seam or Seam()
        self.store = SeamedStore(store, seam)
        self._trust = state_directory / "trust"
        self._trust.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.authority = Authorities(self._trust)
        self._own_endpoint, self._places = own_endpoint, (state_directory, cache)
        self.queue = WorkQueue(self._reconcile, failed=self._failed)
        state = State(self.store)
        events = EventLog(store)
        default_convert = functools.partial(convert.in_process, cache=cache / "oci")
        packing = None if convert_image else convert.pack_in_process
        looking = functools.partial(convert.look_in_process, cache=cache / "oci")
        look = None if convert_image else looking
        images = Images(cache, convert_image or default_convert, packing, look)
        agents = Agents(state, images, events, self._look_now, self.authority, self._trust)
        self.plane = Plane(
            state=state,
            seam=seam,
            pool=ProviderPool(
                make_provider or self._provider, self.store, state_directory / "providers"
            ),
            agents=agents,
            images=images,
            tokens=Tokens.ensure(state_directory / "tokens.key"),
            events=events,
            look=self.queue.add,
            authority=self.authority,
            endpoints=self._endpoints,
            keys=functools.cache(functools.partial(VolumeKeys.ensure, str(self._trust))),
            pace=pace or Pace(),
        )
        agents.deposit = functools.partial(deposit, self.plane)
        self.service = Service(self.plane, self.authority.root_pem)
        self.known: set[str] = set()
        self._uclouds = UCloudController(self.plane)
        self._platforms = PlatformController(self.plane)
        self._environments = EnvironmentController(self.plane)
        self._volumes = VolumeController(self.plane)
        self._stores = StoreController(self.plane)
        self._checkpoints = CheckpointController(self.plane, self._volumes.calls)
        self._tunnels = TunnelController(self.plane)
        self._failover = FailoverController(self.plane)
        self._templates = TemplateController(self.plane)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look at everything that there is, then at whatever changes."""
        await self.plane.events.load()
        revision = await self._look_at_all()
        self._watching = asyncio.get_running_loop().create_task(self._watch(revision), name="watch")

    async def stop(self) -> None:
        """Stop acting; platforms and EEs go on."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.queue.stop()
        with contextlib.suppress(TimeoutError):  # who does not let go is left behind
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.plane.pool.close()
                await self.plane.agents.close()
        await self.plane.events.close()

    async def doctor(self) -> list[Check]:
        """What it can say of its health."""
        from supercloud.control.doctor import examine  # noqa: PLC0415 - seldom

        return await examine(self.plane, self._places)

    # -- what to look at

    async def _look_at_all(self) -> int:
        rows, revision = await self.store.list("")
        for row in rows:
            if kind := kind_of(row.key):
                self.queue.add(row.key)
                if kind == "ucloud":
                    self.known.add(row.key.partition("/")[2])
                    self.queue.add(f"sweep/{row.key.partition('/')[2]}")
        return revision

    async def _watch(self, revision: int) -> None:
        while True:
            try:
                async for change in self.store.watch("", revision):
                    revision = change.revision
                    self._changed(change.key, gone=change.row is None)
            except Compacted:
                revision = await self._look_at_all()

    def _changed(self, key: str, *, gone: bool) -> None:
        kind, _, rest = key.partition("/")
        if not kind_of(key):
            return
        self.queue.add(key)
        if kind == "ucloud":
            (self.known.discard if gone else self.known.add)(rest)
            self.queue.add(f"sweep/{rest}", self.plane.pace.sweep_s)
        else:
            self.queue.add(ucloud_key(rest.partition("/")[0]), self.plane.pace.settle_s)

    def _look_now(self, key: str) -> None:
        self.queue.add(key)

    async def _reconcile(self, key: str) -> float | None:
        kind, _, rest = key.partition("/")
        ucloud, _, name = rest.partition("/")
        try:
            if kind == "ucloud":
                return await self._uclouds.reconcile(ucloud)
            if kind == "sweep":
                return await self._uclouds.sweep(ucloud)
            if kind == "platform":
                return await self._platforms.reconcile(ucloud, name)
            if kind == "volume":
                return await self._volumes.reconcile(ucloud, name)
            if kind == "objects":
                return await self._stores.reconcile(ucloud)
            if kind == "checkpoints":
                return await self._checkpoints.reconcile(ucloud, name)
            if kind == "collect":
                return await self._checkpoints.collect(ucloud)
            if kind == "lease":
                return await self._volumes.replication.leasing.lease(ucloud, name)
            if kind == "rejoin":
                return await self._volumes.replication.rejoin(ucloud, name)
            if kind == "failover":
                return await self._failover.reconcile(ucloud)
            if kind == "tunnels":
                return await self._tunnels.reconcile(ucloud)
            if kind == TEMPLATES:
                return await self._templates.reconcile(ucloud)
            if kind == "seals":
                return await self._volumes.sealing.poll(ucloud, name)
            return await self._environments.reconcile(ucloud, name)
        except NotFound:
            if await self.store.get(key) is None:
                return None  # it went away under the reconciler's hands
            raise

    async def _failed(self, key: str, error: BaseException, bug: str) -> None:
        """Put the reason where the user sees it."""
        kind, _, rest = key.partition("/")
        ucloud, _, name = rest.partition("/")
        log.warning("%s: %s %s", key, error, bug)
        final = isinstance(error, UserError | Permanent)
        wire = to_wire(error, bug_id=bug)

        def failed(fresh: Following) -> None:
            if isinstance(fresh, VolumeDocument) and fresh.halted:
                return  # that is the reason that its user is to see
            fresh.reason = str(wire["message"])
            fresh.error = wire if final else None

        state = self.plane.state
        with contextlib.suppress(NotFound):  # it is gone: nobody needs the reason
            if kind == "platform" and (platform := await state.platform(ucloud, name)):
                await state.change(platform, failed)
            elif kind == "environment" and (item := await state.environment(ucloud, name)):
                await state.change(item, failed)
            elif kind == "objects" and (store := await state.store_document(ucloud)):
                await state.change(store, failed)
            elif kind == "checkpoints" and (kept := await state.checkpoints_of(ucloud, name)):
                await state.change(kept, failed)
            elif kind == "volume" and (volume := await state.volume(ucloud, name)):
                await state.change(volume, failed)

    # -- what it is made of

    def _provider(self, ucloud: str, entry: Entry, pins: PinStore, directory: Path) -> Provider:
        from supercloud.providers.context import Context  # noqa: PLC0415 - see registry
        from supercloud.providers.registry import make  # noqa: PLC0415 - kinds load as needed

        context = Context(
            ucloud=ucloud,
            entry=entry,
            authority=self.authority(ucloud),
            trust_directory=str(self._trust),
            state_directory=str(directory),
            pins=pins,
        )
        return make(context)

    def server_context(self, ucloud: str) -> ssl.SSLContext:
        """TLS for the API and for agents: a client may show a certificate under the user's root."""
        authority = self.authority(ucloud)
        paths = authority.own_files(str(self._trust))
        return tls.server_context(*paths, authority.root_pem, None)

    def _endpoints(self, kind: str) -> list[str]:
        own = [self._own_endpoint] if self._own_endpoint else []
        return [RENDEZVOUS, *own] if kind == "lower_layer" else [*own, RENDEZVOUS]
