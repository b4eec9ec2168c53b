"""Cleans up after a test, also when the test was killed: a process of its own that outlives it.

It reads lines from its input: ``process PID START`` (to be ended), ``directory PATH`` (to be
removed), ``command ARGUMENT...`` (to be run). When the input ends, because whoever wrote it closed it or is no more, it does so, in
reverse order.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TERM_S, KILL_S = 45.0, 10.0


class Guardian:
    """The other end of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def process(self, pid: int) -> None:
        """To be ended, should it still be there."""
        self._say(f"process {pid} {start_of(pid)}")

    def directory(self, path: str | Path) -> None:
        """To be removed with all that is in it."""
        self._say(f"directory {shlex.quote(str(path))}")

    def command(self, argv: list[str]) -> None:
        """To be run."""
        self._say("command " + " ".join(shlex.quote(word) for word in argv))

    def close(self) -> None:
        """Have everything cleaned up now; raises when something stayed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if status := self._process.wait(120):
            raise AssertionError(f"the guardian ended with {status}: see its messages")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()


def start_of(pid: int) -> str:
    """When a process started, so that a later one of the same number is not taken for it."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if stat[0] == "Z" else stat[19]


def _alive(pid: int, start: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return start_of(pid) == start
    return False


def _end(pid: int, start: str) -> bool:
    for number, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
        deadline_s = time.monotonic() + wait_s
        if _alive(pid, start):
            os.kill(pid, number)
        while _alive(pid, start) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if not _alive(pid, start):
            return True
    return False


def main() -> int:
    """Read until the end, then clean up; the exit status says whether all went."""
    lines = [shlex.split(line) for line in sys.stdin]
    stayed = []
    for what, *words in reversed(lines):
        if what == "process" and not _end(int(words[0]), words[1]):
            stayed.append(f"process {words[0]}")
        if (
            what == "command"
            and subprocess.run(words, check=False, stdin=subprocess.DEVNULL).returncode
        ):
            stayed.append(f"{words} failed")
        if what == "directory":
            shutil.rmtree(words[0], ignore_errors=True)
            if os.path.lexists(words[0]):
                stayed.append(words[0])
    if stayed:
        print("guardian: still there:", *stayed, file=sys.stderr)
    return len(stayed)


if __name__ == "__main__":
    sys.exit(main())
