"""The reconciler of checkpoints: taken when it is time or asked for, kept as many as is wished.

::

    due, or asked for -> take (its head is kept) -> too many: stale -> collect, for all of a U-Cloud

A head is written down when the call has answered, so a call that was cut, and one whose answer
nobody heard, is made again after the same head. What is to go is first struck off the document and
then removed from the store: what a document names is there. So it is with snapshots of volumes: see
``control.held``.
"""

import time
from collections.abc import Callable

from supercloud.control import held, schedule
from supercloud.control.controllers import access
from supercloud.control.controllers.hostcalls import HostCalls
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.standstill import Standstill, look_at_volumes
from supercloud.control.controllers.subjects import Subject, leaving, subject_of
from supercloud.control.documents import (
    CheckpointsDocument,
    StoreDocument,
    step_begin,
    step_end,
    store_key,
    ucloud_key,
)
from supercloud.control.kept import KeptCheckpoint
from supercloud.model.errors import (
    BadState,
    Permanent,
    SupercloudError,
    Temporary,
    Unsupported,
    UserError,
    to_wire,
)
from supercloud.model.states import CHECKPOINTS, observed
from supercloud.wire.checkpoints import (
    BUCKET,
    CheckpointCollect,
    CheckpointTake,
    CheckpointTaken,
    Kept,
    StoreAccess,
)

TAKE = "take"
MOST_AT_ONCE = 8
"""Of all that are taken at a time: the others wait for their turn."""
MOST_DETAILS, LONGEST_KEY, LONGEST_DETAIL = 32, 64, 512
"""What is noted of a checkpoint's details, which are to be shown only."""


def collect_key(ucloud: str) -> str:
    """The work queue's key for removing what is stale."""
    return f"collect/{ucloud}"


class CheckpointController:
    """Reconciles one EE's or platform's at a time; see ``reconcile`` and ``collect``."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """Acts through ``plane``, and on volumes through ``calls``."""
        self._plane, self._calls = plane, calls
        self._busy: set[tuple[str, str]] = set()  # platforms of which one is being taken
        self._told: dict[str, str] = {}  # why nothing is removed, by U-Cloud

    async def reconcile(self, ucloud: str, name: str) -> float | None:
        """One look; seconds until the next one, or None."""
        document = await self._plane.state.checkpoints_of(ucloud, name)
        if document is None:
            return None
        if document.deleting or (document.policy is None and not document.kept):
            return await self._going(document)
        document = await self._retention(await self._settled(document))
        if document.stale:
            self._plane.look(collect_key(ucloud), self._plane.pace.collect_s)
        due_s = schedule.due_s(document, self._plane.pace.checkpoint_retry_s)
        if due_s is None:
            return None
        left_s = due_s - time.time()
        return left_s if left_s > 0 else await self._take(document)

    async def _settled(self, document: CheckpointsDocument) -> CheckpointsDocument:
        """As it is while none is being taken: who took one may have died."""

        def settled(fresh: CheckpointsDocument) -> None:
            if fresh.policy is None:
                _move(fresh, "kept")
                hint = "say `checkpoint: {}` of it in the manifest, and supercloud up"
                text = f"{fresh.name} is to have no checkpoints any more"
                _answer(fresh, BadState(text, hint=hint))
            elif fresh.state in ("taking", "kept"):
                _move(fresh, "waiting")
            fresh.snapshot = ""
            step_end(fresh.steps, TAKE, "it was cut, and is taken again")

        return await self._change(document, settled)

    # -- taking

    async def _take(self, document: CheckpointsDocument) -> float | None:
        try:
            subject = await subject_of(self._plane, document)
        except BadState as error:  # it is looked at again when that changes
            if not schedule.waits(document):
                return None
            return await self._failed(document, error)
        except (Temporary, Unsupported) as error:
            return await self._failed(document, error)
        place = (document.ucloud, subject.platform.name)
        taker = access.taker_of(subject.platform.name)
        try:
            store = await access.checkpoint_access(self._plane, document.ucloud, taker)
        except Temporary as error:
            return await self._waits(document, error)
        if place in self._busy or len(self._busy) >= MOST_AT_ONCE:
            return self._plane.pace.release_s
        self._busy.add(place)
        try:
            return await self._taken(document, subject, store)
        except (UserError, Temporary, Permanent) as error:
            return await self._failed(document, error)
        finally:
            self._busy.discard(place)

    async def _waits(self, document: CheckpointsDocument, error: Temporary) -> float:
        """Not a failure: the store is on its way, and has this looked at when it is there."""

        def waiting(fresh: CheckpointsDocument) -> None:
            fresh.reason, fresh.hint = str(error), ""

        await self._change(document, waiting)
        return error.delay_s

    async def _taken(
        self, document: CheckpointsDocument, subject: Subject, store: StoreAccess
    ) -> float:
        snapshot = held.new_name() if subject.volumes or subject.whole else ""

        def taking(fresh: CheckpointsDocument) -> None:
            _move(fresh, "taking")
            fresh.snapshot = snapshot
            step_begin(fresh.steps, TAKE)

        document = await self._change(document, taking)
        asked = CheckpointTake(
            name=document.name,
            uid=subject.uid,
            store=store,
            head=document.head,
            snapshot=snapshot,
        )
        asked_ms = int(time.time() * 1000)
        standstill = Standstill(self._plane, self._calls, subject, snapshot)
        with standstill.expected():
            taken = await self._plane.seam(subject.effect, lambda: subject.call(asked))
        await standstill.told(taken.slots)
        kept = _kept(taken, subject, asked_ms, standstill.taken)
        if document.head is not None and kept.sequence <= document.head.sequence:
            raise Permanent(f"checkpoint {kept.sequence} was said to follow {document.head}")
        before = document.head

        def learned(fresh: CheckpointsDocument) -> None:
            fresh.snapshot = ""
            if fresh.head != before:
                return
            fresh.kept.append(kept)
            fresh.failures, fresh.reason, fresh.hint, fresh.error = 0, "", "", None
            step_end(fresh.steps, TAKE)
            _move(fresh, "waiting")
            if fresh.task is not None and not fresh.task.done:
                fresh.task.done, fresh.task.sequence = True, kept.sequence

        document = await self._change(document, learned)
        self._tell_taken(document, kept)
        return 0.0

    def _tell_taken(self, document: CheckpointsDocument, kept: KeptCheckpoint) -> None:
        dirty = "all of it" if kept.base else f"{kept.dirty_bytes} bytes of it"
        self._plane.tell(
            document,
            "checkpoint.taken",
            f"{kept.sequence}: stood still for {kept.pause_ms:.0f} ms, {dirty} written",
            sequence=kept.sequence,
            pause_ms=kept.pause_ms,
            dirty_bytes=kept.dirty_bytes,
            new_bytes=kept.new_bytes,
        )

    async def _failed(self, document: CheckpointsDocument, error: SupercloudError) -> float:
        final = not isinstance(error, Temporary)
        hint = error.hint if isinstance(error, UserError) else ""

        def failed(fresh: CheckpointsDocument) -> None:
            _move(fresh, "failed")
            fresh.snapshot = ""
            fresh.reason, fresh.hint = str(error), hint
            fresh.failures, fresh.tried_s = fresh.failures + 1, time.time()
            step_end(fresh.steps, TAKE, str(error))
            if final or fresh.failures >= schedule.TRIES:
                _answer(fresh, error)

        document = await self._change(document, failed)
        message = f"{error}; what to do: {hint}" if hint else str(error)
        self._plane.tell(document, "checkpoint.failed", message, severity="warning")
        return 0.0

    # -- keeping

    async def _retention(self, document: CheckpointsDocument) -> CheckpointsDocument:
        """Without those that are too many, unless one of them is about to be restored."""
        if not schedule.given_up(document, None):
            return document
        async with self._plane.deciding:
            restore = await self._plane.restoring(document.ucloud, document.name)
            pinned = restore.sequence if restore is not None else None

            def retired(fresh: CheckpointsDocument) -> None:
                going = schedule.given_up(fresh, pinned)
                fresh.kept = [item for item in fresh.kept if item.sequence not in going]
                fresh.stale = [*fresh.stale, *going]

            return await self._change(document, retired)

    # -- away

    async def _going(self, document: CheckpointsDocument) -> float | None:
        def going(fresh: CheckpointsDocument) -> None:
            _move(fresh, "deleting")
            fresh.deleting = True
            _answer(fresh, leaving(fresh))

        if not document.steps:  # none was ever begun
            await self._forget([document], [])
            return None
        document = await self._change(document, going)
        self._plane.look(collect_key(document.ucloud), 0.0)
        return None

    async def collect(self, ucloud: str) -> float | None:
        """Have the store rid of what no document names; when to look again."""
        documents = await self._plane.state.checkpoints(ucloud)
        going = [item for item in documents if item.state == "deleting"]
        stale = [item for item in documents if item.stale and item.state != "deleting"]
        if not going and not stale:
            return None
        store = await self._plane.state.store_document(ucloud)
        if store is None or BUCKET not in store.buckets:
            await self._forget(going, stale)
            return None
        self._plane.look(store_key(ucloud), 0.0)
        if store.deleting or store.buckets[BUCKET].deleting:
            return self._plane.pace.release_s
        try:
            return await self._collect(store, going, stale)
        except (UserError, Permanent, Temporary) as error:
            if not isinstance(error, Temporary) and self._told.get(ucloud) != str(error):
                self._told[ucloud] = str(error)
                self._plane.tell(store, "checkpoint.collect", str(error), severity="warning")
            return max(self._plane.pace.checkpoint_retry_s, getattr(error, "delay_s", 0.0))

    async def _collect(
        self,
        store: StoreDocument,
        going: list[CheckpointsDocument],
        stale: list[CheckpointsDocument],
    ) -> float | None:
        host = self._plane.pool.get(store.ucloud, store.provider).checkpoints
        if host is None:
            raise Unsupported(f"provider {store.provider.name} removes no checkpoints")
        asked = CheckpointCollect(
            store=await access.checkpoint_access(self._plane, store.ucloud, access.COLLECTOR),
            keep={item.name: kept for item in stale if (kept := _staying(item)) is not None},
            forget=[item.name for item in going],
        )
        done = await self._plane.seam(
            "provider.checkpoint_collect", lambda: host.collect(store.host, asked)
        )
        if done.state == "busy":
            return self._plane.pace.collect_s
        self._told.pop(store.ucloud, None)
        await self._forget(going, stale)
        return None

    async def _forget(
        self, going: list[CheckpointsDocument], stale: list[CheckpointsDocument]
    ) -> None:
        """What is not in the store any more is in no document."""
        for item in stale:
            gone = set(item.stale)

            def forgotten(fresh: CheckpointsDocument, gone: set[int] = gone) -> None:
                fresh.stale = [sequence for sequence in fresh.stale if sequence not in gone]

            await self._change(item, forgotten)
        for item in going:
            await self._plane.state.remove(item)
            await look_at_volumes(self._plane, item.ucloud)
            self._plane.tell(item, "checkpoints.deleted")
            self._plane.look(store_key(item.ucloud), 0.0)
            self._plane.look(ucloud_key(item.ucloud), 0.0)

    # -- helpers

    async def _change(
        self, document: CheckpointsDocument, mutate: Callable[[CheckpointsDocument], object]
    ) -> CheckpointsDocument:
        before = held.claims(document)
        document = await self._plane.state.change(document, mutate)
        if before - held.claims(document):
            await look_at_volumes(self._plane, document.ucloud)
        return document


def _kept(
    taken: CheckpointTaken, subject: Subject, asked_ms: int, snapshots: dict[str, str]
) -> KeptCheckpoint:
    """A clock that is slow would have the next one due at once, again and again."""
    wish = subject.platform.wish
    return KeptCheckpoint(
        sequence=taken.head.sequence,
        root=taken.head.root,
        engine=taken.engine[:64],
        taken_ms=min(max(taken.taken_ms, asked_ms), int(time.time() * 1000)),
        pause_ms=taken.pause_ms,
        base=taken.base,
        memory_bytes=taken.memory_bytes,
        dirty_bytes=taken.dirty_bytes,
        disk_bytes=taken.disk_bytes,
        new_bytes=taken.new_bytes,
        details=_noted(taken.details),
        shape=subject.shape,
        provider=wish.provider.name,
        host=wish.host,
        place=subject.place,
        pin=subject.pin,
        image=subject.image,
        snapshots=snapshots,
        slots={name: taken.slots[name] for name in snapshots} if subject.whole else {},
    )


def _noted(untrusted: dict[str, str]) -> dict[str, str]:
    """As many as are sensible: a platform may tell a mebibyte, and a hundred are kept."""
    some = list(untrusted.items())[:MOST_DETAILS]
    return {key[:LONGEST_KEY]: value[:LONGEST_DETAIL] for key, value in some}


def _staying(document: CheckpointsDocument) -> Kept | None:
    head = document.head
    if head is None:
        return None
    return Kept(head=head, sequences=[item.sequence for item in document.kept])


def _answer(document: CheckpointsDocument, error: SupercloudError) -> None:
    """Tell who asked for one why there is none."""
    if document.task is not None and not document.task.done:
        document.task.done, document.task.error = True, to_wire(error)


def _move(document: CheckpointsDocument, to: str) -> None:
    if document.state != to:
        document.state = observed(CHECKPOINTS, document.state, to)
        document.since_s = time.time()
