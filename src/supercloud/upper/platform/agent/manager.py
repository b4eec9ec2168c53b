"""The desired set and what becomes of it: a worker per EE, and the networks that they share."""

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from supercloud.model.errors import Invalid, NotFound, SupercloudError
from supercloud.upper.platform.agent import (
    cgroups,
    paths,
    rootfs,
    saving,
    spare_machine,
    standstill,
    volumes,
)
from supercloud.upper.platform.agent.container import Container
from supercloud.upper.platform.agent.engine import Places, Services, digests, make_places
from supercloud.upper.platform.agent.firewall import Firewall, Publication, StoreWay, ruleset
from supercloud.upper.platform.agent.machine import ENGINE_BYTES, Machine
from supercloud.upper.platform.agent.names import Names
from supercloud.upper.platform.agent.namespaces import IDS_PER_ENVIRONMENT
from supercloud.upper.platform.agent.networks import check_nic, gateways, sweep_devices
from supercloud.upper.platform.agent.state import read_json, write_json
from supercloud.upper.platform.agent.worker import Worker
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import Apply, EnvironmentSpec, PlatformReport

MAX_ENVIRONMENTS = 1000
REPORT_DELAY_S = 0.005
ON_THE_WAY_S = 0.2  # for states that others follow soon: as many reports less
ON_THE_WAY = ("pending", "preparing", "placed", "starting")
NETWORK_RETRY_S = 2.0
TIDY_S = 60.0

log = logging.getLogger("supercloud.agent.manager")


class Manager:
    """``report`` and ``event`` are called with what the control plane should hear at once.

    ``uplink`` and ``link`` are names of NICs; "" is no link.
    """

    def __init__(
        self, services: Services, names: Names, uplink: str, link: str,
        report: Callable[[PlatformReport], None], event: Callable[..., None],
    ) -> None:  # fmt: skip
        self._services, self._names = services, names
        self._uplink, self._link = uplink, link
        self._report, self._event = report, event
        self._firewall = Firewall()
        self._workers: dict[str, Worker] = {}  # by uid
        self._desired: Apply | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sweeping: list[asyncio.Task[None]] = []
        self._network_changed = asyncio.Event()
        names.died = self._network_changed.set
        self._report_timer: asyncio.TimerHandle | None = None

    # -- what the control plane asks

    def apply(self, desired: Apply) -> PlatformReport:
        """Make the set so; returns at once. Invalid, and no effect, for a set that cannot be."""
        _check(desired)
        first = self._desired is None
        changed = first or encode(desired) != encode(self._desired)
        self._desired = desired
        if changed:
            if first:
                self._find_unwanted({spec.uid for spec in desired.environments})
            write_json(paths.DESIRED, encode(desired))
            self._services.networks.ensure(self._all_specs(desired.environments))
            self._services.spares.limit(taken_bytes(self._all_specs(desired.environments)))
            self._services.networks.settled.clear()
            self._network_changed.set()
            self._converge(desired)
            self._services.volumes.look_again()
        return self.report()

    def report(self, *, figures: bool = False) -> PlatformReport:
        """Everything, as it is now; ``figures``: with the memory and processor time used."""
        return PlatformReport(
            generation=self._desired.generation if self._desired else 0,
            environments=[worker.status(figures=figures) for worker in self._workers.values()],
        )

    def restored(self) -> None:
        """This platform was: guests that listen are told the time."""
        for worker in self._workers.values():
            if isinstance(worker.engine, Machine):
                try:
                    worker.engine.tell()
                except SupercloudError as error:
                    log.warning("%s is not told the time: %s", worker.spec.name, error)

    def find(self, name: str) -> Worker:
        """The EE of that name which is wanted; NotFound."""
        for worker in self._workers.values():
            if worker.spec.name == name and worker.state not in ("deleting", "gone"):
                return worker
        raise NotFound(f"no environment {name} on this platform")

    async def shut_down(self) -> None:
        """Stop and remove all EEs."""
        generation = self._desired.generation if self._desired else 0
        self.apply(Apply(generation=generation, environments=[]))
        await asyncio.gather(*(worker.done.wait() for worker in list(self._workers.values())))

    # -- starting

    def start(self) -> None:
        """Take up what an earlier agent left, and begin."""
        make_places()
        cgroups.prepare()
        standstill.thaw_all()
        self._services.volumes.start()
        self._services.spares.sweep()
        saving.sweep()
        self._tasks = [
            asyncio.ensure_future(task) for task in (self._keep_network(), self._keep_tidy())
        ]
        saved = read_json(paths.DESIRED, None)
        if saved is not None:
            self._take_up(decode(Apply, saved, "desired set", ignore_unknown=True))

    def _take_up(self, desired: Apply) -> None:
        """The old desired set, and what else is left."""
        log.info("taking up generation %d", desired.generation)
        self.apply(desired)
        for uid in cgroups.present():
            if uid not in self._workers:
                log.warning("removing what is left of %s", uid)
                self._sweeping.append(asyncio.ensure_future(cgroups.remove(uid)))
        known = [(uid, len(worker.spec.nics)) for uid, worker in self._workers.items()]
        for device in sweep_devices(known):
            log.warning("removed a leftover device: %s", device)

    def _find_unwanted(self, wanted: set[str]) -> None:
        """EEs that were being removed when the agent ended, or were prepared in the template."""
        for uid in sorted(os.listdir(paths.ENVIRONMENTS)):
            saved = read_json(Places(uid).state, None)
            if saved is not None and uid not in wanted:
                spec = decode(EnvironmentSpec, saved["spec"], uid, ignore_unknown=True)
                self._workers[uid] = self._worker(spec, saved["base_id"])

    # -- converging

    def _converge(self, desired: Apply) -> None:
        wanted = {spec.uid: spec for spec in desired.environments}
        leaving: dict[str, Worker] = {}
        for uid, worker in self._workers.items():
            if uid not in wanted:
                leaving[worker.spec.name] = worker
                if not worker.begun:
                    worker.begin()
                worker.go()
        for uid, spec in wanted.items():
            present = self._workers.get(uid)
            if present is not None:
                present.update(spec)
                continue
            worker = self._workers[uid] = self._worker(spec, self._free_base())
            before = leaving.get(spec.name)
            worker.begin(before.done if before else None)

    def _worker(self, spec: EnvironmentSpec, base_id: int) -> Worker:
        saved = read_json(Places(spec.uid).state, {})
        base_id = saved.get("base_id", base_id)
        kind = Container if spec.kind == "container" else Machine
        settled = self._services.networks.settled
        return Worker(spec, kind(spec, self._services, base_id), base_id, settled, self._told)

    def _free_base(self) -> int:
        """A range of ids that no EE has, here or left from an earlier agent."""
        taken = {worker.base_id for worker in self._workers.values()}
        for uid in os.listdir(paths.ENVIRONMENTS):
            taken.add(read_json(Places(uid).state, {}).get("base_id", 0))
        candidates = range(IDS_PER_ENVIRONMENT, 0x6000_0000, IDS_PER_ENVIRONMENT)
        return next(base for base in candidates if base not in taken)

    def _told(self, worker: Worker, state: str, reason: str, severity: str) -> None:
        passing = state in ON_THE_WAY and not reason
        level = logging.DEBUG if passing else logging.INFO  # events tell of all
        why = f" ({reason})" if reason else ""
        log.log(level, "%s: %s%s", worker.spec.name, state, why)
        details: dict[str, Any] = {"uid": worker.spec.uid}
        if state == "exited":
            details["exit_status"] = worker.exit_status
        self._event(f"environment/{worker.spec.name}", f"agent.environment.{state}", reason,
                    severity, details)  # fmt: skip
        if state == "gone":
            self._workers.pop(worker.spec.uid, None)
            self._network_changed.set()
        self._report_within(ON_THE_WAY_S if state in ON_THE_WAY else REPORT_DELAY_S)

    def _report_within(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._report_timer is not None:
            if self._report_timer.when() <= loop.time() + delay_s:
                return
            self._report_timer.cancel()
        self._report_timer = loop.call_later(delay_s, self._send_report)

    def _send_report(self) -> None:
        self._report_timer = None
        self._report(self.report())

    # -- networks

    def _all_specs(self, wanted: list[EnvironmentSpec]) -> list[EnvironmentSpec]:
        """Those that are wanted and those that are still there."""
        uids = {spec.uid for spec in wanted}
        return wanted + [w.spec for w in self._workers.values() if w.spec.uid not in uids]

    async def _keep_network(self) -> None:
        """DNS, DHCP, firewall: after each change, until it is so."""
        while True:
            await self._network_changed.wait()
            self._network_changed.clear()
            try:
                await self._apply_network()
            except (SupercloudError, OSError) as error:
                log.error("network: %s", error)  # noqa: TRY400 -- the reason is all there is
                self._event("platform", "agent.network.failed", str(error), "error", {})
                asyncio.get_running_loop().call_later(NETWORK_RETRY_S, self._network_changed.set)
                continue
            if not self._network_changed.is_set():
                self._services.networks.settled.set()

    async def _keep_tidy(self) -> None:
        """Images and blobs that nobody uses go after a while."""
        while True:
            await asyncio.sleep(TIDY_S)
            if self._services.scratch.is_ready:
                try:
                    self._collect()
                except OSError as error:
                    log.warning("cannot tidy up: %s", error)

    async def _apply_network(self) -> None:
        desired = self._desired or Apply(generation=0, environments=[])
        specs = desired.environments
        networks = self._services.networks
        networks.ensure(self._all_specs(specs))
        found = list(networks.by_name.values())
        store = StoreWay(self._link, store_clients(specs)) if self._link else None
        rules = ruleset(self._uplink, found, publications(specs), store)
        names = self._names.apply(found, specs, desired.names)
        await asyncio.gather(self._firewall.apply(rules), names)

    def _spares_in_use(self) -> set[str]:
        engines = [worker.engine for worker in self._workers.values()]
        return {spare_machine.key_of(each) for each in engines if isinstance(each, Machine)}

    def _collect(self) -> None:
        specs = self._all_specs(self._desired.environments if self._desired else [])
        used = [digest for spec in specs for digest in digests(spec)]
        self._services.spares.tidy(self._spares_in_use())
        rootfs.collect_images(used)
        for name in self._services.blobs.collect(used):
            log.info("blob %s is not used any more", name)


def taken_bytes(specs: list[EnvironmentSpec]) -> int:
    """What EEs may use of the platform's memory, all together."""
    engines = sum(ENGINE_BYTES for spec in specs if spec.kind == "vm")
    return engines + sum(spec.memory_bytes for spec in specs)


def publications(specs: list[EnvironmentSpec]) -> list[Publication]:
    """Host ports and where they lead."""
    return [
        Publication(port.protocol, port.host_port, str(check_nic(spec.nics[0]).ip), port.port)
        for spec in specs
        for port in spec.ports
        if port.host_port and spec.nics
    ]


def store_clients(specs: list[EnvironmentSpec]) -> list[str]:
    """Addresses of the EEs that may reach the object store."""
    return [str(check_nic(nic).ip) for spec in specs if spec.objects for nic in spec.nics]


def _check(desired: Apply) -> None:
    """All refusals before any effect."""
    specs = desired.environments
    if len(specs) > MAX_ENVIRONMENTS:
        raise Invalid(f"{len(specs)} environments, at most {MAX_ENVIRONMENTS}")
    for what in ("name", "uid"):
        values = [getattr(spec, what) for spec in specs]
        if len(set(values)) != len(values):
            raise Invalid(f"two environments with the same {what}")
    volumes.check(specs)
    gateways(specs)
    addresses = [check_nic(nic).ip for spec in specs for nic in spec.nics]
    if len(set(addresses)) != len(addresses):
        raise Invalid("two environments with the same address")
    ports = [(p.protocol, p.host_port) for p in publications(specs)]
    if len(set(ports)) != len(ports):
        raise Invalid("one host port for two environments")
