"""The error tree of the whole system, and the one table from code to HTTP and exit status.

::

    SupercloudError
    ├── UserError            what was asked, what is wrong, what to do; safe to show
    │   ├── Invalid          the request itself is malformed
    │   ├── NotFound
    │   ├── Exists           there already, and different
    │   ├── Busy             something else is being done to it
    │   ├── BadState         not legal in the state that it is in
    │   ├── Denied
    │   ├── NoResources      does not fit: quota, capacity
    │   └── Unsupported      this provider, platform or kind cannot do that, with the reason
    ├── Temporary            try again after ``delay_s``
    └── Permanent            trying again will not help

What the core may answer is in ``model.refusals``, which it shares; everybody else finds them here.
Anything else that is raised is a bug: it is logged under an id and the user is shown the id only.
"""

from typing import Any

from supercloud.model.refusals import (
    ALL,
    BadState,
    Busy,
    Denied,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    UserError,
)

__all__ = [
    "BY_CODE",
    "STATUS",
    "BadState",
    "Busy",
    "Denied",
    "Exists",
    "Invalid",
    "NoResources",
    "NotFound",
    "Permanent",
    "SupercloudError",
    "Temporary",
    "Unsupported",
    "UserError",
    "from_wire",
    "to_wire",
]


class Unsupported(UserError, code="unsupported"):
    """Cannot be done here; the message says why."""


class Temporary(SupercloudError):
    """Could not be done now; worth another try after ``delay_s`` seconds."""

    def __init__(self, message: str, *, delay_s: float = 1.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class Permanent(SupercloudError):
    """Could not be done, and trying again will not help."""


BY_CODE: dict[str, type[UserError]] = {cls.code: cls for cls in (*ALL, Unsupported)}

# code -> (HTTP status, exit status of the command line)
STATUS: dict[str, tuple[int, int]] = {
    "invalid": (400, 2),
    "not_found": (404, 3),
    "exists": (409, 4),
    "busy": (409, 5),
    "bad_state": (409, 6),
    "denied": (403, 7),
    "no_resources": (507, 8),
    "unsupported": (501, 9),
    "temporary": (503, 10),
    "unavailable": (503, 11),
    "internal": (500, 70),
}


def to_wire(error: BaseException, *, bug_id: str = "") -> dict[str, Any]:
    """The JSON form of an error; a bug shows nothing but its id."""
    if isinstance(error, UserError):
        wire: dict[str, Any] = {"code": error.code, "message": error.message}
        for name in ("hint", "where", "details"):
            if value := getattr(error, name):
                wire[name] = value
        return wire
    if isinstance(error, Temporary):
        return {"code": "temporary", "message": str(error), "details": {"delay_s": error.delay_s}}
    if isinstance(error, Permanent):
        return {"code": "internal", "message": str(error)}
    return {"code": "internal", "message": f"internal error {bug_id}".strip()}


def from_wire(untrusted: object) -> SupercloudError:
    """The error that ``to_wire`` described; an unknown code becomes ``Permanent``."""
    if not isinstance(untrusted, dict):
        return Permanent("malformed error from the other side")
    code, message = untrusted.get("code"), str(untrusted.get("message", ""))[:4096]
    details = untrusted.get("details")
    details = details if isinstance(details, dict) else {}
    if code == "temporary":
        delay = details.get("delay_s", 1.0)
        return Temporary(
            message, delay_s=min(float(delay), 60.0) if isinstance(delay, int | float) else 1.0
        )
    cls = BY_CODE.get(code) if isinstance(code, str) else None
    if cls is None:
        return Permanent(message)
    text = {name: str(untrusted.get(name, ""))[:4096] for name in ("hint", "where")}
    return cls(message, details=details, **text)
