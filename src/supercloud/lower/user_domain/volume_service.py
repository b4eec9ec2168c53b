"""The host wire's methods about volumes, by their names."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from supercloud.lower.user_domain.mirrors import Mirrors
from supercloud.lower.user_domain.volumes import Volumes
from supercloud.wire.messages import ByName, Empty, Implementation
from supercloud.wire.mirrors import VolumeFence
from supercloud.wire.peer import Call
from supercloud.wire.volumes import VolumeList


def volume_methods(volumes: Volumes) -> dict[str, Implementation]:
    """What serves each; a call that was begun is finished, whether its caller waits or not."""

    async def listed(_: Empty) -> VolumeList:
        return VolumeList(volumes=await volumes.statuses())

    async def close(asked: ByName) -> Any:
        return await volumes.close(asked.name)

    async def detach(asked: ByName) -> Any:
        return await volumes.detach(asked.name)

    async def delete(asked: ByName) -> Empty:
        await volumes.delete(asked.name)
        return Empty()

    functions: dict[str, Callable[[Any], Awaitable[Any]]] = {
        "volume.open": volumes.open,
        "volume.serve": volumes.serve,
        "volume.attach": volumes.attach,
        "volume.detach": detach,
        "volume.close": close,
        "volume.delete": delete,
        "volume.list": listed,
        "volume.change": volumes.change,
        "volume.snapshot": volumes.snapshot,
        "volume.revert": volumes.revert,
        "volume.forget": volumes.forget,
        "volume.copy": volumes.copies.copy,
    }
    return {name: shielded(function) for name, function in functions.items()}


def mirror_methods(mirrors: Mirrors) -> dict[str, Implementation]:
    """The owner's word about mirrors: beside whatever else is done to a volume."""

    async def fence(asked: VolumeFence) -> Empty:
        await mirrors.fence(asked)
        return Empty()

    return {
        "volume.lease": shielded(mirrors.lease),
        "volume.rejoin": shielded(mirrors.rejoin),
        "volume.fence": shielded(fence),
    }


def shielded(function: Callable[[Any], Awaitable[Any]]) -> Implementation:
    """It is finished once it was begun."""

    async def serve(_call: Call, asked: Any) -> Any:
        return await asyncio.shield(asyncio.ensure_future(function(asked)))

    return serve
