"""Who uses a volume: what is to have it, and whether its platform has let go of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from supercloud.control import specs
from supercloud.control.controllers.access import apply_of
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.returning import coming_with
from supercloud.control.documents import EnvironmentDocument, PlatformDocument, VolumeDocument


@dataclass(frozen=True, slots=True)
class Usage:
    """``wanted``: an EE is to have it, on ``platform`` (None: not there yet, or going).

    ``free``: nothing in the platform that it is attached to uses it any more. ``coming``: its
    platform is being made with it, from a checkpoint, and has it from its host.
    """

    wanted: bool
    platform: PlatformDocument | None
    free: bool
    coming: bool = False

    def attached(self, volume: VolumeDocument) -> bool:
        """Whether it is attached where it is wanted."""
        wanted = self.platform
        return wanted is not None and (volume.platform, volume.incarnation) == (
            wanted.name,
            wanted.incarnation,
        )


def users_of(volume: str, environments: Sequence[EnvironmentDocument]) -> list[EnvironmentDocument]:
    """The EEs that are to have it."""
    return [
        item
        for item in environments
        if not item.deleting and any(use.name == volume for use in item.spec.volumes)
    ]


async def usage_of(plane: Plane, volume: VolumeDocument) -> Usage:
    """The usage as the documents and the agents' reports have it."""
    environments = await plane.state.environments(volume.ucloud)
    if (coming := await _coming(plane, volume)) is not None:
        free = await _free(plane, volume, environments)
        return Usage(wanted=True, platform=coming, free=free, coming=True)
    users = users_of(volume.name, environments)
    platform = None
    if users:
        platform = await plane.state.platform(volume.ucloud, users[0].assignment.platform)
    if platform is not None and (platform.deleting or _place(platform) != _home(volume)):
        platform = None
    free = await _free(plane, volume, environments)
    return Usage(wanted=bool(users), platform=platform, free=free)


async def _coming(plane: Plane, volume: VolumeDocument) -> PlatformDocument | None:
    """The platform that is being made with it."""
    for platform in await plane.state.platforms(volume.ucloud):
        if platform.restoring > platform.restored and _place(platform) == _home(volume):
            wanted = await coming_with(plane, platform)
            if any(item.volume == volume.name for item in wanted):
                return platform
    return None


def _place(platform: PlatformDocument) -> tuple[str, str]:
    return platform.wish.provider.name, platform.wish.host


def _home(volume: VolumeDocument) -> tuple[str, str]:
    return volume.provider.name, volume.host


async def _free(
    plane: Plane, volume: VolumeDocument, environments: Sequence[EnvironmentDocument]
) -> bool:
    if not volume.platform:
        return True
    platform = await plane.state.platform(volume.ucloud, volume.platform)
    if platform is None or platform.incarnation != volume.incarnation:
        return True  # the machine is gone, and with it what ran there
    told = await apply_of(plane, platform, environments)
    if any(mount.volume == volume.name for spec in told.environments for mount in spec.volumes):
        return False
    session = plane.agents.session(volume.ucloud, platform.name)
    report = plane.agents.reports.get((volume.ucloud, platform.name))
    if session is None or report is None:
        return False
    if plane.agents.applied.get(session) != specs.fingerprint(told):
        return False  # it was told something else, and may yet begin with that
    return {status.uid for status in report.environments} <= {
        spec.uid for spec in told.environments
    }
