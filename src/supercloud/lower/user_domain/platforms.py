"""The platforms of a U-Cloud on this host: created, adopted, watched and deleted.

Each platform is worked on by one task at a time; every refusal comes before any effect. A failed
platform that is created again is made anew, for nothing on it survives its end.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from supercloud.lower import quota as quotas
from supercloud.lower.user_domain.assembly import Assembly, Uplink
from supercloud.lower.user_domain.channel import Channel, Told
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.hub import Hub
from supercloud.lower.user_domain.origins import origin_of, whose
from supercloud.lower.user_domain.platform_checks import config_of, over_quota
from supercloud.lower.user_domain.records import Record, Records, bare, fingerprint
from supercloud.lower.user_domain.rendezvous import Rendezvous
from supercloud.lower.user_domain.templates import NO_TEMPLATES, Template, Templates
from supercloud.lower.vmm.template import Inputs
from supercloud.model.errors import (
    BadState,
    Exists,
    NotFound,
    SupercloudError,
    Unsupported,
)
from supercloud.model.events import Severity
from supercloud.model.states import MACHINE
from supercloud.wire.content import digest_of
from supercloud.wire.host import PlatformSpec, PlatformStatus, TemplateSpec, TemplateStatus
from supercloud.wire.messages import Blob
from supercloud.wire.peer import Stream
from supercloud.wire.places import OBJECTS_LINK_PORT
from supercloud.wire.quota import Quota

GRACE_S: Final = 2.0
START_WAIT_S: Final = 20.0
SWEEP_S: Final = 60.0
TEMPLATE_DELAY_S: Final = 20.0
"""After a platform's agent has dialled: its first environments have the processor till then."""
DEAD: Final = ("failed", "stopped")
TOLD: Final = MACHINE.keys() - {"deleting", "gone"}
"""What a machine's monitor may say that it is; the rest is said here."""
FULL: Final = (
    "the provider's disk is full: the machine stands still at a write to its scratch disk, nothing "
    "is lost, and it goes on when the provider has made room"
)
ROOM: Final[Mapping[str, tuple[Severity, str]]] = {
    "machine.full": ("error", FULL),
    "machine.room": ("info", "the machine goes on: there is room on the provider's disk"),
}

log = logging.getLogger("supercloud.lower.user_domain.platforms")


class Platforms:
    """Records and machines; ``images`` are the digests that this host holds."""

    def __init__(
        self, hub: Hub, user: str, facts: dict[str, Any], feed: Feed, directory: str
    ) -> None:
        self._hub, self._feed = hub, feed
        self._images: list[str] = facts["images"]
        self._accelerator: str = facts["accelerator"]
        self._records = Records(directory)
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self.rendezvous = Rendezvous()
        self._assembly = Assembly(hub, user, self._accelerator, told=self._told)
        self._assembly.agent_connected = self._agent_connected
        self.on_end: Callable[[str], Awaitable[None]] = _nothing
        self.on_object_client: Callable[[str, socket.socket], None] = _refused
        self.restore: Callable[[PlatformSpec, Inputs], Awaitable[None]] = _no_restore
        self.on_checkpoint: Told = _dropped
        self.on_taken_over: Callable[[str], None] = lambda _name: None
        self._templates = Templates(hub, user, facts, feed, f"{directory}/../templates")
        self._templates.used = lambda: {r.template for r in self._records.by_name.values()}
        self._templating: str = facts.get("templates", "auto")

    # -- what is

    def quota(self) -> tuple[Quota, Quota]:
        """What is allowed, and what of that is used; templates that give way do not count."""
        core = self._hub.core
        allowed, usage = quotas.from_limits(core.limits()), core.usage()
        memory, domains = self._templates.yielding()
        used = quotas.used(
            usage.booked_memory_bytes - memory,
            usage.booked_domains - domains,
            usage.booked_disk_bytes,
        )
        cpu = sum(1000 * r.spec.cpus for r in self._records.by_name.values() if r.state not in DEAD)
        return allowed, Quota(cpu_permille=max(10, min(cpu, allowed.cpu_permille)), **used)

    def statuses(self) -> list[PlatformStatus]:
        """All of them, by name."""
        return [record.status() for _, record in sorted(self._records.by_name.items())]

    async def machine(self, name: str) -> Channel:
        """The channel to a running platform's monitor. NotFound, BadState.

        One that is being started is waited for: that is a matter of a second.
        """
        record = self._find(name)
        with contextlib.suppress(TimeoutError):
            async with self._changed, asyncio.timeout(START_WAIT_S):
                await self._changed.wait_for(lambda: record.state not in ("creating", "starting"))
        if record.state != "running":
            raise BadState(f"platform {name} is {record.state}")
        return self._assembly.control(name)

    def record(self, name: str) -> Record:
        """What is known of it; NotFound."""
        return self._find(name)

    def put(self, record: Record) -> None:
        """Keep what changed of it, if it is still there."""
        if self._records.by_name.get(record.spec.name) is record:
            self._records.put(record)

    def inputs_of(self, spec: PlatformSpec) -> Inputs:
        """What its machine depends on, here and now."""
        return self._inputs(spec)

    @property
    def assembly(self) -> Assembly:
        """What makes its parts."""
        return self._assembly

    def running(self) -> set[str]:
        """Names of the platforms whose machines live."""
        return {name for name, r in self._records.by_name.items() if r.state not in DEAD}

    async def console(self, name: str) -> socket.socket:
        """The console: its last output, then live, both ways."""
        self._find(name)
        reply = await self._assembly.control(name).call("console.attach")
        if len(reply.descriptors) != 1:
            raise BadState(f"the monitor of {name} gave no console")
        return socket.socket(fileno=reply.descriptors[0])

    # -- create

    async def create(self, spec: PlatformSpec) -> PlatformStatus:
        """Make it, or find it made alike. Exists, Invalid, NotFound, NoResources, Temporary."""
        config = config_of(spec)
        self._check_image(spec.image)
        async with self._lock(spec.name):
            known = self._records.by_name.get(spec.name)
            if known is not None and fingerprint(known.spec) != fingerprint(spec):
                raise Exists(f"platform {spec.name} is there and differs", hint="delete it first")
            if known is not None and known.state not in DEAD:
                return known.status()
            if known is not None:
                await self._assembly.dismantle(spec.name)
            self._check_quota(spec)
            await self._templates.yield_room(spec.memory_bytes * (2 if spec.restore else 1))
            if spec.restore is not None:
                await self._restore(spec)
            return await self._make(bare(spec), config, whose(spec))

    def _check_image(self, image: str) -> None:
        if image not in self._images:
            raise NotFound(
                f"this host does not hold the image {image}",
                hint="the provider starts the host with other images",
                details={"images": self._images},
            )

    def _check_quota(self, spec: PlatformSpec) -> None:
        allowed, used = self.quota()
        if spec.cpus * 1000 > allowed.cpu_permille:
            raise over_quota("cpu", spec.cpus * 1000, allowed.cpu_permille, 0)
        if used.vms >= allowed.vms:
            raise over_quota("vms", 1, allowed.vms, used.vms)
        memory = spec.memory_bytes * (2 if spec.restore else 1)  # what it goes on from stays
        for what, asked in (("memory", memory), ("disk", spec.scratch_bytes)):
            most, now = (getattr(quota, f"{what}_bytes") for quota in (allowed, used))
            if asked > most - now:
                raise over_quota(f"{what}_bytes", asked, most, now)

    async def _restore(self, spec: PlatformSpec) -> None:
        """Have the checkpoint that it goes on from; nothing is left of it when that fails."""
        try:
            await self.restore(spec, self._inputs(spec))
        except BaseException as error:
            subject = f"platform/{spec.name}"
            self._feed.say(subject, "host.platform.not_restored", str(error), severity="error")
            await self._assembly.dismantle(spec.name)
            raise

    async def _make(self, spec: PlatformSpec, config: bytes, restored: str) -> PlatformStatus:
        record = Record(spec, self._accelerator, time.time(), restored=restored)
        template = None if restored else self._templates.find(self._inputs(spec))
        record.template = template.key if template else ""
        self._records.put(record)
        self._say(record, "creating")
        try:
            uplink = await self._start(record, config, template)
        except BaseException as error:
            self._records.remove(spec.name)
            await self.on_end(spec.name)
            self._feed.say(
                f"platform/{spec.name}", "host.platform.refused", str(error), severity="error"
            )
            raise
        record.address, record.first_port = uplink.address, uplink.first_port
        if record.state == "creating":  # else the monitor has told more already
            record.go("starting")
        self._records.put(record)
        return record.status()

    async def _start(self, record: Record, config: bytes, template: Template | None) -> Uplink:
        """From the template; when that cannot even be begun, by its kernel.

        Where that cannot be done either, the template is not to blame.
        """
        if template is None:
            return await self._assembly.make(record.spec, config, origin_of(record))
        try:
            return await self._assembly.make(record.spec, config, origin_of(record))
        except SupercloudError as error:
            log.warning("%s did not start from memory: %s", record.spec.name, error)
            record.template, why = "", str(error)
        uplink = await self._assembly.make(record.spec, config)
        self._templates.distrust(template.key, why)
        return uplink

    # -- templates

    def prepare(self, spec: TemplateSpec) -> TemplateStatus:
        """Begin to make a template, or see how far it is. NotFound: no such image, or none ever."""
        self._check_image(spec.image)
        if self._templating == "none":
            raise NotFound(NO_TEMPLATES)
        content = digest_of(spec.environments)
        inputs = dataclasses.replace(self._inputs(spec), content=content)
        missing = self._templates.prepare(inputs, spec.environments)
        state, reason = self._templates.state(inputs)
        found = self._templates.exact(inputs)
        if found is None:
            return TemplateStatus(state=state, reason=reason, missing=missing)
        return TemplateStatus(
            state=state, booked_bytes=found.booked_bytes,
            ram_sha256=found.ram_sha256, state_sha256=found.state_sha256,
        )  # fmt: skip

    async def take_blob(self, blob: Blob, stream: Stream) -> None:
        """A blob of an environment that a template is to have ready. Busy, Invalid."""
        await self._templates.contents.take(blob, stream)

    def _inputs(self, spec: PlatformSpec | TemplateSpec) -> Inputs:
        return self._templates.inputs(spec.image, spec.cpus, spec.memory_bytes, spec.scratch_bytes)

    async def _template_later(self, record: Record) -> None:
        """The next platform of this shape is to start from memory, if this one is still wanted."""
        await asyncio.sleep(TEMPLATE_DELAY_S)
        record.awaits_template = False
        if self._records.by_name.get(record.spec.name) is record and record.state == "running":
            inputs = self._inputs(record.spec)
            if self._templates.find(inputs) is None:
                self._templates.prepare(inputs)

    # -- delete

    async def delete(self, name: str) -> None:
        """Stop it and give everything back; nothing when it is not there."""
        async with self._lock(name):
            record = self._records.by_name.get(name)
            if record is None:
                return
            if record.state in ("running", "paused", "wedged"):
                await self._stop(record)
            record.go("deleting")
            self._records.put(record)
            self._say(record, "deleting")
            await self._assembly.dismantle(name)
            await self.on_end(name)
            self.rendezvous.drop(name)
            record.go("gone")
            self._records.remove(name)
            self._templates.drop_unused(record.template)
            self._say(record, "gone")

    async def _stop(self, record: Record) -> None:
        """In order if it can be had; whatever comes of it, the domain is destroyed next."""
        try:
            await self._assembly.stop(record.spec.name, GRACE_S)
            async with self._changed, asyncio.timeout(GRACE_S + 6):
                await self._changed.wait_for(lambda: record.state in DEAD)
        except (SupercloudError, TimeoutError) as error:
            log.warning("%s was not stopped in order: %s", record.spec.name, error)

    # -- after a restart of this domain

    async def adopt(self) -> None:
        """Take up what runs; account for what does not; give back what nobody knows."""
        self._templates.adopt()
        await asyncio.gather(*(self._adopt(r) for r in self._records.by_name.values()))
        self._in_background(self._sweep())

    async def _sweep(self) -> None:
        """Now and then give back what nobody knows: a driver was away when it was to go."""
        while True:
            try:
                for name in await self._assembly.leftovers(set(self._records.by_name)):
                    async with self._lock(name):
                        if name not in self._records.by_name:
                            await self._assembly.dismantle(name)
            except SupercloudError as error:
                log.warning("sweep: %s", error)
            await asyncio.sleep(SWEEP_S)

    async def _adopt(self, record: Record) -> None:
        async with self._lock(record.spec.name):
            await self._adopt_locked(record)

    async def _adopt_locked(self, record: Record) -> None:
        name = record.spec.name
        interrupted = record.state in ("creating", "deleting")
        if self._assembly.exists(name) and not interrupted:
            await self._take_over(record)
            return
        await self._assembly.dismantle(name)
        if record.state == "deleting":
            self._records.remove(name)
            return
        reason = "its making was interrupted" if interrupted else "the host was started anew"
        if record.state != "failed":
            self._set(record, "failed", reason)

    async def _take_over(self, record: Record) -> None:
        name = record.spec.name
        self._assembly.agents(name)
        try:
            status = await self._assembly.control(name).result("machine.status")
        except SupercloudError as error:
            await self._assembly.dismantle(name)
            self._set(record, "failed", f"its monitor did not answer: {error}")
            return
        self._told("machine.state", {**status, "platform": name}, [])
        self._feed.say(f"platform/{name}", "host.platform.adopted", f"it is {record.state}")
        self.on_taken_over(name)

    # -- what others tell

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        if method.startswith("checkpoint."):
            self.on_checkpoint(method, untrusted, descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        record = self._records.by_name.get(str(untrusted.get("platform")))
        state = str(untrusted.get("state"))
        if method == "machine.state" and record is not None and state in TOLD:
            self._set(record, state, str(untrusted.get("reason", ""))[:1000])
        elif method in ROOM and record is not None:
            severity, message = ROOM[method]
            code = f"host.platform.{method.removeprefix('machine.')}"
            self._feed.say(f"platform/{record.spec.name}", code, message, severity=severity)

    def _agent_connected(
        self, method: str, untrusted: dict[str, Any], descriptors: list[int]
    ) -> None:
        platform = str(untrusted["platform"])
        if method != "connection" or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        sock = socket.socket(fileno=descriptors[0])
        sock.setblocking(False)
        if untrusted.get("port") == OBJECTS_LINK_PORT:
            self.on_object_client(platform, sock)
            return
        self.rendezvous.agent(platform, sock)
        record = self._records.by_name.get(platform)
        if self._templating != "auto" or record is None or record.template:
            return
        if not record.awaits_template:  # it may dial as often as it likes
            record.awaits_template = True
            self._in_background(self._template_later(record))

    def domain_ended(self, entry: str) -> None:
        """A domain died, or was taken away."""
        self._templates.ended(entry)
        for name, record in list(self._records.by_name.items()):
            if entry == self._assembly.vmm(name) and record.state not in ("deleting", *DEAD):
                self._set(record, "failed", "its VMM died")
                self._in_background(self._clean_up(name))
            elif entry in (self._assembly.link(name), self._assembly.uplink(name)):
                self._network_lost(record, "link" if entry.startswith("link") else "uplink")

    def _network_lost(self, record: Record, which: str) -> None:
        if record.state not in ("running", "starting", "paused", "wedged"):
            return  # it ended with its machine, as it should
        record.reason, record.cut_off = f"its {which} died", record.cut_off or which == "link"
        self._records.put(record)
        self._feed.say(
            f"platform/{record.spec.name}",
            f"host.platform.{which}_lost",
            "delete and create the platform to have it again",
            severity="error",
        )

    async def _clean_up(self, name: str) -> None:
        async with self._lock(name):
            record = self._records.by_name.get(name)
            if record is not None and record.state in DEAD:
                await self._assembly.dismantle(name)

    # -- bookkeeping

    def _set(self, record: Record, state: str, reason: str = "") -> None:
        before = record.state
        if state == before:
            return
        try:
            record.go(state, reason)
        except BadState as error:
            log.warning("%s: %s", record.spec.name, error)
            return
        self._records.put(record)
        self._say(record, state)
        self._in_background(self._notify())
        if state in DEAD:
            self._in_background(self.on_end(record.spec.name))
        if state == "failed" and before == "starting" and record.template:
            self._templates.distrust(record.template, f"a platform did not come to life: {reason}")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _say(self, record: Record, code: str) -> None:
        severity: Severity = "error" if code in ("failed", "wedged") else "info"
        self._feed.say(
            f"platform/{record.spec.name}",
            f"host.platform.{code}",
            record.reason,
            severity=severity,
        )

    def _find(self, name: str) -> Record:
        record = self._records.by_name.get(name)
        if record is None:
            raise NotFound(f"no platform {name} here")
        return record

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _in_background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log.error("in the background: %s", error, exc_info=error)


async def _no_restore(_spec: PlatformSpec, _inputs: Inputs) -> None:
    raise Unsupported("there are no checkpoints here")


def _dropped(_method: str, _untrusted: dict[str, Any], descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _refused(_platform: str, sock: socket.socket) -> None:
    """There is no object store."""
    sock.close()


async def _nothing(_platform: str) -> None:
    """Nobody wants to know."""
