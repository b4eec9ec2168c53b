"""The replicas of a volume on other hosts than the one where it is used: each with key and seal.

They are opened anew each time that they are served: what was in older connections is never served.
One that was refused and is not in sync is made anew, for others have all of it.
"""

import base64
from collections.abc import Awaitable, Callable
from typing import TypeVar

from supercloud.control.controllers import learning, record
from supercloud.control.controllers.hostcalls import HostCalls, wire_spec
from supercloud.control.controllers.plane import Plane
from supercloud.control.controllers.record import other_of
from supercloud.control.documents import ReplicaDocument, VolumeDocument
from supercloud.model.errors import Denied, NotFound, SupercloudError
from supercloud.model.events import Severity
from supercloud.providers.base import Volumes
from supercloud.wire.mirrors import Shared
from supercloud.wire.volumes import Seal, VolumeOpen, VolumeStatus

Result = TypeVar("Result")


class Others:
    """Acts on one replica at a time; who calls holds the volume's lock."""

    def __init__(self, plane: Plane, calls: HostCalls) -> None:
        """``calls`` is what the reconciler of volumes acts through, too."""
        self._plane, self._calls = plane, calls

    async def open(self, volume: VolumeDocument, other: ReplicaDocument) -> bool:
        """Whether it is open, anew: what was in older connections is never served."""
        name = other.replica
        try:
            await self.close(volume, other)
            other = await self._renewed(volume, name)
            if other.refused:
                return False

            def opening(fresh: VolumeDocument) -> None:
                other_of(fresh, name).opened = True

            volume = await self._change(volume, opening)
            asked = asked_of(self._plane, volume, other_of(volume, name))
            status = await self._at(
                volume, other, "open", lambda there: there.open(other.host, asked)
            )
        except SupercloudError as error:
            refused = isinstance(error, Denied | NotFound) and learning.is_of_the_volume(error)
            await self.note(volume, name, error, refused=refused and bool(other.seal.root))
            return False
        return await self._learn(volume, name, status)

    async def _renewed(self, volume: VolumeDocument, name: str) -> ReplicaDocument:
        """One that was refused, and is not in sync, is made anew: others have it all."""
        other = other_of(volume, name)
        if other.refused and not other.in_sync:
            host = other.host
            await self._at(volume, other, "delete", lambda there: there.delete(host, volume.name))
            self._tell(volume, "renewed", f"at {host}, where {other.refused}", "error")

            def renewed(fresh: VolumeDocument) -> None:
                replica = other_of(fresh, name)
                replica.seal, replica.wrapped_key = Seal(), ""
                replica.opened, replica.refused = False, ""

            volume = await self._change(volume, renewed)
        other = other_of(volume, name)
        if other.wrapped_key:
            return other
        made = self._plane.keys(volume.ucloud).make()

        def keyed(fresh: VolumeDocument) -> None:
            replica = other_of(fresh, name)
            replica.wrapped_key = replica.wrapped_key or made

        return other_of(await self._change(volume, keyed), name)

    async def share(self, volume: VolumeDocument, other: ReplicaDocument) -> bool:
        """Whether it is served to the host where the volume is used."""
        home = await self._plane.pool.get(volume.ucloud, volume.provider).peer(volume.host)
        shared = Shared(host=home.name, generation=volume.generation)
        name, epoch = volume.name, other.seal.epoch
        try:
            status = await self._at(
                volume,
                other,
                "serve",
                lambda there: there.serve(other.host, name, epoch, shared=shared),
            )
        except SupercloudError as error:
            await self.note(volume, other.replica, error, refused=False)
            return False
        return await self._learn(volume, other.replica, status)

    async def _learn(self, volume: VolumeDocument, name: str, status: VolumeStatus) -> bool:
        wrong = ""

        def learned(fresh: VolumeDocument) -> None:
            nonlocal wrong
            wrong = record.take(other_of(fresh, name), status)

        await self._change(volume, learned)
        if wrong:
            self._tell(volume, "evidence", f"replica {name}: {wrong}", "error")
        return not wrong

    async def learn_listed(
        self, volume: VolumeDocument, name: str, status: VolumeStatus, valid: Callable[[], bool]
    ) -> None:
        """What a host's list says of another replica; see ``hostcalls``."""
        if valid() and status.seal.root:
            await self._learn(volume, name, status)

    async def note(
        self, volume: VolumeDocument, name: str, error: SupercloudError, *, refused: bool
    ) -> None:
        """Keep why it is not there, and tell of it once."""
        before = other_of(volume, name)

        def noted(fresh: VolumeDocument) -> None:
            other = other_of(fresh, name)
            other.reason = str(error)
            if refused:
                other.refused = str(error)

        if (before.reason, bool(before.refused)) != (str(error), refused):
            await self._change(volume, noted)
            severity: Severity = "error" if refused else "warning"
            self._tell(volume, "away", f"replica {name} at {before.host}: {error}", severity)

    async def close(self, volume: VolumeDocument, other: ReplicaDocument) -> None:
        """In order, if that can be had: its last seal is kept."""
        if not other.opened:
            return
        host, name = other.host, other.replica
        try:
            status = await self._at(
                volume, other, "close", lambda there: there.close(host, volume.name)
            )
        except NotFound:
            status = None

        def closed(fresh: VolumeDocument) -> None:
            replica = other_of(fresh, name)
            if status is None:
                replica.opened = replica.kept = False
            else:
                record.ended(replica, status)
                record.take(replica, status)

        await self._change(volume, closed)

    async def delete(self, volume: VolumeDocument) -> None:
        """Whatever other hosts have of it."""
        for other in volume.others:
            if other.opened or other.seal.root:
                host = other.host
                delete = _deleting(host, volume.name)
                await self._at(volume, other, "delete", delete)

    async def _at(
        self,
        volume: VolumeDocument,
        other: ReplicaDocument,
        what: str,
        call: Callable[[Volumes], Awaitable[Result]],
    ) -> Result:
        there = await self._calls.volumes_of(volume.ucloud, other.provider)
        with self._calls.calling(volume):
            return await self._plane.seam(f"provider.volume_{what}", lambda: call(there))

    async def _change(
        self, volume: VolumeDocument, mutate: Callable[[VolumeDocument], object]
    ) -> VolumeDocument:
        return await self._plane.state.change(volume, mutate)

    def _tell(self, volume: VolumeDocument, code: str, message: str, severity: Severity) -> None:
        self._plane.tell(volume, f"volume.replica_{code}", message, severity)


def asked_of(plane: Plane, volume: VolumeDocument, replica: record.Replica) -> VolumeOpen:
    """What its host is asked to open."""
    key = plane.keys(volume.ucloud).unwrap(replica.wrapped_key)
    encoded = base64.b64encode(key).decode()
    return VolumeOpen(spec=wire_spec(volume), key_base64=encoded, seal=replica.seal)


def _deleting(host: str, name: str) -> Callable[[Volumes], Awaitable[None]]:
    return lambda there: there.delete(host, name)
