"""What the API can be asked to do with checkpoints; going back to one is in ``restores``."""

import asyncio
import contextlib

from supercloud.control import schedule, views
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.subjects import leaving, subject_of
from supercloud.control.documents import CheckpointsDocument, checkpoints_key
from supercloud.control.kept import TakeTask
from supercloud.model.errors import BadState, Busy, NotFound, Temporary, Unsupported
from supercloud.wire import api


class CheckpointService:
    """The operations. ``deciding`` is held while what there is must not change."""

    def __init__(self, plane: Plane, deciding: asyncio.Lock) -> None:
        """Acts through ``plane``."""
        self._plane, self._deciding = plane, deciding

    # -- what there is

    async def rows(self, ucloud: str = "") -> list[api.CheckpointsRow]:
        """Those of a U-Cloud, or all: also of U-Clouds that are not up."""
        documents = await self._plane.state.checkpoints(ucloud)
        return [await self._row(item) for item in documents]

    async def view(self, ucloud: str, name: str) -> api.CheckpointsView:
        """Those of one EE or platform, in all detail; NotFound."""
        document = await self.find(ucloud, name)
        shape = ""
        with contextlib.suppress(BadState, Temporary, Unsupported):
            shape = (await subject_of(self._plane, document)).shape
        return views.checkpoints_view(document, await self._row(document), shape)

    async def kept(self, ucloud: str) -> dict[str, str]:
        """Of what there are checkpoints: an ``environment`` or a ``platform``, by name."""
        return {item.name: item.of for item in await self._plane.state.checkpoints(ucloud)}

    async def find(self, ucloud: str, name: str) -> CheckpointsDocument:
        """NotFound with what to do."""
        document = await self._plane.state.checkpoints_of(ucloud, name)
        if document is None:
            raise NotFound(
                f"there are no checkpoints of {name} in U-Cloud {ucloud}",
                hint="say `checkpoint: {}` or `checkpoint: {every: 10m}` of it in the manifest; "
                "supercloud checkpoints lists what there is",
            )
        return document

    async def _row(self, document: CheckpointsDocument) -> api.CheckpointsRow:
        due_s = schedule.due_s(document, self._plane.pace.checkpoint_retry_s)
        restoring = await self._plane.restoring(document.ucloud, document.name)
        return views.checkpoints_row(document, due_s, restoring.sequence if restoring else 0)

    # -- changing

    async def take(self, ucloud: str, name: str) -> api.CheckpointTask:
        """Ask for one; ``view`` shows how far it is. BadState, Busy, Temporary."""
        document = await self.find(ucloud, name)
        _wanted(document)
        await subject_of(self._plane, document)  # all refusals before any effect
        task = TakeTask()

        def asked(fresh: CheckpointsDocument) -> None:
            _wanted(fresh)
            if schedule.waits(fresh):
                raise Busy(
                    f"a checkpoint of {name} was asked for already, and is not done",
                    hint=f"supercloud checkpoints {ucloud}/{name} shows it when it is",
                )
            fresh.task, fresh.failures = task, 0

        await self._plane.state.change(document, asked)
        self._plane.look(checkpoints_key(ucloud, name), 0.0)
        return api.CheckpointTask(id=task.id)

    async def delete(self, ucloud: str, name: str) -> None:
        """All of an EE or platform. BadState while the manifest wants some of it."""
        async with self._deciding:
            document = await self.find(ucloud, name)
            owner = await self._plane.state.ucloud(ucloud)
            up = owner is not None and not owner.deleting
            if up and document.policy is not None:
                raise BadState(
                    f"checkpoints are taken of {name}, by the manifest of {ucloud}, which is up",
                    hint=f"take `checkpoint` out of it first, or supercloud down {ucloud}",
                )
            await self._delete(document)

    async def forget(self, ucloud: str) -> int:
        """``delete_all`` while nobody decides that it is to be up again."""
        async with self._deciding:
            return await self.delete_all(ucloud)

    async def delete_all(self, ucloud: str) -> int:
        """All of a U-Cloud that is going or gone; how many EEs and platforms had some.

        ``deciding`` is held. BadState while it is up.
        """
        owner = await self._plane.state.ucloud(ucloud)
        if owner is not None and not owner.deleting:
            raise BadState(
                f"U-Cloud {ucloud} is up", hint=f"supercloud down {ucloud} --checkpoints"
            )
        documents = await self._plane.state.checkpoints(ucloud)
        for document in documents:
            await self._delete(document)
        return len(documents)

    async def _delete(self, document: CheckpointsDocument) -> None:
        def absent(fresh: CheckpointsDocument) -> None:
            fresh.deleting = True

        with contextlib.suppress(NotFound):  # gone already is fine
            await self._plane.state.change(document, absent)
        self._plane.look(checkpoints_key(document.ucloud, document.name), 0.0)


def _wanted(document: CheckpointsDocument) -> None:
    if document.deleting:
        raise leaving(document)
    if document.policy is None:
        raise BadState(
            f"no checkpoints are to be taken of {document.name} any more",
            hint="say `checkpoint: {}` of it in the manifest, and supercloud up",
        )
