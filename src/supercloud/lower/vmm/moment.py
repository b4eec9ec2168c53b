"""The moment of which a machine's volumes have a snapshot: it stands still until they do.

The volumes' service is not in this domain, so its user's domain is told that the machine stands
still, and with which disks, and says so when each has its snapshot. It has the far end of a stream
for that: a byte is its word; whatever else comes, or an end, is none.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from supercloud.model.errors import Busy, Temporary, Unsupported

ANSWER_S: Final = 10.0
"""So long a machine stands still for its volumes, at most."""
TAKEN: Final = b"1"

Statuses = Callable[[], Sequence[Mapping[str, Any]]]
Tell = Callable[[str, Mapping[str, Any], list[int]], None]


class Moment:
    """Of one checkpoint. ``stream`` is duplicated; without one there must be no volumes.

    ``disks`` says which are plugged in; ``tell`` is to the user's domain.
    """

    def __init__(self, disks: Statuses, tell: Tell, stream: int | None) -> None:
        self._disks, self._tell = disks, tell
        self._stream = None if stream is None else socket.socket(fileno=os.dup(stream))

    def begin(self) -> None:
        """It stands still. Busy, Unsupported: there is no checkpoint with these volumes."""
        disks = self._disks()
        for disk in disks:
            if self._stream is None or disk["state"] != "attached":
                raise Busy(f"volume {disk['volume']} is just being plugged in or out")
            if disk["mode"] != "nbd":
                raise Unsupported(
                    f"volume {disk['volume']} was attached before checkpoints of the platform were "
                    "wished for: it could not be restored with it",
                    hint="have it attached anew: supercloud down, then up again; data is kept",
                )
        if self._stream is not None:
            self._tell("checkpoint.still", {"disks": disks}, [])

    def end(self) -> None:
        """It may go on after this. Temporary: not all volumes have a snapshot of this moment."""
        if self._stream is None:
            return
        self._stream.settimeout(ANSWER_S)
        try:
            word = self._stream.recv(1)
        except OSError:
            word = b""
        if word != TAKEN:
            raise Temporary("its volumes were not all given a snapshot while it stood still")

    def close(self) -> None:
        """Over, however it went."""
        if self._stream is not None:
            self._stream.close()
