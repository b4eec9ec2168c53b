"""What there is on the machine, to be compared before and after."""

import contextlib
import json
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from supercloud.lower.host import registry
from supercloud.lower.host.hierarchies import hierarchies
from supercloud.wire import admin

_LISTEN = "0A"


@dataclass(frozen=True)
class Inventory:
    """Everything that a host could leave behind; empty is what one hopes for."""

    processes: frozenset[str]
    groups: frozenset[str]
    mounts: frozenset[str]
    devices: frozenset[str]
    namespaces: frozenset[str]
    loops: frozenset[str]
    listening: frozenset[str]
    files: frozenset[str]

    def since(self, before: "Inventory") -> dict[str, list[str]]:
        """What is there now and was not before."""
        more = {name: getattr(self, name) - getattr(before, name) for name in vars(self)}
        return {name: sorted(found) for name, found in more.items() if found}


def inventory(instance: str, uids: Container[int], ports: range) -> Inventory:
    """What an instance with these uids and ports has; what tells no owner, whoever has it."""
    return Inventory(
        processes=frozenset(_processes(instance, uids)),
        groups=frozenset(_groups(instance)),
        mounts=frozenset(_lines("/proc/self/mountinfo", " ", 4)),
        devices=frozenset(os.listdir("/sys/class/net")),
        namespaces=frozenset(os.listdir("/run/netns") if os.path.isdir("/run/netns") else ()),
        loops=frozenset(_loops()),
        listening=frozenset(_listening(ports)),
        files=frozenset(_files(Path(admin.RUN) / instance)),
    )


def machine() -> Inventory:
    """What tells no owner alone: to be taken before there is what may leave something behind."""
    return inventory("none", range(0), range(0))


def uids_of(instance: str) -> range:
    """Its share of the machine's uids, with those of owners of namespaces; empty before it has."""
    with contextlib.suppress(FileNotFoundError, KeyError):
        entry = json.loads(Path(registry.PATH).read_text())["instances"][instance]
        first = registry.Share(**entry).first_uid
        return range(first, first + 2 * registry.UIDS_EACH)
    return range(0)


def processes_of(top: int, instance: str) -> list[int]:
    """A process, all below it, and all in groups of the instance."""
    found = [top]
    for pid in found:
        found += _children(pid)
    return list(dict.fromkeys([*found, *_grouped(instance)]))


def status(pid: int) -> dict[str, str]:
    """The fields of ``/proc/PID/status``."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def _group_directories(instance: str) -> list[Path]:
    bases = [Path(tree.root) / "supercloud" / instance for tree in hierarchies()]
    return [Path(group) for base in bases for group, _, _ in os.walk(base)]


def _groups(instance: str) -> list[str]:
    return [str(group) for group in _group_directories(instance)]


def _grouped(instance: str) -> set[int]:
    found: set[int] = set()
    for group in _group_directories(instance):
        with contextlib.suppress(OSError):
            found |= set(map(int, (group / "cgroup.procs").read_text().split()))
    return found


def _processes(instance: str, uids: Container[int]) -> list[str]:
    """Processes by one of the instance's uids, or in one of its groups: names, counted.

    One that has ended and is not reaped is none: some machines' process 1 takes its time.
    """
    found: list[str] = []
    grouped = _grouped(instance)
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = status(int(name))
            if fields["State"].startswith("Z"):
                continue
            if int(name) in grouped or any(int(uid) in uids for uid in fields["Uid"].split()):
                found.append(fields["Name"])
    return [f"{name} {found[:place].count(name)}" for place, name in enumerate(found)]


def _lines(path: str, separator: str, column: int) -> list[str]:
    return [line.split(separator)[column] for line in Path(path).read_text().splitlines()]


def _loops() -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            found.append(f"{path.parent.parent.name} {path.read_text().strip()}")
    return found


def _listening(ports: range) -> list[str]:
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            port = int(local.rpartition(":")[2], 16)
            if port in ports and (state == _LISTEN or table.startswith("udp")):
                found.append(f"{table} {port}")
    return found


def _files(directory: Path) -> list[str]:
    return [str(path) for path in (directory, *directory.rglob("*")) if path.exists()]
