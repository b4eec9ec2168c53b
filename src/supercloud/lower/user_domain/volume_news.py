"""What a volume's layers tell unasked, in words for its user."""

from typing import Any, Final

from supercloud.model.errors import NoResources
from supercloud.model.events import Severity

FULL: Final = "the provider's disk is full: what writes to it waits"
_FULL_HINT: Final = "it goes on when the provider has made room; supercloud down ends the waiting"
_DEAD: Final = (
    "the provider's disk failed to keep what it was given: nothing more is written until the "
    "volume is opened again (supercloud down, then up)"
)
_FIXED: Final[dict[str, tuple[str, str, Severity]]] = {
    "device.full": ("full", f"{FULL}, nothing is lost, and {_FULL_HINT}", "error"),
    "device.room": ("room", "nothing waits for room on the provider's disk any more", "info"),
    "device.dead": ("dead", _DEAD, "error"),
    "device.discarded": (
        "discarded",
        "a crash cut off what was written last: nobody had been told that it was kept",
        "info",
    ),
}


def event_of(method: str, untrusted: dict[str, Any]) -> tuple[str, str, Severity] | None:
    """The event that it is worth: the end of its code, message, severity."""
    if method == "device.evidence":
        where = f"{untrusted.get('kind')} {untrusted.get('index')}"[:80]
        return "evidence", f"the provider's disk gave back a wrong {where}", "error"
    if method == "volume.damaged":
        return "damaged", str(untrusted.get("reason", ""))[:1000], "error"
    return _FIXED.get(method)


def full(volume: str, what: str) -> NoResources:
    """The refusal of what would wait, too."""
    message = f"volume {volume} cannot be {what} now: the provider's disk is full"
    return NoResources(message, hint=f"writers wait; {_FULL_HINT}")
