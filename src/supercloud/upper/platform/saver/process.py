"""The process: takes one request from its standard input, and does it."""

import ctypes
import logging
import os
import signal
import sys
from typing import Any

from supercloud.model.errors import SupercloudError, to_wire
from supercloud.model.events import event_id
from supercloud.upper.platform.saver.lines import Lines
from supercloud.upper.platform.saver.requests import Restore, Take

NICENESS = 10
_PR_SET_PDEATHSIG = 1

log = logging.getLogger("supercloud.saver")


def main() -> int:
    """One request; the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    _die_with_parent()
    lines = Lines(os.dup(0), os.dup(1))
    request = lines.next(Take, Restore)
    if isinstance(request, Take):
        os.nice(NICENESS)  # whoever is restored is waited for
    try:
        _serve(lines, request)
    except SupercloudError as error:
        return _failed(lines, to_wire(error))
    except Exception as error:
        bug = event_id()
        log.exception("bug %s", bug)
        why = {"code": "internal", "message": f"{type(error).__name__}: {error}"[:500]}
        return _failed(lines, why if isinstance(error, OSError) else to_wire(error, bug_id=bug))
    return 0


def _die_with_parent() -> None:
    """The next agent begins anew: two of us must not write to one place (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it has gone already, and we are process 1's
        sys.exit(2)


def _serve(lines: Lines, request: Any) -> None:
    """Loaded here: what it imports takes longest of all."""
    from supercloud.upper.platform.saver import restore, take  # noqa: PLC0415

    if isinstance(request, Take):
        take.serve(lines, request)
    else:
        restore.serve(lines, request)


def _failed(lines: Lines, error: dict[str, Any]) -> int:
    lines.say("failed", error)
    return 1
