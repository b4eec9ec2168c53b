"""What a checkpoint is taken of, as it is now: an EE in its platform, or a platform on its host."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from supercloud.control import held, specs
from supercloud.control.controllers.access import UP
from supercloud.control.controllers.plane import Plane
from supercloud.control.documents import CheckpointsDocument, PlatformDocument
from supercloud.control.kept import Place, place_of
from supercloud.model.errors import BadState, Temporary, Unsupported
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """``call`` takes one of ``uid``, on ``platform``; the rest is noted with it (``Kept``).

    ``volumes`` are those that it writes to, which get a snapshot of the same instant. ``whole``: it
    is a platform, whose host says which it has.
    """

    uid: str
    shape: str
    platform: PlatformDocument
    call: Callable[[CheckpointTake], Awaitable[CheckpointTaken]]
    effect: str
    place: Place | None = None
    pin: str = ""
    image: str = ""
    volumes: tuple[str, ...] = ()
    whole: bool = False


async def subject_of(plane: Plane, document: CheckpointsDocument) -> Subject:
    """Raises BadState while none can be taken of it, Temporary while it cannot be reached."""
    if document.of == "platform":
        return await _platform(plane, document)
    return await _environment(plane, document)


def leaving(document: CheckpointsDocument) -> BadState:
    """What is said to who wants one although they are being deleted."""
    return BadState(
        f"the checkpoints of {document.name} are being deleted",
        hint="again, when supercloud checkpoints does not list them any more",
    )


async def _environment(plane: Plane, document: CheckpointsDocument) -> Subject:
    name = document.name
    item = await plane.state.environment(document.ucloud, name)
    if item is None or item.deleting:
        raise BadState(
            f"environment {name} is not there", hint="put it into the manifest, and supercloud up"
        )
    if item.ready is None or not item.current or specs.restoring(item):
        raise BadState(
            f"environment {name} is being made: it is {item.state}",
            hint="again, when supercloud ps shows it running or serving",
        )
    if item.state not in UP:
        raise BadState(f"environment {name} is {item.state}", hint="supercloud ps")
    platform = await plane.state.platform(document.ucloud, item.ready_on)
    session = plane.agents.session(document.ucloud, item.ready_on)
    if platform is None or session is None:
        raise Temporary(f"the platform {item.ready_on} cannot be reached")
    return Subject(
        uid=item.ready.uid,
        shape=specs.shape_of(item.ready),
        platform=platform,
        call=session.checkpoint,
        effect="link.checkpoint",
        place=place_of(item.assignment),
        volumes=tuple(held.written(item.spec)),
    )


async def _platform(plane: Plane, document: CheckpointsDocument) -> Subject:
    name = document.name
    platform = await plane.state.platform(document.ucloud, name)
    if platform is None or platform.deleting:
        raise BadState(
            f"platform {name} is not there",
            hint=f"supercloud inspect {document.ucloud} lists the platforms",
        )
    if platform.state != "ready":
        raise BadState(f"platform {name} is {platform.state}", hint="supercloud inspect")
    checkpoints = plane.pool.get(document.ucloud, platform.wish.provider).checkpoints
    if checkpoints is None:
        raise Unsupported(
            f"provider {platform.wish.provider.name} takes no checkpoints",
            hint="say `checkpoint: {}` of environments instead: a platform's agent takes theirs",
        )
    host = platform.wish.host
    return Subject(
        uid=f"i{platform.incarnation}",
        shape=specs.platform_shape(platform),
        platform=platform,
        call=lambda asked: checkpoints.take(host, asked),
        effect="provider.checkpoint",
        pin=platform.enrolled_pin,
        image=platform.image or platform.wish.image,
        whole=True,
    )
