"""Templates of this domain: made in the background, sealed, kept while they are of use.

A template is made in a machine's domain of its own, which gets no boot data: an empty config disk,
networks with nobody at the other end. It belongs to this U-Cloud alone, its RAM is booked on this
domain's own scheduling context, and it is there at the provider's cost of nothing but that: where
the quota has no room there is no template and platforms boot. One that no platform runs from gives
way to a platform that needs its room.

Memory objects have deterministic names and a file says which are whole, so that a restarted domain
takes up what is good and gives back what was half made.
"""

import asyncio
import contextlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, Final

from supercloud.lower import quota as quotas
from supercloud.lower.client import SCHEDULING
from supercloud.lower.names import domain_name
from supercloud.lower.user_domain import parts
from supercloud.lower.user_domain.contents import Contents
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.vmm.template import MAX_STATE_BYTES, Inputs, key_of, machine_of
from supercloud.model.capability import SELF
from supercloud.model.errors import NoResources, Permanent, SupercloudError, Temporary
from supercloud.wire.codec import encode
from supercloud.wire.content import lay_out
from supercloud.wire.messages import EnvironmentSpec

MAX_TEMPLATES: Final = 2
MAKING_TIMEOUT_S: Final = 180.0
START_TIMEOUT_S: Final = 60.0
MAKER_CPU_WEIGHT: Final = 10
MAX_REASONS: Final = 16
"""So many of what was refused, or had no room, are remembered; older ones may be tried again."""
_KEY_SHOWN: Final = 20

NO_TEMPLATES: Final = "this host starts nothing from memory"
"""Said where that was switched off."""

log = logging.getLogger("supercloud.lower.user_domain.templates")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A whole one. ``ram_sha256`` and ``state_sha256`` are what the core measured."""

    key: str
    inputs: Inputs
    ram_sha256: str
    state_sha256: str
    state_bytes: int
    made_s: float

    @property
    def booked_bytes(self) -> int:
        """What it takes of the quota."""
        return (
            self.inputs.memory_bytes + -(-self.state_bytes // parts.PAGE_BYTES) * parts.PAGE_BYTES
        )


@dataclass(slots=True)
class _Making:
    """The one that is being made; ``booked_bytes`` with its maker's domain."""

    key: str
    booked_bytes: int
    saved: asyncio.Future[BinaryIO]
    task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """The state's file, if it came."""
        if self.saved.done() and not self.saved.cancelled() and not self.saved.exception():
            self.saved.result().close()


class Templates:
    """By key. ``used`` gives the keys of the templates that platforms run from."""

    def __init__(
        self, hub: Hub, user: str, facts: dict[str, Any], feed: Feed, directory: str
    ) -> None:
        self._hub, self._core, self._user, self._feed = hub, hub.core, user, feed
        self._facts, self._directory = facts, directory
        self.used: Callable[[], set[str]] = set
        self.contents = Contents()
        self.by_key: dict[str, Template] = {}
        self.refused: dict[str, str] = {}
        self._lacked: dict[str, str] = {}
        self._making: _Making | None = None
        os.makedirs(directory, mode=0o700, exist_ok=True)

    # -- what is

    def inputs(self, image: str, cpus: int, memory_bytes: int, scratch_bytes: int) -> Inputs:
        """All that a template for such a platform depends on, here and now."""
        return Inputs(
            image=image, runtime_sha256=self._facts["runtime_sha256"],
            kernel=self._facts["kernel"], accelerator=self._facts["accelerator"],
            cpus=cpus, memory_bytes=memory_bytes,
            scratch_bytes=parts.whole_pages(scratch_bytes),
        )  # fmt: skip

    def find(self, inputs: Inputs) -> Template | None:
        """The newest one for platforms of this shape, unless one that was made of it failed."""
        good = [
            template
            for key, template in self.by_key.items()
            if template.inputs.shape == inputs.shape and key not in self.refused
        ]
        return max(good, key=lambda template: template.made_s, default=None)

    def exact(self, inputs: Inputs) -> Template | None:
        """The one of just these inputs, likewise."""
        key = key_of(inputs)
        return None if key in self.refused else self.by_key.get(key)

    def state(self, inputs: Inputs) -> tuple[str, str]:
        """(ready | making | refused | absent, reason)."""
        key = key_of(inputs)
        if key in self.refused:
            return "refused", self.refused[key]
        if key in self.by_key:
            return "ready", ""
        if self._making and self._making.key == key:
            return "making", ""
        return "absent", self._lacked.get(key, "")

    def yielding(self) -> tuple[int, int]:
        """Memory bytes and domains that a platform which needs them may have."""
        idle = sum(t.booked_bytes for t in self._idle())
        making = self._making
        return (idle + making.booked_bytes, 1) if making else (idle, 0)

    def _idle(self) -> list[Template]:
        used = self.used()
        return [t for t in self.by_key.values() if t.key not in used]

    # -- making

    def prepare(self, inputs: Inputs, environments: Sequence[EnvironmentSpec] = ()) -> list[str]:
        """Begin to make it, unless it is there, refused, another is being made, or room lacks.

        Or blobs are missing, whose digests are given back; Invalid: they are too large.
        """
        if self.state(inputs)[0] != "absent" or self._making is not None:
            return []
        lay_out(environments)
        key, old = key_of(inputs), self._in_the_way(inputs)
        needed = 2 * inputs.memory_bytes  # its own, and its maker's
        if lacking := self._lacks(needed - sum(template.booked_bytes for template in old)):
            self._remember(self._lacked, key, f"no room in the quota: {lacking}")
            return []
        self._lacked.pop(key, None)
        if missing := self.contents.missing(environments):
            return missing
        for template in old:
            self.drop(template.key)
        maker = quotas.vmm_limits(inputs.memory_bytes, inputs.cpus).memory_bytes
        booked = inputs.memory_bytes + maker
        making = _Making(key, booked, asyncio.get_running_loop().create_future())
        self._making = making
        making.task = asyncio.ensure_future(self._make(inputs, making, environments))
        return []

    async def _make(
        self, inputs: Inputs, making: _Making, environments: Sequence[EnvironmentSpec]
    ) -> None:
        key, subject = making.key, f"template/{making.key[:_KEY_SHOWN]}"
        try:
            made = await self._made(inputs, making, environments)
        except asyncio.CancelledError:
            self._feed.say(subject, "host.template.given_up", "its room is needed")
            raise
        except (SupercloudError, OSError) as error:
            # room may come; what is broken stays broken
            reasons = self._lacked if isinstance(error, NoResources) else self.refused
            self._remember(reasons, key, str(error))
            self._feed.say(subject, "host.template.refused", str(error), severity="warning")
        else:
            self._put(made)
            self._feed.say(subject, "host.template.ready", details=_shown(made))
        finally:
            making.close()
            self._end_maker(key)
            if key not in self.by_key:
                self._destroy(ram_of(key), state_of(key))
            self._making = None

    async def _made(
        self, inputs: Inputs, making: _Making, environments: Sequence[EnvironmentSpec]
    ) -> Template:
        self._start_maker(inputs, making)
        control = self._hub.join(_control(making.key), self._told)
        machine, disk = encode(machine_of(inputs)), list[int]()
        if environments:
            disk = [self.contents.disk(environments, inputs.scratch_bytes)]
        try:
            await control.call("machine.start", machine, disk, timeout_s=START_TIMEOUT_S)
        finally:
            for descriptor in disk:
                os.close(descriptor)
        try:
            state = await asyncio.wait_for(making.saved, MAKING_TIMEOUT_S)
        except TimeoutError:
            raise Temporary("its agent did not come to wait for an identity") from None
        self._end_maker(making.key)
        return self._seal(inputs, making.key, state)

    def _start_maker(self, inputs: Inputs, making: _Making) -> None:
        core, key = self._core, making.key
        limits = quotas.vmm_limits(inputs.memory_bytes, inputs.cpus)
        ram = core.create_memory(inputs.memory_bytes, ram_of(key))
        limits = limits._replace(cpu_weight=MAKER_CPU_WEIGHT)
        vmm = core.create_domain("vmm", self._maker(key), limits)
        core.delegate(ram, vmm.selector, parts.READ_WRITE, "ram")
        parts.give_config(core, domain_name("config", key[:_KEY_SHOWN]), b"", vmm)
        parts.give_image(core, vmm, "kernel", "initrd", "root")
        core.create_channel(SELF, vmm.selector, _control(key), "control")
        core.start(vmm.selector)

    def _seal(self, inputs: Inputs, key: str, state: BinaryIO) -> Template:
        content = state.read(MAX_STATE_BYTES + 1)
        if len(content) > MAX_STATE_BYTES:
            raise Permanent(f"the devices' state is larger than {MAX_STATE_BYTES} bytes")
        _, state_sha256 = parts.sealed_memory(self._core, state_of(key), content, SCHEDULING)
        ram = self._core.lookup(ram_of(key)).selector
        return Template(
            key=key, inputs=inputs, state_sha256=state_sha256, state_bytes=len(content),
            ram_sha256=self._core.seal(ram).hex(), made_s=time.time(),
        )  # fmt: skip

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        making = self._making
        if making is None or making.saved.done():
            pass
        elif method == "template.saved" and not _is_file(descriptors):
            making.saved.set_exception(Permanent("its machine's state came as no file"))
        elif method == "template.saved":
            making.saved.set_result(os.fdopen(descriptors.pop(), "rb"))
        elif method == "machine.state" and untrusted.get("state") in ("failed", "stopped"):
            why = str(untrusted.get("reason"))[:1000]
            making.saved.set_exception(Temporary(f"its machine ended: {why}"))
        for descriptor in descriptors:
            os.close(descriptor)

    def ended(self, entry: str) -> None:
        """A domain died, or was taken away."""
        making = self._making
        if making and entry == self._maker(making.key) and not making.saved.done():
            making.saved.set_exception(Temporary("its domain died"))

    # -- giving back

    def _in_the_way(self, inputs: Inputs) -> list[Template]:
        """The idle ones that give way to another: of the same shape, and the oldest if need be."""
        oldest = sorted(self._idle(), key=lambda t: (t.inputs.shape != inputs.shape, t.made_s))
        alike = sum(template.inputs.shape == inputs.shape for template in oldest)
        return oldest[: max(alike, len(self.by_key) + 1 - MAX_TEMPLATES)]

    async def yield_room(self, memory_bytes: int) -> None:
        """Give back what is idle until a platform fits that has so much memory, as far as it is."""
        if self._lacks(memory_bytes):
            await self.give_up_making()
        for template in sorted(self._idle(), key=lambda t: t.made_s):
            if not self._lacks(memory_bytes):
                return
            self.drop(template.key)

    def _lacks(self, memory_bytes: int) -> str:
        """What of the quota there is too little of for one more machine; empty when it fits."""
        allowed, usage = quotas.from_limits(self._core.limits()), self._core.usage()
        used = quotas.used(usage.booked_memory_bytes, usage.booked_domains, usage.booked_disk_bytes)
        if used["vms"] >= allowed.vms:
            return f"{used['vms']} of {allowed.vms} vms are in use"
        left = allowed.memory_bytes - used["memory_bytes"]
        return f"memory_bytes: {memory_bytes} needed, {left} left" if memory_bytes > left else ""

    async def give_up_making(self) -> None:
        """End the maker, if there is one; returns when it has given everything back."""
        making = self._making
        if making is not None and making.task is not None:
            making.task.cancel()
            await asyncio.wait([making.task])

    def distrust(self, key: str, why: str) -> None:
        """No more clones of it: one did not come to life."""
        self._remember(self.refused, key, why)
        self.drop_unused(key)

    def _remember(self, reasons: dict[str, str], key: str, why: str) -> None:
        """The newest ones; and of each that is there why nothing starts from it any more."""
        reasons.pop(key, None)
        reasons[key] = why
        old = [other for other in reasons if other not in self.by_key]
        for other in old[: max(0, len(old) - MAX_REASONS)]:
            del reasons[other]

    def drop_unused(self, key: str) -> None:
        """Give it back if it is distrusted and the last platform that ran from it is gone."""
        if key in self.refused and key not in self.used():
            self.drop(key)

    def drop(self, key: str) -> None:
        """Give it back. Machines that run from it would be killed by the core: see ``used``."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(key))
        if self.by_key.pop(key, None) is not None:
            self._feed.say(f"template/{key[:_KEY_SHOWN]}", "host.template.dropped")
        self._destroy(ram_of(key), state_of(key))

    def _end_maker(self, key: str) -> None:
        self._hub.leave(_control(key))
        self._destroy(self._maker(key))

    def _destroy(self, *names: str) -> None:
        for name in names:
            self._core.destroy_named(name)

    # -- after a restart of this domain

    def adopt(self) -> None:
        """Take up what is whole and of this host as it is now; give back all else."""
        for file in sorted(os.listdir(self._directory)):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                template = _read(f"{self._directory}/{file}")
                if self._is_whole(template):
                    self.by_key[template.key] = template
                    continue
            os.unlink(f"{self._directory}/{file}")
        known = {name(key) for key in self.by_key for name in (ram_of, state_of)}
        prefixes = ("template-ram:", "template-state:", domain_name("template", self._user) + ":")
        for entry in self._core.entries():
            if entry.name.startswith(prefixes) and entry.name not in known:
                self._destroy(entry.name)

    def _is_whole(self, template: Template) -> bool:
        i = template.inputs
        now = self.inputs(i.image, i.cpus, i.memory_bytes, i.scratch_bytes)
        now = replace(now, content=i.content)
        if template.key != key_of(now) or i.image not in self._facts["images"]:
            return False
        names = {entry.name for entry in self._core.entries()}
        return {ram_of(template.key), state_of(template.key)} <= names

    def _put(self, template: Template) -> None:
        path = self._path(template.key)
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(asdict(template), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
        self.by_key[template.key] = template

    def _path(self, key: str) -> str:
        return f"{self._directory}/{key}.json"

    def _maker(self, key: str) -> str:
        return domain_name("template", self._user, key[:_KEY_SHOWN])


def _is_file(descriptors: list[int]) -> bool:
    """One that can be read without waiting."""
    return len(descriptors) == 1 and stat.S_ISREG(os.fstat(descriptors[0]).st_mode)


def ram_of(key: str) -> str:
    """The memory object with its RAM."""
    return f"template-ram:{key[:_KEY_SHOWN]}"


def state_of(key: str) -> str:
    """The one with its devices' state."""
    return f"template-state:{key[:_KEY_SHOWN]}"


def _control(key: str) -> str:
    return f"template-control:{key[:_KEY_SHOWN]}"


def _shown(template: Template) -> dict[str, Any]:
    return {
        "memory_bytes": template.inputs.memory_bytes,
        "state_bytes": template.state_bytes,
        "ram_sha256": template.ram_sha256,
        "state_sha256": template.state_sha256,
    }


def _read(path: str) -> Template:
    with open(path, encoding="utf-8") as file:
        stored: dict[str, Any] = json.load(file)
    return Template(**{**stored, "inputs": Inputs(**stored["inputs"])})
