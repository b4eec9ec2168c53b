"""The pretended world: hosts, and the platforms that are on them, kept in files.

::

    DIRECTORY/creations.jsonl   one line for every platform that was ever made
    DIRECTORY/NAME.json         a platform (mode 0600: it holds its token)
    DIRECTORY/NAME.key .pem     its agent's key, and its certificate once it enrolled
    DIRECTORY/down              it cannot be reached, nor reach others, while this is there
    DIRECTORY/volumes           see ``volumes``
    DIRECTORY/objects           see ``objects``
    DIRECTORY/checkpoints       see ``checkpoints``
"""

import asyncio
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from supercloud.model.errors import Exists, Invalid, NoResources, NotFound, Temporary, Unsupported
from supercloud.model.states import MACHINE, step
from supercloud.providers.base import HostCapacity, PlatformObservation, PlatformRequest
from supercloud.providers.fake import bootdata
from supercloud.providers.fake.checkpoints import FakeCheckpoints
from supercloud.providers.fake.files import write_private
from supercloud.providers.fake.objects import FakeObjects
from supercloud.providers.fake.options import Options
from supercloud.providers.fake.templates import FakeTemplates
from supercloud.providers.fake.volumes import FakeVolumes
from supercloud.wire.codec import decode, encode
from supercloud.wire.messages import EnvironmentSpec, EnvironmentStatus
from supercloud.wire.tunnel import PeerHost, TunnelApply

FIRST_PORT = 20_000
LAST_PORT = 60_000
_WORLDS: "WeakValueDictionary[str, FakeCloud]" = WeakValueDictionary()
"""All clouds of this process, by their directory: so one host reaches another."""

Hook = Callable[[str, str, str], None]
"""Called with ("before" | "after", operation, name) around every effect; what it raises, is raised:
so a test crashes the control plane between any two effects."""


@dataclass(slots=True, kw_only=True)
class Platform:
    """A platform, and what its agent knows."""

    name: str
    host: str
    image: str
    cpus: int
    memory_bytes: int
    scratch_bytes: int
    ports: int
    tag: str
    shape: str
    first_port: int
    address: str
    state: str = "running"
    reason: str = ""
    cut_off: bool = False
    boot_id: str = ""
    boot: bootdata.BootData | None = None
    generation: int = 0
    specs: list[EnvironmentSpec] = field(default_factory=list)
    statuses: list[EnvironmentStatus] = field(default_factory=list)
    words: dict[str, list[str]] = field(default_factory=dict)  # what its EEs remember, by uid

    def observation(self) -> PlatformObservation:
        """As the provider shows it."""
        return PlatformObservation(
            name=self.name, host=self.host, state=self.state, address=self.address,
            first_port=self.first_port, ports=self.ports, accelerator="tcg", image=self.image,
            reason=self.reason, tag=self.tag, cut_off=self.cut_off,
        )  # fmt: skip


class FakeCloud:
    """Hosts and platforms of one provider entry.

    ``changed`` is set, and a new one takes its place, whenever platforms come or go.
    ``creations`` counts by name how often a platform was really made.
    """

    def __init__(self, name: str, options: Options | None = None, directory: str = "") -> None:
        self.name, self.options = name, options or Options()
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="fake-cloud-")
        self.directory = directory or (self._temporary.name if self._temporary else "")
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        self.hook: Hook = lambda _when, _operation, _name: None
        self.changed = asyncio.Event()
        self.creations: Counter[str] = Counter()
        self.platforms: dict[str, Platform] = {}
        self.tunnels: dict[str, TunnelApply] = {}  # what a host was told, by its name
        self._failures = Counter(
            create=self.options.fail_create,
            delete=self.options.fail_delete,
            hosts=self.options.fail_hosts,
        )
        self._load()
        self.volumes, self.objects = FakeVolumes(self), FakeObjects(self)
        self.checkpoints = FakeCheckpoints(self)
        self.templates = FakeTemplates(self)
        _WORLDS[self.directory] = self

    # -- its connection to the world

    @property
    def down(self) -> bool:
        """Whether it cannot be reached: for as long as ``DIRECTORY/down`` is there."""
        return os.path.exists(self.path("down", ""))

    def reach(self, peer: PeerHost) -> "FakeCloud | None":
        """The cloud of another host, while both are there."""
        cloud = _WORLDS.get(peer.address)
        return None if self.down or cloud is None or cloud.down else cloud

    def cut_off(self) -> None:
        """Nobody reaches it, and it reaches nobody; what is there goes on."""
        write_private(self.path("down", ""), b"")
        self._announce()

    def kill(self) -> None:
        """All of its hosts lose their power."""
        self.cut_off()
        for platform in self.platforms.values():
            platform.state, platform.reason = "failed", "the host was started anew"
            self.save(platform)
        self.volumes.killed()

    def come_back(self) -> None:
        """It can be reached again."""
        os.unlink(self.path("down", ""))
        self._announce()

    # -- what a provider does

    async def pretend(self, operation: str) -> None:
        """Take as long as configured, then fail if that is configured, or while it is down."""
        if self.down:
            raise Temporary(f"{self.name} cannot be reached: pretended", delay_s=0.01)
        if self.options.latency_ms:
            await asyncio.sleep(self.options.latency_ms / 1000)
        if self._failures[operation] > 0:
            self._failures[operation] -= 1
            raise Temporary(f"{self.name}: pretended failure of {operation}", delay_s=0.01)

    def fail(self, operation: str, times: int = 1) -> None:
        """Let the next ``times`` calls of create, delete or hosts fail with Temporary."""
        self._failures[operation] += times

    def hosts(self) -> list[HostCapacity]:
        """The hosts, less what their platforms take."""
        free = {host.name: host for host in self.options.capacities(self.name)}
        for platform in self.platforms.values():
            if host := free.get(platform.host):
                free[platform.host] = replace(
                    host,
                    cpus_free=host.cpus_free - platform.cpus,
                    memory_free_bytes=host.memory_free_bytes - platform.memory_bytes,
                    disk_free_bytes=host.disk_free_bytes - platform.scratch_bytes,
                    platforms_free=host.platforms_free - 1,
                )
        return list(free.values())

    def host(self, name: str) -> HostCapacity:
        """NotFound."""
        for host in self.hosts():
            if host.name == name:
                return host
        raise NotFound(f"{self.name} has no host {name}")

    def create(self, request: PlatformRequest) -> Platform:
        """Make the platform, or find it; all refusals precede all effects."""
        shape = shape_of(request)
        if there := self.platforms.get(request.name):
            if there.shape != shape:
                raise Exists(f"platform {request.name} is there with another shape")
            return there
        self._check(request)
        platform = self._new(request, shape)
        returning = request.restore.volumes if request.restore is not None else []
        if request.restore is not None:
            self._restore(platform, self.checkpoints.read(request.host, request.restore))
            self.volumes.check_back(request.host, returning)
        self.hook("before", "create", request.name)
        self._count(request.name)
        self.volumes.go_back(request.host, request.name, returning)
        self.platforms[request.name] = platform
        self.save(platform)
        self._announce()
        self.hook("after", "create", request.name)
        return platform

    def delete(self, name: str) -> None:
        """Forget the platform and its agent's files."""
        if name not in self.platforms:
            return
        self.hook("before", "delete", name)
        del self.platforms[name]
        for suffix in (".json", ".pem", ".key"):
            path = self.path(name, suffix)
            if os.path.exists(path):
                os.unlink(path)
        self.volumes.released(name)
        self._announce()
        self.hook("after", "delete", name)

    def find(self, name: str) -> Platform:
        """The platform; NotFound."""
        if name not in self.platforms:
            raise NotFound(f"{self.name} has no platform {name}")
        return self.platforms[name]

    def set_state(self, name: str, state: str, reason: str = "") -> None:
        """Let a platform go to a state of MACHINE: fail, wedge, stop, run."""
        platform = self.find(name)
        platform.state, platform.reason = step(MACHINE, platform.state, state), reason
        self.save(platform)
        self._announce()

    # -- how

    def _announce(self) -> None:
        self.changed, old = asyncio.Event(), self.changed
        old.set()

    def _check(self, request: PlatformRequest) -> None:
        host = next((host for host in self.hosts() if host.name == request.host), None)
        if host is None:
            raise NotFound(f"{self.name} has no host {request.host}")
        if request.image not in host.images:
            raise Unsupported(f"host {host.name} does not hold the image {request.image}")
        for what, asked, free in (
            ("processors", request.cpus, host.cpus_free),
            ("bytes of memory", request.memory_bytes, host.memory_free_bytes),
            ("bytes of disk", request.scratch_bytes, host.disk_free_bytes),
            ("platforms", 1, host.platforms_free),
        ):
            if asked > free:
                raise NoResources(f"{host.name}: {asked} {what} asked for, {free:g} are free")

    def _new(self, request: PlatformRequest, shape: str) -> Platform:
        number = int(request.host.rpartition("-")[2])
        platform = Platform(
            name=request.name, host=request.host, image=request.image, cpus=request.cpus,
            memory_bytes=request.memory_bytes, scratch_bytes=request.scratch_bytes,
            ports=request.ports, tag=request.tag, shape=shape,
            first_port=self._ports(request.host, request.ports),
            address=f"198.18.{number // 250}.{number % 250 + 1}",
            boot_id=hashlib.sha256(f"{self.name}/{request.name}".encode()).hexdigest()[:32],
        )  # fmt: skip
        try:
            platform.boot = bootdata.read(request.config_iso)
        except Invalid as error:  # a real host does not read it either: its guest fails to boot
            platform.state, platform.reason = "failed", str(error)
        return platform

    def _restore(self, platform: Platform, content: dict[str, Any]) -> None:
        """It goes on as it was, with its key and certificate."""
        was = decode(Platform, content["platform"], "checkpoint")
        platform.boot, platform.boot_id, platform.generation = was.boot, was.boot_id, was.generation
        platform.specs, platform.statuses, platform.words = was.specs, was.statuses, was.words
        for suffix, text in content["files"].items():
            write_private(self.path(platform.name, suffix), text.encode())

    def remember(self, name: str, word: str) -> None:
        """What an EE keeps in mind while it runs; NotFound."""
        for platform in self.platforms.values():
            for status in platform.statuses:
                if status.name == name and status.uid in platform.words:
                    platform.words[status.uid].append(word)
                    self.save(platform)
                    return
        raise NotFound(f"no environment {name} runs at {self.name}")

    def remembered(self, name: str) -> list[str]:
        """What an EE has in mind; nothing when it runs nowhere."""
        for platform in self.platforms.values():
            for status in platform.statuses:
                if status.name == name:
                    return list(platform.words.get(status.uid, []))
        return []

    def _ports(self, host: str, count: int) -> int:
        taken = sorted((p.first_port, p.ports) for p in self.platforms.values() if p.host == host)
        first = FIRST_PORT
        for start, length in taken:
            if start - first >= count:
                break
            first = start + length
        if first + count > LAST_PORT:
            raise NoResources(f"{host}: {count} ports asked for, so many are not free")
        return first

    # -- files

    def path(self, name: str, suffix: str) -> str:
        """A file of a platform."""
        return os.path.join(self.directory, name + suffix)

    def save(self, platform: Platform) -> None:
        """Keep the platform across the end of the process; one that was deleted stays deleted."""
        if self.platforms.get(platform.name) is not platform:
            return
        write_private(self.path(platform.name, ".json"), json.dumps(encode(platform)).encode())

    def _load(self) -> None:
        log = os.path.join(self.directory, "creations.jsonl")
        if os.path.exists(log):
            with open(log, encoding="utf-8") as file:
                self.creations.update(json.loads(line)["name"] for line in file)
        for entry in sorted(os.listdir(self.directory)):
            if entry.endswith(".json"):
                with open(os.path.join(self.directory, entry), encoding="utf-8") as file:
                    loaded: Any = json.load(file)
                platform = decode(Platform, loaded, entry)
                self.platforms[platform.name] = platform

    def _count(self, name: str) -> None:
        self.creations[name] += 1
        path = os.path.join(self.directory, "creations.jsonl")
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name}) + "\n")


def shape_of(request: PlatformRequest) -> str:
    """What makes two requests of one name the same: all but config disk and checkpoint."""
    shape = {k: v for k, v in encode(request).items() if k not in ("config_iso", "restore")}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
