"""Control groups: one group per scheduling context in every hierarchy found (v1, v2, hybrid).

Groups nest as scheduling contexts do, under ``supercloud/<instance>``. A context that may have
children keeps its own processes in a leaf ``own``, since v2 wants processes in leaves only.
"""

import os
import signal
import time
from dataclasses import dataclass

from supercloud.model.capability import Limits

TOP = "supercloud"
OWN = "own"
_WANTED = frozenset({"cpu", "cpuacct", "memory", "pids"})
_PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted tree of groups and those controllers of it that we use."""

    root: str
    controllers: frozenset[str]
    unified: bool


def hierarchies(mountinfo: str | None = None) -> list[Hierarchy]:
    """All trees worth using: where a controller of ours is, and v2 in any case (for kill)."""
    mountinfo = mountinfo or _read("/proc/self/mountinfo")
    found: dict[frozenset[str], Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root = before.split(" ")[4]
        if kind == "cgroup":
            controllers = _WANTED & set(options.split(","))
            if controllers:
                found.setdefault(controllers, Hierarchy(root, controllers, unified=False))
        elif kind == "cgroup2":
            controllers = _WANTED & set(_read(f"{root}/cgroup.controllers").split())
            found.setdefault(frozenset({"v2"}), Hierarchy(root, controllers, unified=True))
    return list(found.values())


class Groups:
    """The groups of one instance. Paths of groups are relative to the instance's."""

    def __init__(self, instance: str) -> None:
        self.trees, self._base = hierarchies(), f"{TOP}/{instance}"
        self.make_top()

    def make_top(self) -> None:
        """Make the instance's top group in every hierarchy."""
        for tree in self.trees:
            for directory in (tree.root, f"{tree.root}/{TOP}", self._directory(tree, "")):
                os.makedirs(directory, exist_ok=True)
                _enable(tree, directory)

    def create(self, path: str, limits: Limits, own: Limits | None) -> None:
        """Make a group; with ``own`` also its leaf, limited so, for processes."""
        for tree in self.trees:
            directory = self._directory(tree, path)
            os.makedirs(directory, exist_ok=True)
            if own:
                _enable(tree, directory)
                os.makedirs(f"{directory}/{OWN}", exist_ok=True)
        self.limit(path, limits)
        if own:
            self.limit(f"{path}/{OWN}", own)

    def limit(self, path: str, limits: Limits) -> None:
        """Set the limits of a group; what is zero is not limited."""
        for tree in self.trees:
            for name, value in _settings(tree, limits).items():
                _write(f"{self._directory(tree, path)}/{name}", str(value))

    def add(self, path: str, pid: int) -> None:
        """Move a process into a group."""
        for tree in self.trees:
            _write(f"{self._directory(tree, path)}/cgroup.procs", str(pid))

    def remove(self, path: str) -> bool:
        """Remove a group with what is below; False while something in it is alive."""
        return all(_remove(self._directory(tree, path)) for tree in self.trees)

    def kill(self, path: str = "") -> None:
        """Kill every process in a group and below."""
        for tree in self.trees:
            _kill(self._directory(tree, path))

    def usage(self, path: str) -> tuple[int, int, int]:
        """(memory bytes, cpu microseconds, processes) of a group and below, now."""
        memory = cpu_us = pids = 0
        for tree in self.trees:
            directory = self._directory(tree, path)
            if "memory" in tree.controllers:
                name = "memory.current" if tree.unified else "memory.usage_in_bytes"
                memory = int(_read(f"{directory}/{name}"))
            if "pids" in tree.controllers:
                pids = int(_read(f"{directory}/pids.current"))
            if "cpuacct" in tree.controllers:
                cpu_us = int(_read(f"{directory}/cpuacct.usage")) // 1000
            elif tree.unified and "cpu" in tree.controllers:
                cpu_us = int(_read(f"{directory}/cpu.stat").split()[1])
        return memory, cpu_us, pids

    def paths(self) -> set[str]:
        """Every group there is, as relative paths, without the leaves ``own``."""
        found = set()
        for base in [self._directory(tree, "") for tree in self.trees]:
            found |= {os.path.relpath(group, base) for group, _, _ in os.walk(base)}
        return {path for path in found if path != "." and os.path.basename(path) != OWN}

    def sweep(self, timeout_s: float = 10.0) -> bool:
        """Kill all that is left of this instance and remove its groups; False when stuck."""
        deadline_s = time.monotonic() + timeout_s
        while not self.remove(""):
            if time.monotonic() > deadline_s:
                return False
            self.kill()
            time.sleep(0.01)
        for tree in self.trees:
            _rmdir(f"{tree.root}/{TOP}")  # stays while another instance is up
        return True

    def _directory(self, tree: Hierarchy, path: str) -> str:
        return f"{tree.root}/{self._base}/{path}".rstrip("/")


def _settings(tree: Hierarchy, limits: Limits) -> dict[str, str | int]:
    """Values of files for each limit that this tree can set."""
    quota_us = limits.cpu_permille * _PERIOD_US // 1000
    wanted: dict[str, str | int] = {"pids.max": limits.pids or "max"}
    if tree.unified:
        wanted["cpu.weight"] = limits.cpu_weight
        wanted["cpu.max"] = f"{quota_us or 'max'} {_PERIOD_US}"
        wanted["memory.max"] = limits.memory_bytes or "max"
    else:
        wanted["cpu.shares"] = max(2, limits.cpu_weight * 1024 // 100)
        wanted["cpu.cfs_quota_us"] = quota_us or -1
        wanted["memory.limit_in_bytes"] = limits.memory_bytes or -1
    return {name: wanted[name] for name in wanted if name.split(".")[0] in tree.controllers}


def _enable(tree: Hierarchy, directory: str) -> None:
    """Pass a v2 tree's controllers on to a group's children."""
    if tree.unified and tree.controllers:
        wanted = " ".join(f"+{name}" for name in sorted(tree.controllers))
        _write(f"{directory}/cgroup.subtree_control", wanted)


def _kill(directory: str) -> None:
    if os.path.exists(f"{directory}/cgroup.kill"):
        _write(f"{directory}/cgroup.kill", "1")
        return
    for group, _, _ in os.walk(directory):
        for pid in _read(f"{group}/cgroup.procs").split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue


def _remove(directory: str) -> bool:
    return all(_rmdir(group) for group, _, _ in os.walk(directory, topdown=False))


def _rmdir(directory: str) -> bool:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    finally:
        os.close(descriptor)
