"""What an engine is to the worker of an EE, and what all engines share."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Protocol

from supercloud.model.errors import Permanent, SupercloudError, Temporary, UserError
from supercloud.model.records import dataclass, field
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.accelerator import Accelerator
from supercloud.upper.platform.agent.blobs import Blobs
from supercloud.upper.platform.agent.logs import Log
from supercloud.upper.platform.agent.networks import Networks
from supercloud.upper.platform.agent.processes import Watched
from supercloud.upper.platform.agent.scratch import Scratch
from supercloud.upper.platform.agent.spares import Spares
from supercloud.upper.platform.agent.standstill import Ask
from supercloud.upper.platform.agent.volumes import Volumes
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.messages import EnvironmentSpec, VolumeUsage


class NotRestored(Permanent):
    """Its checkpoint cannot be restored here, and will not be later: nothing of it has started."""


@contextlib.contextmanager
def not_restored() -> Iterator[None]:
    """What will not pass by itself is raised as NotRestored."""
    try:
        yield
    except (Temporary, NotRestored):
        raise
    except SupercloudError as error:
        why = error.message if isinstance(error, UserError) else str(error)
        raise NotRestored(f"not restored: {why}") from error


@dataclass(frozen=True, slots=True)
class Services:
    """What the platform offers to every engine."""

    blobs: Blobs
    networks: Networks
    scratch: Scratch
    accelerator: Accelerator
    volumes: Volumes
    ucloud: str
    snapshot: Ask
    spares: Spares = field(default_factory=Spares)


class Engine(Protocol):
    """One EE's engine. Every method may be repeated after it failed or the agent was restarted.

    ``name`` and ``started_from`` are as in ``EnvironmentStatus``; ``log`` is there after
    ``prepare``/``resume``.
    """

    spec: EnvironmentSpec
    log: Log | None
    started_from: str

    @property
    def name(self) -> str:
        """The engine, and for VMs its accelerator."""

    async def prepare(self) -> None:
        """Bring here what it runs from; nothing runs yet."""

    async def start_ahead(self, timeout_s: float) -> Watched | None:
        """As far as it goes in a template; its process, if it has one that waits."""

    async def attach(self, waiting: Callable[[str], None]) -> None:
        """Have its volumes; ``waiting`` is told for what. ``volumes.Absent`` when it was long."""

    async def lost(self) -> None:
        """While it runs: ``volumes.Absent`` when a volume has gone from under it."""

    async def returned(self) -> None:
        """When ``attach`` has nothing to wait for."""

    def usage(self) -> list[VolumeUsage]:
        """Of the file systems of volumes that it has mounted."""

    async def start(self) -> Watched:
        """Run it; returns when its process runs."""

    def refusal(self) -> str:
        """Why it cannot be checkpointed; empty if it can."""

    async def checkpoint(self, wanted: CheckpointTake, process: Watched) -> CheckpointTaken:
        """Take one while it runs; it goes on whatever comes of it."""

    async def resume(self) -> None:
        """Take up streams of an EE that runs already, and have it run if it was stopped."""

    async def stop(self, process: Watched, grace_s: float) -> None:
        """Ask it to end, then make it."""

    async def ended(self) -> None:
        """Clean up after its process, keeping what it has written; volumes are given back."""

    async def destroy(self) -> None:
        """Remove all of it."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where an EE's things are."""

    uid: str

    @property
    def run(self) -> str:
        """In memory: namespaces, mounts, sockets, state."""
        return f"{paths.ENVIRONMENTS}/{self.uid}"

    @property
    def state(self) -> str:
        """What the next agent must know of it."""
        return f"{self.run}/state.json"

    @property
    def layer(self) -> str:
        """On scratch: what it writes, and its log."""
        return f"{paths.LAYERS}/{self.uid}"

    @property
    def log(self) -> str:
        """Its output; in a directory of its own that its root is not in."""
        return f"{self.layer}/log/output"

    def make(self, group: int = 0) -> None:
        """The directories. ``group`` may pass through the one in memory: a container's root."""
        os.makedirs(self.layer, mode=0o700, exist_ok=True)
        self.make_run(group)

    def make_run(self, group: int = 0) -> None:
        """The one in memory."""
        os.makedirs(self.run, mode=0o700, exist_ok=True)
        os.chown(self.run, 0, group)
        os.chmod(self.run, 0o710)


def make_places() -> None:
    """The directories that EEs' places in memory are in."""
    for path in (paths.ENVIRONMENTS, paths.IMAGES, paths.CRUN):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o711)


def digests(spec: EnvironmentSpec) -> list[str]:
    """The blobs that an EE is made from."""
    return [blob.digest for blob in spec.image.blobs.values()]
