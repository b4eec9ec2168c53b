"""What the control plane asks of a provider: one small protocol, the same for all of them.

A provider object serves one U-Cloud at one provider entry of its manifest. Names of platforms are
the caller's, deterministic and unique within the U-Cloud, so that every call may be repeated after
any crash. Failures are ``UserError`` (with its reason), ``Temporary`` (try again after
``delay_s``), or ``Permanent``.
"""

from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from supercloud.model.errors import Exists
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    RestoreFrom,
)
from supercloud.wire.host import TemplateSpec, TemplateStatus
from supercloud.wire.messages import Blob
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    Shared,
    VolumeFence,
    VolumeLease,
    VolumeRejoin,
)
from supercloud.wire.objects import (
    ObjectsApply,
    ObjectsCredentials,
    ObjectsSecret,
    ObjectsStatus,
    ServiceStatus,
)
from supercloud.wire.tunnel import PeerHost, TunnelApply
from supercloud.wire.volumes import VolumeCopy, VolumeOpen, VolumeSpec, VolumeStatus

Accept = Callable[[StreamReader, StreamWriter], Awaitable[None]]
"""Given the raw byte stream to an agent, which is about to send a TLS ClientHello over it."""

FEATURES = (
    "platforms", "console", "rendezvous", "ports", "kvm", "volumes", "objects", "tunnel",
    "checkpoints", "templates",
)  # fmt: skip
"""Every provider says of each of these "" (it has it) or the reason why not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCapacity:
    """A place for platforms, as far as this U-Cloud may use it.

    ``cpus_*`` are processors (1.5 is one and a half). ``images`` are digests of L1 images that it
    holds. ``accelerator`` is kvm, tcg or "" (unknown); ``platforms_free`` more platforms fit.
    """

    name: str
    region: str
    jurisdiction: str
    cpus_total: float
    cpus_free: float
    memory_total_bytes: int
    memory_free_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int
    platforms_free: int
    accelerator: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRequest:
    """A platform to have. ``config_iso`` is the config disk; ``tag`` says whose it is.

    The same name with another shape (anything but ``config_iso`` and ``restore``) is ``Exists``:
    delete it first. The first of these two stay in effect for as long as the platform lives: with
    ``restore`` it goes on as that checkpoint has it, instead of booting.
    """

    name: str
    host: str
    image: str
    cpus: int
    memory_bytes: int
    scratch_bytes: int
    ports: int
    config_iso: bytes = field(repr=False)
    tag: str = ""
    restore: RestoreFrom | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformObservation:
    """A platform as the provider sees it. ``state`` is one of ``model.states.MACHINE``.

    The ports ``first_port`` .. ``first_port + ports - 1`` of ``address`` reach the platform.
    """

    name: str
    host: str
    state: str
    address: str = ""
    first_port: int = 0
    ports: int = 0
    accelerator: str = ""
    image: str = ""
    reason: str = ""
    tag: str = ""
    cut_off: bool = False  # its agent can never be reached again, though it runs


class Console(Protocol):
    """A serial console: ``read`` gives b"" at its end."""

    async def read(self) -> bytes:
        """The next bytes that the platform wrote."""
        ...

    async def write(self, data: bytes) -> None:
        """Type ``data``."""
        ...


class Volumes(Protocol):
    """One U-Cloud's volumes at one provider: the host wire's calls; all may be repeated.

    See ``wire.volumes`` for how a volume is opened.
    """

    async def open(self, host: str, asked: VolumeOpen) -> VolumeStatus:
        """Have it, and its next epoch. Denied: it is not the one that ``asked.seal`` is of."""
        ...

    async def serve(
        self,
        host: str,
        name: str,
        epoch: int,
        *,
        mirror: Mirror | None = None,
        shared: Shared | None = None,
    ) -> VolumeStatus:
        """Let it be used; see ``wire.mirrors`` for one that is kept on several hosts."""
        ...

    async def lease(self, host: str, asked: VolumeLease) -> MirrorStatus:
        """Let the mirror there answer. NotFound, Denied when that generation is over."""
        ...

    async def rejoin(self, host: str, asked: VolumeRejoin) -> MirrorStatus:
        """A replica is there again, for the mirror on ``host``."""
        ...

    async def fence(self, host: str, asked: VolumeFence) -> None:
        """A mirror of an older generation there never answers again."""
        ...

    async def attach(
        self, host: str, name: str, platform: str, *, restorable: bool = False
    ) -> VolumeStatus:
        """Give it to a running platform; ``restorable``: in a way that checkpoints of it allow."""
        ...

    async def detach(self, host: str, name: str) -> VolumeStatus:
        """Take it from its platform."""
        ...

    async def close(self, host: str, name: str) -> VolumeStatus:
        """What was written is on the disk, and its seal final."""
        ...

    async def delete(self, host: str, name: str) -> None:
        """With all that is in it. Gone already is fine."""
        ...

    async def change(self, host: str, spec: VolumeSpec) -> VolumeStatus:
        """Grow it, or throttle it otherwise."""
        ...

    async def snapshot(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Make a snapshot; one of that name is kept as it is."""
        ...

    async def revert(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Go back to a snapshot; while it is not attached."""
        ...

    async def forget(self, host: str, name: str, snapshot: str) -> VolumeStatus:
        """Delete a snapshot. Gone already is fine."""
        ...

    async def fill(self, host: str, asked: VolumeCopy) -> VolumeStatus:
        """Have it hold what another one there holds; see ``wire.volumes``. Permanent: it failed."""
        ...

    async def list(self) -> list[tuple[str, VolumeStatus]]:
        """Host and status of every volume of this U-Cloud here, wanted or not."""
        ...


class Objects(Protocol):
    """One U-Cloud's object stores at one provider, one a host: the host wire's calls.

    All may be repeated. See ``wire.objects`` for how a store comes to be.
    """

    async def apply(self, host: str, asked: ObjectsApply) -> ObjectsStatus:
        """Bring it closer to what it is to be. NoResources before any effect.

        Permanent when what is there is not what ``asked`` is of: another key, an older state.
        """
        ...

    async def state(self, host: str) -> ObjectsStatus:
        """As it is now; ``absent`` where there is none."""
        ...

    async def credentials(self, host: str, asked: ObjectsCredentials) -> ObjectsSecret:
        """Let somebody use buckets. NotFound, Invalid, Busy while it does not serve."""
        ...

    async def delete(self, host: str, bucket: str = "") -> ObjectsStatus:
        """A bucket with all that is in it; "" is the whole store. Gone already is fine."""
        ...

    async def stop(self, host: str) -> ObjectsStatus:
        """Serve no more; its data is kept."""
        ...


class Checkpoints(Protocol):
    """Checkpoints of one U-Cloud's platforms at one provider, and the removal of any.

    See ``wire.checkpoints``. All may be repeated.
    """

    async def take(self, host: str, asked: CheckpointTake) -> CheckpointTaken:
        """One of a platform; returns when it is stored. NotFound, BadState unless it runs.

        Its nested machines are stopped by its agent for the moment; without that there is none.
        """
        ...

    async def collect(self, host: str, asked: CheckpointCollect) -> CheckpointCollected:
        """Remove what is not to be kept, on the host that has the object store."""
        ...

    async def verify(self, host: str, asked: RestoreFrom) -> CheckpointVerified:
        """Read all of one, on the host that has the object store, and use nothing of it.

        Denied with the reason when it is not what was taken; NotFound by hosts that cannot do it.
        """
        ...


class Templates(Protocol):
    """What one U-Cloud's platforms at one provider start from, instead of booting."""

    async def prepare(self, host: str, asked: TemplateSpec) -> TemplateStatus:
        """Begin to make one, or see how far it is. NotFound where there are none; Invalid.

        ``missing`` blobs are to be offered first.
        """
        ...

    async def offer(self, host: str, blob: Blob, content: AsyncIterator[bytes]) -> None:
        """Send a blob of an environment that is to be ready in one. Busy, Invalid."""
        ...


class Provider(Protocol):
    """One U-Cloud's access to one provider."""

    @property
    def checkpoints(self) -> Checkpoints | None:
        """None where none are taken or removed; ``features`` says why."""

    @property
    def templates(self) -> Templates | None:
        """None where every platform boots; ``features`` says why."""

    @property
    def objects(self) -> Objects | None:
        """None where it has no object stores; ``features`` says why."""

    async def services(self) -> list[tuple[str, ServiceStatus]]:
        """Host and status of every service that the user has there."""
        ...

    @property
    def volumes(self) -> Volumes | None:
        """None where it has none; ``features`` says why."""

    async def peer(self, host: str) -> PeerHost:
        """How other hosts of the U-Cloud reach that one."""
        ...

    async def tunnels(self, host: str, asked: TunnelApply) -> None:
        """What that host asks of others, and lets them have. NotFound where there are none."""
        ...

    async def features(self) -> dict[str, str]:
        """Feature (of ``FEATURES``) -> "" when it is there, otherwise the reason, for people."""
        ...

    async def hosts(self) -> list[HostCapacity]:
        """The hosts as they are now. Temporary while the provider cannot be reached."""
        ...

    async def ensure_platform(self, request: PlatformRequest) -> PlatformObservation:
        """Have the platform: create it, or find it. Idempotent by name.

        Exists when the name is there with another shape; NoResources, Unsupported before any
        effect. A platform that failed is not started again: delete it and ask anew.
        """
        ...

    async def deposit(self, name: str, size_bytes: int, content: AsyncIterator[bytes]) -> None:
        """Lay bytes down at the end of a running platform's scratch disk (``wire.places``).

        The provider sees them. NotFound, Unsupported where that cannot be; BadState.
        """
        ...

    async def platforms(self) -> list[PlatformObservation]:
        """Every platform of this U-Cloud at this provider, wanted or not."""
        ...

    async def delete_platform(self, name: str) -> None:
        """Stop it and give everything back. Gone already is fine."""
        ...

    def console(self, name: str) -> AbstractAsyncContextManager[Console]:
        """The platform's serial console while the context is open. NotFound."""
        ...

    async def rendezvous(self, accept: Accept) -> None:
        """Hand every agent that dials in at this provider to ``accept``, until cancelled.

        Each ``accept`` runs in a task of its own; a failing one is logged and costs only its
        connection. Loss of the provider is waited out with back-off.
        """
        ...

    async def close(self) -> None:
        """Let go of connections and tasks; platforms stay as they are."""
        ...


class PinStore(Protocol):
    """Where public keys seen at first contact are kept; the control plane gives it."""

    async def get(self, name: str) -> str | None:
        """The pin (``sha256:...``) under ``name``."""
        ...

    async def put(self, name: str, pin: str) -> None:
        """Keep the pin; Exists when there is another one under ``name``."""
        ...


class MemoryPins:
    """Pins for as long as the process lives; for tests and one-shot tools."""

    def __init__(self) -> None:
        self.pins: dict[str, str] = {}

    async def get(self, name: str) -> str | None:
        """The pin under ``name``."""
        return self.pins.get(name)

    async def put(self, name: str, pin: str) -> None:
        """Keep the pin; Exists when there is another one."""
        if self.pins.setdefault(name, pin) != pin:
            raise Exists(f"another key is pinned for {name} already")
