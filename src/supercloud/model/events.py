"""The one Event type that every component speaks."""

import os
import time
from typing import Any, Literal

from supercloud.model.records import dataclass, field

Severity = Literal["debug", "info", "warning", "error"]


def event_id() -> str:
    """A new id that sorts by time: 12 hexadecimal digits of milliseconds, 8 of chance."""
    return f"{int(time.time() * 1000):012x}{os.urandom(4).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    ``code`` is ``component.sub.event``; ``subject`` is what it happened to (``environment/web``),
    ``actor`` who did it, ``cause`` the id of the event or request that led to it.
    ``time_s`` is seconds since the epoch.
    """

    ucloud: str
    subject: str
    actor: str
    code: str
    message: str = ""
    severity: Severity = "info"
    cause: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=event_id)
    time_s: float = field(default_factory=time.time)
