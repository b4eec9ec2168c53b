"""The seals of protected volumes: which one is newer, and which one cannot be. Pure.

What a host shows of a volume may only go forward from what was kept of it (``wire.volumes.Seal``):
otherwise it is a copy of another time, or another device.
"""

from supercloud.wire.volumes import Seal

WINDOW_S = 5.0
"""A copy of the volume from less than this ago may pass for the present one: the figure that is
promised. Hosts report, and are asked, more often."""


def objection(kept: Seal, shown: Seal) -> str:
    """Why ``shown`` cannot follow ``kept``; "" when it can. One without a root says nothing."""
    if not shown.root or not kept.root:
        return ""
    if shown.epoch < kept.epoch:
        return f"it is at epoch {shown.epoch}, and was at {kept.epoch} already"
    if shown.sequence < kept.sequence:
        return f"it is at state {shown.sequence}, and was at {kept.sequence} already"
    same = (shown.epoch, shown.sequence) == (kept.epoch, kept.sequence)
    if same and shown.root != kept.root:
        return f"its state {shown.sequence} is another one than it was"
    return ""


def newest(kept: Seal, shown: Seal) -> Seal:
    """What to keep after seeing ``shown``, to which there was no objection."""
    return shown if shown.root else kept
