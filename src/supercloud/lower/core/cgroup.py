"""Control groups: one group per scheduling context in every hierarchy of the manifest (v1, v2).

They nest as contexts do, below ``supercloud/<instance>``. A context that may have children keeps
its own processes in a leaf ``own``, since v2 wants processes in leaves only.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from supercloud.model.capability import Limits

TOP, OWN = "supercloud", "own"
_PERIOD_US = 100_000


class Hierarchy(NamedTuple):
    """One mounted tree of groups and those controllers of it that we use."""

    root: str
    controllers: frozenset[str]
    unified: bool

    def settings(self, limits: Limits) -> dict[str, object]:
        """Values of files for each limit that this tree can set; what is zero is not limited."""
        quota_us = limits.cpu_permille * _PERIOD_US // 1000
        wanted: dict[str, object] = {"pids.max": limits.pids or "max"}
        if self.unified:
            wanted["cpu.weight"] = limits.cpu_weight
            wanted["cpu.max"] = f"{quota_us or 'max'} {_PERIOD_US}"
            wanted["memory.max"] = limits.memory_bytes or "max"
        else:
            wanted["cpu.shares"] = max(2, limits.cpu_weight * 1024 // 100)
            wanted["cpu.cfs_quota_us"] = quota_us or -1
            wanted["memory.limit_in_bytes"] = limits.memory_bytes or -1
        return {k: v for k, v in wanted.items() if k.split(".")[0] in self.controllers}

    def enable(self, directory: str) -> None:
        """Pass a v2 tree's controllers on to a group's children."""
        if self.unified and self.controllers:
            wanted = " ".join(f"+{name}" for name in sorted(self.controllers))
            _write(f"{directory}/cgroup.subtree_control", wanted)


class Groups:
    """The groups of one instance."""

    def __init__(self, instance: str, trees: tuple[Hierarchy, ...]) -> None:
        self._trees, self._base = trees, f"{TOP}/{instance}"

    def make_top(self) -> None:
        """Make the instance's top group in every hierarchy."""
        for tree in self._trees:
            for directory in ("", f"/{TOP}", f"/{self._base}"):
                os.makedirs(tree.root + directory, exist_ok=True)
                tree.enable(tree.root + directory)

    def create(self, path: str, limits: Limits, own: Limits | None) -> None:
        """Make a group; with ``own`` also its leaf, limited so, for processes."""
        for tree, directory in self._each(path):
            os.makedirs(directory, exist_ok=True)
            if own:
                tree.enable(directory)
                os.makedirs(f"{directory}/{OWN}", exist_ok=True)
        self.limit(path, limits)
        if own:
            self.limit(f"{path}/{OWN}", own)

    def limit(self, path: str, limits: Limits) -> None:
        """Set the limits of a group."""
        for tree, directory in self._each(path):
            for name, value in tree.settings(limits).items():
                _write(f"{directory}/{name}", str(value))

    def add(self, path: str, pid: int) -> None:
        """Move a process into a group."""
        for _, directory in self._each(path):
            _write(f"{directory}/cgroup.procs", str(pid))

    def remove(self, path: str) -> bool:
        """Remove a group with what is below; False when something had to be killed first."""
        for _, directory in self._each(path):
            for group, _, _ in os.walk(directory, topdown=False):
                with suppress(OSError):
                    os.rmdir(group)
                    continue
                for pid in _read(f"{group}/cgroup.procs").split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        return not any(os.path.exists(directory) for _, directory in self._each(path))

    def usage(self, path: str) -> tuple[int, int, int]:
        """(memory bytes, cpu microseconds, processes) of a group and below, now."""
        memory = cpu_us = pids = 0
        for tree, directory in self._each(path):
            if "memory" in tree.controllers:
                name = "current" if tree.unified else "usage_in_bytes"
                memory = int(_read(f"{directory}/memory.{name}"))
            if "pids" in tree.controllers:
                pids = int(_read(f"{directory}/pids.current"))
            if "cpuacct" in tree.controllers:
                cpu_us = int(_read(f"{directory}/cpuacct.usage")) // 1000
            elif tree.unified and "cpu" in tree.controllers:
                cpu_us = int(_read(f"{directory}/cpu.stat").split()[1])
        return memory, cpu_us, pids

    def paths(self) -> set[str]:
        """Every group there is, without the leaves ``own``."""
        bases = [base for _, base in self._each("")]
        found = {os.path.relpath(group, base) for base in bases for group, _, _ in os.walk(base)}
        return {path for path in found if path != "." and os.path.basename(path) != OWN}

    def sweep(self, path: str = "", timeout_s: float = 10.0) -> bool:
        """Kill all that is in a group and remove it; False when stuck."""
        deadline_s = time.monotonic() + timeout_s
        while not self.remove(path):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.005)
        for tree in self._trees if not path else ():
            with suppress(OSError):  # another instance is up
                os.rmdir(f"{tree.root}/{TOP}")
        return True

    def _each(self, path: str) -> Iterator[tuple[Hierarchy, str]]:
        for tree in self._trees:
            yield tree, f"{tree.root}/{self._base}/{path}".rstrip("/")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(value.encode())
