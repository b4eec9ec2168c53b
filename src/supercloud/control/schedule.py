"""When checkpoints are taken, and which ones are given up. Pure.

All follows from what is in the document, so that a control plane that starts anew goes on with it.
"""

import hashlib

from supercloud.control.documents import CheckpointsDocument

SPREAD = 0.1
"""The time between two of them varies by so much of it, so that not all are taken at once."""
LONGEST_DELAY_S = 600.0
TRIES = 3
"""After so many failures in a row that might pass, who asked for one is told of the last."""


def due_s(document: CheckpointsDocument, retry_s: float) -> float | None:
    """When the next one is to be taken, in seconds since the epoch; None: when it is asked for.

    After a failure it is tried again ``retry_s`` later, then after twice as long, and so on.
    """
    policy = document.policy
    if policy is None or document.deleting:
        return None
    soon_s = document.tried_s + delay_s(document.failures, retry_s) if document.failures else 0.0
    if waits(document):
        return soon_s
    if not policy.every_s:
        return None
    if not document.kept:
        return max(soon_s, document.created_s + policy.every_s * (SPREAD + _part(document)))
    taken_s = document.kept[-1].taken_ms / 1000
    between_s = policy.every_s * (1 + SPREAD * (2 * _part(document) - 1))
    return max(soon_s, taken_s + between_s)


def delay_s(failures: int, retry_s: float) -> float:
    """How long after so many failures it is not tried again."""
    return min(retry_s * 2.0 ** min(failures - 1, 16), LONGEST_DELAY_S)


def waits(document: CheckpointsDocument) -> bool:
    """Whether somebody waits for one."""
    return document.task is not None and not document.task.done


def given_up(document: CheckpointsDocument, pinned: int | None) -> list[int]:
    """The sequences of those that are too many: the oldest, but never the newest or ``pinned``."""
    if document.policy is None:
        return []
    extra = len(document.kept) - document.policy.keep
    older = [kept.sequence for kept in document.kept[:-1] if kept.sequence != pinned]
    return older[: max(0, extra)]


def _part(document: CheckpointsDocument) -> float:
    """From 0 to 1, another one for each name and number, and always the same."""
    number = document.kept[-1].sequence if document.kept else 0
    about = f"{document.ucloud}/{document.name}/{number}"
    return int.from_bytes(hashlib.sha256(about.encode()).digest()[:4], "big") / 2.0**32
