"""Snapshots of volumes that checkpoints hold: their names, who claims them, what goes back. Pure.

A snapshot of such a name belongs to the checkpoint whose document has it, or to one that is being
taken. A name is drawn once and written down before there is a snapshot of it, and what is not
claimed any more never will be again: so whatever a volume has beyond the claims is to be forgotten,
whoever died when.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from supercloud.control import specs
from supercloud.control.documents import (
    CheckpointsDocument,
    EnvironmentDocument,
    PlatformDocument,
    VolumeDocument,
)
from supercloud.model.resources import Environment
from supercloud.wire.checkpoints import GoesBack

PREFIX = "supercloud-"
_OURS = re.compile(rf"{PREFIX}[0-9a-f]{{16}}")


@dataclass(frozen=True, slots=True)
class Back:
    """A volume is to go back to ``snapshot`` before its EE starts from checkpoint ``sequence``."""

    name: str
    sequence: int
    snapshot: str
    mark: str


def new_name() -> str:
    """For the snapshots of one checkpoint, or of one that comes to nothing."""
    return f"{PREFIX}{secrets.token_hex(8)}"


def is_ours(snapshot: str) -> bool:
    """Whether only checkpoints may have a snapshot of that name."""
    return _OURS.fullmatch(snapshot) is not None


def written(environment: Environment) -> list[str]:
    """The volumes that it may write to."""
    return [use.name for use in environment.volumes if not use.read_only]


def claims(document: CheckpointsDocument) -> set[str]:
    """The snapshots that it wants kept."""
    names = {name for kept in document.kept for name in kept.snapshots.values()}
    return names | ({document.snapshot} - {""})


def unclaimed(volume: VolumeDocument, documents: Iterable[CheckpointsDocument]) -> list[str]:
    """The snapshots of a volume that no checkpoint wants any more."""
    ours = [name for name in volume.snapshots if is_ours(name)]
    if not ours:
        return []
    wanted = set().union(*map(claims, documents))
    return [name for name in ours if name not in wanted]


def purposes(volume: VolumeDocument, documents: Iterable[CheckpointsDocument]) -> dict[str, str]:
    """What its snapshots are for, in words, by name."""
    return {
        kept.snapshots[volume.name]: f"checkpoint {kept.sequence} of {document.name}"
        for document in documents
        for kept in document.kept
        if volume.name in kept.snapshots
    }


def going_with(
    platform: PlatformDocument, documents: Iterable[CheckpointsDocument]
) -> list[GoesBack]:
    """What goes back with a platform that is being made from a checkpoint."""
    restore = platform.restore
    if restore is None or platform.deleting or platform.restoring <= platform.restored:
        return []
    return [
        GoesBack(volume=name, slot=kept.slots[name], snapshot=snapshot)
        for document in documents
        if (document.name, document.of) == (platform.name, "platform")
        for kept in document.kept
        if kept.sequence == restore.sequence
        for name, snapshot in sorted(kept.snapshots.items())
    ]


def going_back(
    volume: VolumeDocument,
    environments: Sequence[EnvironmentDocument],
    documents: Sequence[CheckpointsDocument],
) -> Back | None:
    """What it is to go back to, for an EE that is to be restored; None when that is done."""
    for item in environments:
        restore = item.restore
        if restore is None or item.deleting or not specs.restoring(item):
            continue
        if volume.name not in written(item.spec) or volume.reverted == restore.mark:
            continue
        for document in documents:
            for kept in document.kept if document.name == item.name else ():
                if kept.sequence == restore.sequence and volume.name in kept.snapshots:
                    snapshot = kept.snapshots[volume.name]
                    return Back(item.name, kept.sequence, snapshot, restore.mark)
    return None
