"""What a volume's document learns from its host: state, seal, evidence; and when it halts. Pure."""

import time

from supercloud.control import seals
from supercloud.control.documents import Task, VolumeDocument
from supercloud.model.errors import BadState, Denied, Invalid, UserError, to_wire
from supercloud.model.events import Severity
from supercloud.model.states import KEPT_VOLUME, observed
from supercloud.wire.codec import decode
from supercloud.wire.volumes import Seal, VolumeStatus

STATES = {
    "closed": "kept",
    "opened": "opening",
    "served": "served",
    "attached": "attached",
    "failed": "failed",
}
"""The host's states of a volume that count here, as the control plane's."""
FULL = (
    "the provider's disk is full: what writes to it waits, and nothing is lost; it goes on when "
    "the provider has made room there, and supercloud down ends the waiting"
)
ROOM = "nothing waits for room on the provider's disk any more"


def take(volume: VolumeDocument, status: VolumeStatus) -> None:
    """Note what the host says, unless it cannot be: then the volume is halted."""
    volume.evidence = max(volume.evidence, status.evidence)
    if volume.halted:
        return
    if reason := seals.objection(volume.seal, status.seal):
        halt(volume, f"its host shows another volume than it had: {reason}", status.seal)
        return
    if (seal := seals.newest(volume.seal, status.seal)) != volume.seal:
        volume.seal, volume.sealed_s = seal, time.time()
    if status.copied > volume.copied:
        volume.copied, volume.copied_s = status.copied, time.time()
    volume.stored_bytes, volume.full = status.stored_bytes, status.full
    if status.state in ("served", "attached") and status.seal.root:  # else its host cannot know
        volume.snapshots = list(status.snapshots)
    attached = status.state == "attached"
    if volume.platform and not attached:  # it may have been written to, of which nobody was told
        volume.reverted = ""
    volume.platform = status.platform if attached else ""
    volume.slot, volume.mode = (status.slot, status.mode) if attached else (0, "")
    if status.state in STATES:
        move(volume, STATES[status.state])
    volume.opened = status.state not in ("closed", "gone")
    volume.reason, volume.error = status.reason, None
    if status.state == "failed":
        hint = f"supercloud events -u {volume.ucloud} tells what its host met"
        failed = BadState(f"volume {volume.name} failed: {status.reason}", hint=hint)
        volume.error = to_wire(failed)


def in_use(volume: VolumeDocument) -> BadState:
    """What is said to who wants it reverted meanwhile."""
    return BadState(
        f"volume {volume.name} is in use: nothing is reverted under that",
        hint=f"supercloud down {volume.ucloud}, revert, then up again",
    )


def halted(volume: VolumeDocument) -> BadState:
    """What is said to who asks something of one that is."""
    name = f"{volume.ucloud}/{volume.name}"
    return BadState(
        f"volume {volume.name} is halted: {volume.halted}",
        hint=f"supercloud volumes inspect {name}, then supercloud volumes accept {name}",
    )


def halt(volume: VolumeDocument, message: str, found: Seal | None) -> None:
    """Leave it alone until its user acts; nothing of what is trusted changes."""
    move(volume, "failed")
    name = f"{volume.ucloud}/{volume.name}"
    hint = (
        f"supercloud volumes inspect {name} says what is known; supercloud volumes accept {name} "
        "takes the volume as it is there now, without what was written since"
    )
    if found is None:
        hint = f"when its host has it again: supercloud volumes accept {name}"
    volume.halted, volume.found, volume.reason = message, found, message
    volume.error = to_wire(Denied(f"volume {volume.name}: {message}", hint=hint))
    for step in volume.steps:
        if not step.ended_s:
            step.ended_s, step.error = time.time(), message


def is_of_the_volume(error: UserError) -> bool:
    """Whether the refusal to open it is about what is there, not about who asks."""
    return not isinstance(error, Denied) or not error.details.keys().isdisjoint(
        ("evidence", "found")
    )


def found_in(error: UserError) -> Seal | None:
    """The seal of the device that its host refused to open, when it says that."""
    untrusted = error.details.get("found")
    try:
        return None if untrusted is None else decode(Seal, untrusted, "found", ignore_unknown=True)
    except Invalid:
        return None


def news(
    before: VolumeDocument, after: VolumeDocument, status: VolumeStatus
) -> list[tuple[str, str, Severity]]:
    """The events that a change is worth: code, message, severity."""
    told: list[tuple[str, str, Severity]] = []
    if after.halted and not before.halted:
        told.append(("evidence", after.halted, "error"))
    elif after.state != before.state:
        severity: Severity = "warning" if after.state == "failed" else "info"
        told.append((after.state, status.reason, severity))
    if after.evidence > before.evidence:
        blocks = after.evidence - before.evidence
        message = f"{blocks} blocks were not what was written, and were not given to its user"
        told.append(("evidence", message, "error"))
    if after.full != before.full:
        told.append(("full", FULL, "error") if after.full else ("room", ROOM, "info"))
    return told


def waits(task: Task | None) -> bool:
    """Whether there is something to be done once."""
    return task is not None and not task.done


def move(volume: VolumeDocument, to: str) -> None:
    """Change its state, and since when it is so."""
    if volume.state != to:
        volume.state = observed(KEPT_VOLUME, volume.state, to)
        volume.since_s = time.time()
