"""The reconciler of EEs: prepare the image, say what is to run where, and see what runs."""

import time
from collections.abc import Callable

from supercloud.control import specs
from supercloud.control.controllers import access
from supercloud.control.controllers.access import UP
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import (
    EnvironmentDocument,
    PlatformDocument,
    checkpoints_key,
    environment_key,
    platform_key,
    step_begin,
    step_end,
    ucloud_key,
)
from supercloud.control.images import source_of
from supercloud.model.errors import Temporary, Unsupported
from supercloud.model.events import Severity
from supercloud.model.states import ENVIRONMENT, observed
from supercloud.wire.messages import EnvironmentStatus, ImageRef, ObjectAccess

IMAGE, START = "image", "start"
AGENT_STATES = frozenset({"starting", "running", "serving", "unready", "exited", "failed"})


class EnvironmentController:
    """Reconciles one EE at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane

    async def reconcile(self, ucloud: str, name: str) -> float | None:
        """One look; seconds until the next one, or None."""
        document = await self._plane.state.environment(ucloud, name)
        if document is None:
            return None
        if document.deleting:
            await self._retire(document)
            return None
        document = await self._make_ready(document)
        await self._observe(document)
        return None

    # -- what is to run

    async def _make_ready(self, document: EnvironmentDocument) -> EnvironmentDocument:
        await self._checkpointable(document)
        image = await self._image(document)
        objects = await self._objects(document)
        await self._checkpoint(document)
        spec = specs.environment_spec(document, image, objects)
        platform = document.assignment.platform
        if document.current and document.ready == spec and document.ready_on == platform:
            return document
        old, old_platform = (document.ready, document.ready_on), document.ready_on

        def placed(fresh: EnvironmentDocument) -> None:
            if _wish(fresh) != _wish(document):
                return  # the wish changed meanwhile: there will be another look
            fresh.image, fresh.image_of, fresh.error = image, _source(fresh), None
            fresh.ready, fresh.ready_on, fresh.current = spec, platform, True
            step_end(fresh.steps, IMAGE)
            if old != (spec, platform):
                _move(fresh, "placed")
                fresh.reason = ""
                step_begin(fresh.steps, START)

        document = await self._change(document, placed)
        for affected in {platform, old_platform} - {""}:
            self._plane.look(platform_key(document.ucloud, affected), self._plane.pace.settle_s)
        return document

    async def _objects(self, document: EnvironmentDocument) -> ObjectAccess | None:
        """How it finds its buckets. Temporary until the store knows it."""
        if not document.spec.buckets:
            return None
        store = await self._plane.state.store_document(document.ucloud)
        if not access.has_access(document.name, access.buckets_of(document), store):
            state = f"is {store.state} {store.reason}".rstrip() if store else "is not there"
            raise Temporary(
                f"waits for its object store, which {state}", delay_s=access.STORE_WAIT_S
            )
        return access.plain(self._plane, document.ucloud)

    async def _checkpoint(self, document: EnvironmentDocument) -> None:
        """Temporary until it can be said what it is to be restored from."""
        if document.restore is not None and specs.restoring(document):
            place = document.assignment.platform
            restore, plane, ucloud = document.restore, self._plane, document.ucloud
            await access.restore_from(plane, ucloud, document.name, place, restore)

    async def _checkpointable(self, document: EnvironmentDocument) -> None:
        """Unsupported when its platform says that it can take no checkpoints of such an EE."""
        place = document.assignment.platform
        platform = await self._plane.state.platform(document.ucloud, place)
        engines = platform.engines if platform is not None else {}
        if why := specs.checkpoint_refusal(document.spec, engines):
            raise Unsupported(
                f"no checkpoints can be taken of {document.name} on {place}: {why}",
                hint="take `checkpoint` out of the environment, or place it elsewhere",
            )

    async def _image(self, document: EnvironmentDocument) -> ImageRef:
        image = document.image
        same = document.image_of == _source(document)
        if image is not None and same and self._plane.images.complete(image):
            return image

        def preparing(fresh: EnvironmentDocument) -> None:
            if fresh.ready is None:
                _move(fresh, "preparing")
            step_begin(fresh.steps, IMAGE)

        await self._change(document, preparing)
        key = environment_key(document.ucloud, document.name)

        def progress(part: float) -> None:
            self._plane.fractions[key] = part

        try:
            return await self._plane.seam(
                "images.prepare",
                lambda: self._plane.images.prepare(document.spec, document.mark, progress),
            )
        finally:
            self._plane.fractions.pop(key, None)

    # -- what runs

    async def _observe(self, document: EnvironmentDocument) -> None:
        platform = await self._plane.state.platform(document.ucloud, document.ready_on)
        agents = self._plane.agents
        status = None
        if document.ready is not None and platform is not None:
            status = agents.status(document.ucloud, platform.name, document.ready.uid)
        heard = (document.ucloud, document.ready_on) in agents.reports
        state = _seen(document, platform, status, heard=heard)

        def seen(fresh: EnvironmentDocument) -> None:
            if fresh.ready == document.ready:
                _note(fresh, state, status)

        restored = document.restored
        before, document = document.state, await self._change(document, seen)
        if document.restored != restored and document.restore is not None:
            sequence = document.restore.sequence
            self._plane.tell(document, "environment.restored", f"from checkpoint {sequence}")
        if document.state != before:
            severity: Severity = "warning" if state in ("failed", "lost", "unready") else "info"
            self._plane.tell(document, f"environment.{state}", document.reason, severity)
            self._plane.look(checkpoints_key(document.ucloud, document.name), 0.0)
            self._plane.look(ucloud_key(document.ucloud), self._plane.pace.settle_s)

    # -- away

    async def _retire(self, document: EnvironmentDocument) -> None:
        document = await self._change(document, lambda fresh: _move(fresh, "deleting"))
        if await self._still_there(document):
            return
        await self._plane.state.remove(document)
        self._plane.tell(document, "environment.deleted")
        self._plane.look(ucloud_key(document.ucloud), self._plane.pace.settle_s)

    async def _still_there(self, document: EnvironmentDocument) -> bool:
        """Whether its platform may run it yet; asks the platform to stop it."""
        name = document.ready_on
        if not name or await self._plane.state.platform(document.ucloud, name) is None:
            return False
        report = self._plane.agents.reports.get((document.ucloud, name))
        session = self._plane.agents.session(document.ucloud, name)
        told = session is not None and session in self._plane.agents.applied
        if report is None or not told:
            return True  # the platform's reconciler looks at us once it has told the agent
        if any(status.name == document.name for status in report.environments):
            self._plane.look(platform_key(document.ucloud, name), self._plane.pace.settle_s)
            return True
        return False

    async def _change(
        self, document: EnvironmentDocument, mutate: Callable[[EnvironmentDocument], None]
    ) -> EnvironmentDocument:
        return await self._plane.state.change(document, mutate)


def _wish(document: EnvironmentDocument) -> object:
    return document.spec, document.assignment, document.mark, document.restore


def _source(document: EnvironmentDocument) -> str:
    return source_of(document.spec.image, document.mark)


def _seen(
    document: EnvironmentDocument,
    platform: PlatformDocument | None,
    status: EnvironmentStatus | None,
    *,
    heard: bool,
) -> str:
    """The state that follows from what is known of the platform and of its report.

    ``heard`` is whether there is a report: before the first one of our life, EEs are as they were.
    """
    if platform is not None and platform.deleting:
        return document.state
    if platform is None or platform.state in ("pending", "creating", "booting", "failed"):
        return "placed" if document.state in ("preparing", "placed") else "pending"
    if platform.state == "lost":
        return "lost" if document.state in UP else document.state
    if not heard and document.state in UP:
        return document.state
    if status is None or status.state not in AGENT_STATES:
        return "placed" if document.state in ("preparing", "placed") else "pending"
    return status.state


def _note(document: EnvironmentDocument, state: str, status: EnvironmentStatus | None) -> None:
    _move(document, state)
    document.reason = status.reason if status else ""
    document.engine = status.engine if status else document.engine
    begun = state in UP or state == "exited"
    if status is not None and document.current and document.restore is not None and begun:
        document.restored = document.restore.number
    if status is not None:
        document.restarts, document.exit_status = status.restarts, status.exit_status
        document.started_s = status.started_s or document.started_s
    if state in ("serving", "exited") or (state == "running" and not document.spec.ports):
        step_end(document.steps, START)
    elif state == "failed":
        step_end(document.steps, START, document.reason or "it failed")
    elif state in ("placed", "pending", "starting"):
        step_begin(document.steps, START)


def _move(document: EnvironmentDocument, to: str) -> None:
    if document.state != to:
        document.state = observed(ENVIRONMENT, document.state, to)
        document.since_s = time.time()
