"""VMs that start again from memory: how each was when it waited to be told who it is.

A VM whose image has ``identity`` stops in its boot before anything in it must differ
(``guestport``). Where there is room, it is kept as it is there: its devices' state and what it has
of memory, in files in memory, a *spare*. The next start of the same VM fills a memory with it and
goes on, is told another seed and the time, and so is another. What makes two VMs the same is in the
spare's key (``spare_machine``).

Room for spares is what no EE has a right to: of the platform's memory, less what all of them may
use. When one more needs it, spares go. They outlive the agent; without EE they stay for a while,
for one that comes back.
"""

import contextlib
import logging
import os
import time
from typing import Final

from supercloud.upper.platform.agent import cgroups, paths
from supercloud.upper.platform.agent.state import remove_tree

KEEP_S: Final = 600.0
RAM, STATE = "ram", "state"

log = logging.getLogger("supercloud.agent.spares")


class Spares:
    """All of this platform's, in a directory of their own."""

    def __init__(self, directory: str = paths.SPARES) -> None:
        self._directory = directory
        self._room_bytes = 0
        self._needed_bytes: dict[str, int] = {}

    # -- room

    def limit(self, taken_bytes: int) -> None:
        """So much of the platform's memory the EEs may use: what is left is for spares."""
        free = cgroups.total_memory_bytes() - cgroups.RESERVED_BYTES - taken_bytes
        self._room_bytes = max(0, free)
        self._make_fit(0)

    def has_room(self, size_bytes: int) -> bool:
        """Whether one more of that size may be; the oldest make room for it."""
        if size_bytes > self._room_bytes:
            return False
        self._make_fit(size_bytes)
        return True

    def _make_fit(self, more_bytes: int) -> None:
        left = self._room_bytes - more_bytes
        for key in sorted(self._keys(), key=self._age_s):
            left -= self._size_bytes(key)
            if left < 0:
                log.info("spare %.12s makes room", key)
                self.drop(key)

    def sweep(self) -> None:
        """What an earlier agent did not finish goes."""
        for key in self._keys():
            if not self.has(key):
                self.drop(key)

    def tidy(self, used: set[str]) -> None:
        """What has been no wanted VM's for a while goes."""
        for key in self._keys():
            if key in used:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._place(key))
            elif self._age_s(key) > KEEP_S:
                self.drop(key)

    # -- one of them

    def has(self, key: str) -> bool:
        """Whether there is one, whole."""
        return os.path.exists(f"{self._place(key)}/{STATE}")

    def new(self, key: str, size_bytes: int) -> str:
        """A directory for one that is to be made; there is one when its state is there.

        Its room is taken from now on: others may be made at the same time.
        """
        self.drop(key)
        self._needed_bytes[key] = size_bytes
        os.makedirs(self._place(key), mode=0o700)
        return self._place(key)

    def open(self, key: str, name: str) -> int:
        """One of its files, for reading."""
        return os.open(f"{self._place(key)}/{name}", os.O_RDONLY | os.O_CLOEXEC)

    def drop(self, key: str) -> None:
        """Give its memory back; whoever runs has a copy."""
        self._needed_bytes.pop(key, None)
        remove_tree(self._place(key))

    def _place(self, key: str) -> str:
        return f"{self._directory}/{key}"

    def _keys(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self._directory)
        return []

    def _age_s(self, key: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - os.stat(self._place(key)).st_mtime
        return 0.0

    def _size_bytes(self, key: str) -> int:
        has_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            has_bytes = sum(entry.stat().st_blocks * 512 for entry in os.scandir(self._place(key)))
        return max(has_bytes, self._needed_bytes.get(key, 0))
