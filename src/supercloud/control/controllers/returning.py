"""Volumes that a platform is made with again, as its checkpoint had them.

Its host takes them back to their snapshots and plugs them in, whenever it makes the platform; so
they must be served there, and nobody's. From then on they are this incarnation's, which is written
down before: what is seen of them meanwhile is not taken for an attachment of an earlier one.
"""

from supercloud.control import held
from supercloud.control.controllers.learning import halted
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import PlatformDocument, VolumeDocument, volume_key
from supercloud.model.errors import BadState, NotFound, Temporary
from supercloud.wire.checkpoints import GoesBack

WAIT_S = 0.25


async def coming_with(plane: Plane, platform: PlatformDocument) -> list[GoesBack]:
    """Those of a platform that is being made from a checkpoint; of any other none."""
    documents = await plane.state.checkpoints(platform.ucloud)
    return held.going_with(platform, documents)


async def reserve(plane: Plane, platform: PlatformDocument) -> list[GoesBack]:
    """They can be taken back, and are this incarnation's. Temporary until they are free."""
    wanted = await coming_with(plane, platform)
    for item in wanted:
        volume = await _volume(plane, platform, item.volume)
        if is_of(volume, platform):
            continue
        if volume.state != "served" or volume.platform:
            plane.look(volume_key(platform.ucloud, volume.name), 0.0)
            raise Temporary(
                f"waits for volume {volume.name}, which is {volume.state}", delay_s=WAIT_S
            )

        def reserved(fresh: VolumeDocument) -> None:
            if not fresh.platform:
                fresh.incarnation = platform.incarnation

        await plane.state.change(volume, reserved)
    return wanted


async def are_known(plane: Plane, platform: PlatformDocument) -> bool:
    """Whether it is known in which slots they are: before that its agent is told nothing."""
    known = True
    for item in await coming_with(plane, platform):
        volume = await plane.state.volume(platform.ucloud, item.volume)
        if volume is not None and not is_of(volume, platform):
            plane.look(volume_key(platform.ucloud, volume.name), 0.0)
            known = False
    return known


def is_of(volume: VolumeDocument, platform: PlatformDocument) -> bool:
    """Whether that incarnation has it."""
    here = (platform.name, platform.incarnation)
    return (volume.platform, volume.incarnation) == here


async def _volume(plane: Plane, platform: PlatformDocument, name: str) -> VolumeDocument:
    volume = await plane.state.volume(platform.ucloud, name)
    hint = f"choose another one: supercloud checkpoints {platform.ucloud}/{platform.name}"
    if volume is None or volume.deleting:
        raise NotFound(
            f"the checkpoint needs volume {name}, which is not there any more", hint=hint
        )
    if volume.halted:
        raise halted(volume)
    wish = platform.wish
    if (volume.provider.name, volume.host) != (wish.provider.name, wish.host):
        where = f"on host {volume.host} by now"
        raise BadState(f"the checkpoint needs volume {name}, which is {where}", hint=hint)
    return volume
