"""An opened image: its config and its layers, verified as they are read.

A layer is decompressed into a scratch file while both its digests (of the blob, and of the tar
inside) are computed, so nothing is used before it is known to be what the image names.
"""

import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from supercloud.model.errors import Invalid, NoResources, Unsupported
from supercloud.upper.environments.config import ImageConfig, parse_config
from supercloud.upper.environments.limits import Limits

if TYPE_CHECKING:  # the control plane looks into layouts, and has not the image builder in memory
    from supercloud.upper.platform.image.tools import ToolTree

_CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PACKED = (_GZIP, _ZSTD)


@dataclass(frozen=True)
class Blob:
    """Something to read once. ``digest`` is checked when it is given, ``size_bytes`` too."""

    open: Callable[[], BinaryIO]
    digest: str = ""
    size_bytes: int = -1


@dataclass(frozen=True)
class Source:
    """An image at its source.

    ``key`` identifies its content; ``diff_ids`` are the digests of the uncompressed layers,
    bottom first.
    """

    where: str
    key: str
    config: ImageConfig
    blobs: Sequence[Blob]
    diff_ids: Sequence[str]
    limits: Limits

    def layers(self, scratch: Path, tools: "ToolTree") -> list[Path]:
        """The layers as uncompressed tars in ``scratch``, bottom first."""
        left, paths = self.limits.total_bytes, []
        for number, (blob, diff_id) in enumerate(zip(self.blobs, self.diff_ids, strict=True)):
            path = scratch / f"layer-{number}.tar"
            digest, size_bytes = unpack(blob, path, left, tools, self.where)
            if digest != diff_id:
                raise Invalid("a layer is not the one that the config names", where=self.where)
            left -= size_bytes
            paths.append(path)
        return paths


def source(
    where: str, key: str, untrusted_config: bytes, blobs: Sequence[Blob], limits: Limits
) -> Source:
    """Check an image's config against its layers. Raises ``Invalid``, ``Unsupported``."""
    config = load_object(untrusted_config, "the image's config", where)
    if (config.get("architecture"), config.get("os")) != ("amd64", "linux"):
        made_for = f"{config.get('os')}/{config.get('architecture')}"[:100]
        raise Unsupported(f"the image is made for {made_for}, not linux/amd64", where=where)
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(blobs):
        raise Invalid("the image's config does not list its layers", where=where)
    if len(blobs) > limits.layers:
        raise NoResources(f"the image has more than {limits.layers} layers", where=where)
    checked = [check_digest(diff_id, where) for diff_id in diff_ids]
    return Source(
        where, key, parse_config(config.get("config"), where=where), blobs, checked, limits
    )


def load_object(untrusted: bytes, what: str, where: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ``Invalid``."""
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not JSON", where=where) from error
    if not isinstance(value, dict):
        raise Invalid(f"{what} is not an object", where=where)
    return value


def check_digest(untrusted: object, where: str) -> str:
    """A ``sha256:`` digest. Raises ``Invalid``, ``Unsupported`` for another algorithm."""
    if isinstance(untrusted, str) and _DIGEST.fullmatch(untrusted):
        return untrusted
    if isinstance(untrusted, str) and untrusted.startswith("sha512:"):
        raise Unsupported("the image is named by SHA-512 digests", where=where)
    raise Invalid(f"{str(untrusted)[:80]!r} is not a digest", where=where)


def unpack(
    blob: Blob, path: Path, limit_bytes: int, tools: "ToolTree", where: str
) -> tuple[str, int]:
    """Decompress and verify a blob into ``path``: digest and size of what is in it now."""
    packed, plain, size = _Hashing(blob, where), hashlib.sha256(), 0
    with blob.open() as file, path.open("wb") as out:
        for chunk in _decompressed(packed.chunks(file), path, tools, where):
            size += len(chunk)
            if size > limit_bytes:
                raise NoResources("the image is too large when unpacked", where=where)
            plain.update(chunk)
            out.write(chunk)
        packed.finish(file)
    return f"sha256:{plain.hexdigest()}", size


class _Hashing:
    """Hashes a blob as it is read, and holds it to its size and digest."""

    def __init__(self, blob: Blob, where: str) -> None:
        self.blob, self.where = blob, where
        self.digest, self.size_bytes = hashlib.sha256(), 0

    def chunks(self, file: BinaryIO) -> Iterator[bytes]:
        while chunk := file.read(_CHUNK_BYTES):
            self.digest.update(chunk)
            self.size_bytes += len(chunk)
            if 0 <= self.blob.size_bytes < self.size_bytes:
                break
            yield chunk

    def finish(self, file: BinaryIO) -> None:
        """Read what the decompressor left; then compare."""
        for _ in self.chunks(file):
            pass
        if self.blob.size_bytes not in {-1, self.size_bytes}:
            raise Invalid("a layer has another size than the manifest says", where=self.where)
        if self.blob.digest not in {"", f"sha256:{self.digest.hexdigest()}"}:
            raise Invalid("a layer's digest is not what the manifest says", where=self.where)


def _decompressed(
    chunks: Iterator[bytes], path: Path, tools: "ToolTree", where: str
) -> Iterator[bytes]:
    first = next(chunks, b"")
    joined = _chain(first, chunks)
    if first.startswith(_GZIP):
        return _gunzipped(joined, where)
    if first.startswith(_ZSTD):
        return _unzstd(joined, path.with_suffix(".zst"), tools, where)
    return joined


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _gunzipped(chunks: Iterator[bytes], where: str) -> Iterator[bytes]:
    """Several members in a row are one stream; each step's output is bounded."""
    unzip = zlib.decompressobj(31)
    try:
        for chunk in chunks:
            data = chunk
            while data:
                if unzip.eof:
                    unzip = zlib.decompressobj(31)
                yield unzip.decompress(data, _CHUNK_BYTES)
                data = unzip.unused_data if unzip.eof else unzip.unconsumed_tail
        if not unzip.eof:
            raise Invalid("a layer ends early", where=where)
    except zlib.error as error:
        raise Invalid(f"a layer is not good gzip: {error}", where=where) from error


def _unzstd(
    chunks: Iterator[bytes], packed_path: Path, tools: "ToolTree", where: str
) -> Iterator[bytes]:
    """By the tool tree's zstd; Python 3.11 has none."""
    with packed_path.open("wb") as out:
        for chunk in chunks:
            out.write(chunk)
    command = [*tools.argv("zstd"), "-d", "-c", "-q", "--memory=128MB", str(packed_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            while process.stdout and (chunk := process.stdout.read(_CHUNK_BYTES)):
                yield chunk
        except GeneratorExit:
            process.kill()  # over the limit: the rest is not wanted
            raise
    packed_path.unlink()
    if process.returncode != 0:
        raise Invalid("a layer is not good zstd", where=where)
