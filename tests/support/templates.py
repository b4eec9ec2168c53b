"""A user's domain's templates, with a core and machines that are pretended."""

import asyncio
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from supercloud.lower import quota as quotas
from supercloud.lower.client import Core
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.templates import Templates
from supercloud.lower.vmm.template import Inputs, key_of
from supercloud.model.capability import Limits
from supercloud.model.errors import Exists, NoResources, NotFound
from supercloud.wire.quota import Quota

MIB = 1 << 20
INPUTS = Inputs(
    image="sha256:" + "1" * 64, runtime_sha256="2" * 64, kernel="6.18", accelerator="tcg",
    cpus=1, memory_bytes=256 * MIB, scratch_bytes=512 * MIB,
)  # fmt: skip
FACTS = {
    "runtime_sha256": INPUTS.runtime_sha256, "kernel": INPUTS.kernel,
    "accelerator": INPUTS.accelerator, "images": [INPUTS.image],
}  # fmt: skip


def allowed(memory_bytes: int, vms: int = 2) -> Limits:
    return quotas.to_limits(Quota(memory_bytes=memory_bytes, vms=vms))


OWN_BYTES = quotas.USER_OWN_MEMORY_BYTES + sum(s.memory_bytes for s in quotas.SERVICES.values())
"""Booked from the start: the user's domain, and its services' domains."""


class FakeCore:
    """As much of the core as templates need; memory is real, booking as the core does it."""

    def __init__(self, memory_bytes: int) -> None:
        self.allowed = allowed(memory_bytes)
        self.table: dict[str, tuple[int, str, int]] = {"image.0.kernel": (1, "", 0)}
        self.table |= {f"image.0.{part}": (n, "", 0) for n, part in enumerate(("initrd", "root"), 2)}  # fmt: skip
        self.files: dict[int, int] = {}
        self.number = 10

    def _add(self, name: str, kind: str, booked: int) -> int:
        if name in self.table:
            raise Exists(name)
        if booked > self.allowed.memory_bytes - self.booked():
            raise NoResources(f"memory_bytes: {booked} asked")
        self.number += 1
        self.table[name] = (self.number, kind, booked)
        return self.number

    def booked(self) -> int:
        return OWN_BYTES + self.held()

    def held(self) -> int:
        return sum(booked for _, _, booked in self.table.values())

    def limits(self) -> Limits:
        return self.allowed

    def usage(self) -> SimpleNamespace:
        domains = self.domains() + len(quotas.SERVICES)
        return SimpleNamespace(
            booked_memory_bytes=self.booked(), booked_domains=domains, booked_disk_bytes=0
        )

    def domains(self) -> int:
        return sum(kind == "domain" for _, kind, _ in self.table.values())

    def create_memory(self, size: int, name: str, scheduling: int = 1) -> int:
        selector = self._add(name, "memory", size if scheduling == 1 else 0)
        self.files[selector] = os.memfd_create(name)
        os.ftruncate(self.files[selector], size)
        return selector

    def create_domain(self, _kind: str, name: str, limits: Limits) -> SimpleNamespace:
        selector = self._add(name, "domain", limits.memory_bytes)
        return SimpleNamespace(selector=selector, scheduling=99)

    def lookup(self, name: str) -> SimpleNamespace:
        if name not in self.table:
            raise NotFound(name)
        return SimpleNamespace(selector=self.table[name][0], name=name)

    def entries(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.table]

    def take(self, selector: int) -> int:
        return os.dup(self.files[selector])

    def seal(self, selector: int) -> bytes:
        return hashlib.sha256(str(selector).encode()).digest()

    destroy_named = Core.destroy_named

    def destroy(self, selector: int) -> None:
        """With a domain goes what is booked on it."""
        gone = next(v for v in self.table.values() if v[0] == selector)
        self.table = {
            name: v
            for name, v in self.table.items()
            if v[0] != selector and (gone[1], v[1:]) != ("domain", ("memory", 0))
        }

    def create_channel(self, *_: object) -> None: ...
    def delegate(self, *_: object) -> None: ...
    def start(self, *_: object) -> None: ...


class FakeHub:
    """Control channels whose far ends the test plays."""

    def __init__(self, core: FakeCore) -> None:
        self.core, self.told = core, {}

    def join(self, name: str, told: Any) -> "FakeHub":
        self.told[name] = told
        return self

    def leave(self, name: str) -> None:
        self.told.pop(name, None)

    async def call(self, *_: object, **__: object) -> None: ...


class World:
    def __init__(self, directory: Path, memory_bytes: int = 4096 * MIB) -> None:
        self.core = FakeCore(memory_bytes)
        self.hub, self.directory, self.used = FakeHub(self.core), directory, set()
        self.start()

    def start(self, **facts: object) -> None:
        """This domain, once more."""
        feed = Feed("demo", "host/x")
        made = Templates(self.hub, "demo", {**FACTS, **facts}, feed, str(self.directory))  # type: ignore[arg-type]
        made.used = lambda: self.used
        made.adopt()
        self.templates = made

    def tell(self, method: str, parameters: dict[str, Any], descriptors: list[int]) -> None:
        (told,) = self.hub.told.values()
        told(method, parameters, descriptors)

    def saved(self, content: bytes = b"state") -> None:
        descriptor = os.memfd_create("state")
        os.write(descriptor, content)
        os.lseek(descriptor, 0, 0)
        self.tell("template.saved", {}, [descriptor])

    async def until(self, *states: str, inputs: Inputs = INPUTS) -> str:
        async with asyncio.timeout(60):
            while (found := self.templates.state(inputs))[0] not in states:
                await asyncio.sleep(0)
        return found[1]

    async def begin(self, inputs: Inputs = INPUTS) -> None:
        """Until its machine is started."""
        self.templates.prepare(inputs)
        async with asyncio.timeout(60):
            while not self.hub.told:
                await asyncio.sleep(0)

    async def make(self, inputs: Inputs = INPUTS) -> str:
        await self.begin(inputs)
        self.saved()
        await self.until("ready", inputs=inputs)
        return key_of(inputs)
