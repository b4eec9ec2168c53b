"""Progress on stderr: one line a step, with the seconds that it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Prints ``  seconds  step  detail`` lines; silent when ``quiet``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.started_s = time.monotonic()

    def note(self, text: str) -> None:
        """One line outside any step."""
        self._print(f"{'':>9}  {text}")

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is appended to the yielded list is printed as its detail."""
        detail: list[str] = []
        begun_s = time.monotonic()
        yield detail
        self._print(f"{time.monotonic() - begun_s:7.2f} s  {name}  {' '.join(detail)}".rstrip())

    def _print(self, line: str) -> None:
        if not self.quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
