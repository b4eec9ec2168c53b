"""Our half of the object store, a loop in a thread of its own: metadata, quotas, gate."""

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from supercloud.model.errors import NotFound
from supercloud.services.objects.gate import Gate
from supercloud.services.objects.journal import Journal, Position
from supercloud.services.objects.metadata import Metadata
from supercloud.services.objects.quota import Book
from supercloud.services.objects.tables import SET, Change, Usage
from supercloud.services.objects.weed import LIFECYCLE_CURSORS

_RECORDS: Final = b"supercloud:records"  # no path: weed asks for nothing of that name
_CALL_S: Final = 25.0
T = TypeVar("T")


class Front:
    """Opens the journal in ``directory`` and listens for weed at ``store_socket``.

    All methods may be called from any thread but the loop's. ``failed`` is called on the loop's.
    """

    def __init__(
        self,
        *,
        directory: str,
        key: bytes,
        least: Position,
        context: ssl.SSLContext,
        store_socket: str,
        s3_port: int,
        failed: Callable[[OSError], None],
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="objects", daemon=True)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._metadata = Metadata(Journal(self._directory, key, least=least), failed)
        except BaseException:
            os.close(self._directory)
            self._loop.close()
            raise
        tables = self._metadata.tables
        self._book = Book(lambda bucket: self._usage(bucket).charged_bytes)
        tables.changed = lambda _bucket: self._book.wake()
        self._gate = Gate(context, self._book, tables.content_bytes, ("127.0.0.1", s3_port))
        self._thread.start()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(store_socket)
        self._server = self._call(self._metadata.serve(store_socket))

    @property
    def position(self) -> Position:
        """How far the journal is safe: what the user keeps against a roll-back."""
        return self._metadata.journal.position

    @property
    def journal_bytes(self) -> int:
        """Of the journal on the disk."""
        return self._metadata.journal.size_bytes

    def connect(self) -> int:
        """The client's end of a new connection to the S3 port; the caller's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        try:
            self._call(self._gate.accept(ours))
        except BaseException:
            theirs.close()
            raise
        return theirs.detach()

    def accept(self, descriptor: int) -> None:
        """Serve a client's connection, which is this one's from now on."""
        connection = socket.socket(fileno=descriptor)
        connection.setblocking(False)
        try:
            self._call(self._gate.accept(connection))
        except BaseException:
            connection.close()
            raise

    def present(self, context: ssl.SSLContext) -> None:
        """Show clients that come from now on another certificate."""

        async def change() -> None:
            self._gate.context = context

        self._call(change())

    def set_quotas(self, quotas: dict[str, int]) -> None:
        """The buckets that there are, and what each may hold."""

        async def change() -> None:
            self._book.quotas = dict(quotas)
            self._book.wake()

        self._call(change())

    def usage(self, bucket: str) -> Usage:
        """What a bucket holds."""

        async def look() -> Usage:
            return self._usage(bucket)

        return self._call(look())

    def records(self) -> bytes:
        """What ``keep`` was given last."""
        return self._metadata.tables.values.get(_RECORDS, b"")

    def keep(self, records: bytes) -> None:
        """Store the service's own records; safe on the disk on return."""

        async def store() -> None:
            self._metadata.make(Change(SET, _RECORDS, records))
            await self._metadata.flushed()

        self._call(store())

    def forget_lifecycle(self) -> None:
        """Have weed look at every object again for what is due: see ``weed.LIFECYCLE_CURSORS``."""

        async def forget() -> None:
            self._metadata.forget(LIFECYCLE_CURSORS)

        self._call(forget())

    def close(self) -> None:
        """End connections, flush."""

        async def end() -> None:
            await self._gate.close()
            self._server.close()
            await self._metadata.close()

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        os.close(self._directory)

    def _usage(self, bucket: str) -> Usage:
        return self._metadata.tables.usage.get(bucket) or Usage()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise NotFound("the object store is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)
