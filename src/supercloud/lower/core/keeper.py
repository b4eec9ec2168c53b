"""The keeper: holds the core's descriptors by name, restarts the core, hands them back, reaps.

``python3 -I -S -B keeper.py --manifest FILE --run DIR --state DIR [--fd NAME=N ...]``

One SEQPACKET socketpair leads to the core (:class:`Vault` is its end). The core sends ``P name``
with descriptors (store, replacing), ``D name`` (forget), ``L`` (list: answered by each name with
its descriptors, then ``.``) and ``W pid`` (answered by the wait status of a child that has ended).
SIGTERM stops the host in order, SIGHUP replaces the core by a new one.

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
from contextlib import suppress

RESTART_STATUS, CONFIGURATION_STATUS = 75, 78
"""The core's exit status for: replace me at once; it makes no sense to try again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_STOP_GRACE_S, _STOP_ATTEMPTS, _SPACING_S = 30.0, 3, 0.5  # from a core's start to the next's
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


class Vault:
    """The core's end: descriptors that outlive it, and how children ended that outlived a core."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def put(self, name: str, *descriptors: int) -> None:
        """Store copies; they are safe there when this returns, even if the core dies at once."""
        socket.send_fds(self._link, [f"P {name}".encode()], descriptors)

    def drop(self, name: str) -> None:
        """Forget what is stored under a name."""
        self._link.send(f"D {name}".encode())

    def load(self) -> dict[str, list[int]]:
        """All that is stored."""
        stored, flags = dict[str, list[int]](), socket.MSG_CMSG_CLOEXEC
        self._link.send(b"L")
        while (answer := socket.recv_fds(self._link, _MAX_MESSAGE, 2, flags))[0] != b".":
            if not answer[0]:
                raise ConnectionError("the keeper is gone")
            stored[answer[0].decode()] = answer[1]
        return stored

    def wait_status(self, pid: int) -> int:
        """The wait status of a child of the keeper's that has ended."""
        self._link.send(f"W {pid}".encode())
        return int(self._link.recv(_MAX_MESSAGE))


class Keeper:
    """Descriptors by name, wait statuses by process id, and the core."""

    def __init__(self, options: dict[str, str], inherited: dict[str, int]) -> None:
        self._options = options
        self._kept = {f"i{name}": [number] for name, number in inherited.items()}
        self._ended: dict[int, int] = {}  # few: only of domains that outlived a core
        self._core_pid = self._status = self._stop_attempts = 0
        self._restart_at_s = self._stop_by_s = 0.0
        self._link, self._woken = socket.socket(), wake_on_signals()

    def run(self) -> int:
        """Until stopped; the exit status."""
        while self._core_pid or not self._stop_by_s:
            delay_s = 1.0 if self._core_pid else self._restart_at_s - time.monotonic()
            if delay_s <= 0:
                self._start_core()
                continue
            waiting = select.poll()
            waiting.register(self._woken, select.POLLIN)
            if self._core_pid:
                waiting.register(self._link, select.POLLIN)
            ready = dict(waiting.poll(delay_s * 1000))
            if self._link.fileno() in ready:
                self._serve()
            if self._woken.fileno() in ready:
                self._on_signals(self._woken.recv(4096))
            if self._core_pid and 0 < self._stop_by_s < time.monotonic():
                os.kill(self._core_pid, signal.SIGKILL)
        return self._status

    def _start_core(self) -> None:
        self._link, core_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._restart_at_s = time.monotonic() + _SPACING_S
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
        kept = [descriptor for descriptors in self._kept.values() for descriptor in descriptors]
        own = [signal.set_wakeup_fd(-1), self._link.detach(), self._woken.detach()]
        for descriptor in own + kept:
            os.close(descriptor)
        for name in [name for name in sys.modules if name.startswith("supercloud")]:
            del sys.modules[name]  # a planned replacement brings new code
        from supercloud.lower.core import core  # noqa: PLC0415  only here, anew in each core

        os._exit(core.main(self._options, core_end))

    def _serve(self) -> bool:
        """Take one message of the core; False when there is none."""
        link = self._link
        with suppress(OSError):  # nothing to read, or the core has died
            message, descriptors, *_ = socket.recv_fds(link, _MAX_MESSAGE, 2, socket.MSG_DONTWAIT)
            order, _, name = message.decode("ascii", "replace").partition(" ")
            if order in ("P", "D"):
                for descriptor in self._kept.pop(name, ()):
                    os.close(descriptor)
            if order == "P":
                self._kept[name] = descriptors
            elif order == "L":
                for kept, descriptors in self._kept.items():
                    socket.send_fds(link, [kept.encode()], descriptors)
                link.send(b".")
            elif order == "W":
                self._reap()  # the signal may still be on its way
                link.send(str(self._ended.get(int(name), signal.SIGKILL)).encode())
            return bool(order)
        return False

    def _on_signals(self, numbers: bytes) -> None:
        if {signal.SIGTERM, signal.SIGINT} & set(numbers) and not self._stop_by_s:
            self._stop_core()
        if signal.SIGHUP in numbers and self._core_pid:
            os.kill(self._core_pid, signal.SIGHUP)
        self._reap()

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # no children at all
            while (end := os.waitpid(-1, os.WNOHANG))[0]:
                if end[0] == self._core_pid:
                    self._core_ended(os.waitstatus_to_exitcode(end[1]))
                else:
                    self._ended[end[0]] = end[1]

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
        elif code == RESTART_STATUS:
            self._restart_at_s = now_s
        else:
            print(f"keeper: core ended with {code}", file=sys.stderr)


def main(words: list[str]) -> int:
    """Hold the core's hand until told to stop; the exit status."""
    from supercloud.lower.core import system  # noqa: PLC0415  the path is set just above

    system.call("prctl", system.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    system.call("unshare", system.CLONE_NEWNS)
    system.mount("", "/", "", system.MS_REC | system.MS_PRIVATE)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    inherited = [value.partition("=") for option, value in pairs if option == "--fd"]
    return Keeper(dict(pairs), {name: int(number) for name, _, number in inherited}).run()


if __name__ == "__main__":
    sys.path.insert(0, os.path.normpath(os.path.join(os.path.abspath(__file__), *[".."] * 4)))
    sys.exit(main(sys.argv[1:]))
