"""The host wire's methods about the object store and about services, by their names."""

from collections.abc import Callable
from typing import Any

from supercloud.lower.user_domain.objects import Objects
from supercloud.lower.user_domain.services import Services
from supercloud.lower.user_domain.volume_service import shielded
from supercloud.wire.messages import Empty, Implementation
from supercloud.wire.objects import ObjectsApply, ServiceList


def object_methods(objects: Objects, ucloud: Callable[[], str]) -> dict[str, Implementation]:
    """What serves each; ``ucloud`` is whose domain this is."""

    async def apply(asked: ObjectsApply) -> Any:
        return await objects.apply(asked, ucloud())

    async def state(_: Empty) -> Any:
        return await objects.status()

    async def stop(_: Empty) -> Any:
        return await objects.stop()

    return {
        "objects.apply": shielded(apply),
        "objects.state": shielded(state),
        "objects.credentials": shielded(objects.credentials),
        "objects.delete": shielded(objects.delete),
        "objects.stop": shielded(stop),
    }


def service_methods(services: Services) -> dict[str, Implementation]:
    """The one about all of them."""

    async def listed(_: Empty) -> ServiceList:
        return ServiceList(services=services.statuses())

    return {"service.list": shielded(listed)}
