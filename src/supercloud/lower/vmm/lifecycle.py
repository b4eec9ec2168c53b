"""A machine's life as its monitor sees it: the state by the table, deadlines, why it ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from supercloud.model.states import MACHINE, step
from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor, Timer


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a machine may take, in seconds."""

    start_s: float = 60.0  # until its monitor answers
    ask_every_s: float = 5.0
    silence_s: float = 30.0  # without an answer it is wedged
    wedged_s: float = 60.0  # and then killed
    quit_s: float = 5.0  # between asking QEMU to quit and killing it


class Lifecycle:
    """State and reason; every change goes through the table and to ``changed``."""

    def __init__(self, changed: Callable[[str, str], None]) -> None:
        self.state, self.reason = "creating", ""
        self._changed = changed

    def go(self, state: str, reason: str = "") -> None:
        """Enter a state (BadState when the table forbids it) and tell."""
        if state == self.state:
            return
        self.state = step(MACHINE, self.state, state)
        self.reason = reason
        self._changed(self.state, reason)


class Watchdog:
    """Asks QEMU how it is; silence means wedged, more silence the end."""

    def __init__(
        self,
        reactor: Reactor,
        qmp: Qmp,
        life: Lifecycle,
        kill: Callable[[], None],
        limits: Patience,
    ) -> None:
        self._reactor, self._qmp, self._life = reactor, qmp, life
        self._kill, self._limits = kill, limits
        self._heard_s = time.monotonic()
        self._next: Timer = reactor.after(limits.ask_every_s, self._ask)

    def stop(self) -> None:
        """No more questions."""
        self._next.cancel()

    def _ask(self) -> None:
        silent_s = time.monotonic() - self._heard_s
        limits = self._limits
        if self._life.state == "running" and silent_s > limits.silence_s:
            self._life.go("wedged", f"QEMU has not answered for {silent_s:.0f} s")
        if self._life.state == "wedged" and silent_s > limits.silence_s + limits.wedged_s:
            self._kill()
            return
        self._qmp.command("query-status", answered=self._heard)
        self._next = self._reactor.after(limits.ask_every_s, self._ask)

    def _heard(self, _answer: dict[str, object]) -> None:
        self._heard_s = time.monotonic()
        if self._life.state == "wedged":
            self._life.go("running", "it answers again")
