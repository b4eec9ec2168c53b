"""Puts the agent together and runs it: nothing else knows all the parts."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import sys
from typing import Any

from supercloud.model.errors import SupercloudError, Temporary
from supercloud.model.events import Event, Severity
from supercloud.upper.platform.agent import (
    cgroups,
    identity,
    networks,
    obstacles,
    paths,
    prefetch,
    uplink,
)
from supercloud.upper.platform.agent.accelerator import Accelerator
from supercloud.upper.platform.agent.blobs import Blobs
from supercloud.upper.platform.agent.bootdata import BootData, load, load_directly
from supercloud.upper.platform.agent.deposits import Deposits
from supercloud.upper.platform.agent.disks import Disks
from supercloud.upper.platform.agent.engine import Services
from supercloud.upper.platform.agent.link import Link, hello
from supercloud.upper.platform.agent.manager import Manager
from supercloud.upper.platform.agent.methods import Methods
from supercloud.upper.platform.agent.names import Names
from supercloud.upper.platform.agent.processes import load_modules
from supercloud.upper.platform.agent.quiet import Quiet
from supercloud.upper.platform.agent.scratch import Scratch
from supercloud.upper.platform.agent.standstill import SNAPSHOT_TIMEOUT_S
from supercloud.upper.platform.agent.volumes import Volumes
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.codec import encode
from supercloud.wire.messages import CONTROL_TO_AGENT, PlatformReport, handlers

LINK_FIRST_S = 5.0
GC_AFTER = 10_000  # objects: after Python's own 700 it would collect a hundred times in a start

log = logging.getLogger("supercloud.agent")


def run() -> int:
    """The agent's whole life; the exit status."""
    gc.enable()
    gc.set_threshold(GC_AFTER)
    os.environ["PATH"] = "/usr/sbin:/usr/bin"
    os.umask(0o022)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(relativeCreated)6d %(name)s: %(message)s"
    )
    os.makedirs(paths.RUN, exist_ok=True)
    os.chmod(paths.RUN, 0o711)
    _protect_from_oom()
    waiting = identity.Waiting() if identity.is_template() else None
    if waiting:
        waiting.become()
    boot, name = load_directly(waiting.config) if waiting else load()
    socket.sethostname(name)
    identity.ensure_machine_id()
    if not waiting:
        networks.prepare_kernel()
    link_nic, uplink_nic = uplink.bring_up(known=waiting.nics if waiting else None)
    port = waiting.confirm() if waiting else -1
    log.info("platform %s of %s; link %s, uplink %s", boot.platform, boot.ucloud,
             link_nic and link_nic.name, uplink_nic and uplink_nic.name)  # fmt: skip
    lease = waiting.lease if waiting else None
    way_out = uplink.Uplink(uplink_nic, lease) if uplink_nic else None
    link_name = link_nic.name if link_nic else ""
    agent = Agent(boot, way_out, link_name, cloned=waiting is not None, port=port)
    asyncio.run(agent.run())
    return 0


async def _load_modules() -> None:
    await load_modules(*networks.MODULES)


def _protect_from_oom() -> None:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-900")


class Agent:
    """The composition root."""

    def __init__(
        self,
        boot: BootData,
        way_out: uplink.Uplink | None,
        link_nic: str,
        *,
        cloned: bool = False,
        port: int = -1,
    ) -> None:
        self._port = port
        self._boot, self._uplink, self._link_nic, self._cloned = boot, way_out, link_nic, cloned
        self._accelerator, self._scratch = Accelerator(), Scratch()
        self._link: Link | None = None
        self._leasing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Start everything at once; ends only when something that must not end does."""
        link = self._link = Link(self._boot, self._hello, {}, self._connected)
        self._deposits = Deposits(link.deposit)
        services = Services(
            Blobs(link.source, self._deposits), networks.Networks(), self._scratch,
            self._accelerator, Volumes(Disks()), self._boot.ucloud, self._snapshot,
        )  # fmt: skip
        way_out = self._uplink.nic.name if self._uplink else "none"
        names, link_nic = Names(self._boot.ucloud), self._link_nic
        self._manager = Manager(services, names, way_out, link_nic, self._report, self._event)
        methods = Methods(self._manager)
        link.handlers = handlers(CONTROL_TO_AGENT, methods.table())
        link.make_key()
        self._manager.start()
        quiet = Quiet(self._accelerator.probe, self._restored, self._port)
        tasks = map(asyncio.ensure_future, (link.run(), self._warm_up(link), quiet.run()))
        await asyncio.gather(*tasks)

    def _restored(self) -> None:
        """Nobody whom this platform was connected to is there any more."""
        if self._link:
            self._link.dial_again()
        if self._uplink:
            self._uplink.forget_told()
        if self._leasing and self._uplink:
            self._leasing.cancel()
            self._leasing = asyncio.ensure_future(self._uplink.keep())
        self._manager.restored()
        self._event("platform", "agent.platform.restored", "", "info", {})

    async def _warm_up(self, link: Link) -> None:
        """What the first EE would otherwise wait for; not before the control plane waits for us.

        A clone has most of it from its template, and is connected before that could be of use.
        """
        await link.requested.wait()
        if self._cloned:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.welcomed.wait(), LINK_FIRST_S)
        else:
            prefetch.prefetch(*prefetch.CONTAINERS)
        if self._uplink and self._boot.uplink == "dhcp":
            self._leasing = asyncio.ensure_future(self._uplink.keep())
        for step in (self._scratch.ready, _load_modules, self._accelerator.probe):
            try:
                await step()
            except (SupercloudError, OSError) as error:
                log.warning("%s: %s", step.__qualname__, error)
        found = f"{self._accelerator.name} {self._accelerator.reason}".strip()
        log.info("nested VMs: %s", found)
        self._event("platform", "agent.accelerator.probed", found, "info", {})

    async def _snapshot(self, asked: CheckpointSnapshot) -> None:
        if self._link is None:
            raise Temporary("not connected to the control plane")
        method, timeout_s = "checkpoint.snapshot", SNAPSHOT_TIMEOUT_S
        await self._link.peer().call(method, encode(asked), timeout_s=timeout_s)

    def _hello(self) -> Any:
        engines = {
            name: "" if os.path.exists(f"/usr/bin/{program}") else "not in this image"
            for name, program in (("crun", "crun"), ("qemu", "qemu-system-x86_64"))
        }
        engines |= {f"checkpoint:{kind}": why for kind, why in obstacles.of_checkpoints().items()}
        return hello(self._boot, engines, self._accelerator.name, cgroups.total_memory_bytes())

    def _connected(self) -> None:
        self._deposits.connected()
        self._report(self._manager.report())

    def _report(self, report: PlatformReport) -> None:
        if self._link:
            self._link.notify("agent.report", report)

    def _event(
        self, subject: str, code: str, message: str, severity: Severity, details: dict[str, Any]
    ) -> None:
        if self._link:
            self._link.notify("agent.event", Event(
                ucloud=self._boot.ucloud, subject=subject, code=code, message=message,
                actor=f"platform/{self._boot.platform}", severity=severity, details=details,
            ))  # fmt: skip
