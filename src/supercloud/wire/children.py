"""Child processes of a domain's process 1, with descriptors passed on at their own numbers."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence

from supercloud.wire.reactor import Reactor


class Children:
    """Starts and reaps. As process 1 it reaps whatever else is left to it, too."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._ended: dict[int, Callable[[int], None]] = {}
        self._woken, wake = socket.socketpair()
        for end in (self._woken, wake):
            end.setblocking(False)
        self._wake = wake
        self._before = (
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False),
            signal.signal(signal.SIGCHLD, lambda *_: None),
        )
        reactor.watch(self._woken, self._reap)

    def close(self) -> None:
        """Kill and reap whoever is left, unheard; signals are again whose they were."""
        if self._wake.fileno() < 0:
            return
        for pid in self._ended:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self._ended.clear()
        descriptor, handler = self._before
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGCHLD, handler)
        self._reactor.forget(self._woken)
        for end in (self._woken, self._wake):
            end.close()

    def start(
        self,
        argv: list[str],
        descriptors: Sequence[int],
        ended: Callable[[int], None],
        *,
        environment: Mapping[str, str] | None = None,
        output: int | None = None,
    ) -> int:
        """Run ``argv`` with these descriptors open; ``ended`` gets the wait status. The pid.

        Without ``environment`` it has ours, without ``output`` it writes where we do.
        """
        actions = [(os.POSIX_SPAWN_DUP2, output, n) for n in (1, 2)] if output is not None else []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        try:
            pid = os.posix_spawn(
                argv[0],
                argv,
                os.environ if environment is None else environment,
                file_actions=actions,
            )
        finally:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
        self._ended[pid] = ended
        return pid

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a child that has not been reaped."""
        if pid in self._ended:
            os.kill(pid, number)

    def _reap(self) -> None:
        self._woken.recv(4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ended = self._ended.pop(pid, None)
            if ended is not None:
                ended(status)


def how_it_ended(status: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.WEXITSTATUS(status)}"
