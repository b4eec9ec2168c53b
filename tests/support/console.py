"""Typing at a VM's serial console, as somebody with the command line would."""

import contextlib
import re
import socket
import time

from support.stack import Stack

ANSWER_S = 120.0


def typed(stack: Stack, name: str, line: str, until: str) -> str:
    """Type a line at the console of ``UCLOUD/ENVIRONMENT``; what matches ``until``, once it does.

    The line is typed again until then: who sits there may not have been listening yet. Output comes
    in pieces, so ``until`` has to say what ends it.
    """
    ours, theirs = socket.socketpair()
    with ours, stack.popen(
        "console", name, stdin=theirs.fileno(), stdout=theirs.fileno()
    ) as running:  # fmt: skip
        theirs.close()
        ours.settimeout(1)
        said, end_s = "", time.monotonic() + ANSWER_S
        while time.monotonic() < end_s:
            ours.send(f"{line}\n".encode())
            with contextlib.suppress(TimeoutError):
                while data := ours.recv(4096):
                    said += data.decode(errors="replace")
                    if found := re.search(until, said, re.DOTALL):
                        running.kill()
                        return found[0]
        running.kill()
    raise AssertionError(said)
