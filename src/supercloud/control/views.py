"""What the API shows of the documents: rows, steps, summaries (``wire.api``)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from supercloud.control.documents import (
    EnvironmentDocument,
    PlatformDocument,
    Step,
    UCloudDocument,
    environment_key,
)
from supercloud.control.specs import host_port
from supercloud.model.errors import BadState, to_wire
from supercloud.wire import api

MESSAGES = {
    ("platform", "create"): "create the platform",
    ("platform", "boot"): "boot it and wait for its agent",
    ("environment", "image"): "prepare the image",
    ("environment", "start"): "start it",
}
StepState = Literal["waiting", "running", "done", "failed"]


def ucloud_view(
    ucloud: UCloudDocument,
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    fractions: Mapping[str, float],
) -> api.UCloudView:
    """A U-Cloud with all that is in it."""
    by_name = {platform.name: platform for platform in platforms}
    return api.UCloudView(
        name=ucloud.name,
        state=ucloud.state,
        generation=ucloud.generation,
        platforms=[platform_row(item) for item in platforms],
        environments=[environment_row(item, by_name) for item in environments],
        steps=_steps(platforms, environments, fractions),
        error=_error(platforms, environments),
    )


def platform_row(platform: PlatformDocument) -> api.PlatformRow:
    """A row of the platforms."""
    wish = platform.wish
    return api.PlatformRow(
        name=platform.name,
        provider=wish.provider.name,
        host=wish.host,
        state=platform.state,
        reason=platform.reason,
        region=wish.region,
        jurisdiction=wish.jurisdiction,
        accelerator=platform.accelerator,
        created_s=platform.created_s,
    )


def environment_row(
    item: EnvironmentDocument, platforms: Mapping[str, PlatformDocument]
) -> api.EnvironmentRow:
    """A row of ``ps``."""
    platform = platforms.get(item.assignment.platform)
    wish = platform.wish if platform else None
    return api.EnvironmentRow(
        ucloud=item.ucloud,
        name=item.name,
        environment=item.spec.name,
        kind=item.spec.kind,
        state=item.state,
        reason=item.reason,
        provider=wish.provider.name if wish else "",
        host=wish.host if wish else "",
        platform=item.assignment.platform,
        address=item.assignment.address,
        urls=urls(item, platform) if platform else [],
        restarts=item.restarts,
        created_s=item.created_s,
        started_s=item.started_s,
        engine=item.engine,
        image=item.spec.image,
    )


def urls(item: EnvironmentDocument, platform: PlatformDocument) -> list[str]:
    """Where its published ports are reached: ``http://`` for TCP, ``udp://`` for UDP."""
    found = []
    for port in item.spec.ports:
        number = host_port(item, platform, port.port, port.protocol)
        if port.publish and number and platform.address:
            host = f"[{platform.address}]" if ":" in platform.address else platform.address
            scheme = "http" if port.protocol == "tcp" else "udp"
            found.append(f"{scheme}://{host}:{number}")
    return found


def _steps(
    platforms: Sequence[PlatformDocument],
    environments: Sequence[EnvironmentDocument],
    fractions: Mapping[str, float],
) -> list[api.Step]:
    steps = []
    for platform in platforms:
        subject = f"platform/{platform.name}"
        steps += [_step(subject, "platform", item, -1.0) for item in platform.steps]
    for item in environments:
        subject = f"environment/{item.name}"
        fraction = fractions.get(environment_key(item.ucloud, item.name), -1.0)
        steps += [_step(subject, "environment", one, fraction) for one in item.steps]
    return sorted(steps, key=lambda step: step.started_s)


def _step(subject: str, kind: str, step: Step, fraction: float) -> api.Step:
    state: StepState = "running" if not step.ended_s else "done"
    if step.error:
        state = "failed"
    done = {"done": 1.0, "running": fraction if step.name == "image" else -1.0}
    text = MESSAGES.get((kind, step.name), step.name)
    return api.Step(
        subject=subject,
        message=f"{text}: {step.error}" if step.error else text,
        state=state,
        started_s=step.started_s,
        ended_s=step.ended_s,
        fraction=done.get(state, -1.0),
    )


def _error(
    platforms: Sequence[PlatformDocument], environments: Sequence[EnvironmentDocument]
) -> dict[str, Any] | None:
    errors = [item.error for item in platforms] + [item.error for item in environments]
    for error in errors:
        if error:
            return error
    for item in environments:
        if item.state == "failed":
            return to_wire(BadState(f"environment {item.name} failed: {item.reason}"))
    return None
