"""What the control plane knows of the platforms' agents: it owns the links (``link.owner``)."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

from supercloud.control.documents import PlatformDocument, environment_key, platform_key
from supercloud.control.events import EventLog
from supercloud.control.images import Images
from supercloud.control.state import State
from supercloud.model.errors import Denied, NotFound, SupercloudError, Unsupported
from supercloud.model.events import Event, event_id
from supercloud.trust.authority import Authority
from supercloud.upper.platform.link.hub import LinkHub
from supercloud.upper.platform.link.owner import check_token
from supercloud.upper.platform.link.session import AgentSession
from supercloud.wire.checkpoints import CheckpointSnapshot
from supercloud.wire.messages import (
    Blob,
    Deposited,
    Enroll,
    EnvironmentStatus,
    Hello,
    PlatformReport,
)

ASKED_S = 3.0

Changed = Callable[[str], None]
"""Told the key of an object that is worth a look."""

Deposit = Callable[[PlatformDocument, Blob, Path], Awaitable[Deposited]]
"""Lays a file down on a platform's disk; see ``control.deposits``."""

Snapshot = Callable[[CheckpointSnapshot], Awaitable[None]]
"""Snapshots the volumes of an EE that stands still."""


@dataclass(slots=True)
class _Link:
    hub: LinkHub
    owner: "UCloudOwner"


class Agents:
    """The links of all U-Clouds: sessions, reports, and what was applied over which session."""

    def __init__(
        self,
        state: State,
        images: Images,
        events: EventLog,
        changed: Changed,
        authority: Callable[[str], Authority],
        trust_directory: Path,
    ) -> None:
        """``authority`` gives the one of a U-Cloud, made if need be."""
        self.state, self.images, self.events, self.changed = state, images, events, changed
        self._authority, self._trust_directory = authority, trust_directory
        self._links: dict[str, _Link] = {}
        self.applied: WeakKeyDictionary[AgentSession, str] = WeakKeyDictionary()
        self.reports: dict[tuple[str, str], PlatformReport] = {}
        self.deposit: Deposit = _no_deposits
        self.reused: set[tuple[str, str]] = set()
        """Platforms whose token came with another key: made anew by somebody, or rebooted."""
        self.snapshots: dict[tuple[str, str, str], Snapshot] = {}
        """Who is expected to ask for snapshots now: U-Cloud, platform, uid of the EE."""

    def hub(self, ucloud: str) -> LinkHub:
        """The hub of a U-Cloud."""
        if ucloud not in self._links:
            owner = UCloudOwner(self, ucloud)
            hub = LinkHub(self._authority(ucloud), str(self._trust_directory), owner)
            self._links[ucloud] = _Link(hub, owner)
        return self._links[ucloud].hub

    def session(self, ucloud: str, platform: str) -> AgentSession | None:
        """The platform's session, or None while its agent is not connected."""
        link = self._links.get(ucloud)
        return None if link is None else link.hub.sessions.get(platform)

    async def status_now(self, ucloud: str, platform: str, uid: str) -> EnvironmentStatus | None:
        """What the platform says of an EE when asked, with figures; as ``status`` if it is away."""
        if (session := self.session(ucloud, platform)) is not None:
            with contextlib.suppress(SupercloudError, TimeoutError):
                report = await session.list(timeout_s=ASKED_S)
                return _of(report, uid)
        return self.status(ucloud, platform, uid)

    def status(self, ucloud: str, platform: str, uid: str) -> EnvironmentStatus | None:
        """What the platform last said of an EE; None when it does not know it."""
        report = self.reports.get((ucloud, platform))
        return _of(report, uid) if report else None

    def take(self, ucloud: str, platform: str, report: PlatformReport) -> None:
        """Keep a report; whatever differs from the one before is worth a look."""
        before = self.reports.get((ucloud, platform))
        self.reports[ucloud, platform] = report
        old = _seen(before) if before else {}
        new = _seen(report)
        for uid, name in old.keys() | new.keys():
            if old.get((uid, name)) != new.get((uid, name)):
                self.changed(environment_key(ucloud, name))

    async def forget(self, ucloud: str, platform: str) -> None:
        """The platform is gone, or is made anew."""
        self.reports.pop((ucloud, platform), None)
        self.reused.discard((ucloud, platform))
        if session := self.session(ucloud, platform):
            session.close()

    async def drop(self, ucloud: str) -> None:
        """The U-Cloud is gone."""
        if link := self._links.pop(ucloud, None):
            await link.hub.close()
        for key in [key for key in self.reports if key[0] == ucloud]:
            del self.reports[key]

    async def close(self) -> None:
        """End all links."""
        await asyncio.gather(*(link.hub.close() for link in self._links.values()))


def _of(report: PlatformReport, uid: str) -> EnvironmentStatus | None:
    return next((item for item in report.environments if item.uid == uid), None)


def _seen(report: PlatformReport) -> dict[tuple[str, str], EnvironmentStatus]:
    """What it says of each EE, by uid and name, without the figures that change all the time."""
    return {
        (item.uid, item.name): replace(item, memory_bytes=0, cpu_s=0.0, volumes=[])
        for item in report.environments
    }


async def _no_deposits(_platform: PlatformDocument, _asked: Blob, _path: Path) -> Deposited:
    raise Unsupported("nothing is laid down on disks here")


class UCloudOwner:
    """The ``Owner`` of one U-Cloud's link."""

    def __init__(self, agents: Agents, ucloud: str) -> None:
        """Of ``ucloud``."""
        self._agents, self._ucloud = agents, ucloud

    async def redeem(self, asked: Enroll, pin: str) -> None:
        """See ``Owner``: single use, and until it expires."""
        platform = await self._platform(asked.platform)
        try:
            check_token(asked.token, platform.token_sha256, platform.enrolled_pin, pin)
            if not platform.enrolled_pin and time.time() > platform.token_expires_s:
                raise Denied("the enrolment token has expired")
        except Denied as error:
            self._refused(platform, asked, error)
            raise

        def enrolled(document: PlatformDocument) -> None:
            check_token(asked.token, document.token_sha256, document.enrolled_pin, pin)
            document.enrolled_pin = pin

        await self._agents.state.change(platform, enrolled)
        self._tell(asked.platform, "control.platform.enrolled")

    def _refused(self, platform: PlatformDocument, asked: Enroll, error: Denied) -> None:
        self._tell(asked.platform, "control.platform.refused", str(error), severe=True)
        if platform.token_sha256 and "already" in error.message:
            self._agents.reused.add((self._ucloud, asked.platform))
            self._agents.changed(platform_key(self._ucloud, asked.platform))

    async def admit(self, hello: Hello, pin: str) -> None:
        """See ``Owner``."""
        platform = await self._platform(hello.platform)
        if not platform.enrolled_pin or platform.enrolled_pin != pin:
            raise Denied(f"platform {hello.platform} enrolled with another key")
        if platform.deleting:
            raise Denied(f"platform {hello.platform} is being deleted")

    async def blob(self, session: AgentSession, digest: str) -> str:
        """See ``Owner``: only what an EE placed there runs from."""
        for environment in await self._agents.state.environments(self._ucloud):
            if environment.ready is None or environment.ready_on != session.platform:
                continue
            if any(blob.digest == digest for blob in environment.ready.image.blobs.values()):
                return str(self._agents.images.blob(digest))
        raise NotFound(f"no EE of platform {session.platform} runs from {digest}")

    async def deposit(self, session: AgentSession, asked: Blob) -> Deposited:
        """See ``Owner``: only what an EE placed there runs from."""
        path = Path(await self.blob(session, asked.digest))
        return await self._agents.deposit(await self._platform(session.platform), asked, path)

    async def snapshot(self, session: AgentSession, asked: CheckpointSnapshot) -> None:
        """See ``Owner``."""
        snapshot = self._agents.snapshots.get((self._ucloud, session.platform, asked.uid))
        if snapshot is None:
            raise Denied(f"no checkpoint of {asked.name} is being taken")
        await snapshot(asked)

    async def connected(self, session: AgentSession) -> None:
        """See ``Owner``."""
        self._agents.reused.discard((self._ucloud, session.platform))
        self._agents.changed(platform_key(self._ucloud, session.platform))

    async def lost(self, session: AgentSession) -> None:
        """See ``Owner``."""
        self._agents.changed(platform_key(self._ucloud, session.platform))

    async def report(self, session: AgentSession, report: PlatformReport) -> None:
        """See ``Owner``."""
        self._agents.take(self._ucloud, session.platform, report)

    async def event(self, session: AgentSession, event: Event) -> None:
        """See ``Owner``: the platform speaks for itself only, and the id is by our clock."""
        actor = f"platform/{session.platform}"
        told = replace(event, ucloud=self._ucloud, actor=actor, id=event_id())
        self._agents.events.add(told)

    async def _platform(self, name: str) -> PlatformDocument:
        platform = await self._agents.state.platform(self._ucloud, name)
        if platform is None:
            raise Denied(f"there is no platform {name} in U-Cloud {self._ucloud}")
        return platform

    def _tell(self, platform: str, code: str, message: str = "", *, severe: bool = False) -> None:
        self._agents.events.add(
            Event(
                ucloud=self._ucloud,
                subject=f"platform/{platform}",
                actor="control",
                code=code,
                message=message,
                severity="warning" if severe else "info",
            )
        )
