"""A host's grant manifest: kinds from ``isolation`` with filters, first domains, grants."""

import json
import os
from dataclasses import dataclass
from typing import Any, Final

from supercloud.isolation import seccomp
from supercloud.isolation.kinds import (
    COMPONENT_LIMITS,
    MIB,
    UPLINK_NET_LIMITS,
    Site,
    filters,
    kinds,
)
from supercloud.lower.host import hierarchies, soundness
from supercloud.lower.host.images import Images
from supercloud.lower.host.registry import UIDS_EACH, Share
from supercloud.model.errors import Permanent

DEFAULT_FILTER: Final = "base"
MIN_UPLINKS: Final = 8
UPLINKS_PART: Final = 16
"""The uplinks of all users may take one part in this many of the memory."""
_PIDS, _DOMAINS = 16384, 2000
_DISK_KEPT_FREE: Final = 20  # one part in this many
_OWN_COMPONENTS: Final = ("front_door", "disk", "admin")
_FIRST: Final = ("disk", "uplink", "front_door", "multiplexing", "admin")
"""Drivers before those that use them; the console, which says ready, last."""
_USE = ["USE", "READ", "GRANT"]


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the host may hand out at most."""

    memory_bytes: int
    disk_bytes: int


def capacity(state: str) -> Capacity:
    """All memory of the machine, and most of the file system with the state directory."""
    with open("/proc/meminfo", encoding="ascii") as file:
        total_kib = int(file.readline().split()[1])
    space = os.statvfs(state)
    disk = space.f_blocks * space.f_frsize
    return Capacity(total_kib << 10, disk - disk // _DISK_KEPT_FREE)


def compile_manifest(
    instance: str, share: Share, images: Images, site: Site, directory: str
) -> dict[str, Any]:
    """The whole manifest; ``directory`` is where the host's disks will be."""
    table = kinds(site)
    names, size = filters(), capacity(directory)
    for name, limits in _limits(size).items():
        table[name]["limits"] = limits
    for name, kind in table.items():
        kind["filter"] = _filter(names.get(name, DEFAULT_FILTER))
    whole = {"memory_bytes": size.memory_bytes, "pids": _PIDS, "domains": _DOMAINS}
    document = {
        "version": 1,
        "instance": instance,
        "first_uid": share.first_uid,
        "uids": UIDS_EACH,
        "runtime": images.runtime,
        "runtime_sha256": images.runtime_sha256,
        "groups": hierarchies.for_manifest(),
        "limits": {**whole, "disk_bytes": size.disk_bytes},
        "kinds": table,
        "domains": [(name, name) for name in _FIRST],
        "grants": _grants(),
    }
    soundness.check(document)
    return document


def write(manifest: dict[str, Any], path: str) -> None:
    """Store it for the keeper."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
    os.replace(f"{path}.part", path)


def _filter(name: str) -> str:
    program, sha256 = seccomp.compiled(name)
    promised = json.loads(seccomp.HASHES.read_text())[name]
    if sha256 != promised:
        raise Permanent(f"filter {name} compiles to {sha256}, promised is {promised}")
    return program.hex()


def _limits(size: Capacity) -> dict[str, dict[str, int]]:
    """Of those that share the host out: uplinks, and all the rest for the users."""
    each = COMPONENT_LIMITS["memory_bytes"]
    affordable = size.memory_bytes // UPLINKS_PART // UPLINK_NET_LIMITS["memory_bytes"]
    uplinks = max(MIN_UPLINKS, affordable)
    uplink = {
        "memory_bytes": each + uplinks * UPLINK_NET_LIMITS["memory_bytes"],
        "pids": COMPONENT_LIMITS["pids"] + uplinks * UPLINK_NET_LIMITS["pids"],
        "domains": uplinks,
    }
    others = len(_OWN_COMPONENTS)
    multiplexing = {
        "memory_bytes": size.memory_bytes - uplink["memory_bytes"] - others * each - MIB,
        "pids": _PIDS - uplink["pids"] - others * COMPONENT_LIMITS["pids"],
        "domains": _DOMAINS - uplinks - others - 2,
        "disk_bytes": size.disk_bytes,
    }
    return {"uplink": uplink, "multiplexing": multiplexing}


def _grants() -> list[dict[str, Any]]:
    grants: list[dict[str, Any]] = [
        _grant("front_door", "listener", ["USE"], "inherited:listener"),
        _grant("admin", "listener", ["USE"], "inherited:admin"),
        _grant("admin", "ready", ["USE"], "inherited:ready"),
    ]
    for component in ("front_door", "disk", "uplink", "admin"):
        name = f"domain:{component}"
        grants.append(_grant("multiplexing", name, ["CONNECT"], name))
    return grants + [
        _grant("multiplexing", f"image.0.{part}", _USE, f"inherited:{part}")
        for part in ("kernel", "initrd", "root")
    ]


def _grant(to: str, name: str, rights: list[str], what: str) -> dict[str, Any]:
    return {"to": to, "name": name, "rights": rights, "object": what}
