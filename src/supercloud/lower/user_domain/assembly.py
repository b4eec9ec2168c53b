"""Everything that a platform's machine is made of, put together and taken apart again.

Names are deterministic, and ``dismantle`` takes apart whatever is there: it undoes a half-made
platform as well as a whole one.
"""

import asyncio
import hashlib
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any, Final

from supercloud.lower import quota as quotas
from supercloud.lower.client import Domain
from supercloud.lower.names import domain_name
from supercloud.lower.user_domain import parts
from supercloud.lower.user_domain.channel import Channel, Told
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.user_domain.origins import Origin, restored_ram, restored_state
from supercloud.model.capability import SELF
from supercloud.model.errors import NotFound, SupercloudError
from supercloud.wire.codec import decode, encode
from supercloud.wire.host import PlatformSpec
from supercloud.wire.lease import Lease

START_TIMEOUT_S: Final = 60.0

log = logging.getLogger("supercloud.lower.user_domain.assembly")


@dataclass(frozen=True, slots=True)
class Uplink:
    """What the uplink driver allotted."""

    domain: str
    address: str
    first_port: int
    guest: Lease


class Assembly:
    """Makes machines of one user; ``disk`` and ``uplink`` are the drivers' channels."""

    def __init__(self, hub: Hub, user: str, accelerator: str, *, told: Told) -> None:
        self._hub, self._core, self._user = hub, hub.core, user
        self._accelerator, self._told = accelerator, told
        self._disk, self._uplink = hub.join("disk"), hub.join("uplink")
        self.agent_connected: Told = told
        self._plugs: dict[str, list[tuple[dict[str, Any], int]]] = {}

    # -- names in this domain's table

    def vmm(self, platform: str) -> str:
        """Name of the machine's domain."""
        return domain_name("vmm", self._user, platform)

    def link(self, platform: str) -> str:
        """Name of the link's domain."""
        return domain_name("link", self._user, platform)

    def uplink(self, platform: str) -> str:
        """Name of the uplink's domain, which is the driver's."""
        return domain_name("uplink-net", self._user, platform)

    def control(self, platform: str) -> Channel:
        """The channel to the machine's monitor."""
        told = _with_platform(self._told, platform)
        return self._hub.join(domain_name("control", platform), told)

    def agents(self, platform: str) -> Channel:
        """The channel on which the link domain passes the agent's connections."""
        told = _with_platform(self.agent_connected, platform)
        return self._hub.join(domain_name("agents", platform), told)

    def exists(self, platform: str) -> bool:
        """Whether the machine's domain is there."""
        return self._has(self.vmm(platform))

    # -- making

    async def make(self, spec: PlatformSpec, config: bytes, origin: Origin | None = None) -> Uplink:
        """Make and start it, out of a template or a checkpoint if there is one.

        On any error everything is taken apart again.
        """
        try:
            return await self._make(spec, config, origin)
        except BaseException:
            try:
                await self.dismantle(spec.name)
            except SupercloudError as error:  # a driver is away: the sweep comes back to it
                log.warning("%s is not wholly taken apart: %s", spec.name, error)
            raise

    async def _make(self, spec: PlatformSpec, config: bytes, origin: Origin | None) -> Uplink:
        """The drivers work while the monitor starts, passt and the link while QEMU does."""
        core, name = self._core, spec.name
        disk = asyncio.ensure_future(self.make_disk(spec))
        uplink = asyncio.ensure_future(self._make_uplink(spec))
        try:
            await asyncio.sleep(0)  # both are asked for
            vmm = self._make_machine(spec, config, origin)
            core.create_channel(SELF, vmm.selector, domain_name("control", name), "control")
            core.start(vmm.selector)
            made = await uplink
            await self._run(spec, vmm, origin, made, await disk)
        finally:
            await asyncio.wait({disk, uplink})  # whatever comes of it: then it can be taken apart
            if disk.exception() is None:
                os.close(disk.result())
            uplink.exception()  # was raised, or another was
            self._drop_plugs(name)
        return made

    async def _run(
        self, spec: PlatformSpec, vmm: Domain, origin: Origin | None, uplink: Uplink, scratch: int
    ) -> None:
        """Its parts are there: have them work."""
        core, name, control = self._core, spec.name, self.control(spec.name)
        link = self._join(name, vmm, uplink.domain)
        start = origin.start if origin else "boot"
        machine = self._machine(spec) | {"start": start, "lease": encode(uplink.guest)}
        plugs = self._plugs.get(name, [])
        machine["disks"], given = [plug for plug, _ in plugs], [d for _, d in plugs]
        starting = asyncio.ensure_future(
            control.call("machine.start", machine, [scratch, *given], timeout_s=START_TIMEOUT_S)
        )
        try:
            await asyncio.sleep(0)  # it is sent
            core.start(link.selector)
            self.agents(name)
            await self._uplink.result("uplink.start", {"platform": name})
        finally:
            await starting

    def plug(self, platform: str, plugs: list[tuple[dict[str, Any], int]]) -> None:
        """What it has plugged in when it is made, and the streams to that: closed then."""
        self._plugs[platform] = plugs

    def _drop_plugs(self, platform: str) -> None:
        for _, descriptor in self._plugs.pop(platform, []):
            os.close(descriptor)

    async def make_disk(self, spec: PlatformSpec) -> int:
        """Its scratch disk, made or found: a descriptor, the caller's."""
        size = parts.whole_pages(spec.scratch_bytes)
        made = await self._disk.call("disk.create", {"name": spec.name, "size_bytes": size})
        return made.descriptors[0]

    async def _make_uplink(self, spec: PlatformSpec) -> Uplink:
        asked = {"platform": spec.name, "ports": spec.ports}
        made = await self._uplink.result("uplink.create", asked)
        guest = decode(Lease, made["guest"], "guest")
        return Uplink(str(made["domain"]), str(made["address"]), int(made["first_port"]), guest)

    def _make_machine(self, spec: PlatformSpec, config: bytes, origin: Origin | None) -> Domain:
        """The domain, its memory, and what it starts from; not started.

        A clone's memory is booked as well: in time it may write to all of it.
        """
        core, name = self._core, self.vmm(spec.name)
        vmm = core.create_domain("vmm", name, quotas.vmm_limits(spec.memory_bytes, spec.cpus))
        parts.give_config(core, domain_name("config", spec.name), config, vmm)
        parts.give_image(core, vmm, "root")
        if origin is not None:
            origin.lend(core, vmm.selector)
            return vmm
        ram = core.create_memory(
            spec.memory_bytes, domain_name("ram", spec.name), scheduling=vmm.scheduling
        )
        core.delegate(ram, vmm.selector, parts.READ_WRITE, "ram")
        parts.give_image(core, vmm, "kernel", "initrd")
        return vmm

    def _join(self, platform: str, vmm: Domain, uplink: str) -> Domain:
        """The machine's two networks, and the link's domain, not started."""
        core, stream = self._core, socket.SOCK_STREAM
        link = core.create_domain("link", self.link(platform), quotas.link_limits())
        core.create_channel(SELF, link.selector, domain_name("agents", platform), "link")
        core.create_channel(link.selector, vmm.selector, "guest", "link", stream)
        passt = core.lookup(uplink).selector
        core.create_channel(passt, vmm.selector, "guest", "uplink", stream)
        return link

    def _machine(self, spec: PlatformSpec) -> dict[str, Any]:
        return {
            "name": f"{self._user}/{spec.name}",
            "cpus": spec.cpus,
            "memory_bytes": spec.memory_bytes,
            "accelerator": self._accelerator,
            "uplink_mac": mac("02:5c:00", self._user, spec.name),
            "link_mac": mac("02:5c:77", self._user, spec.name),
        }

    # -- for a checkpoint

    async def make_overlay(self, spec: PlatformSpec, size_bytes: int) -> int:
        """A disk for what is written while the scratch disk is read: a descriptor, the caller's.

        NoResources where the quota has no room for it.
        """
        asked = {"use": "checkpoint", "name": spec.name, "size_bytes": size_bytes}
        await self.drop_overlay(spec.name)  # of one that was cut off
        return (await self._disk.call("disk.create", asked)).descriptors[0]

    async def drop_overlay(self, platform: str) -> None:
        """Give it back."""
        await self._disk.result("disk.delete", {"use": "checkpoint", "name": platform})

    def give_room(self, spec: PlatformSpec, memory_bytes: int) -> None:
        """Let its machine's domain have so much memory beyond its own. NoResources, Busy."""
        limits = quotas.vmm_limits(spec.memory_bytes, spec.cpus)
        more = limits._replace(memory_bytes=limits.memory_bytes + memory_bytes)
        self._core.set_limits(self._core.lookup(f"sched:{self.vmm(spec.name)}").selector, more)

    # -- taking apart

    async def stop(self, platform: str, grace_s: float) -> None:
        """Ask the monitor to stop the machine; it tells how that went."""
        await self.control(platform).result("machine.stop", {"grace_ms": int(grace_s * 1000)})

    async def dismantle(self, platform: str) -> None:
        """End and give back whatever there is of it."""
        self._drop_plugs(platform)
        for name in (self.vmm(platform), self.link(platform)):
            self._core.destroy_named(name)
        for kind in ("control", "agents"):
            self._hub.leave(domain_name(kind, platform))
        for memory in (restored_ram(platform), restored_state(platform)):
            self._core.destroy_named(memory)
        await self._uplink.result("uplink.delete", {"platform": platform})
        await self._disk.result("disk.delete", {"name": platform})
        await self._disk.result("disk.delete", {"use": "checkpoint", "name": platform})

    async def leftovers(self, known: set[str]) -> set[str]:
        """Platforms that the drivers have something of and that are not ``known``."""
        found = {*await self._disk.result("disk.list"), *await self._uplink.result("uplink.list")}
        return {str(name) for name in found} - known

    def _has(self, name: str) -> bool:
        try:
            self._core.lookup(name)
        except NotFound:
            return False
        return True


def mac(prefix: str, user: str, platform: str) -> str:
    """A MAC address that stays the platform's."""
    tail = hashlib.sha256(f"{user}/{platform}".encode()).digest()[:3]
    return ":".join([prefix, *(f"{byte:02x}" for byte in tail)])


def _with_platform(told: Told, platform: str) -> Told:
    def tell(method: str, parameters: dict[str, Any], descriptors: list[int]) -> None:
        told(method, {**parameters, "platform": platform}, descriptors)

    return tell
