"""The reconciler of EEs: prepare the image, say what is to run where, and see what runs."""

import time
from collections.abc import Callable

from supercloud.control import specs
from supercloud.control.controllers import access
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import (
    EnvironmentDocument,
    PlatformDocument,
    environment_key,
    platform_key,
    step_begin,
    step_end,
    ucloud_key,
)
from supercloud.model.errors import Temporary
from supercloud.model.events import Severity
from supercloud.model.states import ENVIRONMENT, observed
from supercloud.wire.messages import EnvironmentStatus, ImageRef, ObjectAccess

IMAGE, START = "image", "start"
STORE_WAIT_S = 1.0  # it is looked at sooner when it can go on
AGENT_STATES = frozenset({"starting", "running", "serving", "unready", "exited", "failed"})
UP = frozenset({"running", "serving", "unready"})


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
        image = await self._image(document)
        objects = await self._objects(document)
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
        if not access.has_access(document, store):
            state = f"is {store.state} {store.reason}".rstrip() if store else "is not there"
            raise Temporary(f"waits for its object store, which {state}", delay_s=STORE_WAIT_S)
        return access.plain(self._plane, document.ucloud)

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

        before, document = document.state, await self._change(document, seen)
        if document.state != before:
            severity: Severity = "warning" if state in ("failed", "lost", "unready") else "info"
            self._plane.tell(document, f"environment.{state}", document.reason, severity)
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
    return document.spec, document.assignment, document.mark


def _source(document: EnvironmentDocument) -> str:
    return f"{document.spec.image} {document.mark}"


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
