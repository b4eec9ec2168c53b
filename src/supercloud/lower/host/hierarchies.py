"""Which trees of control groups there are (v1, v2, hybrid), for a host's grant manifest."""

from typing import Any, Final

from supercloud.lower.core.cgroup import Hierarchy
from supercloud.model.errors import Unsupported

_WANTED: Final = frozenset({"cpu", "cpuacct", "memory", "pids"})


def hierarchies(mountinfo: str = "") -> list[Hierarchy]:
    """All trees where a controller of ours is; Unsupported when one is nowhere."""
    found: dict[frozenset[str], Hierarchy] = {}
    for line in (mountinfo or _read("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, unified = before.split(" ")[4], kind == "cgroup2"
        if unified:
            options = ",".join(_read(f"{root}/cgroup.controllers").split())
        controllers = _WANTED & set(options.split(","))
        if kind.startswith("cgroup") and controllers:
            found.setdefault(controllers, Hierarchy(root, controllers, unified))
    if missing := {"cpu", "memory", "pids"} - {name for tree in found for name in tree}:
        raise Unsupported(f"no control groups for {missing}", hint="see supercloud doctor")
    return list(found.values())


def for_manifest() -> list[dict[str, Any]]:
    """Those of this machine, as the manifest's ``groups``."""
    return [
        {"root": tree.root, "controllers": sorted(tree.controllers), "unified": tree.unified}
        for tree in hierarchies()
    ]


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
