"""All routes of the API, each declared once."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from aiohttp import web

from supercloud import __version__
from supercloud.control.api import openapi, streams
from supercloud.control.api.declare import Asked, Nothing, Route
from supercloud.control.service import Manifest, Service
from supercloud.control.snapshot import Snapshot
from supercloud.model.resources import Environment
from supercloud.wire import api
from supercloud.wire.codec import Limit
from supercloud.wire.messages import Logs
from supercloud.wire.volumes import SnapshotName

WAIT_MAX_MS = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OfUCloud:
    """``ucloud`` "" is all."""

    ucloud: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateQuery:
    """Wait for another state than ``state``, at most ``wait_ms`` and ``WAIT_MAX_MS``."""

    state: str = ""
    wait_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogsQuery:
    """``tail`` last lines, -1 all."""

    follow: bool = False
    tail: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsQuery:
    """``since`` is an event's id."""

    ucloud: str = ""
    follow: bool = False
    since: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfSnapshot:
    """A snapshot of the volume, by name."""

    snapshot: SnapshotName


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """``root`` is the beginning of the root that the volume was found with."""

    root: Annotated[str, Limit(max_length=64)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToRestore:
    """``checkpoint`` 0 is the newest; ``to`` another provider for an EE, "" where it is."""

    checkpoint: Annotated[int, Limit(ge=0, le=(1 << 48) - 1)] = 0
    to: Annotated[str, Limit(max_length=63)] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected(api.EnvironmentRow):
    """An EE in all detail: its row, and its wish."""

    spec: Environment
    uid: str = ""
    mac: str = ""
    network: str = ""
    exit_status: int | None = None
    accelerator: str = ""
    memory_used_bytes: int = 0
    cpu_used_s: float = 0.0
    started_from: str = ""
    volumes: list[api.Mounted] = field(default_factory=list)
    buckets: dict[str, str] = field(default_factory=dict)  # read or write
    checkpoints: api.CheckpointsView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ca:
    """The user's root certificate."""

    ca_pem: str


@dataclass(slots=True)
class Routes:
    """The handlers; ``all`` declares them."""

    service: Service
    snapshot: Snapshot
    doctor: Callable[[], Awaitable[list[api.Check]]]
    all: tuple[Route, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Declare."""
        environment = "/v1/uclouds/{ucloud}/environments/{environment}"
        volume = "/v1/uclouds/{ucloud}/volumes/{volume}"
        bucket = "/v1/uclouds/{ucloud}/buckets/{bucket}"
        kept = "/v1/uclouds/{ucloud}/checkpoints/{name}"
        self.all = (
            Route(method="POST", path="/v1/plan", params=Manifest, result=api.Plan,
                  handle=self._plan, doc="what `up` would change"),
            Route(method="POST", path="/v1/name", params=Manifest, result=api.Named,
                  handle=self._name, doc="the U-Cloud that a manifest is of"),
            Route(method="POST", path="/v1/up", params=Manifest, result=api.Applied,
                  handle=self._up, doc="store the wish; it is worked on from then on"),
            Route(method="POST", path="/v1/uclouds/{ucloud}/down", result=api.UCloudView,
                  handle=self._down, doc="the wish is that it is not there; data is kept"),
            Route(method="POST", path="/v1/uclouds/{ucloud}/purge",
                  handle=self._purge, doc="likewise, and its volumes and buckets"),
            Route(method="GET", path="/v1/uclouds", result=list[api.UCloudView],
                  handle=self._uclouds, doc="all U-Clouds"),
            Route(method="GET", path="/v1/uclouds/{ucloud}", result=api.UCloudView,
                  handle=self._ucloud, doc="one U-Cloud, with progress"),
            Route(method="GET", path="/v1/uclouds/{ucloud}/state", params=StateQuery,
                  handle=self._state, doc="its state, as soon as that is another one"),
            Route(method="GET", path="/v1/environments", params=OfUCloud,
                  result=list[api.EnvironmentRow], handle=self._environments,
                  doc="the rows of `ps`"),
            Route(method="GET", path=environment, result=Inspected,
                  handle=self._environment, doc="one EE in all detail"),
            Route(method="GET", path=environment + "/logs", params=LogsQuery,
                  stream="application/octet-stream", handle=self._logs, doc="its output"),
            Route(method="GET", path=environment + "/exec", stream="websocket",
                  handle=self._exec, doc="run a program in it"),
            Route(method="GET", path=environment + "/console", stream="websocket",
                  handle=self._console, doc="a VM's serial console"),
            Route(method="GET", path="/v1/volumes", params=OfUCloud, result=list[api.VolumeRow],
                  handle=self._volumes, doc="all volumes, also of U-Clouds that are not up"),
            Route(method="GET", path=volume, result=api.VolumeView,
                  handle=self._volume, doc="one volume in all detail"),
            Route(method="POST", path=volume + "/snapshot", params=OfSnapshot,
                  result=api.VolumeView, handle=self._snapshot, doc="make a snapshot"),
            Route(method="POST", path=volume + "/revert", params=OfSnapshot,
                  result=api.VolumeView, handle=self._revert,
                  doc="go back to a snapshot; while nobody uses the volume"),
            Route(method="POST", path=volume + "/forget", params=OfSnapshot,
                  result=api.VolumeView, handle=self._forget, doc="delete a snapshot"),
            Route(method="POST", path=volume + "/backup", result=api.VolumeView,
                  handle=self._backup, doc="make a backup into it"),
            Route(method="POST", path=volume + "/delete", handle=self._delete,
                  doc="with all that is in it"),
            Route(method="POST", path=volume + "/accept", params=Accepted,
                  result=api.VolumeView, handle=self._accept,
                  doc="take a volume that was refused as it is, without what is missing in it"),
            Route(method="POST", path="/v1/uclouds/{ucloud}/rotate-key", result=api.Rotated,
                  handle=self._rotate_key, doc="wrap the keys of its volumes anew"),
            Route(method="GET", path="/v1/buckets", params=OfUCloud, result=list[api.BucketRow],
                  handle=self._buckets, doc="all buckets, also of U-Clouds that are not up"),
            Route(method="GET", path=bucket, result=api.BucketView,
                  handle=self._bucket, doc="one bucket in all detail"),
            Route(method="POST", path=bucket + "/delete", handle=self._delete_bucket,
                  doc="with all that is in it"),
            Route(method="GET", path="/v1/checkpoints", params=OfUCloud,
                  result=list[api.CheckpointsRow], handle=self._checkpoints,
                  doc="of what there are checkpoints, also of U-Clouds that are not up"),
            Route(method="GET", path=kept, result=api.CheckpointsView,
                  handle=self._kept, doc="all checkpoints of an EE or a platform"),
            Route(method="POST", path=kept + "/take", result=api.CheckpointTask,
                  handle=self._take, doc="take one; answers at once"),
            Route(method="POST", path=kept + "/restore", params=ToRestore,
                  result=api.Restoring, handle=self._restore,
                  doc="make it anew from one; answers when that is decided"),
            Route(method="POST", path=kept + "/delete", handle=self._delete_checkpoints,
                  doc="all of them; while none are to be taken"),
            Route(method="POST", path="/v1/uclouds/{ucloud}/forget-checkpoints",
                  handle=self._forget_checkpoints,
                  doc="all checkpoints of a U-Cloud that is going or gone"),
            Route(method="GET", path="/v1/services", params=OfUCloud,
                  result=list[api.ServiceRow], handle=self._services,
                  doc="the services of U-Clouds on their hosts, as they say now"),
            Route(method="GET", path="/v1/events", params=EventsQuery,
                  stream="application/jsonl", handle=self._events, doc="what happened"),
            Route(method="GET", path="/v1/ca", result=Ca, handle=self._ca,
                  doc="the user's root certificate, for providers to enrol"),
            Route(method="GET", path="/v1/version", result=api.Version,
                  handle=self._version, doc="what is running here"),
            Route(method="GET", path="/v1/doctor", result=list[api.Check],
                  handle=self._doctor, doc="what this machine can do, and how to fix the rest"),
            Route(method="GET", path="/v1/openapi.json", handle=self._openapi,
                  doc="this document"),
        )  # fmt: skip

    async def _plan(self, asked: Asked[Manifest]) -> api.Plan:
        return await self.service.plan(asked.params, asked.caller.may)

    async def _name(self, asked: Asked[Manifest]) -> api.Named:
        return await self.service.name(asked.params, asked.caller.may)

    async def _up(self, asked: Asked[Manifest]) -> api.Applied:
        return await self.service.up(asked.params, asked.caller.may)

    async def _down(self, asked: Asked[Nothing]) -> api.UCloudView:
        return await self.service.down(asked.at["ucloud"])

    async def _purge(self, asked: Asked[Nothing]) -> dict[str, str]:
        name = asked.at["ucloud"]
        view = await self.service.purge(name)
        return {"ucloud": name, "state": view.state if view else "gone"}

    async def _uclouds(self, asked: Asked[Nothing]) -> list[api.UCloudView]:
        return await self.service.uclouds(asked.caller.scope)

    async def _ucloud(self, asked: Asked[Nothing]) -> api.UCloudView:
        return await self.service.ucloud(asked.at["ucloud"])

    async def _state(self, asked: Asked[StateQuery]) -> dict[str, str]:
        wait_s = min(max(asked.params.wait_ms, 0), WAIT_MAX_MS) / 1000
        name, left = asked.at["ucloud"], asked.params.state
        return {"ucloud": name, "state": await self.service.state(name, left, wait_s)}

    async def _environments(self, asked: Asked[OfUCloud]) -> web.Response:
        ucloud = asked.params.ucloud
        if ucloud:
            asked.caller.may(ucloud)
        body = await self.snapshot.environments(ucloud or asked.caller.scope)
        return web.Response(body=body, content_type="application/json")

    async def _environment(self, asked: Asked[Nothing]) -> dict[str, object]:
        return await self.service.environment(asked.at["ucloud"], asked.at["environment"])

    async def _volumes(self, asked: Asked[OfUCloud]) -> list[api.VolumeRow]:
        ucloud = asked.params.ucloud
        if ucloud:
            asked.caller.may(ucloud)
        return await self.service.volumes.rows(ucloud or asked.caller.scope)

    async def _volume(self, asked: Asked[Nothing]) -> api.VolumeView:
        return await self.service.volumes.volume(*_volume_of(asked))

    async def _snapshot(self, asked: Asked[OfSnapshot]) -> api.VolumeView:
        return await self._task(asked, "snapshot")

    async def _revert(self, asked: Asked[OfSnapshot]) -> api.VolumeView:
        return await self._task(asked, "revert")

    async def _forget(self, asked: Asked[OfSnapshot]) -> api.VolumeView:
        return await self._task(asked, "forget")

    async def _backup(self, asked: Asked[Nothing]) -> api.VolumeView:
        return await self.service.volumes.task(*_volume_of(asked), "backup", "")

    async def _task(self, asked: Asked[OfSnapshot], what: str) -> api.VolumeView:
        volumes = self.service.volumes
        return await volumes.task(*_volume_of(asked), what, asked.params.snapshot)

    async def _delete(self, asked: Asked[Nothing]) -> dict[str, str]:
        await self.service.volumes.delete(*_volume_of(asked))
        return {"volume": asked.at["volume"], "state": "deleting"}

    async def _accept(self, asked: Asked[Accepted]) -> api.VolumeView:
        return await self.service.volumes.accept(*_volume_of(asked), asked.params.root)

    async def _rotate_key(self, asked: Asked[Nothing]) -> api.Rotated:
        return await self.service.volumes.rotate_key(asked.at["ucloud"])

    async def _buckets(self, asked: Asked[OfUCloud]) -> list[api.BucketRow]:
        ucloud = asked.params.ucloud
        if ucloud:
            asked.caller.may(ucloud)
        return await self.service.buckets.rows(ucloud or asked.caller.scope)

    async def _bucket(self, asked: Asked[Nothing]) -> api.BucketView:
        return await self.service.buckets.bucket(asked.at["ucloud"], asked.at["bucket"])

    async def _delete_bucket(self, asked: Asked[Nothing]) -> dict[str, str]:
        await self.service.buckets.delete(asked.at["ucloud"], asked.at["bucket"])
        return {"bucket": asked.at["bucket"], "state": "deleting"}

    async def _checkpoints(self, asked: Asked[OfUCloud]) -> list[api.CheckpointsRow]:
        ucloud = asked.params.ucloud
        if ucloud:
            asked.caller.may(ucloud)
        return await self.service.checkpoints.rows(ucloud or asked.caller.scope)

    async def _kept(self, asked: Asked[Nothing]) -> api.CheckpointsView:
        return await self.service.checkpoints.view(*_kept_of(asked))

    async def _take(self, asked: Asked[Nothing]) -> api.CheckpointTask:
        return await self.service.checkpoints.take(*_kept_of(asked))

    async def _restore(self, asked: Asked[ToRestore]) -> api.Restoring:
        wanted = asked.params
        return await self.service.restores.restore(*_kept_of(asked), wanted.checkpoint, wanted.to)

    async def _delete_checkpoints(self, asked: Asked[Nothing]) -> dict[str, str]:
        await self.service.checkpoints.delete(*_kept_of(asked))
        return {"name": asked.at["name"], "state": "deleting"}

    async def _forget_checkpoints(self, asked: Asked[Nothing]) -> dict[str, int]:
        return {"deleting": await self.service.checkpoints.forget(asked.at["ucloud"])}

    async def _services(self, asked: Asked[OfUCloud]) -> list[api.ServiceRow]:
        ucloud = asked.params.ucloud
        if ucloud:
            asked.caller.may(ucloud)
        return await self.service.buckets.services(ucloud or asked.caller.scope)

    async def _logs(self, asked: Asked[LogsQuery]) -> web.StreamResponse:
        query = asked.params
        wanted = Logs(name=asked.at["environment"], follow=query.follow, tail=query.tail)
        return await streams.logs(self.service, asked, wanted)

    async def _exec(self, asked: Asked[Nothing]) -> web.WebSocketResponse:
        return await streams.run(self.service, asked)

    async def _console(self, asked: Asked[Nothing]) -> web.WebSocketResponse:
        return await streams.console(self.service, asked)

    async def _events(self, asked: Asked[EventsQuery]) -> web.StreamResponse:
        query = asked.params
        if query.ucloud:
            asked.caller.may(query.ucloud)
        ucloud = query.ucloud or asked.caller.scope
        log = self.service.events
        return await streams.events(log, asked, ucloud, query.since, follow=query.follow)

    async def _ca(self, _asked: Asked[Nothing]) -> Ca:
        return Ca(ca_pem=self.service.ca_pem())

    async def _version(self, _asked: Asked[Nothing]) -> api.Version:
        return api.Version(version=__version__, pid=os.getpid())

    async def _doctor(self, _asked: Asked[Nothing]) -> list[api.Check]:
        return await self.doctor()

    async def _openapi(self, _asked: Asked[Nothing]) -> dict[str, Any]:
        return openapi.document(self.all)


def _volume_of(asked: Asked[Any]) -> tuple[str, str]:
    return asked.at["ucloud"], asked.at["volume"]


def _kept_of(asked: Asked[Any]) -> tuple[str, str]:
    return asked.at["ucloud"], asked.at["name"]


def encode(result: object) -> bytes:
    """A result as JSON."""
    return msgspec.json.encode(result)
