"""How a command fails: what is wrong, where, what to do; the exit status says which kind it is."""

import os
import sys
from typing import Any

from supercloud.model.errors import STATUS, SupercloudError, to_wire

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_INTERNAL = STATUS["internal"][1]


class Unavailable(SupercloudError):
    """The control plane cannot be reached; ``hint`` says what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def report(error: Exception, *, as_json: bool) -> int:
    """Show ``error`` on stderr; the exit status for it. A bug is logged, and shown as its id."""
    wire = _described(error)
    try:
        if as_json:
            import json  # noqa: PLC0415 - only here

            print(json.dumps({"error": wire}), file=sys.stderr)
        else:
            print(_text(wire, colour=sys.stderr.isatty()), file=sys.stderr)
    except OSError:  # nobody reads stderr any more: the status still tells
        pass
    return STATUS.get(wire["code"], STATUS["internal"])[1]


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, Unavailable):
        return {"code": "unavailable", "message": str(error), "hint": error.hint}
    if isinstance(error, SupercloudError):
        return to_wire(error)
    return _bug(error)


def _bug(error: Exception) -> dict[str, Any]:
    from supercloud.model.events import event_id  # noqa: PLC0415 - only here

    bug_id = event_id()
    path = _log(bug_id, error)
    return {**to_wire(error, bug_id=bug_id), "hint": f"this is a bug; see {path}" if path else ""}


def _log(bug_id: str, error: Exception) -> str:
    """Append the traceback to the user's log; its path, or nothing where there is no place."""
    import traceback  # noqa: PLC0415 - only here

    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = os.path.join(state, "supercloud", "cli.log")
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "a", encoding="utf-8") as log:
            log.write(f"bug {bug_id}\n{''.join(traceback.format_exception(error))}\n")
    except OSError:
        return ""
    return path


def _text(wire: dict[str, Any], *, colour: bool) -> str:
    label = "\033[1;31merror:\033[0m" if colour else "error:"
    errors = wire.get("details", {}).get("errors") or [wire]
    lines = []
    for error in errors:
        place = f"{error['where']}: " if error.get("where") else ""
        lines.append(f"{label} {printable(place + error['message'])}")
        if error.get("hint"):
            lines.append(printable(f"  what to do: {error['hint']}"))
    more = wire.get("details", {}).get("count", 0) - len(errors)
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor or change its state."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
