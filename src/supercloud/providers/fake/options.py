"""The ``options`` of a fake provider in the manifest."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from supercloud.model.errors import Invalid
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import HostCapacity

IMAGE = "sha256:" + hashlib.sha256(b"the fake provider's L1 image").hexdigest()
GIB = 1 << 30
_NUMBERS = {
    "hosts": (1, 10_000),
    "cpus": (1, 4096),
    "memory_gib": (1, 1 << 20),
    "disk_gib": (1, 1 << 20),
    "platforms": (0, 10_000),
    "volumes": (0, 1),
    "objects": (0, 1),
    "checkpoints": (0, 1),
    "vm_checkpoints": (0, 1),
    "tunnel": (0, 1),
    "templates": (0, 1),
    "latency_ms": (0, 60_000),
    "boot_ms": (0, 600_000),
    "start_ms": (0, 600_000),
    "checkpoint_ms": (0, 600_000),
    "reconnect_ms": (1, 60_000),
    "fail_create": (0, 1000),
    "fail_delete": (0, 1000),
    "fail_hosts": (0, 1000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``hosts`` hosts of equal size (cpus, memory, disk, platforms each), spread over ``regions``.

    Every provider call takes ``latency_ms``; a platform's agent dials ``boot_ms`` after creation,
    an environment serves ``start_ms`` after it was applied. The first ``fail_*`` calls of that kind
    are answered with Temporary. ``volumes``, ``objects``, ``templates``,
    ``checkpoints`` 0: it has none;
    ``vm_checkpoints`` 0: its platforms say that they take none of VMs; ``tunnel`` 0: a host does
    not reach the object store of another one. A checkpoint takes ``checkpoint_ms``.
    """

    hosts: int = 3
    cpus: int = 16
    memory_gib: int = 64
    disk_gib: int = 1024
    platforms: int = 64
    volumes: int = 1
    objects: int = 1
    checkpoints: int = 1
    vm_checkpoints: int = 1
    tunnel: int = 1
    templates: int = 1
    latency_ms: int = 0
    boot_ms: int = 0
    start_ms: int = 0
    checkpoint_ms: int = 0
    reconnect_ms: int = 50
    fail_create: int = 0
    fail_delete: int = 0
    fail_hosts: int = 0
    regions: tuple[str, ...] = ("fake-1",)
    jurisdiction: str = ""
    image: str = IMAGE

    def capacities(self, name: str) -> list[HostCapacity]:
        """The hosts while nothing runs on them."""
        return [
            HostCapacity(
                name=f"{name}-{number}",
                region=self.regions[number % len(self.regions)],
                jurisdiction=self.jurisdiction,
                cpus_total=self.cpus,
                cpus_free=self.cpus,
                memory_total_bytes=self.memory_gib * GIB,
                memory_free_bytes=self.memory_gib * GIB,
                disk_total_bytes=self.disk_gib * GIB,
                disk_free_bytes=self.disk_gib * GIB,
                platforms_free=self.platforms,
                accelerator="tcg",
                images=(self.image,),
            )
            for number in range(self.hosts)
        ]


def options_of(entry: Entry) -> Options:
    """The options of a manifest entry; Invalid with the option's name."""
    values: dict[str, Any] = {}
    regions: tuple[str, ...] = (entry.region or "fake-1",)
    for key, text in entry.options.items():
        if key == "regions":
            regions = tuple(region.strip() for region in text.split(",") if region.strip())
        elif key in _NUMBERS:
            values[key] = _number(key, text)
        else:
            allowed = ", ".join(sorted([*_NUMBERS, "regions"]))
            raise Invalid(f"no such option; allowed are {allowed}", where=f"options.{key}")
    if not regions:
        raise Invalid("found no region, allowed is a list of names", where="options.regions")
    options = Options(regions=regions, jurisdiction=entry.jurisdiction)
    return replace(options, **values)


def _number(key: str, text: str) -> int:
    low, high = _NUMBERS[key]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not low <= number <= high:
        raise Invalid(
            f"found {text!r:.40}, allowed is a number from {low} to {high}", where=f"options.{key}"
        )
    return number
