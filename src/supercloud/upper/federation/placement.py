"""Which host each EE runs on: wishes are conditions, capacity is a condition, the rest is taste.

Pure: from hosts, environments and where things stand to an assignment, or to NoResources that
says of each host why not. An EE that stands where it may stand is never moved. What fits anywhere
is put where a platform stands already, on the emptiest one. What uses a volume goes where that is,
and what shares one goes where the other is; likewise all that use buckets. The search takes back a
choice when a later EE finds no room because of it, within a bounded number of steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from supercloud.model.errors import NoResources
from supercloud.model.resources import Environment, PlatformSize, replica_names
from supercloud.wire.places import VOLUME_SLOTS

PLATFORM_RESERVE_BYTES = 192 << 20
"""Of a platform's memory, what its kernel, agent and page cache need."""
VM_OVERHEAD_BYTES = 96 << 20
"""What QEMU needs beside the memory of its guest."""
MAX_STEPS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host of a provider, as a candidate. ``refusal`` is why no *new* platform fits there, or "".

    ``standing`` says that the U-Cloud has a platform there already; ``size`` is that platform's
    size, or the size that a new one would have.
    """

    provider: str
    name: str
    region: str
    jurisdiction: str
    size: PlatformSize
    standing: bool = False
    refusal: str = ""
    features: Mapping[str, str] = field(default_factory=dict)  # EE kind -> "" or why not
    volumes: str = ""  # why it has no volumes, or ""
    objects: str = ""  # why no object store can be there, or ""
    tunnel: str = "nothing joins it to other hosts"  # why it reaches no store elsewhere, or ""
    checkpoints: Mapping[str, str] = field(default_factory=dict)  # EE kind -> "" or why none

    @property
    def key(self) -> tuple[str, str]:
        """Provider and host name."""
        return (self.provider, self.name)


@dataclass(frozen=True, slots=True)
class Instance:
    """One EE to place."""

    name: str
    environment: Environment

    @property
    def memory_bytes(self) -> int:
        """What it takes of its platform's memory."""
        overhead = VM_OVERHEAD_BYTES if self.environment.kind == "vm" else 0
        return self.environment.memory_bytes + overhead

    @property
    def published(self) -> int:
        """How many host ports it takes."""
        return sum(port.publish for port in self.environment.ports)

    @property
    def volumes(self) -> set[str]:
        """The volumes that it uses."""
        return {use.name for use in self.environment.volumes}


@dataclass(slots=True)
class _Load:
    """What stands on a host so far."""

    memory_bytes: int = 0
    ports: int = 0
    instances: list[Instance] = field(default_factory=list)


HostKey = tuple[str, str]


def instances_of(environments: Sequence[Environment]) -> list[Instance]:
    """All EEs of a manifest, in its order."""
    return [Instance(name, item) for item in environments for name in replica_names(item)]


def place(
    environments: Sequence[Environment],
    hosts: Sequence[Host],
    standing: Mapping[str, HostKey] | None = None,
    volumes: Mapping[str, HostKey] | None = None,
    store: HostKey | None = None,
    *,
    only: Mapping[str, str] | None = None,
    platforms: bool = False,
) -> dict[str, HostKey]:
    """EE name -> (provider, host name) for every EE. Raises NoResources, with why per host.

    ``standing`` is where EEs are; one that may stay there does. ``volumes`` is where volumes are,
    ``store`` where the object store is. ``only`` is the provider that an EE must go to, whatever
    else it may; ``platforms``: checkpoints are taken of whatever platform an EE is on.
    """
    search = _Search(hosts, standing or {}, volumes or {}, store, only or {}, platforms=platforms)
    return search.run(instances_of(environments))


class _Search:
    def __init__(
        self,
        hosts: Sequence[Host],
        standing: Mapping[str, HostKey],
        volumes: Mapping[str, HostKey],
        store: HostKey | None,
        only: Mapping[str, str],
        *,
        platforms: bool,
    ) -> None:
        self._hosts = list(hosts)
        self._by_key = {host.key: host for host in hosts}
        self._standing, self._volumes, self._store = standing, volumes, store
        self._only, self._platforms = only, platforms
        self._loads = {host.key: _Load() for host in hosts}
        self._placed: dict[str, HostKey] = {}
        self._worst: tuple[int, NoResources] | None = None

    def run(self, instances: list[Instance]) -> dict[str, HostKey]:
        waiting = [item for item in instances if not self._stay(item)]
        waiting.sort(key=self._choices_then_size)
        self._fill(waiting)
        return {item.name: self._placed[item.name] for item in instances}

    def _stay(self, instance: Instance) -> bool:
        host = self._by_key.get(self._standing.get(instance.name, ("", "")))
        if host is None or self._refusal(instance, host):
            return False
        self._put(instance, host)
        return True

    def _choices_then_size(self, instance: Instance) -> tuple[int, int]:
        choices = sum(not _wish_refused(instance, host) for host in self._hosts)
        return (choices, -instance.memory_bytes)

    def _fill(self, waiting: list[Instance]) -> None:
        """Depth first over the choices of each EE in turn, with an explicit stack."""
        choices: list[list[Host]] = []
        steps = 0
        while len(choices) < len(waiting) or not waiting:
            if not waiting:
                return
            options = self._options(waiting[len(choices)], len(choices))
            choices.append(options)
            while not choices[-1]:
                choices.pop()
                if not choices or steps > MAX_STEPS:
                    raise self._explanation()
                self._take(waiting[len(choices) - 1])
                steps += 1
            self._put(waiting[len(choices) - 1], choices[-1].pop(0))

    def _options(self, instance: Instance, depth: int) -> list[Host]:
        refusals = {host.key: self._refusal(instance, host) for host in self._hosts}
        options = [host for host in self._hosts if not refusals[host.key]]
        options.sort(key=self._taste)
        if not options and (self._worst is None or depth >= self._worst[0]):
            self._worst = (depth, _no_resources(instance, refusals))
        return options

    def _taste(self, host: Host) -> tuple[bool, int, HostKey]:
        load = self._loads[host.key]
        used = host.standing or bool(load.instances)
        return (not used, load.memory_bytes - _usable_bytes(host), host.key)

    def _explanation(self) -> NoResources:
        return self._worst[1] if self._worst else NoResources("no placement was found")

    def _put(self, instance: Instance, host: Host) -> None:
        load = self._loads[host.key]
        load.memory_bytes += instance.memory_bytes
        load.ports += instance.published
        load.instances.append(instance)
        self._placed[instance.name] = host.key

    def _take(self, instance: Instance) -> None:
        load = self._loads[self._placed.pop(instance.name)]
        load.memory_bytes -= instance.memory_bytes
        load.ports -= instance.published
        load.instances.remove(instance)

    def _refusal(self, instance: Instance, host: Host) -> str:
        """Why ``instance`` cannot go to ``host`` as things stand; "" when it can."""
        return (
            _wish_refused(instance, host)
            or self._only_refused(instance, host)
            or self._platform_refused(host)
            or _size_refused(instance, host)
            or self._volumes_refused(instance, host)
            or self._store_refused(instance, host)
            or self._checkpoints_refused(instance, host)
            or self._full(instance, host)
            or self._crowded(instance, host)
        )

    def _platform_refused(self, host: Host) -> str:
        return "" if host.standing else host.refusal

    def _volumes_refused(self, instance: Instance, host: Host) -> str:
        wanted = instance.volumes
        if wanted and host.volumes:
            return f"its provider has no volumes: {host.volumes}"
        for name in sorted(wanted):
            place = self._volumes.get(name) or self._shared(name)
            if place is not None and place != host.key:
                return f"its volume {name} is at {'/'.join(place)}"
        there = {name for other in self._loads[host.key].instances for name in other.volumes}
        if len(there | wanted) > VOLUME_SLOTS:
            return f"a platform takes {VOLUME_SLOTS} volumes, {len(there)} are in use there"
        return ""

    def _store_refused(self, instance: Instance, host: Host) -> str:
        if not instance.environment.buckets:
            return ""
        if host.objects:
            return f"its object store cannot be there: {host.objects}"
        place = self._store or self._with_buckets()
        if place is not None and place != host.key:
            return f"its buckets are at {'/'.join(place)}"
        return ""

    def _only_refused(self, instance: Instance, host: Host) -> str:
        wanted = self._only.get(instance.name, host.provider)
        return "" if wanted == host.provider else f"not at provider {wanted}"

    def _checkpoints_refused(self, instance: Instance, host: Host) -> str:
        if not self._platforms and instance.environment.checkpoint is None:
            return ""
        kind = "platform" if self._platforms else instance.environment.kind
        if why := host.checkpoints.get(kind, ""):
            return f"no checkpoints can be taken there: {why}"
        place = self._store or self._with_buckets()
        if place is None:
            return f"its object store cannot be there: {host.objects}" if host.objects else ""
        if place == host.key:
            return ""
        for one in (host, self._by_key.get(place, host)):
            if one.tunnel:
                return f"its checkpoints are kept at {'/'.join(place)}: {one.tunnel}"
        return ""

    def _with_buckets(self) -> HostKey | None:
        """Where another EE that uses the object store has been put."""
        for key, load in self._loads.items():
            if any(self._stores(other.environment) for other in load.instances):
                return key
        return None

    def _stores(self, environment: Environment) -> bool:
        return bool(environment.buckets or environment.checkpoint or self._platforms)

    def _shared(self, volume: str) -> HostKey | None:
        """Where another EE that shares the volume has been put."""
        for key, load in self._loads.items():
            if any(volume in other.volumes for other in load.instances):
                return key
        return None

    def _full(self, instance: Instance, host: Host) -> str:
        load = self._loads[host.key]
        left = _usable_bytes(host) - load.memory_bytes
        if instance.memory_bytes > left:
            return f"{_mib(left)} MiB of its platform's memory are left"
        if instance.published > host.size.ports - load.ports:
            return f"{host.size.ports - load.ports} of its platform's ports are left to publish"
        return ""

    def _crowded(self, instance: Instance, host: Host) -> str:
        wishes, group = instance.environment.placement, instance.environment.name
        for other in self._loads[host.key].instances:
            name = other.environment.name
            if name in wishes.anti_affinity or group in other.environment.placement.anti_affinity:
                return f"{other.name} is there (anti-affinity)"
        if wishes.spread == "none":
            return ""
        place = _place_of(host, wishes.spread)
        for key, load in self._loads.items():
            if _place_of(self._by_key[key], wishes.spread) == place:
                for other in load.instances:
                    if other.environment.name == group:
                        return f"{other.name} is on the same {wishes.spread} (spread)"
        return ""


def _place_of(host: Host, spread: str) -> object:
    return {"host": host.key, "provider": host.provider, "region": host.region}[spread]


def _wish_refused(instance: Instance, host: Host) -> str:
    wishes = instance.environment.placement
    if wishes.provider and host.provider != wishes.provider:
        return f"not at provider {wishes.provider}"
    if wishes.region and host.region != wishes.region:
        return f"in region {host.region or '(none said)'}, not {wishes.region}"
    if wishes.jurisdiction and host.jurisdiction != wishes.jurisdiction:
        return f"under {host.jurisdiction or '(none said)'}, not {wishes.jurisdiction}"
    return host.features.get(instance.environment.kind, "")


def _size_refused(instance: Instance, host: Host) -> str:
    size = host.size
    if instance.environment.cpus > size.cpus:
        return f"its platform has {size.cpus} processors, {instance.environment.cpus:g} are wanted"
    if instance.memory_bytes > _usable_bytes(host):
        return (
            f"an EE of its platform ({_mib(size.memory_bytes)} MiB) can have at most "
            f"{_mib(_usable_bytes(host))} MiB, {_mib(instance.memory_bytes)} are wanted"
        )
    return ""


def _no_resources(instance: Instance, refusals: Mapping[HostKey, str]) -> NoResources:
    reasons = [f"{provider}/{name}: {why}" for (provider, name), why in sorted(refusals.items())]
    shown = reasons[:16] + ([f"... and {len(reasons) - 16} more"] if len(reasons) > 16 else [])
    hint = "relax its placement, ask for less memory or fewer processors, "
    hint += "or enlarge `platform` or the quota"
    if instance.volumes:
        hint += "; a volume stays where it is until it is deleted (supercloud volumes)"
    if instance.environment.buckets:
        hint += "; all buckets of a U-Cloud are on one host (supercloud buckets)"
    if instance.environment.checkpoint:
        hint += "; all checkpoints of a U-Cloud are on one host (supercloud checkpoints)"
    return NoResources(
        f"no host can take environment {instance.name}: " + ("; ".join(shown) or "no hosts"),
        hint=hint,
        where=f"environments.{instance.environment.name}",
        details={"candidates": reasons},
    )


def _usable_bytes(host: Host) -> int:
    return max(0, host.size.memory_bytes - PLATFORM_RESERVE_BYTES)


def _mib(number_bytes: int) -> int:
    return number_bytes >> 20
