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
import resource
import select
import signal
import socket
import sys
import time

RESTART_STATUS, CONFIGURATION_STATUS = 75, 78
"""The core's exit status for: replace me at once; it makes no sense to try again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_STOP_GRACE_S, _STOP_ATTEMPTS, _STEADY_S, _BACKOFF_S = 30.0, 3, 10.0, (0.05, 5.0)
_MAX_MESSAGE = 256


def wake_on_signals() -> socket.socket:
    """A socket from which the numbers of ``SIGNALS`` can be read when they have come."""
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.settimeout(0)
    signal.set_wakeup_fd(wake.detach(), warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return woken


def reap() -> list[tuple[int, int]]:
    """(process id, wait status) of all children that have ended."""
    ended: list[tuple[int, int]] = []
    try:
        while (end := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(end)
    except ChildProcessError:
        pass  # no children at all
    return ended


class Keeper:
    """Descriptors by name, ends of children that the core has not heard of, and the core."""

    def __init__(self, options: dict[str, str], inherited: dict[str, int]) -> None:
        self._options = options
        self._kept = {f"i{name}": number for name, number in inherited.items()}
        self._ends: list[bytes] = []
        self._core_pid = self._status = self._stop_attempts = 0
        self._backoff_s, self._listening = _BACKOFF_S[0], False
        self._started_s = self._restart_at_s = self._stop_by_s = 0.0
        self._link, self._woken = socket.socket(), wake_on_signals()

    def run(self) -> int:
        """Until stopped; the exit status."""
        while self._core_pid or not self._stop_by_s:
            if not self._core_pid and time.monotonic() >= self._restart_at_s:
                self._start_core()
            waiting, delay_s = select.poll(), 1.0
            waiting.register(self._woken, select.POLLIN)
            if self._core_pid:
                sending = select.POLLOUT if self._listening and self._ends else 0
                waiting.register(self._link, select.POLLIN | sending)
            else:
                delay_s = min(max(self._restart_at_s - time.monotonic(), 0.0), delay_s)
            ready = dict(waiting.poll(delay_s * 1000))
            if ready.get(self._link.fileno(), 0) & select.POLLIN:
                self._serve()
            if ready.get(self._link.fileno(), 0) & select.POLLOUT:
                self._send_ends(socket.MSG_DONTWAIT)
            if self._woken.fileno() in ready:
                self._on_signals(self._woken.recv(4096))
            if self._core_pid and 0 < self._stop_by_s < time.monotonic():
                os.kill(self._core_pid, signal.SIGKILL)
        return self._status

    def _start_core(self) -> None:
        self._link, core_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening, self._started_s = False, time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none is lost while the core starts
        self._core_pid = os.fork()
        if self._core_pid == 0:
            try:
                self._become_core(core_end)
            finally:
                os._exit(70)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        core_end.close()

    def _become_core(self, core_end: socket.socket) -> None:
        kept = [self._link.detach(), self._woken.detach(), *self._kept.values()]
        for descriptor in [signal.set_wakeup_fd(-1), *kept]:
            os.close(descriptor)
        for name in [name for name in sys.modules if name.startswith("supercloud")]:
            del sys.modules[name]  # a planned replacement brings new code
        from supercloud.lower.core import core  # noqa: PLC0415  only here, anew in each core

        os._exit(core.main(self._options, core_end))

    def _serve(self) -> bool:
        """Take one message of the core; False when there is none."""
        flags = socket.MSG_DONTWAIT
        try:
            message, descriptors, _, _ = socket.recv_fds(self._link, _MAX_MESSAGE, 4, flags)
        except OSError:
            return False
        order, _, name = message.decode("ascii", "replace").partition(" ")
        if order in ("P", "D") and name in self._kept:
            os.close(self._kept.pop(name))
        if order == "P" and descriptors:
            self._kept[name] = descriptors.pop()
        for descriptor in descriptors:
            os.close(descriptor)
        if order == "L":
            self._send_ends(0, b".")
        return bool(message)

    def _send_ends(self, flags: int, last: bytes = b"") -> None:
        """Send the ends of children; with ``last`` all descriptors before and that behind."""
        try:
            for name, descriptor in self._kept.items() if last else ():
                socket.send_fds(self._link, [f"F {name}".encode()], [descriptor])
            while self._ends:
                self._link.send(self._ends[0], flags)
                del self._ends[0]
            if last:
                self._link.send(last)
                self._listening = True
        except OSError:
            return  # full, or the core died: later

    def _on_signals(self, numbers: bytes) -> None:
        if {signal.SIGTERM, signal.SIGINT} & set(numbers) and not self._stop_by_s:
            self._stop_core()
        if signal.SIGHUP in numbers and self._core_pid:
            os.kill(self._core_pid, signal.SIGHUP)
        for pid, status in reap():
            if pid == self._core_pid:
                self._core_ended(os.waitstatus_to_exitcode(status))
            else:
                self._ends.append(f"X {pid} {status}".encode())

    def _stop_core(self) -> None:
        """Have the core end all domains; a new core if need be."""
        self._stop_by_s = time.monotonic() + _STOP_GRACE_S
        self._stop_attempts += 1
        if not self._core_pid:
            self._start_core()
        os.kill(self._core_pid, signal.SIGTERM)

    def _core_ended(self, code: int) -> None:
        while self._serve():  # what it stored before it ended
            pass
        self._link.close()
        self._core_pid, now_s = 0, time.monotonic()
        if code == CONFIGURATION_STATUS:
            self._status, self._stop_by_s = code, now_s
        elif self._stop_by_s:
            if code and self._stop_attempts < _STOP_ATTEMPTS:
                self._stop_core()
        elif code != RESTART_STATUS:
            if now_s - self._started_s > _STEADY_S:
                self._backoff_s = _BACKOFF_S[0]
            self._restart_at_s = now_s + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])
            print(f"keeper: core ended with {code}", file=sys.stderr)


def main(words: list[str]) -> int:
    """Hold the core's hand until told to stop; the exit status."""
    from supercloud.lower.core import system  # noqa: PLC0415  the path is set just above

    system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)
    system.unshare(system.CLONE_NEWNS)
    system.mount("", "/", "", system.MS_REC | system.MS_PRIVATE)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    inherited = [value.partition("=") for option, value in pairs if option == "--fd"]
    return Keeper(dict(pairs), {name: int(number) for name, _, number in inherited}).run()


if __name__ == "__main__":
    sys.path.insert(0, os.path.normpath(os.path.join(os.path.abspath(__file__), *[".."] * 4)))
    sys.exit(main(sys.argv[1:]))
