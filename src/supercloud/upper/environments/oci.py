"""Container images to erofs: any OCI reference becomes one content-addressed, read-only file.

::

    oci:DIR[:tag]  docker-archive:FILE  docker://host[:port]/name[:tag]  name[:tag]
        --references--> what it names
        --pull (registries)--> an OCI layout
        --layouts, archives--> config, layers verified against their digests
        --layers--> one tree: whiteouts, opaque directories, hard links
        --mkfs.erofs--> CACHE/erofs/SHA256

The result is cached by the digest of the source's manifest, so the same image costs one look-up.
"""

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from supercloud.upper.environments import archives, layouts, pull
from supercloud.upper.environments.config import ImageConfig, parse_config
from supercloud.upper.environments.filesystem import write_erofs
from supercloud.upper.environments.layers import merge
from supercloud.upper.environments.limits import LIMITS, Limits
from supercloud.upper.environments.references import Reference, parse_reference
from supercloud.upper.environments.sources import Source
from supercloud.upper.platform.image.scratch import scratch
from supercloud.upper.platform.image.tools import ToolTree

_FORMAT = "1"  # of the conversion: part of the cache's key


@dataclass(frozen=True)
class ConvertedImage:
    """``digest`` is ``sha256:`` of the erofs file at ``path``."""

    digest: str
    path: Path
    size_bytes: int
    config: ImageConfig


def convert(ref: str, *, cache: Path, tools: ToolTree, limits: Limits = LIMITS) -> ConvertedImage:
    """Convert the image that ``ref`` names; blocks.

    Raises ``Invalid`` for a bad reference or image, ``NotFound``, ``NoResources`` for an image
    over the limits, ``Unsupported`` for another architecture, ``Temporary`` when a registry does
    not answer.
    """
    reference = parse_reference(ref)
    if found := _by_digest(cache, reference):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with scratch(cache, ".convert-") as place:
        key, opened = _open(reference, place, tools, limits)
        with _one_at_a_time(cache, key):
            found = _cached(cache, key, ref)
            return found or _convert(cache, opened(), place, tools)


def look(ref: str, *, cache: Path, tools: ToolTree, timeout_s: float) -> None:
    """Whether a registry has the image that ``ref`` names, and could be converted; blocks.

    Raises as ``convert``: ``Temporary`` when that cannot be found out now.
    """
    reference = parse_reference(ref)
    if _by_digest(cache, reference):
        return
    cache.mkdir(parents=True, exist_ok=True)
    with scratch(cache, ".look-") as place:
        pull.resolve(reference, tools, place, LIMITS, timeout_s)


async def convert_async(ref: str, *, cache: Path, tools: ToolTree) -> ConvertedImage:
    """As ``convert``, in a thread."""
    return await asyncio.to_thread(convert, ref, cache=cache, tools=tools)


def _open(
    reference: Reference, place: Path, tools: ToolTree, limits: Limits
) -> tuple[str, Callable[[], Source]]:
    """The key of what a reference names, and how to get at it."""
    if reference.transport == "docker":
        digest = pull.resolve(reference, tools, place, limits)
        return digest, lambda: pull.pull(reference, digest, tools, place, limits)
    if reference.transport == "docker-archive":
        source = archives.open_archive(reference, place, tools, limits)
    else:
        root = Path(reference.place)
        source = layouts.open_layout(root, reference.tag, limits, where=reference.text)
    return source.key, lambda: source


def _convert(cache: Path, source: Source, place: Path, tools: ToolTree) -> ConvertedImage:
    layers = source.layers(place, tools)
    made = place / "root.erofs"
    with merge(layers, source.limits, where=source.where) as tree:
        write_erofs(tree, made, source.key, tools)
    with made.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file)  # before a note says that it is there
    path = cache / "erofs" / sha256
    path.parent.mkdir(exist_ok=True)
    made.replace(path)
    _remember(cache, source, sha256)
    return ConvertedImage(f"sha256:{sha256}", path, path.stat().st_size, source.config)


def _note(cache: Path, key: str) -> Path:
    name = hashlib.sha256(f"{_FORMAT} {key}".encode()).hexdigest()
    return cache / "converted" / f"{name}.json"


def _remember(cache: Path, source: Source, sha256: str) -> None:
    note = _note(cache, source.key)
    note.parent.mkdir(exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"erofs": sha256, "config": source.config.oci()}))
    partial.replace(note)


def _cached(cache: Path, key: str, where: str) -> ConvertedImage | None:
    note = _note(cache, key)
    if not note.exists():
        return None
    found = json.loads(note.read_text())
    path = cache / "erofs" / str(found["erofs"])
    if not path.exists():
        return None
    config = parse_config(found["config"], where=where)
    return ConvertedImage(f"sha256:{path.name}", path, path.stat().st_size, config)


def _by_digest(cache: Path, reference: Reference) -> ConvertedImage | None:
    """What a remote image that is named by its digest was converted to: no registry is asked."""
    return _cached(cache, reference.digest, reference.text) if reference.digest else None


@contextmanager
def _one_at_a_time(cache: Path, key: str) -> Iterator[None]:
    """Two conversions of one image, in two processes even: the second finds the first's result."""
    path = cache / f".lock-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
