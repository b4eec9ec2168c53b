"""A command of ours on a real terminal."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

from support.commandline import CommandLine
from support.stack import Stack


class Terminal:
    """A command on a terminal of its own, as somebody at a keyboard has it."""

    def __init__(
        self, line: CommandLine | Stack, *words: str, rows: int = 30, columns: int = 100
    ) -> None:
        self.seen = b""
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = line.popen(
            *words, stdin=slave, stdout=slave, stderr=slave, preexec_fn=self._own_terminal
        )

    @staticmethod
    def _own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, pattern: bytes, timeout_s: float = 60.0) -> re.Match[bytes]:
        """Read until ``pattern`` is there; what comes before it is gone then."""
        end_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0, end_s - time.monotonic()))
            assert ready, f"{pattern!r} did not come, but {self.seen!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:
                data = b""
            assert data, f"{pattern!r} did not come before the end, but {self.seen!r}"
            self.seen += data
        self.seen = self.seen[found.end() :]
        return found

    def ended(self) -> int:
        status = self.process.wait(60)
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is not as it was"
        return status

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)
