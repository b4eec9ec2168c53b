"""What is wrong with the checkpoints that a manifest wants."""

from collections.abc import Sequence

from supercloud.control.manifest.problems import Problems
from supercloud.model.errors import Unsupported
from supercloud.model.resources import Environment, Volume


def check(
    environments: Sequence[tuple[int, Environment]],
    volumes: Sequence[tuple[int, Volume]],
    problems: Problems,
    *,
    platforms: bool,
) -> None:
    """Note every problem; ``platforms``: whole platforms are to be checkpointed."""
    raw = {volume.name for _, volume in volumes if volume.format == "raw"}
    for index, environment in environments:
        written = [use.name for use in environment.volumes if not use.read_only and use.name in raw]
        if written and environment.checkpoint is not None:
            message = (
                f"found it with the volume {written[0]!r:.80}, which it may write to and which is "
                "raw: that one cannot be taken back to the same moment, for it has no snapshots"
            )
            path = f"environments[{index}].checkpoint"
            hint = "use a volume of format qcow2, or read_only: true, or take no checkpoints of it"
            problems.at_path(path, message, hint=hint, kind=Unsupported)
    using = [(item.name, use.name) for _, item in environments for use in item.volumes]
    using = [(name, volume) for name, volume in using if volume in raw]
    if using and platforms:
        message = (
            f"found it with the volume {using[0][1]!r:.80}, which {using[0][0]!r:.80} uses and "
            "which is raw: that one cannot be taken back to the same moment, for it has no "
            "snapshots"
        )
        hint = "use a volume of format qcow2, or take checkpoints of the environments"
        problems.at_path("platform.checkpoint", message, hint=hint, kind=Unsupported)
