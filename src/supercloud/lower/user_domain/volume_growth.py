"""Volumes that become larger, or are throttled otherwise: under a machine or a mirror."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.layers import Layers, User
from supercloud.lower.user_domain.volume_records import Volume, VolumeRecords
from supercloud.model.errors import BadState
from supercloud.wire.volumes import VolumeSpec


class Growth:
    """``machine`` is the monitor of a running platform, ``lock`` one of that name."""

    def __init__(
        self,
        layers: Layers,
        machine: Callable[[str], Awaitable[Channel]],
        records: VolumeRecords,
        lock: Callable[[str], asyncio.Lock],
    ) -> None:
        self._layers, self._machine, self._records, self._lock = layers, machine, records, lock

    async def change(self, volume: Volume, spec: VolumeSpec) -> None:
        """Of one that is open. BadState when that cannot be under what uses it."""
        if volume.mirrored and spec.size_bytes != volume.spec.size_bytes:
            hint = "it grows when it is opened anew: supercloud down, then up again"
            raise BadState(f"volume {spec.name} is kept on several hosts, and open", hint=hint)
        if volume.state != "attached":
            await self._layers.change(volume.spec, spec, None)
            return
        user = User(volume.platform, await self._machine(volume.platform), volume.mode)
        async with self._lock(f"slots of {volume.platform}"):  # it may have to stand still
            await self._layers.change(volume.spec, spec, user)

    async def replica(self, volume: Volume) -> None:
        """Before its mirror is made: that has one size, and so has each stream to a replica."""
        wanted = volume.wanted or volume.spec
        if wanted.size_bytes > volume.spec.size_bytes:
            await self._layers.grow_device(wanted)
            volume.spec = replace(volume.spec, size_bytes=wanted.size_bytes)
            self._records.put(volume)
