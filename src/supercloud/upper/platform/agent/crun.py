"""crun, run out of a sealed copy in memory.

It would make itself such a copy at each start, and start again from that, so that a container can
write to no file that the platform runs (CVE-2019-5736). Here there is one for all starts.
"""

import contextlib
import fcntl
import functools
import os
from typing import Any, Final

from supercloud.upper.platform.agent import paths

NAME: Final = "crun"
ARGUMENTS: Final = (NAME, "--root", paths.CRUN, "--cgroup-manager=cgroupfs")
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def spawning() -> dict[str, Any]:
    """What a spawn of ``ARGUMENTS`` takes beside them; nothing where there is no such copy."""
    copy = _sealed()
    return {} if copy < 0 else {"executable": f"/proc/self/fd/{copy}", "pass_fds": [copy]}


@functools.cache
def _sealed() -> int:
    """Its descriptor, for as long as this agent lives; -1 when it cannot be had."""
    places = [f"{directory}/{NAME}" for directory in os.get_exec_path()]
    path = next((place for place in places if os.access(place, os.X_OK)), "")
    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        copy = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, copy)
        with open(path, "rb") as source:
            while os.sendfile(copy, source.fileno(), None, 1 << 20):
                pass
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        undo.pop_all()
        return copy
    return -1
