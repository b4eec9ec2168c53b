"""A model of what is around a mirror: devices that answer late or never, a map, an owner."""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from supercloud.services.replication import nbd
from supercloud.services.replication.begin import Replica, begin, connect
from supercloud.services.replication.lease import Lease
from supercloud.services.replication.mirror import Mirror
from supercloud.services.replication.regions import Map, map_bytes
from supercloud.services.replication.unsettled import Unsettled

MS = 1_000_000
REGION = 64 << 10
VALID_MS = 1000


class Disk:
    """A device: it may forget what was not flushed when it is killed.

    Each byte of a region's first is enough: requests here are of whole regions of one value.
    """

    def __init__(self, regions: int) -> None:
        self.durable = [0] * regions
        self.now = [0] * regions
        self.crashes = 0
        self.links: list[FakeLink] = []
        self.unreadable: set[int] = set()

    def end_connections(self) -> None:
        """What came over them before and was not served is never served."""
        for link in self.links:
            link.cut = True
        self.links.clear()

    def kill(self, rnd: random.Random) -> None:
        """Started again, it has lost any of what was not flushed."""
        for region, value in enumerate(self.durable):
            if self.now[region] != value and rnd.random() < 0.5:
                self.now[region] = value
        self.durable = list(self.now)
        self.crashes += 1
        for link in self.links:
            link.dead = True
        self.end_connections()

    def serve(self, kind: int, first: int, count: int, data: bytes) -> tuple[int, bytes]:
        where = range(first, first + count)
        if kind == nbd.FLUSH:
            self.durable = list(self.now)
        elif kind == nbd.READ:
            if self.unreadable & set(where):
                return 5, b""
            return 0, b"".join(bytes([self.now[region]]) * REGION for region in where)
        else:
            for at, region in enumerate(where):
                self.now[region] = data[at * REGION] if kind == nbd.WRITE else 0
                self.unreadable.discard(region)
        return 0, b""


@dataclass(eq=False)
class Asked:
    kind: int
    first: int
    count: int
    data: bytes
    done: Callable[[int, Any], None]
    served: tuple[int, bytes] | None = None


class FakeLink:
    """A connection in which anything takes any time. ``cut``: the device serves nothing more."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.asked = disk, []
        self.cut = self.dead = self.closed = False
        disk.links.append(self)

    def send(self, kind: int, offset: int, length: int, data: Any, flags: int, done: Any) -> None:
        self.asked.append(Asked(kind, offset // REGION, length // REGION, bytes(data), done))

    def waiting_s(self) -> float:
        return 1e9 if self.asked else 0.0

    def close(self) -> None:
        self.closed = True  # what was sent before may be served yet

    def serve(self, rnd: random.Random) -> None:
        """The device serves one that it got, in any order; flushes cover what was answered."""
        waiting = [asked for asked in self.asked if asked.served is None]
        if waiting and not self.cut:
            asked = rnd.choice(waiting)
            asked.served = self.disk.serve(asked.kind, asked.first, asked.count, asked.data)

    def deliver(self, rnd: random.Random) -> None:
        """One answer arrives."""
        served = [asked for asked in self.asked if asked.served is not None]
        if served and not self.closed and not self.dead:
            asked = rnd.choice(served)
            self.asked.remove(asked)
            assert asked.served is not None
            asked.done(*asked.served)


class Memory:
    """The map's memory file."""

    def __init__(self, regions: int) -> None:
        self.size_bytes = regions * REGION
        self.descriptor = os.memfd_create("map")
        os.truncate(self.descriptor, map_bytes(self.size_bytes))

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass
class Running:
    """A mirror with its lease's clock."""

    mirror: Mirror
    map: Map
    told: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def close(self) -> None:
        self.mirror.end("closed")
        self.map.close()


def start(
    memory: Memory,
    generation: int,
    disks: Mapping[str, Disk],
    in_sync: set[str],
    kept: set[str],
    connected: set[str],
    clock_ns: Callable[[], int],
    *,
    clean: bool = False,
) -> Running:
    """As the service opens one; the devices end what older generations had of them."""
    found = Map(memory.descriptor, memory.size_bytes)
    replicas = [Replica(n, n in in_sync, n in kept, n in connected) for n in disks]
    members = begin(found, generation, replicas, clean=clean)
    told: list[tuple[str, Mapping[str, Any]]] = []
    mirror = Mirror(
        memory.size_bytes,
        Lease(generation, clock_ns),
        members,
        Unsettled(found.unsettled),
        lambda method, parameters: told.append((method, dict(parameters))),
    )
    for name in connected:
        connect(mirror.named(name), FakeLink(disks[name]))
    mirror.begin()
    return Running(mirror, found, told)
