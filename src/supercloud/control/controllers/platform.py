"""The reconciler of platforms: have the machine, wait for its agent, keep it told what to run."""

import asyncio
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

from supercloud.control import bootdata, specs
from supercloud.control.controllers.access import STORE_WAIT_S, apply_of, restore_from
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.returning import are_known, coming_with, reserve
from supercloud.control.documents import (
    PlatformDocument,
    UCloudDocument,
    checkpoints_key,
    environment_key,
    step_begin,
    step_end,
    ucloud_key,
    volume_key,
)
from supercloud.control.kept import KeptCheckpoint, Restore
from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
)
from supercloud.model.states import PLATFORM, step
from supercloud.providers.base import PlatformObservation, PlatformRequest, Provider
from supercloud.upper.platform.link.owner import token_hash
from supercloud.upper.platform.link.session import AgentSession

CREATE, BOOT = "create", "boot"
ENDED = frozenset({"failed", "stopped", "gone", "wedged"})


def tag_of(ucloud: str) -> str:
    """What marks a provider's platform as ours."""
    return f"supercloud:{ucloud}"


class PlatformController:
    """Reconciles one platform at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane
        self._missed: dict[tuple[str, str], float] = {}  # since when, on the loop's clock
        self._told: WeakKeyDictionary[AgentSession, float] = WeakKeyDictionary()  # when, likewise

    async def reconcile(self, ucloud: str, name: str) -> float | None:
        """One look; seconds until the next one, or None."""
        platform = await self._plane.state.platform(ucloud, name)
        if platform is None:
            return None
        if platform.deleting:
            await self._delete(platform)
            return None
        owner = await self._plane.state.ucloud(ucloud)
        if owner is None:
            return None
        if platform.restore and platform.restore.number > max(
            platform.restored, platform.restoring
        ):
            return await self._restore(platform, platform.restore)
        hub = self._plane.agents.hub(ucloud)
        self._plane.pool.listen(ucloud, platform.wish.provider, hub.serve_relayed)
        if platform.state in ("pending", "creating", "failed"):
            return await self._create(platform, owner)
        session = self._plane.agents.session(ucloud, name)
        if session is None:
            return await self._wait(platform)
        self._missed.pop((ucloud, name), None)
        return await self._serve(platform, session)

    # -- towards a machine

    async def _create(self, platform: PlatformDocument, owner: UCloudDocument) -> float | None:
        token, kept = self._plane.tokens.token(platform, owner.uid), await self._kept(platform)

        def creating(document: PlatformDocument) -> None:
            _move(document, "creating")
            step_begin(document.steps, CREATE)
            if document.token_sha256 != token_hash(token):
                document.token_sha256 = token_hash(token)
                document.enrolled_pin = kept.pin if kept else ""  # it has its key with it
                lifetime_s = self._plane.pace.token_lifetime_s
                document.token_expires_s = time.time() + lifetime_s

        platform = await self._change(platform, creating)
        request = await self._request(platform, token)
        seen = await self._ensure(platform, request)
        if seen.state in ENDED:
            return await self._anew(platform, f"the provider says {seen.state}: {seen.reason}")

        def booting(document: PlatformDocument) -> None:
            _move(document, "booting")
            document.address, document.first_port = seen.address, seen.first_port
            document.ports, document.accelerator = seen.ports, seen.accelerator
            document.image = seen.image
            document.error = None
            step_end(document.steps, CREATE)
            step_begin(document.steps, BOOT)

        await self._change(platform, booting)
        return 0.0

    async def _request(self, platform: PlatformDocument, token: str) -> PlatformRequest:
        wish, ucloud = platform.wish, platform.ucloud
        ca_pem = self._plane.authority(ucloud).root_pem
        endpoints = self._plane.endpoints(wish.provider.kind)
        user = bootdata.user_data(ucloud, platform.name, token, ca_pem, endpoints)
        iso = await asyncio.to_thread(bootdata.config_iso, ucloud, platform.name, user)
        kept, restore = await self._kept(platform), None
        if kept is not None and platform.restore is not None:
            name = platform.name
            volumes = await reserve(self._plane, platform)
            restore = await restore_from(self._plane, ucloud, name, name, platform.restore, volumes)
        return PlatformRequest(
            name=platform.name,
            host=wish.host,
            image=kept.image if kept else await self._image(platform),
            cpus=wish.size.cpus,
            memory_bytes=wish.size.memory_bytes,
            scratch_bytes=wish.size.scratch_bytes,
            ports=wish.size.ports,
            config_iso=iso,
            tag=tag_of(ucloud),
            restore=restore,
        )

    async def _kept(self, platform: PlatformDocument) -> KeptCheckpoint | None:
        """The checkpoint that this incarnation is made from; NotFound when it is gone."""
        if platform.restore is None or platform.restoring <= platform.restored:
            return None
        there = await self._plane.state.checkpoints_of(platform.ucloud, platform.name)
        for kept in there.kept if there is not None else ():
            if kept.sequence == platform.restore.sequence:
                return kept
        raise NotFound(
            f"platform {platform.name} has no checkpoint {platform.restore.sequence}",
            hint=f"supercloud checkpoints {platform.ucloud}/{platform.name} lists those there are",
        )

    async def _image(self, platform: PlatformDocument) -> str:
        """The L1 image of the wish, or the host's own when it does not hold that one any more."""
        wish = platform.wish
        for host in await self._provider(platform).hosts():
            if host.name == wish.host and host.images and wish.image not in host.images:
                return host.images[0]
        return wish.image

    async def _ensure(
        self, platform: PlatformDocument, request: PlatformRequest
    ) -> PlatformObservation:
        provider = self._provider(platform)
        try:
            return await self._plane.seam(
                "provider.ensure_platform", lambda: provider.ensure_platform(request)
            )
        except Exists as error:  # of another time, with another shape
            await self._remove_machine(platform)
            raise Temporary(f"{error}; it was removed", delay_s=0.2) from error
        except (BadState, Busy) as error:
            if request.restore is None or not request.restore.volumes:
                raise
            raise Temporary(f"its volumes are not free yet: {error}") from error
        except NoResources as error:
            others = await self._plane.state.platforms(platform.ucloud)
            if any(other.deleting for other in others):
                raise Temporary(f"waits for a platform to go: {error}") from error
            raise

    async def _wait(self, platform: PlatformDocument) -> float:
        """Its agent is not connected: look what the provider says."""
        if platform.state == "ready":
            if (left_s := self._grace(platform)) > 0:
                return left_s
            platform = await self._change(platform, lambda document: _move(document, "lost"))
            self._plane.tell(platform, "platform.lost", severity="warning")
            await self._look_at_environments(platform)
        seen = await self._observe(platform)
        if seen is None:
            return await self._anew(platform, "the provider does not have it any more")
        if seen.state in ENDED:
            return await self._anew(platform, f"the provider says {seen.state}: {seen.reason}")
        if seen.cut_off:
            return await self._anew(platform, f"its agent cannot be reached: {seen.reason}")
        if (platform.ucloud, platform.name) in self._plane.agents.reused:
            return await self._anew(platform, "it started anew and has lost its key")
        pace = self._plane.pace
        if platform.state == "booting":
            if time.time() - platform.since_s > pace.boot_timeout_s:
                return await self._anew(platform, "its agent did not answer in time")
            return pace.observe_s
        return pace.lost_observe_s

    def _grace(self, platform: PlatformDocument) -> float:
        """Seconds that it may yet be away without being called lost: agents dial again."""
        now = asyncio.get_running_loop().time()
        since = self._missed.setdefault((platform.ucloud, platform.name), now)
        return since + self._plane.pace.lost_grace_s - now

    async def _restore(self, platform: PlatformDocument, restore: Restore) -> float:
        """Delete the machine, and make the next incarnation from a checkpoint."""

        def going(document: PlatformDocument) -> None:
            if document.state != "pending":
                _move(document, "failed")
            document.reason = f"goes back to checkpoint {restore.sequence}"
            document.error = None

        platform = await self._change(platform, going)
        self._plane.tell(platform, "platform.restoring", platform.reason)
        await self._remove_machine(platform)
        await self._plane.agents.forget(platform.ucloud, platform.name)

        def next_one(document: PlatformDocument) -> None:
            document.incarnation += 1
            document.token_sha256 = document.enrolled_pin = ""
            document.restoring = restore.number

        platform = await self._change(platform, next_one)
        await self._look_at_environments(platform)
        await self._look_at_volumes(platform)
        return 0.0

    async def _anew(self, platform: PlatformDocument, reason: str) -> float:
        """Delete the machine, and make the platform's next incarnation."""

        def failed(document: PlatformDocument) -> None:
            _move(document, "failed")
            document.reason = reason
            for name in (CREATE, BOOT):
                step_end(document.steps, name, reason)

        platform = await self._change(platform, failed)
        self._plane.tell(platform, "platform.failed", reason, severity="warning")
        await self._remove_machine(platform)
        await self._plane.agents.forget(platform.ucloud, platform.name)

        def next_one(document: PlatformDocument) -> None:
            document.incarnation += 1
            document.failures += 1
            document.token_sha256 = document.enrolled_pin = ""

        platform = await self._change(platform, next_one)
        await self._look_at_environments(platform)
        pace = self._plane.pace
        delay_s = pace.recreate_first_s * 2.0 ** min(platform.failures - 1, 16)
        return min(delay_s, pace.recreate_longest_s)

    # -- with an agent

    async def _serve(self, platform: PlatformDocument, session: AgentSession) -> float | None:
        if platform.state != "ready":
            if not await are_known(self._plane, platform):
                return self._plane.pace.release_s

            def ready(document: PlatformDocument) -> None:
                _move(document, "ready")
                document.reason, document.failures, document.error = "", 0, None
                document.engines = dict(session.hello.engines)
                document.restored = document.restoring
                step_end(document.steps, BOOT)

            platform = await self._change(platform, ready)
            self._plane.tell(platform, "platform.ready")
            self._plane.look(checkpoints_key(platform.ucloud, platform.name), 0.0)
        return await self._apply(platform, session)

    async def _apply(self, platform: PlatformDocument, session: AgentSession) -> float | None:
        """Tell the agent what to run, when that changed; not too often when much changes."""
        now = asyncio.get_running_loop().time()
        wait_s = self._told.get(session, -1e9) + self._plane.pace.apply_gap_s - now
        if wait_s > 0:
            return wait_s
        environments = await self._plane.state.environments(platform.ucloud)
        _, revision = await self._plane.state.store.list("lease/none/")
        apply = await apply_of(self._plane, platform, environments, revision)
        agents, wanted = self._plane.agents, specs.fingerprint(apply)
        told = {item.name for item in apply.environments}
        waiting = any(
            specs.runs_on(item, platform.name) and specs.restoring(item) and item.name not in told
            for item in environments
        )
        again_s = STORE_WAIT_S if waiting else None
        if agents.applied.get(session) == wanted:
            return again_s
        self._told[session] = now
        report = await self._plane.seam("link.apply", lambda: session.apply(apply))
        agents.applied[session] = wanted
        agents.take(platform.ucloud, platform.name, report)
        for item in environments:
            if platform.name in (item.ready_on, item.assignment.platform):
                self._plane.look(environment_key(platform.ucloud, item.name), 0.0)
        return again_s

    # -- away

    async def _delete(self, platform: PlatformDocument) -> None:
        if platform.state != "deleting":
            platform = await self._change(platform, lambda document: _move(document, "deleting"))
        session = self._plane.agents.session(platform.ucloud, platform.name)
        if session is not None:
            await self._shut_down(platform, session)
        await self._remove_machine(platform)
        await self._plane.agents.forget(platform.ucloud, platform.name)
        await self._plane.state.remove(platform)
        self._plane.tell(platform, "platform.deleted")
        await self._look_at_environments(platform)
        self._plane.look(ucloud_key(platform.ucloud), 0.0)

    async def _shut_down(self, platform: PlatformDocument, session: AgentSession) -> None:
        """Let its EEs end in peace; what does not, ends with the machine."""
        timeout_s = self._plane.pace.shutdown_timeout_s
        try:
            await self._plane.seam("link.shutdown", lambda: session.shutdown(timeout_s=timeout_s))
        except SupercloudError as error:
            self._plane.tell(platform, "platform.shutdown", str(error), severity="warning")

    async def _remove_machine(self, platform: PlatformDocument) -> None:
        provider = self._provider(platform)
        await self._plane.seam(
            "provider.delete_platform", lambda: provider.delete_platform(platform.name)
        )
        if await self._observe(platform) is not None:
            raise Temporary(f"platform {platform.name} is not gone yet", delay_s=0.5)

    # -- helpers

    async def _observe(self, platform: PlatformDocument) -> PlatformObservation | None:
        for seen in await self._provider(platform).platforms():
            if seen.name == platform.name and seen.state != "gone":
                return seen
        return None

    def _provider(self, platform: PlatformDocument) -> Provider:
        return self._plane.pool.get(platform.ucloud, platform.wish.provider)

    async def _change(
        self, platform: PlatformDocument, mutate: Callable[[PlatformDocument], None]
    ) -> PlatformDocument:
        return await self._plane.state.change(platform, mutate)

    async def _look_at_volumes(self, platform: PlatformDocument) -> None:
        for item in await coming_with(self._plane, platform):
            self._plane.look(volume_key(platform.ucloud, item.volume), 0.0)

    async def _look_at_environments(self, platform: PlatformDocument) -> None:
        for item in await self._plane.state.environments(platform.ucloud):
            if platform.name in (item.ready_on, item.assignment.platform):
                self._plane.look(environment_key(platform.ucloud, item.name), 0.0)


def _move(platform: PlatformDocument, to: str) -> None:
    if platform.state != to:
        platform.state, platform.since_s = step(PLATFORM, platform.state, to), time.time()
