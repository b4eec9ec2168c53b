"""The way of a platform's checkpoints to their store: a real S3 server, TLS in front of it.

The platform's link network leads to our loopback, so the front listens where a link domain would.
"""

import asyncio
import contextlib
import secrets
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.s3 import S3, Bucket
from supercloud.services.checkpoint.store import Store
from supercloud.trust import tls
from supercloud.wire.checkpoints import BUCKET, StoreAccess
from supercloud.wire.places import OBJECTS_LINK_PORT
from support.link import Link
from support.s3_server import s3_server

SERVICE = "objects"


@dataclass
class StoreWay:
    """``bucket`` is what is behind; ``closed`` refuses connections as a store that is down does."""

    access: StoreAccess
    bucket: Bucket
    ucloud: str
    closed: bool = False

    def store(self) -> Store:
        """The same store, past the front."""
        return Store(S3(self.bucket), Keys(bytes.fromhex(self.access.secret), self.ucloud))


@contextlib.asynccontextmanager
async def store_way(link: Link, directory: Path) -> AsyncIterator[StoreWay]:
    """Running; one at a time on a machine, as platforms are."""
    directory.mkdir()
    with s3_server(directory, BUCKET) as bucket:
        access = StoreAccess(
            secret=secrets.token_hex(32), server_name=f"{SERVICE}.service.{link.ucloud}.supercloud.internal",
            ca_pem=link.authority.root_pem, access_key=bucket.access_key,
            secret_key=bucket.secret_key, region=bucket.region,
        )  # fmt: skip
        way = StoreWay(access, bucket, link.ucloud)
        port = int(bucket.endpoint.rpartition(":")[2])

        async def serve(reader: StreamReader, writer: StreamWriter) -> None:
            with contextlib.suppress(OSError), contextlib.closing(writer):
                if way.closed:
                    return
                there, back = await asyncio.open_connection("127.0.0.1", port)
                with contextlib.closing(back):
                    await asyncio.gather(_pump(reader, back), _pump(there, writer))

        context = tls.server_context(*link.leaf("service", SERVICE), link.authority.root_pem, False)
        server = await asyncio.start_server(
            serve, "127.0.0.1", OBJECTS_LINK_PORT, ssl=context, limit=1 << 20
        )
        try:
            yield way
        finally:
            server.close()


async def _pump(reader: StreamReader, writer: StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 18):
            writer.write(data)
            await writer.drain()
        writer.close()
