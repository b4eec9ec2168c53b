"""The keeper: holds the core's descriptors by name, restarts the core, hands them back, reaps.

``python3 -I -S -B keeper.py --manifest FILE --run DIR --state DIR [--fd NAME=N ...]``

One SEQPACKET socketpair leads to the core. The core sends ``P name`` with a descriptor (store,
replacing), ``D name`` (forget) and ``L`` (list); the keeper answers ``L`` with ``F name`` and a
descriptor each, then ``X pid status`` for each child that ended meanwhile, then ``.``; later ends
follow as ``X``. SIGTERM stops the host in order, SIGHUP replaces the core by a new one.

It is a subreaper: domains whose core died become its children. It imports next to nothing, so
that there is little that could break; the core's code is loaded anew in each fork.
"""

import os
import select
import signal
import socket
import sys
import time

RESTART_STATUS, CONFIGURATION_STATUS = 75, 78
"""The core's exit status for: replace me at once; it makes no sense to try again."""
_STOP_GRACE_S = 30.0
_BACKOFF_S = (0.05, 5.0)
_STEADY_S = 10.0
_MAX_MESSAGE = 256


class Keeper:
    """Descriptors by name, ends of children that the core has not heard of, and the core."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._kept: dict[str, int] = {}
        self._ends: list[bytes] = []
        self._core_pid = self._status = 0
        self._backoff_s = _BACKOFF_S[0]
        self._started_s = self._restart_at_s = 0.0
        self._stop_by_s = 0.0
        self._listening = False
        self._link = self._core_end = socket.socket()
        self._woken, wake = socket.socketpair()
        for end in (self._woken, wake):
            end.setblocking(False)
        self._wake = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)

    def keep(self, name: str, descriptor: int) -> None:
        """Store a descriptor; one of the same name is closed."""
        self.drop(name)
        self._kept[name] = descriptor

    def drop(self, name: str) -> None:
        """Close and forget, if it is there."""
        if name in self._kept:
            os.close(self._kept.pop(name))

    def run(self) -> int:
        """Until stopped; the exit status."""
        while True:
            if not self._core_pid and self._stop_by_s:
                return self._status
            if not self._core_pid and time.monotonic() >= self._restart_at_s:
                self._start_core()
            wanted = [self._woken] + ([self._link] if self._core_pid else [])
            sending = [self._link] if self._core_pid and self._listening and self._ends else []
            delay_s = 1.0 if self._core_pid else self._restart_at_s - time.monotonic()
            readable, writable, _ = select.select(wanted, sending, [], min(max(delay_s, 0.0), 1.0))
            if self._link in readable:
                self._serve()
            if self._link in writable:
                self._send_ends()
            if self._woken in readable:
                self._on_signals()
            if self._stop_by_s and time.monotonic() > self._stop_by_s and self._core_pid:
                os.kill(self._core_pid, signal.SIGKILL)

    def _start_core(self) -> None:
        self._link, core_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening = False
        self._started_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_core(core_end)
            finally:
                os._exit(70)
        core_end.close()
        self._core_pid = pid

    def _become_core(self, core_end: socket.socket) -> None:
        signal.set_wakeup_fd(-1)
        for opened in (self._link, self._woken, self._wake):
            opened.close()
        for descriptor in self._kept.values():
            os.close(descriptor)
        for name in [name for name in sys.modules if name.startswith("supercloud")]:
            del sys.modules[name]  # a planned replacement brings new code
        from supercloud.lower.core import core  # noqa: PLC0415  only here, anew in each core

        os._exit(core.main(self._arguments, core_end))

    def _serve(self) -> bool:
        """Take one message of the core; False when there is none."""
        try:
            message, descriptors, _, _ = socket.recv_fds(
                self._link, _MAX_MESSAGE, 4, socket.MSG_DONTWAIT
            )
        except OSError:
            return False
        order, _, name = message.decode("ascii", "replace").partition(" ")
        if order == "P" and len(descriptors) == 1:
            self.keep(name, descriptors.pop())
        elif order == "D":
            self.drop(name)
        elif order == "L":
            self._send_all()
        for descriptor in descriptors:
            os.close(descriptor)
        return bool(message)

    def _send_all(self) -> None:
        try:
            for name, descriptor in self._kept.items():
                socket.send_fds(self._link, [f"F {name}".encode()], [descriptor])
            while self._ends:
                self._link.send(self._ends[0])
                del self._ends[0]
            self._link.send(b".")
            self._listening = True
        except OSError as error:  # the core died: it will be reaped and replaced
            print(f"keeper: {error}", file=sys.stderr)

    def _send_ends(self) -> None:
        try:
            while self._ends:
                self._link.send(self._ends[0], socket.MSG_DONTWAIT)
                del self._ends[0]
        except OSError:
            return  # full, or the core died: later

    def _on_signals(self) -> None:
        numbers = set(self._woken.recv(4096))
        if numbers & {signal.SIGTERM, signal.SIGINT} and not self._stop_by_s:
            self._stop_by_s = time.monotonic() + _STOP_GRACE_S
            self._signal_core(signal.SIGTERM)
        if signal.SIGHUP in numbers:
            self._signal_core(signal.SIGHUP)
        self._reap()

    def _signal_core(self, number: signal.Signals) -> None:
        if self._core_pid:
            os.kill(self._core_pid, number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._core_pid:
                self._core_ended(status)
            else:
                self._ends.append(f"X {pid} {status}".encode())

    def _core_ended(self, status: int) -> None:
        while self._serve():  # what it stored before it ended
            pass
        self._link.close()
        self._core_pid = 0
        lasted_s = time.monotonic() - self._started_s
        code = os.waitstatus_to_exitcode(status)
        if code == RESTART_STATUS:
            return
        if code == CONFIGURATION_STATUS:
            self._status, self._stop_by_s = code, self._stop_by_s or time.monotonic()
        if lasted_s > _STEADY_S:
            self._backoff_s = _BACKOFF_S[0]
        self._restart_at_s = time.monotonic() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])
        print(f"keeper: core ended with wait status {status}", file=sys.stderr)


def _arguments(arguments: list[str]) -> tuple[list[str], dict[str, int]]:
    """Split ``--fd NAME=N`` from what is the core's."""
    rest, inherited = [], {}
    pending = iter(arguments)
    for argument in pending:
        if argument == "--fd":
            name, _, number = next(pending).partition("=")
            inherited[name] = int(number)
        else:
            rest.append(argument)
    return rest, inherited


def main(arguments: list[str]) -> int:
    """Hold the core's hand until told to stop, then see that nothing is left of the host."""
    from supercloud.lower.core import system  # noqa: PLC0415  the path is set just above

    system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)
    system.unshare(system.CLONE_NEWNS)
    system.mount("", "/", "", system.MS_REC | system.MS_PRIVATE)
    rest, inherited = _arguments(arguments)
    keeper = Keeper(rest)
    for name, descriptor in inherited.items():
        keeper.keep(f"i{name}", descriptor)
    return keeper.run()


if __name__ == "__main__":
    here = os.path.abspath(__file__)
    sys.path.insert(0, os.path.normpath(os.path.join(here, *[".."] * 4)))
    sys.exit(main(sys.argv[1:]))
