"""A user domain on loopback: its real identity, rendezvous and wire, over pretended machines."""

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from supercloud.lower.user_domain.identity import Birth, IdentityStore
from supercloud.lower.user_domain.rendezvous import Rendezvous
from supercloud.model.errors import Denied
from supercloud.model.resources import Provider as Entry
from supercloud.providers.base import MemoryPins, PlatformRequest
from supercloud.providers.context import Context
from supercloud.providers.fake.agent import FakeAgent, dial
from supercloud.providers.fake.checkpoints import FakeCheckpoints
from supercloud.providers.fake.cloud import FakeCloud
from supercloud.providers.fake.objects import FakeObjects
from supercloud.providers.fake.options import Options
from supercloud.providers.fake.templates import FakeTemplates
from supercloud.providers.fake.volumes import FakeVolumes
from supercloud.providers.lower_layer.provider import LowerLayerProvider, from_context
from supercloud.trust import tls
from supercloud.wire.checkpoints import (
    CheckpointCollect,
    CheckpointCollected,
    CheckpointTake,
    CheckpointTaken,
    CheckpointVerified,
    RestoreFrom,
)
from supercloud.wire.codec import encode
from supercloud.wire.host import (
    HOST,
    HostInfo,
    PlatformList,
    PlatformSpec,
    PlatformStatus,
    TemplateSpec,
    TemplateStatus,
)
from supercloud.wire.messages import Blob, ByName, Certificate, CsrResult, Empty, handlers
from supercloud.wire.mirrors import MirrorStatus, VolumeFence, VolumeLease, VolumeRejoin
from supercloud.wire.objects import (
    ObjectsApply,
    ObjectsCredentials,
    ObjectsDelete,
    ObjectsSecret,
    ObjectsStatus,
    ServiceList,
    ServiceStatus,
)
from supercloud.wire.peer import Call, Detach, Peer
from supercloud.wire.quota import Quota
from supercloud.wire.tunnel import TunnelApply
from supercloud.wire.volumes import (
    VolumeAttach,
    VolumeCopy,
    VolumeList,
    VolumeOpen,
    VolumeServe,
    VolumeSnapshot,
    VolumeSpec,
    VolumeStatus,
)
from support.link import Link


class LoopbackHost:
    """One user's domain. ``forget`` makes its domain anew, with another key."""

    def __init__(self, directory: Path, ca_pem: str, user: str = "demo") -> None:
        self.directory, self.ca_pem, self.user = directory, ca_pem, user
        self.cloud = FakeCloud("loop", Options(hosts=1, reconnect_ms=20), str(directory / "cloud"))
        self.rendezvous = Rendezvous()
        self.identity: IdentityStore
        self.port = 0
        self.connections = 0
        self._agents: dict[str, asyncio.Task[None]] = {}
        self._peers: set[Peer] = set()
        self._server: asyncio.Server | None = None
        self.calls: dict[str, Any] = {
            "host.info": self._info, "identity.request": self._request,
            "identity.install": self._install, "platform.create": self._create,
            "platform.list": self._list, "platform.delete": self._delete,
            "platform.console": self._console, "rendezvous.accept": self._accept,
        }  # fmt: skip
        self.calls["tunnel.apply"] = self._tunnels
        self.tunnels: list[TunnelApply] = []
        self.calls |= template_calls(self.cloud.templates, "loop-0")
        self.calls |= volume_calls(self.cloud.volumes, "loop-0")
        self.calls |= object_calls(self.cloud.objects, "loop-0")
        self.calls |= checkpoint_calls(self.cloud.checkpoints, "loop-0")
        self.forget("identity")

    def forget(self, where: str) -> None:
        home = self.directory / where
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.identity = IdentityStore(str(home), Birth(self.user, self.ca_pem), "loop")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["LoopbackHost"]:
        await self.start()
        try:
            yield self
        finally:
            await self.stop()
            for task in self._agents.values():
                task.cancel()
            await asyncio.gather(*self._agents.values(), return_exceptions=True)

    async def start(self) -> None:
        """Listen: the socket is accepted raw, as the front door passes it on."""
        self._server = await asyncio.start_server(self._passed, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Be gone, with every connection."""
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.writer.transport.abort()
        await asyncio.sleep(0)

    async def _passed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from supercloud.upper.platform.link.upgrade import accept_tls

        self.connections += 1
        with contextlib.suppress(Denied, OSError):
            streams = await accept_tls(reader, writer, self.identity.context())
            try:
                self.identity.admit(tls.peer_identity(streams[1].get_extra_info("ssl_object")))
                context = {"enrolled": True}
            except Denied:
                context = {}
            peer = Peer(*streams, handlers(HOST, self.calls), accepted=True, name="host")
            peer.context.update(context)
            self._peers.add(peer)
            await peer.run()
            self._peers.discard(peer)
            while not streams[1].is_closing():
                await asyncio.sleep(0.05)  # a relay holds it; ``writer`` must outlive that

    # -- methods

    async def _info(self, _call: Call, _params: Empty) -> HostInfo:
        (host,) = self.cloud.hosts()
        used = Quota(
            cpu_permille=max(10, int(1000 * (host.cpus_total - host.cpus_free))),
            memory_bytes=host.memory_total_bytes - host.memory_free_bytes,
            disk_bytes=host.disk_total_bytes - host.disk_free_bytes,
            vms=self.cloud.options.platforms - host.platforms_free,
        )
        return HostInfo(
            instance="loop", protocol=1, region="here", jurisdiction="", accelerator="tcg",
            kernel="6", runtime_sha256="", images=list(host.images), cpus=int(host.cpus_total),
            quota=Quota(
                cpu_permille=int(1000 * host.cpus_total), memory_bytes=host.memory_total_bytes,
                disk_bytes=host.disk_total_bytes, vms=self.cloud.options.platforms,
            ),
            used=used,
            features=dict.fromkeys(("volumes", "objects", "tunnel", "checkpoints", "templates"), ""),
        )  # fmt: skip

    async def _request(self, _call: Call, _params: Empty) -> CsrResult:
        return CsrResult(csr_pem=self.identity.request())

    async def _install(self, _call: Call, given: Certificate) -> Empty:
        self.identity.install(given)
        return Empty()

    async def _create(self, _call: Call, spec: PlatformSpec) -> PlatformStatus:
        request = PlatformRequest(
            name=spec.name, host="loop-0", image=spec.image, cpus=spec.cpus,
            memory_bytes=spec.memory_bytes, scratch_bytes=spec.scratch_bytes, ports=spec.ports,
            tag=spec.tag, restore=spec.restore, config_iso=base64.b64decode(spec.config_base64),
        )  # fmt: skip
        self.cloud.create(request)
        if spec.name not in self._agents:
            self._agents[spec.name] = asyncio.ensure_future(self._agent(spec.name))
        return self._status(spec.name)

    def _status(self, name: str) -> PlatformStatus:
        platform = self.cloud.find(name)
        return PlatformStatus(
            name=name, state=platform.state, image=platform.image, cpus=platform.cpus,
            memory_bytes=platform.memory_bytes, scratch_bytes=platform.scratch_bytes,
            address="0.0.0.0", first_port=platform.first_port, ports=platform.ports,
            accelerator="tcg", created_s=1.0, reason=platform.reason, tag=platform.tag,
        )  # fmt: skip

    async def _list(self, _call: Call, _params: Empty) -> PlatformList:
        return PlatformList(platforms=[self._status(name) for name in self.cloud.platforms])

    async def _delete(self, _call: Call, asked: ByName) -> Empty:
        self.cloud.find(asked.name)
        self.cloud.delete(asked.name)
        if task := self._agents.pop(asked.name, None):
            task.cancel()
        return Empty()

    async def _console(self, call: Call, asked: ByName) -> None:
        self.cloud.find(asked.name)
        stream = call.accept({})
        await stream.write(b"login: ")
        async for data in stream.chunks():
            await stream.write(data)

    async def _tunnels(self, _call: Call, asked: TunnelApply) -> Empty:
        self.tunnels.append(asked)
        return Empty()

    async def _accept(self, _call: Call, _params: Empty) -> Detach:
        return await self.rendezvous.accept()

    async def _agent(self, name: str) -> None:
        """Dials the rendezvous over and over, as the agent in the platform would."""
        agent = FakeAgent(self.cloud, self.cloud.find(name))
        while True:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            self.rendezvous.agent(name, ours)
            await dial(agent, theirs)
            await asyncio.sleep(0.02)


def template_calls(templates: FakeTemplates, host: str) -> dict[str, Any]:
    """The pretended templates' methods as those of the wire."""

    async def prepare(_call: Call, asked: TemplateSpec) -> TemplateStatus:
        return await templates.prepare(host, asked)

    async def offer(call: Call, blob: Blob) -> Empty:
        await templates.offer(host, blob, call.accept(encode(Empty())).chunks())
        return Empty()

    return {"template.prepare": prepare, "template.blob": offer}


def volume_calls(volumes: FakeVolumes, host: str) -> dict[str, Any]:
    """The host wire's methods of volumes, over pretended ones."""

    async def opened(_call: Call, asked: VolumeOpen) -> VolumeStatus:
        return await volumes.open(host, asked)

    async def served(_call: Call, asked: VolumeServe) -> VolumeStatus:
        return await volumes.serve(
            host, asked.name, asked.epoch, mirror=asked.mirror, shared=asked.shared
        )

    async def leased(_call: Call, asked: VolumeLease) -> MirrorStatus:
        return await volumes.lease(host, asked)

    async def rejoined(_call: Call, asked: VolumeRejoin) -> MirrorStatus:
        return await volumes.rejoin(host, asked)

    async def fenced(_call: Call, asked: VolumeFence) -> Empty:
        await volumes.fence(host, asked)
        return Empty()

    async def attached(_call: Call, asked: VolumeAttach) -> VolumeStatus:
        more = {"restorable": asked.restorable}
        return await volumes.attach(host, asked.name, asked.platform, **more)

    async def detached(_call: Call, asked: ByName) -> VolumeStatus:
        return await volumes.detach(host, asked.name)

    async def closed(_call: Call, asked: ByName) -> VolumeStatus:
        return await volumes.close(host, asked.name)

    async def deleted(_call: Call, asked: ByName) -> Empty:
        await volumes.delete(host, asked.name)
        return Empty()

    async def changed(_call: Call, spec: VolumeSpec) -> VolumeStatus:
        return await volumes.change(host, spec)

    async def copied(_: Call, asked: VolumeCopy) -> VolumeStatus:
        return await volumes.fill(host, asked)

    async def listed(_call: Call, _params: Empty) -> VolumeList:
        return VolumeList(volumes=[status for _, status in await volumes.list()])

    def of_snapshot(what: str) -> Any:
        async def act(_call: Call, asked: VolumeSnapshot) -> VolumeStatus:
            status: VolumeStatus = await getattr(volumes, what)(host, asked.name, asked.snapshot)
            return status

        return act

    return {
        "volume.open": opened, "volume.serve": served, "volume.attach": attached,
        "volume.detach": detached, "volume.close": closed, "volume.delete": deleted,
        "volume.change": changed, "volume.list": listed, "volume.copy": copied,
        "volume.lease": leased, "volume.rejoin": rejoined, "volume.fence": fenced,
        **{f"volume.{what}": of_snapshot(what) for what in ("snapshot", "revert", "forget")},
    }  # fmt: skip


def object_calls(objects: FakeObjects, host: str) -> dict[str, Any]:
    """The host wire's methods of the object store, over a pretended one."""

    async def apply(_call: Call, asked: ObjectsApply) -> ObjectsStatus:
        return await objects.apply(host, asked)

    async def state(_call: Call, _params: Empty) -> ObjectsStatus:
        return await objects.state(host)

    async def credentials(_call: Call, asked: ObjectsCredentials) -> ObjectsSecret:
        return await objects.credentials(host, asked)

    async def deleted(_call: Call, asked: ObjectsDelete) -> ObjectsStatus:
        return await objects.delete(host, asked.bucket)

    async def stopped(_call: Call, _params: Empty) -> ObjectsStatus:
        return await objects.stop(host)

    async def services(_call: Call, _params: Empty) -> ServiceList:
        return ServiceList(services=[ServiceStatus(kind="objects", state="not running")])

    return {
        "objects.apply": apply, "objects.state": state, "objects.credentials": credentials,
        "objects.delete": deleted, "objects.stop": stopped, "service.list": services,
    }  # fmt: skip


def checkpoint_calls(checkpoints: FakeCheckpoints, host: str) -> dict[str, Any]:
    """The host wire's methods of checkpoints, over pretended ones."""

    async def taken(_call: Call, asked: CheckpointTake) -> CheckpointTaken:
        return await checkpoints.take(host, asked)

    async def collected(_call: Call, asked: CheckpointCollect) -> CheckpointCollected:
        return await checkpoints.collect(host, asked)

    async def verified(_call: Call, asked: RestoreFrom) -> CheckpointVerified:
        return await checkpoints.verify(host, asked)

    return {
        "platform.checkpoint": taken,
        "checkpoint.collect": collected,
        "checkpoint.verify": verified,
    }


def entry_of(host: LoopbackHost, **changes: Any) -> Entry:
    """A manifest entry that reaches it."""
    values = {"name": "h1", "kind": "lower_layer", "endpoint": f"127.0.0.1:{host.port}"}
    return Entry(**{**values, **changes})


def provider_of(
    link: Link, host: LoopbackHost, pins: MemoryPins | None = None, **changes: Any
) -> LowerLayerProvider:
    """The control plane's way to it."""
    return from_context(
        Context(
            ucloud=link.ucloud,
            entry=entry_of(host, **changes),
            authority=link.authority,
            trust_directory=str(link.directory),
            state_directory=str(link.directory / "state"),
            pins=pins or MemoryPins(),
        )
    )
