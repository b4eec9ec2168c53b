"""What is wrong with the checkpoints that a manifest wants."""

from collections.abc import Sequence

from supercloud.control.manifest.problems import Problems
from supercloud.model.resources import Environment

_VOLUMES = (
    "checkpoints do not hold volumes yet: what goes back in time would meet a volume that did not"
)


def check(
    environments: Sequence[tuple[int, Environment]], problems: Problems, *, platforms: bool
) -> None:
    """Note every problem; ``platforms``: whole platforms are to be checkpointed."""
    for index, environment in environments:
        written = [use.name for use in environment.volumes if not use.read_only]
        if written and environment.checkpoint is not None:
            message = f"found it with the volume {written[0]!r:.80}, which it may write to: "
            path = f"environments[{index}].checkpoint"
            hint = "use the volume with read_only: true, or take no checkpoints of it"
            problems.at_path(path, message + _VOLUMES, hint=hint, unsupported=True)
    using = [item for _, item in environments if item.volumes]
    if using and platforms:
        message = f"found it with volumes, which {using[0].name!r:.80} uses: {_VOLUMES}"
        hint = "take checkpoints of environments instead, which have no volumes"
        problems.at_path("platform.checkpoint", message, hint=hint, unsupported=True)
