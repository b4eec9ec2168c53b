"""The reconciler of templates: platforms of a U-Cloud start from memory when they come again.

What is wished for follows from a U-Cloud that is as it should be: the shapes of its platforms, and
the EEs that run on them, without their secrets. The wish outlives the U-Cloud (unless its volumes
went with it), so that the next ``up`` is warm; it is given up when another one takes its place.
Hosts make templates when they have room and time; here is only asked, again and again, how far
they are, and never while the U-Cloud's own platforms and EEs are on their way.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import (
    EnvironmentDocument,
    PlatformWish,
    TemplatesDocument,
    TemplateWish,
    UCloudDocument,
)
from supercloud.model.errors import NotFound, SupercloudError, UserError
from supercloud.model.events import Severity
from supercloud.providers.base import Templates
from supercloud.wire.content import (
    MAX_CONTENT_BYTES,
    MAX_ENVIRONMENTS,
    blobs_of,
    can_be_prepared,
    without_secrets,
)
from supercloud.wire.host import TemplateSpec, TemplateStatus
from supercloud.wire.messages import Blob, EnvironmentSpec

CHUNK_BYTES = 256 << 10
FINAL = frozenset({"ready", "refused", "unsupported"})


async def note(plane: Plane, document: UCloudDocument) -> None:
    """Wish for templates of what a U-Cloud has now; to be called when it is ready."""
    environments = await plane.state.environments(document.name)
    wishes = wishes_of(document, environments)
    there = await plane.state.templates(document.name)
    if there is None:
        await plane.state.add(TemplatesDocument(ucloud=document.name, wishes=wishes))
        return

    def changed(fresh: TemplatesDocument) -> None:
        known = {_same(wish): wish for wish in fresh.wishes}
        fresh.wishes = [known.get(_same(wish), wish) for wish in wishes]

    await plane.state.change(there, changed)


def wishes_of(
    document: UCloudDocument, environments: Sequence[EnvironmentDocument]
) -> list[TemplateWish]:
    """One for each shape at each host, with what runs on platforms of that shape."""
    found: dict[str, TemplateWish] = {}
    for _, platform in sorted(document.platforms.items()):
        wish = _wish(platform)
        wish = found.setdefault(_same(wish), wish)
        for item in environments:
            if item.ready is not None and item.ready_on == platform.name and not item.deleting:
                _add(wish, item.ready)
    return list(found.values())


def _wish(platform: PlatformWish) -> TemplateWish:
    size = platform.size
    return TemplateWish(
        provider=platform.provider, host=platform.host, image=platform.image, cpus=size.cpus,
        memory_bytes=size.memory_bytes, scratch_bytes=size.scratch_bytes,
    )  # fmt: skip


def _add(wish: TemplateWish, spec: EnvironmentSpec) -> None:
    """As far as there is room."""
    environments = [*wish.environments, without_secrets(spec)]
    size_bytes = sum(blob.size_bytes for blob in blobs_of(environments).values())
    fits = size_bytes <= MAX_CONTENT_BYTES and len(environments) <= MAX_ENVIRONMENTS
    if fits and can_be_prepared(spec):
        wish.environments = environments


def _same(wish: TemplateWish) -> str:
    return repr(replace(wish, state="", reason="", plain=False))


class TemplateController:
    """Reconciles the templates of one U-Cloud at a time; see ``reconcile``."""

    def __init__(self, plane: Plane) -> None:
        """Acts through ``plane``."""
        self._plane = plane

    async def reconcile(self, ucloud: str) -> float | None:
        """One look; seconds until the next one, or None."""
        document, pace = await self._plane.state.templates(ucloud), self._plane.pace
        if document is None:
            return None
        owner = await self._plane.state.ucloud(ucloud)
        if owner is not None and (owner.deleting or owner.state == "applying"):
            return pace.template_wait_s
        states = [await self._look(document, wish) for wish in document.wishes]
        if all(state in FINAL for state in states):
            return pace.template_look_s
        return pace.template_ask_s if "making" in states else pace.template_wait_s

    async def _look(self, document: TemplatesDocument, wish: TemplateWish) -> str:
        """Ask for one; its state, which is kept and told of when it is another one."""
        plain = wish.plain
        try:
            status = await self._ask(document.ucloud, wish)
            if status.state == "refused" and wish.environments and not plain:
                plain = True  # what is to be ready in it may be to blame
                status = replace(status, state="absent")
        except NotFound as error:
            status = TemplateStatus(state="unsupported", reason=error.message)
        except SupercloudError as error:
            message = error.message if isinstance(error, UserError) else str(error)
            status = TemplateStatus(state="absent", reason=message)
        before = wish.state

        def seen(fresh: TemplatesDocument) -> None:
            for item in fresh.wishes:
                if _same(item) == _same(wish):
                    item.state, item.reason, item.plain = status.state, status.reason, plain

        if (wish.state, wish.reason, wish.plain) != (status.state, status.reason, plain):
            await self._plane.state.change(document, seen)
        if before != status.state:
            severity: Severity = "warning" if status.state == "refused" else "info"
            self._plane.tell(
                document, f"template.{status.state}", status.reason, severity,
                host=wish.host, provider=wish.provider.name,
            )  # fmt: skip
        return status.state

    async def _ask(self, ucloud: str, wish: TemplateWish) -> TemplateStatus:
        provider = self._plane.pool.get(ucloud, wish.provider)
        templates = provider.templates
        if templates is None:
            raise NotFound((await provider.features()).get("templates", "it has none"))
        images = [host.images for host in await provider.hosts() if host.name == wish.host]
        held = images[0] if images and images[0] else (wish.image,)
        asked = TemplateSpec(
            image=wish.image if wish.image in held else held[0], cpus=wish.cpus,
            memory_bytes=wish.memory_bytes, scratch_bytes=wish.scratch_bytes,
            environments=[] if wish.plain else wish.environments,
        )  # fmt: skip
        status = await self._prepare(templates, wish.host, asked)
        if status.missing:
            blobs = blobs_of(asked.environments)
            for digest in status.missing:
                await self._offer(templates, wish.host, blobs[digest])
            status = await self._prepare(templates, wish.host, asked)
        return status

    async def _prepare(
        self, templates: Templates, host: str, asked: TemplateSpec
    ) -> TemplateStatus:
        return await self._plane.seam("provider.template", lambda: templates.prepare(host, asked))

    async def _offer(self, templates: Templates, host: str, blob: Blob) -> None:
        path = self._plane.images.blob(blob.digest)
        await self._plane.seam(
            "provider.template_blob", lambda: templates.offer(host, blob, _pieces(path))
        )


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while data := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield data
