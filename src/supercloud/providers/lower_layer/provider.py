"""The provider protocol on top of the host wire: one manifest entry is one host."""

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

from supercloud.model.errors import NotFound, Temporary
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import (
    FEATURES,
    Accept,
    Console,
    HostCapacity,
    PlatformObservation,
    PlatformRequest,
)
from supercloud.providers.context import Context
from supercloud.providers.lower_layer.checkpoints import HostCheckpoints
from supercloud.providers.lower_layer.dial import Connection, Dialer, Target, why_lost
from supercloud.providers.lower_layer.objects import HostObjects
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from supercloud.providers.lower_layer.templates import HostTemplates, send
from supercloud.providers.lower_layer.volumes import HostVolumes
from supercloud.wire.codec import decode, encode
from supercloud.wire.host import HOST, Deposit, HostInfo, PlatformList, PlatformSpec, PlatformStatus
from supercloud.wire.messages import ByName, Empty
from supercloud.wire.objects import ServiceList, ServiceStatus
from supercloud.wire.peer import ConnectionLost, Stream
from supercloud.wire.tunnel import PeerHost, TunnelApply

CREATE_TIMEOUT_S: Final = 120.0
RESTORE_TIMEOUT_S: Final = 1800.0
CALL_TIMEOUT_S: Final = 60.0
_ANYWHERE: Final = ("", "0.0.0.0", "::")  # noqa: S104 - compared with, not bound to


def from_context(context: Context) -> "LowerLayerProvider":
    """The provider of a manifest entry of kind ``lower_layer``."""
    entry = context.entry
    target = target_of(entry, entry.user or context.ucloud)
    dialer = Dialer(target, context.authority, context.trust_directory, context.pins)
    return LowerLayerProvider(entry, dialer)


def target_of(entry: Entry, user: str) -> Target:
    """Address, port and user of a manifest entry."""
    address, _, port = entry.endpoint.rpartition(":")
    return Target(name=entry.name, address=address.strip("[]"), port=int(port), user=user)


class LowerLayerProvider:
    """Implements ``providers.base.Provider``."""

    def __init__(self, entry: Entry, dialer: Dialer) -> None:
        self._entry, self._dialer = entry, dialer
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self.volumes = HostVolumes(entry.name, self._call)
        self.objects = HostObjects(entry.name, self._call)
        self.checkpoints = HostCheckpoints(entry.name, self._call)
        self.templates = HostTemplates(entry.name, self._call, self._opened)

    async def features(self) -> dict[str, str]:
        """What the host says of itself."""
        info = await self._info()
        kvm = "" if info.accelerator == "kvm" else f"its accelerator is {info.accelerator}"
        unsaid = "the host does not say that it has any"
        silent = dict.fromkeys(("volumes", "objects", "tunnel", "checkpoints", "templates"), unsaid)
        return dict.fromkeys(FEATURES, "") | {"kvm": kvm} | silent | info.features

    async def hosts(self) -> list[HostCapacity]:
        """The one host, as far as the quota goes. Its name is the entry's."""
        info = await self._info()
        quota, used = info.quota, info.used
        return [
            HostCapacity(
                name=self._entry.name,
                region=self._entry.region or info.region,
                jurisdiction=self._entry.jurisdiction or info.jurisdiction,
                cpus_total=quota.cpu_permille / 1000,
                cpus_free=(quota.cpu_permille - used.cpu_permille) / 1000,
                memory_total_bytes=quota.memory_bytes,
                memory_free_bytes=quota.memory_bytes - used.memory_bytes,
                disk_total_bytes=quota.disk_bytes,
                disk_free_bytes=quota.disk_bytes - used.disk_bytes,
                platforms_free=quota.vms - used.vms,
                accelerator=info.accelerator,
                images=tuple(info.images),
            )
        ]

    async def ensure_platform(self, request: PlatformRequest) -> PlatformObservation:
        """Create or find: the user domain is idempotent by name and shape."""
        self._check(request.host)
        spec = PlatformSpec(
            name=request.name, image=request.image, cpus=request.cpus,
            memory_bytes=request.memory_bytes, scratch_bytes=request.scratch_bytes,
            ports=request.ports, tag=request.tag, restore=request.restore,
            config_base64=base64.b64encode(request.config_iso).decode(),
        )  # fmt: skip
        timeout_s = CREATE_TIMEOUT_S if request.restore is None else RESTORE_TIMEOUT_S
        status: PlatformStatus = await self._call("platform.create", spec, timeout_s)
        return self._observation(status)

    async def platforms(self) -> list[PlatformObservation]:
        """All that the user domain has."""
        listed: PlatformList = await self._call("platform.list", Empty())
        return [self._observation(status) for status in listed.platforms]

    async def delete_platform(self, name: str) -> None:
        """Have it stopped and given back."""
        with contextlib.suppress(NotFound):
            await self._call("platform.delete", ByName(name=name), CREATE_TIMEOUT_S)

    async def deposit(self, name: str, size_bytes: int, content: AsyncIterator[bytes]) -> None:
        """Lay bytes down for a platform's agent."""
        asked = Deposit(platform=name, size_bytes=size_bytes)
        await send(await self._opened("platform.deposit", encode(asked)), content)

    @contextlib.asynccontextmanager
    async def console(self, name: str) -> AsyncIterator[Console]:
        """The platform's serial console."""
        connection = await self._connected()
        async with connection.peer.open("platform.console", encode(ByName(name=name))) as stream:
            yield StreamConsole(stream)

    async def services(self) -> list[tuple[str, ServiceStatus]]:
        """All that the user domain has."""
        listed: ServiceList = await self._call("service.list", Empty())
        return [(self._entry.name, status) for status in listed.services]

    async def peer(self, host: str) -> PeerHost:
        """The host's front door, by its number: who dials has no name service. Temporary."""
        self._check(host)
        target = self._dialer.target
        loop, kind = asyncio.get_running_loop(), socket.SOCK_STREAM
        try:
            found = await loop.getaddrinfo(target.address, target.port, type=kind)
        except OSError as error:
            raise Temporary(f"{target}: no address for that name: {error}") from error
        address = str(found[0][4][0])
        return PeerHost(name=target.name, user=target.user, address=address, port=target.port)

    async def tunnels(self, host: str, asked: TunnelApply) -> None:
        """What the host asks of others, and lets them have."""
        self._check(host)
        await self._call("tunnel.apply", asked)

    async def rendezvous(self, accept: Accept) -> None:
        """Keep connections parked for agents, until cancelled."""
        await Rendezvous(self._dialer, accept).run()

    async def close(self) -> None:
        """End the connection for calls."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # -- how

    def _check(self, host: str) -> None:
        if host != self._entry.name:
            raise NotFound(f"{self._entry.name} has no host {host}")

    async def _info(self) -> HostInfo:
        info: HostInfo = await self._call("host.info", Empty())
        return info

    async def _call(self, name: str, params: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The decoded result of a declared method; every method used here may be repeated."""
        method = HOST[name]
        connection = await self._connected()
        try:
            answer = await connection.peer.call(name, encode(params), timeout_s=timeout_s)
        except ConnectionLost as error:
            raise why_lost(connection, str(self._dialer.target)) or error from error
        return decode(method.result, answer or {}, name, ignore_unknown=True)

    async def _opened(
        self, name: str, params: Any
    ) -> contextlib.AbstractAsyncContextManager[Stream]:
        return (await self._connected()).peer.open(name, params)

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.alive:
                await self.close()
                self._connection = await self._dialer.connect()
            return self._connection

    def _observation(self, status: PlatformStatus) -> PlatformObservation:
        address = status.address
        return PlatformObservation(
            name=status.name, host=self._entry.name, state=status.state,
            address=self._dialer.target.address if address in _ANYWHERE else address,
            first_port=status.first_port, ports=status.ports, accelerator=status.accelerator,
            image=status.image, reason=status.reason, tag=status.tag, cut_off=status.cut_off,
        )  # fmt: skip


class StreamConsole:
    """A console over a call's stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        """The next bytes; signals are none of a console's."""
        while (item := await self._stream.read()) is not None:
            if isinstance(item, bytes):
                return item
        return b""

    async def write(self, data: bytes) -> None:
        """Type."""
        await self._stream.write(data)
