"""What is wrong with the checkpoints that a manifest wants."""

from collections.abc import Sequence

from supercloud.control.manifest.problems import Problems
from supercloud.model.resources import Environment

_VOLUMES = (
    "checkpoints do not hold volumes yet: what goes back in time would meet a volume that did not"
)
_HINT = "use the volume with read_only: true, or use no checkpoints there"


def check(
    environments: Sequence[tuple[int, Environment]], problems: Problems, *, platforms: bool
) -> None:
    """Note every problem; ``platforms``: whole platforms are to be checkpointed."""
    for index, environment in environments:
        written = [use.name for use in environment.volumes if not use.read_only]
        if not written:
            continue
        if environment.checkpoint is not None:
            message = f"found it with the volume {written[0]!r:.80}, which it may write to: "
            path = f"environments[{index}].checkpoint"
            problems.at_path(path, message + _VOLUMES, hint=_HINT, unsupported=True)
        if platforms:
            message = f"found that {environment.name!r:.80} writes to the volume {written[0]!r:.80}"
            path = "platform.checkpoint"
            problems.at_path(path, f"{message}: {_VOLUMES}", hint=_HINT, unsupported=True)
            return
