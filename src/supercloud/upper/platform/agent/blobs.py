"""Content-addressed files, pulled over the link; nothing is used before its hash is right."""

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable

from supercloud.model.errors import Invalid, NoResources, Temporary
from supercloud.upper.platform.agent import paths
from supercloud.wire.codec import encode
from supercloud.wire.messages import Blob
from supercloud.wire.peer import Peer

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
    """``peer`` gives the present connection to the control plane, or raises Temporary."""

    def __init__(self, peer: Callable[[], Peer]) -> None:
        self._peer = peer
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
            wanted = Blob(digest=blob.digest, size_bytes=blob.size_bytes, offset_bytes=offset)
            async with self._peer().open("blob.get", encode(wanted)) as stream:
                with open(part, "ab") as file:
                    async for chunk in stream.chunks():
                        offset += len(chunk)
                        if offset > blob.size_bytes:
                            os.unlink(part)
                            raise Invalid(f"{blob.digest} has more than {blob.size_bytes} bytes")
                        hasher.update(chunk)
                        file.write(chunk)
            if offset < blob.size_bytes:
                raise Temporary(f"{blob.digest}: {offset} of {blob.size_bytes} bytes came")
            if f"sha256:{hasher.hexdigest()}" != blob.digest:
                os.unlink(part)
                raise Invalid(f"what came as {blob.digest} has another hash")
            os.chmod(part, 0o444)  # opened again by /proc/self/fd in QEMU; the directory is closed
            os.rename(part, path)
            return path

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
