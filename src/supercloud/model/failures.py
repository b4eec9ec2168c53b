"""How an error travels (its JSON form), and what it ends in: one table of HTTP and exit statuses.

The errors themselves are in ``model.errors``, which the core shares; nothing here is of the core.
"""

from typing import Any

from supercloud.model.errors import BY_CODE, Permanent, SupercloudError, Temporary, UserError

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
