"""The seals of protected volumes: which one is newer, and which one cannot be. Pure.

What a host shows of a volume may only go forward from what was kept of it (``wire.volumes.Seal``):
otherwise it is a copy of another time, or another device.
"""

from dataclasses import replace

from supercloud.wire.volumes import Seal

WINDOW_S = 5.0
"""A copy of the volume from less than this ago may pass for the present one: the figure that is
promised. Hosts report, and are asked, more often."""


def objection(kept: Seal, shown: Seal) -> str:
    """Why ``shown`` cannot follow ``kept``; "" when it can. One without a root says nothing."""
    if not shown.root or not kept.root or _state(shown) == _state(kept):
        return ""
    if shown.epoch < kept.epoch:
        return f"it is at epoch {shown.epoch}, and was at {kept.epoch} already"
    if shown.sequence < kept.sequence:
        return f"it is at state {shown.sequence}, and was at {kept.sequence} already"
    if shown.sequence == kept.sequence:
        return f"its state {shown.sequence} is another one than it was"
    return ""


def newest(kept: Seal, shown: Seal) -> Seal:
    """What to keep after seeing ``shown``, to which there was no objection."""
    if not shown.root:
        return kept
    return replace(shown, epoch=max(kept.epoch, shown.epoch))


def accepted(kept: Seal, found: Seal) -> Seal:
    """What to keep when the user takes the volume as it was found, older than it was.

    The epoch does not go back: the next one is not to be one under which other data was encrypted.
    """
    return newest(kept, found)


def _state(seal: Seal) -> tuple[int, str]:
    return seal.sequence, seal.root
