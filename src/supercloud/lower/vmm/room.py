"""A machine whose scratch disk finds no room on the provider's disk: it stands still meanwhile."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor

RETRY_S: Final = 2.0


class Room:
    """QEMU stops at such a write. ``machine.full`` is told once, ``machine.room`` when it is over.

    Volumes are another matter: their writes wait in the protection service.
    """

    def __init__(
        self, reactor: Reactor, qmp: Qmp, tell: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self._reactor, self._qmp, self._tell = reactor, qmp, tell
        self._is_full = self._is_stopped = False

    def on_qmp(self, name: str, data: dict[str, Any]) -> None:
        """An event of QEMU's: of several writes under way each has its own."""
        if name != "BLOCK_IO_ERROR" or not data.get("nospace") or data.get("action") != "stop":
            return
        if not self._is_full:
            self._is_full = True
            self._tell("machine.full", {})
        if not self._is_stopped:
            self._is_stopped = True
            self._reactor.after(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        """Go on with the writes that found no room; the machine stops again if there is none."""
        self._is_stopped = False
        self._qmp.command("cont")
        self._reactor.after(RETRY_S, self._look)

    def _look(self) -> None:
        if self._is_full and not self._is_stopped:
            self._is_full = False
            self._tell("machine.room", {})
