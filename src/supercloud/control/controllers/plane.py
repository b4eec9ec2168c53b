"""What all reconcilers share: state, effects, providers, agents, images, events, and the pace."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from supercloud.control.agents import Agents
from supercloud.control.authorities import Authorities
from supercloud.control.bootdata import Tokens
from supercloud.control.documents import KINDS, AnyDocument, UCloudDocument, VolumeDocument
from supercloud.control.effects import Seam
from supercloud.control.events import EventLog
from supercloud.control.images import Images
from supercloud.control.kept import Restore
from supercloud.control.pool import ProviderPool
from supercloud.control.rates import Gauge, next_gauge
from supercloud.control.state import State
from supercloud.model.events import Event, Severity
from supercloud.trust.wrapping import VolumeKeys
from supercloud.wire.mirrors import MirrorStatus
from supercloud.wire.objects import ObjectsStatus
from supercloud.wire.volumes import VolumeStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often things are looked at again, and how long is too long; all in seconds."""

    observe_s: float = 2.0
    lost_grace_s: float = 5.0
    lost_observe_s: float = 10.0
    boot_timeout_s: float = 240.0
    shutdown_timeout_s: float = 15.0
    settle_s: float = 0.02
    apply_gap_s: float = 0.25
    sweep_s: float = 60.0
    seal_s: float = 2.0
    release_s: float = 0.25
    lease_s: float = 1.0
    lease_valid_s: float = 5.0
    rejoin_s: float = 5.0
    failover_s: float = 10.0
    token_lifetime_s: float = 3600.0
    recreate_first_s: float = 1.0
    recreate_longest_s: float = 60.0
    checkpoint_retry_s: float = 5.0
    collect_s: float = 20.0
    template_ask_s: float = 2.0
    template_wait_s: float = 10.0
    template_look_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a host last said of a volume, and when."""

    status: VolumeStatus
    gauge: Gauge | None = None
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class SeenStore:
    """What a host last said of an object store, and when."""

    status: ObjectsStatus
    time_s: float = field(default_factory=time.time)


@dataclass(slots=True, kw_only=True)
class Plane:
    """The reconcilers' world. ``look`` puts an object's key on the queue, after a delay."""

    state: State
    seam: Seam
    pool: ProviderPool
    agents: Agents
    images: Images
    tokens: Tokens
    events: EventLog
    look: Callable[[str, float], None]
    authority: Authorities
    endpoints: Callable[[str], list[str]]  # of an agent, by the kind of its provider
    keys: Callable[[str], VolumeKeys]  # of a U-Cloud's volumes
    pace: Pace = field(default_factory=Pace)
    deciding: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while what there is to decide about must not change."""
    fractions: dict[str, float] = field(default_factory=dict)  # of image preparations, by EE key
    stores: dict[str, SeenStore] = field(default_factory=dict)  # by U-Cloud
    seen: dict[tuple[str, str], Seen] = field(default_factory=dict)  # by U-Cloud and volume
    mirrors: dict[tuple[str, str], MirrorStatus] = field(default_factory=dict)  # likewise

    def sees(self, volume: VolumeDocument, status: VolumeStatus) -> None:
        """Its host has just said that of it."""
        before = self.seen.get((volume.ucloud, volume.name))
        gauge = next_gauge(before.gauge if before else None, status, time.monotonic())
        self.seen[volume.ucloud, volume.name] = Seen(status, gauge)

    async def restoring(self, ucloud: str, name: str) -> Restore | None:
        """The restore of an EE or platform that is decided, and that it has not come up from."""
        owner = await self.state.ucloud(ucloud)
        restore = owner.restores.get(name) if owner is not None else None
        if owner is None or restore is None:
            return None
        if name in owner.platforms:
            platform = await self.state.platform(ucloud, name)
            restored = platform.restored if platform is not None else 0
        else:
            item = await self.state.environment(ucloud, name)
            restored = item.restored if item is not None else 0
        return restore if restore.number > restored else None

    def tell(
        self,
        document: AnyDocument,
        code: str,
        message: str = "",
        severity: Severity = "info",
        **details: Any,
    ) -> None:
        """An event about the object."""
        ucloud, subject = subject_of(document)
        self.events.add(
            Event(
                ucloud=ucloud,
                subject=subject,
                actor="control",
                code=f"control.{code}",
                message=message,
                severity=severity,
                details=details,
            )
        )


def subject_of(document: AnyDocument) -> tuple[str, str]:
    """The U-Cloud's name, and the subject for events and steps."""
    if isinstance(document, UCloudDocument):
        return document.name, f"ucloud/{document.name}"
    return document.ucloud, f"{KINDS[type(document)]}/{document.name}"
