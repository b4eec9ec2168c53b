"""Content-addressed files, pulled over the link; nothing is used before its hash is right."""

import asyncio
import contextlib
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from supercloud.model.errors import Invalid, NoResources, Temporary
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.deposits import Deposits
from supercloud.upper.platform.agent.fetch import Fetch, Source
from supercloud.wire.messages import Blob

PARALLEL = 3
KEEP_UNUSED_S = 60.0
SPARE_BYTES = 64 << 20
_HASH_STEP_BYTES = 1 << 20


def path_of(digest: str) -> str:
    """Where a blob is once it is complete; Invalid for what is no digest.

    In memory, when the template had it; else on scratch.
    """
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise Invalid(f"{digest!r:.80} is no digest")
    name = digest.removeprefix("sha256:")
    prepared = f"{paths.PREPARED}/{name}"
    return prepared if os.path.exists(prepared) else f"{paths.BLOBS}/{name}"


class Blobs:
    """``source`` says where the control plane is at present, or raises Temporary.

    What can come by ``deposits`` does; the rest is pulled.
    """

    def __init__(self, source: Callable[[], Source], deposits: Deposits | None = None) -> None:
        self._source, self._deposits = source, deposits
        self._slots = asyncio.Semaphore(PARALLEL)
        self._pulls: dict[str, asyncio.Task[str]] = {}

    async def get(self, blob: Blob) -> str:
        """The path of the complete, verified file; pulls it when it is not here.

        Callers that want the same blob share one pull; it goes on while one of them waits.
        """
        path = path_of(blob.digest)
        if os.path.exists(path):
            return path
        task = self._pulls.get(blob.digest)
        if task is None or task.done():
            task = self._pulls[blob.digest] = asyncio.ensure_future(self._pull(blob, path))
            task.add_done_callback(lambda _: self._pulls.pop(blob.digest, None))
        return await asyncio.shield(task)

    async def _pull(self, blob: Blob, path: str) -> str:
        async with self._slots:
            part = f"{path}.part"
            hasher = await _hash_of_part(part, blob.size_bytes)
            offset = os.stat(part).st_size
            _check_space(blob.size_bytes - offset)
            await self._fetch(blob, part, hasher)
            if f"sha256:{hasher.hexdigest()}" != blob.digest:
                os.unlink(part)
                if self._deposits:
                    self._deposits.forgo()
                raise Invalid(f"what came as {blob.digest} has another hash")
            os.chmod(part, 0o444)  # opened again by /proc/self/fd in QEMU; the directory is closed
            os.rename(part, path)
            return path

    async def _fetch(self, blob: Blob, part: str, hasher: "hashlib._Hash") -> None:
        """Append what is missing; the thread has ended when this returns or is cancelled."""
        with open(part, "ab", buffering=0) as file:

            def take(piece: memoryview) -> None:
                if file.tell() + len(piece) > blob.size_bytes:
                    os.unlink(part)
                    raise Invalid(f"{blob.digest} has more than {blob.size_bytes} bytes")
                hasher.update(piece)
                _write(file, piece)

            if self._deposits:
                await self._deposits.get(blob, take, file.tell)
                if file.tell() == blob.size_bytes:
                    return
            wanted = replace(blob, offset_bytes=file.tell())
            fetch = Fetch(self._source(), wanted)
            running = asyncio.ensure_future(asyncio.to_thread(fetch.run, take))
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                fetch.cancel()
                await asyncio.wait({running})  # it writes to the file
                raise
            if file.tell() < blob.size_bytes:
                raise Temporary(f"{blob.digest}: {file.tell()} of {blob.size_bytes} bytes came")

    def collect(self, used: Iterable[str]) -> list[str]:
        """Remove blobs that no EE uses and nobody touched for a while; their file names."""
        keep = {os.path.basename(path_of(digest)) for digest in used}
        pulled = {os.path.basename(path_of(digest)) for digest in self._pulls}
        removed = []
        for path in _present():
            name = os.path.basename(path)
            if name.removesuffix(".part") in keep | pulled:
                os.utime(path)
                continue
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(path).st_mtime > KEEP_UNUSED_S:
                    os.unlink(path)
                    removed.append(name)
        return removed


def _present() -> list[str]:
    """The files of all blobs."""
    places = [place for place in (paths.BLOBS, paths.PREPARED) if os.path.isdir(place)]
    return [f"{place}/{name}" for place in places for name in os.listdir(place)]


def _write(file: io.FileIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


async def _hash_of_part(part: str, size_bytes: int) -> "hashlib._Hash":
    """The state of the hash after what an interrupted pull left; makes the file if need be."""
    hasher = hashlib.sha256()
    with open(part, "a+b") as file:
        os.chmod(part, 0o600)
        if file.tell() >= size_bytes:
            file.truncate(0)
        file.seek(0)
        while data := file.read(_HASH_STEP_BYTES):
            hasher.update(data)
            await asyncio.sleep(0)
    return hasher


def _check_space(needed_bytes: int) -> None:
    disk = os.statvfs(paths.BLOBS)
    free_bytes = disk.f_bavail * disk.f_frsize
    if needed_bytes + SPARE_BYTES > free_bytes:
        raise NoResources(
            f"an image needs {needed_bytes} bytes more, the scratch disk has {free_bytes}",
            hint="give the platform a larger scratch disk",
        )
