"""A blob over the agent link: TLS in TLS through a relay, against TLS alone and a bare socket.

    python bench/link_blob.py [MIB [ROUNDS]]

Control plane and relay share this process and its one thread with whoever reads by asyncio; the
agent's own reader is a thread beside it, as in a platform. What comes is discarded.
"""

import asyncio
import contextlib
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from supercloud.trust import tls
from supercloud.upper.platform.agent.fetch import Fetch, Source
from supercloud.wire.messages import Blob
from support.link import Link

PIECE = 1 << 18


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Relay one direction."""
    while data := await reader.read(PIECE):
        writer.write(data)
        await writer.drain()
    writer.close()


async def bare(path: Path) -> float:
    """Seconds for the file over a plain socket, by the same reads and writes."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with path.open("rb") as file:
            while data := file.read(PIECE):
                writer.write(data)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(
            *server.sockets[0].getsockname(), limit=1 << 20
        )
        begin = time.perf_counter()
        while await reader.read(PIECE):
            pass
        writer.close()
        return time.perf_counter() - begin


async def get(source: Source, asked: Blob) -> float:
    """Seconds for one blob, as the agent fetches it."""
    begin = time.perf_counter()
    count = 0

    def take(piece: memoryview) -> None:
        nonlocal count
        count += len(piece)

    await asyncio.to_thread(Fetch(source, asked).run, take)
    assert count == asked.size_bytes
    return time.perf_counter() - begin


@contextlib.asynccontextmanager
async def in_tls(link: Link, files: tuple[str, str]) -> AsyncIterator[Source]:
    """The way over TLS in TLS through a relay, as with a real host; for one connection."""
    parked: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    outer = tls.server_context(
        *link.leaf("host", "h1"), link.authority.root_pem, require_client=True
    )
    host = await asyncio.start_server(
        lambda r, w: parked.put_nowait((r, w)), "127.0.0.1", 0, ssl=outer, limit=1 << 20
    )
    own = link.authority.own_files(str(link.directory))
    context = tls.client_context(link.authority.root_pem, *own, check_hostname=False)
    streams = await asyncio.open_connection(
        *host.sockets[0].getsockname(), ssl=context, server_hostname="h1", limit=1 << 20
    )
    serving = asyncio.ensure_future(link.hub.serve_relayed(*streams))
    up, down = await parked.get()
    front = await asyncio.start_server(
        lambda r, w: asyncio.gather(pump(r, down), pump(up, w)), "127.0.0.1", 0, limit=1 << 20
    )
    try:
        yield replace(link.source(files), port=front.sockets[0].getsockname()[1])
    finally:
        await asyncio.wait_for(serving, 10)
        front.close()
        host.close()


async def main(mib: int, rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "blob"
        data = hashlib.shake_256(b"blob").digest(1 << 20)
        path.write_bytes(data * mib)
        digest = "sha256:" + hashlib.sha256(data * mib).hexdigest()
        asked = Blob(digest=digest, size_bytes=mib << 20)
        times: dict[str, list[float]] = {"bare socket": [], "TLS": [], "TLS in TLS, relayed": []}
        async with Link(Path(directory) / "trust").listening() as link:
            link.owner.paths[digest] = path
            files = await link.enroll("p1", link.owner.expect("p1"))
            async with link.dial(link.context(files)) as peer:
                await peer.call("agent.hello", link.hello())
                for _ in range(rounds):
                    times["bare socket"].append(await bare(path))
                    times["TLS"].append(await get(link.source(files), asked))
                    async with in_tls(link, files) as source:
                        times["TLS in TLS, relayed"].append(await get(source, asked))
        for name, seconds in times.items():
            rates = sorted(mib / each for each in seconds)
            print(
                f"{name:22} {statistics.median(rates):7.0f} MiB/s  ({rates[0]:.0f}-{rates[-1]:.0f})"
            )


if __name__ == "__main__":
    arguments = [int(each) for each in sys.argv[1:3]]
    asyncio.run(main(*arguments, *(256, 5)[len(arguments) :]))
