"""Mirrors on this host: the replication service between block service and replicas.

A mirror's streams come from the protection service here and, over tunnels, from those of other
hosts. What a replica lacks is noted in a memory object of the core, which outlives this domain and
the service, and not the host. The record of who is in sync, generations and leases are the control
plane's; see ``wire.mirrors`` for the calls, and ``services.replication`` for the rules.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, Final

from supercloud.lower.client import Core
from supercloud.lower.names import domain_name
from supercloud.lower.user_domain.feed import Feed
from supercloud.lower.user_domain.services import Services
from supercloud.lower.user_domain.tunnel import Tunnels
from supercloud.model.errors import Denied, Invalid, NotFound, SupercloudError, Temporary
from supercloud.services.replication.regions import map_bytes
from supercloud.wire.codec import decode
from supercloud.wire.mirrors import (
    Mirror,
    MirrorStatus,
    Replica,
    VolumeFence,
    VolumeLease,
    VolumeRejoin,
)

KIND: Final = "replication"
PROTECTION: Final = "protection"
TIMEOUT_S: Final = 60.0
QUIET_TIMEOUT_S: Final = 20.0

log = logging.getLogger("supercloud.lower.user_domain.mirrors")


class Mirrors:
    """By the volume's name. ``over`` is called with a volume and why its mirror has ended."""

    def __init__(self, core: Core, services: Services, tunnels: Tunnels, feed: Feed) -> None:
        self._core, self._services, self._tunnels, self._feed = core, services, tunnels, feed
        self.over: Callable[[str, str], None] = lambda _volume, _reason: None
        self._quiet: dict[str, asyncio.Event] = {}
        services.told[KIND] = self._told

    def join(self) -> None:
        """Take up the service, if it runs."""
        if self._services.is_running(KIND):
            self._services.join(KIND)

    # -- a mirror's life

    async def open(self, volume: str, size_bytes: int, asked: Mirror) -> MirrorStatus:
        """Have it: nothing is answered yet. Temporary while none can be begun with."""
        with contextlib.suppress(NotFound):
            now = await self.status(volume)
            if now.generation == asked.generation:
                return now
        streams = await self._streams(volume, asked)
        try:
            _check_begin(asked, set(streams))
            memory = self._map(volume, size_bytes)
            try:
                told = await self._ask(
                    "mirror.open",
                    {
                        "volume": volume,
                        "generation": asked.generation,
                        "size_bytes": size_bytes,
                        "clean": asked.clean,
                        "replicas": [_wish(replica, streams) for replica in asked.replicas],
                    },
                    [memory, *(streams[r.replica] for r in asked.replicas if r.replica in streams)],
                )
            finally:
                os.close(memory)
        finally:
            for descriptor in streams.values():
                os.close(descriptor)
        return _status(told)

    async def _streams(self, volume: str, asked: Mirror) -> dict[str, int]:
        """A stream to each replica that can be had, by its name."""

        async def one(replica: Replica) -> tuple[str, int] | None:
            try:
                if replica.peer is None:
                    return replica.replica, await self._own(volume)
                sock = await self._tunnels.reach_replica(replica.peer, volume, asked.generation)
                return replica.replica, sock.detach()
            except SupercloudError as error:
                log.warning("%s: replica %s: %s", volume, replica.replica, error)
                return None

        found = await asyncio.gather(*(one(replica) for replica in asked.replicas if replica.there))
        return dict(each for each in found if each is not None)

    async def _own(self, volume: str) -> int:
        channel = self._services.start(PROTECTION)
        asked = {"device": volume}
        (descriptor,) = (await channel.call("device.connect", asked)).descriptors
        return descriptor

    def _map(self, volume: str, size_bytes: int) -> int:
        """What replicas lack, as it was left; a volume of another size begins anew."""
        name, wanted = _map_name(volume), map_bytes(size_bytes)
        with contextlib.suppress(NotFound):
            selector = self._core.lookup(name).selector
            descriptor = self._core.take(selector)
            if os.fstat(descriptor).st_size == wanted:
                return descriptor
            os.close(descriptor)
            self._core.destroy(selector)
        return self._core.take(self._core.create_memory(wanted, name))

    async def check_open(self, volume: str, generation: int) -> None:
        """Whether it answers now, in that generation. Temporary, Denied."""
        status = await self.status(volume)
        if status.generation != generation:
            raise Denied(f"volume {volume} is open in generation {status.generation}")
        if status.closed_by:
            raise Temporary(f"volume {volume} cannot be used yet: {status.closed_by}", delay_s=0.2)

    async def connect(self, volume: str) -> int:
        """A stream for whoever uses the volume: the caller's to close."""
        channel = self._services.join(KIND)
        asked = {"volume": volume}
        (descriptor,) = (await channel.call("mirror.connect", asked)).descriptors
        return descriptor

    async def close(self, volume: str) -> MirrorStatus | None:
        """End it, when all replicas are equal if that can be had; None when there is none."""
        if not self._services.is_running(KIND):
            return None
        quiet = self._quiet[volume] = asyncio.Event()
        try:
            status = await self._quiesced(volume, quiet)
            await self._ask("mirror.close", {"volume": volume})
        except NotFound:
            return None
        finally:
            del self._quiet[volume]
        return status

    async def _quiesced(self, volume: str, quiet: asyncio.Event) -> MirrorStatus:
        try:
            await self._ask("mirror.quiesce", {"volume": volume})
            async with asyncio.timeout(QUIET_TIMEOUT_S):
                await quiet.wait()
        except TimeoutError:
            log.warning("%s: its replicas are not known to be equal", volume)
        except NotFound:
            raise
        except SupercloudError as error:  # it is over already
            log.warning("%s: %s", volume, error)
        told = await self._ask("mirror.state", {"volume": volume})
        return _status({**told, "clean": quiet.is_set()})

    async def drop(self, volume: str) -> None:
        """End it at once, if there is one."""
        if self._services.is_running(KIND):
            with contextlib.suppress(NotFound):
                await self._ask("mirror.close", {"volume": volume})

    def forget(self, volume: str) -> None:
        """The volume is gone, and with it what its replicas lack."""
        self._core.destroy_named(_map_name(volume))

    # -- the owner's word

    async def lease(self, asked: VolumeLease) -> MirrorStatus:
        """What is written down is confirmed, then answers may be given; how it stands then."""
        volume = {"volume": asked.name, "generation": asked.generation}
        for one in asked.written:
            confirmed = {"replica": one.replica, "turn": one.turn, "in_sync": one.in_sync}
            await self._ask("replica.confirm", {**volume, **confirmed})
        if asked.valid_ms:
            renewed = {"stamp": asked.stamp, "valid_ms": asked.valid_ms}
            await self._ask("lease.renew", {**volume, **renewed})
        return await self.status(asked.name)

    async def rejoin(self, asked: VolumeRejoin) -> MirrorStatus:
        """A stream to a replica that is served again; one that is connected stays so."""
        status = await self.status(asked.name)
        if any(one.replica == asked.replica and one.connected for one in status.replicas):
            return status
        sock = await self._tunnels.reach_replica(asked.peer, asked.name, asked.generation)
        with sock:
            named = {"volume": asked.name, "replica": asked.replica}
            told = await self._ask(
                "replica.attach", {**named, "generation": asked.generation}, [sock.fileno()]
            )
        return _status(told)

    async def fence(self, asked: VolumeFence) -> None:
        """A mirror of an older generation never answers again."""
        if self._services.is_running(KIND):
            named = {"volume": asked.name, "generation": asked.generation}
            await self._ask("mirror.fence", named)

    async def status(self, volume: str) -> MirrorStatus:
        """How it stands. NotFound."""
        if not self._services.is_running(KIND):
            raise NotFound(f"volume {volume} has no mirror here")
        return _status(await self._ask("mirror.state", {"volume": volume}))

    # -- what is told

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        volume = str(untrusted.get("volume"))
        if method == "mirror.quiet" and volume in self._quiet:
            self._quiet[volume].set()
        elif method == "mirror.over":
            self.over(volume, str(untrusted.get("reason", ""))[:1000])
        elif method in ("replica.stale", "replica.dropped"):
            self._say(volume, method, f"{untrusted.get('replica')}: {untrusted.get('reason')}")
        elif method == "replica.evidence":
            where = f"{untrusted.get('length')} bytes at {untrusted.get('offset')}"
            self._say(volume, method, f"{untrusted.get('replica')} did not give back {where}")

    def _say(self, volume: str, method: str, message: str) -> None:
        code = f"host.volume.{method.replace('.', '_')}"
        self._feed.say(f"volume/{volume}", code, message[:1000], severity="warning")

    async def _ask(
        self, method: str, parameters: dict[str, Any], given: list[int] | None = None
    ) -> Any:
        channel = self._services.start(KIND)
        reply = await channel.call(method, parameters, given, timeout_s=TIMEOUT_S)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result


def _check_begin(asked: Mirror, there: set[str]) -> None:
    """Whether it may begin with who is connected: the source must have all that was answered."""
    usable = [one for one in asked.replicas if one.in_sync and one.replica in there]
    if not usable:
        raise Temporary("no replica that is in sync can be reached", delay_s=1.0)
    if not asked.all_ended and not any(one.kept for one in usable):
        raise Temporary(
            "the replicas that can be reached were ended by force, and another may have more",
            delay_s=1.0,
        )


def _wish(replica: Replica, streams: dict[str, int]) -> dict[str, Any]:
    return {
        "replica": replica.replica,
        "in_sync": replica.in_sync,
        "kept": replica.kept,
        "connected": replica.replica in streams,
    }


def _status(told: Any) -> MirrorStatus:
    if not isinstance(told, dict):
        raise Invalid("the replication service does not say how a mirror stands")
    return decode(MirrorStatus, told, "mirror", ignore_unknown=True)


def _map_name(volume: str) -> str:
    return domain_name("map", volume)
