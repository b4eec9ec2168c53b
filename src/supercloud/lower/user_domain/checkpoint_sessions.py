"""The checkpointing service on this host: it lives for one piece of work at a time.

It is started, gets the secret of the U-Cloud's checkpoints, does what it is asked, and ends; so it
takes no memory in between, and the secret is nowhere. Its connections to the object store are made
here when it asks for them; what goes over them is between it and the store.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from supercloud.lower.user_domain.channel import Channel
from supercloud.lower.user_domain.services import Services
from supercloud.model.errors import SupercloudError, Temporary, from_wire
from supercloud.wire.checkpoints import BUCKET, StoreAccess

KIND: Final = "checkpoint"
JOB_S: Final = 3600.0
_MAX_CONNECTIONS: Final = 16

Client = Callable[[str, socket.socket], None]
"""Takes the far end of a new connection to the object store, and who it is for."""


class Sessions:
    """One is open at a time. ``ucloud`` is whose checkpoints they are."""

    def __init__(self, services: Services, client: Client, ucloud: Callable[[], str]) -> None:
        self._services, self._client, self._ucloud = services, client, ucloud
        self._lock = asyncio.Lock()
        self._present: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        services.told[KIND] = self._told

    @contextlib.asynccontextmanager
    async def open(self, access: StoreAccess, room_bytes: int = 0) -> AsyncIterator["Session"]:
        """The service, for as long as this is open; ``room_bytes`` more than what it has."""
        async with self._lock:
            channel = self._services.start(KIND)
            session = self._present = Session(channel, lambda: self._services.end(KIND))
            try:
                if room_bytes:
                    self._services.give_room(KIND, room_bytes)
                await session.configure(access, self._ucloud())
                yield session
            finally:
                self._present = None
                session.end()

    def adopt(self) -> None:
        """After a restart of this domain: nobody waits for what it does any more."""
        if self._services.is_running(KIND):
            self._services.end(KIND)

    def service_ended(self, entry: str) -> bool:
        """A domain died: True when it was the service's."""
        if self._services.kind_of(entry) != KIND:
            return False
        if self._present is not None and not self._services.is_running(KIND):
            self._present.spoil(Temporary("the checkpointing service died"))
        return True

    def _told(self, method: str, untrusted: dict[str, Any], descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)
        if method == "connection.wanted":
            wanted = untrusted.get("count")
            for _ in range(min(wanted, _MAX_CONNECTIONS) if isinstance(wanted, int) else 0):
                task = asyncio.ensure_future(self._connect())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        elif self._present is not None:
            self._present.told(method, untrusted)

    async def _connect(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._client("checkpoints", theirs)
        with ours, contextlib.suppress(SupercloudError):  # it asks again, if it is there
            await self._services.join(KIND).call("connection", {}, [ours.fileno()])


class Session:
    """The service while it works for one call. ``end`` ends its domain, once."""

    def __init__(self, channel: Channel, end: Callable[[], None]) -> None:
        self._channel, self._end = channel, end
        self._is_over = False
        self._jobs: dict[int, asyncio.Future[dict[str, Any]]] = {}

    def end(self) -> None:
        """It is gone when this returns."""
        if not self._is_over:
            self._is_over = True
            self._end()

    def told(self, method: str, untrusted: dict[str, Any]) -> None:
        """The end of a job, maybe before the answer that names it was looked at."""
        number = untrusted.get("job")
        if not isinstance(number, int):
            return
        future = self._job(number)
        if future.done():
            return
        if method == "job.done" and isinstance(untrusted.get("result"), dict):
            future.set_result(untrusted["result"])
        elif method == "job.failed":
            future.set_exception(from_wire(untrusted.get("error")))

    def _job(self, number: int) -> asyncio.Future[dict[str, Any]]:
        return self._jobs.setdefault(number, asyncio.get_running_loop().create_future())

    def spoil(self, error: SupercloudError) -> None:
        """What it works on is no good any more: it ends, and whoever waits for it gets this."""
        self.end()
        for future in self._jobs.values():
            if not future.done():
                future.set_exception(error)

    async def configure(self, access: StoreAccess, ucloud: str) -> None:
        """Give it the secret, in a memory file, and whom to expect at the store."""
        document = {
            "ucloud": ucloud,
            "secret": access.secret,
            "server_name": access.server_name,
            "ca_pem": access.ca_pem,
            "region": access.region,
            "bucket": BUCKET,
            "access_key": access.access_key,
            "secret_key": access.secret_key,
        }
        descriptor = os.memfd_create("configuration", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, json.dumps(document).encode())
            await self._channel.call("configure", {}, [descriptor])
        finally:
            os.close(descriptor)

    async def job(
        self, method: str, parameters: dict[str, Any], descriptors: list[int] | None = None
    ) -> dict[str, Any]:
        """Have it done; its result, or the error that it failed with."""
        reply = await self._channel.call(method, parameters, descriptors)
        number = int(reply.result["job"])
        future = self._job(number)
        try:
            return await asyncio.wait_for(future, JOB_S)
        except TimeoutError:
            raise Temporary(f"{method} was not done within {JOB_S:g} s") from None
        finally:
            self._jobs.pop(number, None)
