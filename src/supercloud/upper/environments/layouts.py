"""OCI image layouts: a directory of blobs named by their digests."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from supercloud.model.errors import Invalid, NoResources, NotFound, Unsupported
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.sources import Blob, Source, check_digest, load_object, source

_REF_NAME = "org.opencontainers.image.ref.name"
_INDEXES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_MAX_MANIFESTS = 1024


def open_layout(root: Path, tag: str, limits: Limits, *, where: str, key: str = "") -> Source:
    """Open the image ``tag`` (or the only one) of the layout ``root``.

    ``key`` stands for the digest of the manifest where the layout is a mere copy of the source.
    """
    if not (root / "oci-layout").is_file():
        hint = "an OCI layout is a directory with oci-layout, index.json and blobs"
        raise NotFound(f"there is no OCI layout at {root}", where=where, hint=hint)
    index = load_object(_read(root / "index.json", limits, where), "index.json", where)
    entry = _tagged(index, tag, where)
    for _ in range(limits.index_depth):
        manifest = _load(root, entry, limits, where)
        if "manifests" not in manifest:
            return _source(
                root, manifest, key or check_digest(entry["digest"], where), limits, where
            )
        entry = for_this_platform(manifest, where)
    raise Invalid("the image's indexes are nested too deep", where=where)


def for_this_platform(untrusted_index: dict[str, Any], where: str) -> dict[str, Any]:
    """The entry of an image index for linux/amd64. Raises ``Unsupported``."""
    for entry in _entries(untrusted_index, where):
        platform = entry.get("platform")
        if not isinstance(platform, dict):
            continue
        if (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
            return entry
    raise Unsupported("the image is not made for linux/amd64", where=where)


def _entries(untrusted_index: dict[str, Any], where: str) -> list[dict[str, Any]]:
    entries = untrusted_index.get("manifests")
    good = isinstance(entries, list) and len(entries) <= _MAX_MANIFESTS
    if not good or not all(isinstance(entry, dict) for entry in entries or ()):
        raise Invalid("the image's index is malformed", where=where)
    return list(entries or ())


def _tagged(index: dict[str, Any], tag: str, where: str) -> dict[str, Any]:
    entries = _entries(index, where)
    tags = {_tag(entry): entry for entry in entries}
    if tag and tag in tags:
        return tags[tag]
    if not tag and len(entries) == 1:
        return entries[0]
    if not tag and "latest" in tags:
        return tags["latest"]
    has = ", ".join(sorted(name[:128] for name in tags if name)) or "none"
    wanted = f"no image {tag}" if tag else "more than one image" if entries else "no image"
    hint = "name one of its tags after the path, or write the image into it under that tag"
    raise NotFound(f"the layout has {wanted}; its tags: {has}", where=where, hint=hint)


def _tag(entry: dict[str, Any]) -> str:
    annotations = entry.get("annotations")
    return str(annotations.get(_REF_NAME, "")) if isinstance(annotations, dict) else ""


def _load(root: Path, entry: dict[str, Any], limits: Limits, where: str) -> dict[str, Any]:
    data = _small_blob(root, entry, limits, where)
    return load_object(data, "the image's manifest", where)


def _source(root: Path, manifest: dict[str, Any], key: str, limits: Limits, where: str) -> Source:
    config, layers = manifest.get("config"), manifest.get("layers")
    if not isinstance(config, dict) or not isinstance(layers, list):
        raise Invalid("the image's manifest names no config or layers", where=where)
    blobs = [_blob(root, layer, where) for layer in layers]
    return source(where, key, _small_blob(root, config, limits, where), blobs, limits)


def _blob(root: Path, untrusted: object, where: str) -> Blob:
    size = untrusted.get("size") if isinstance(untrusted, dict) else None
    if not isinstance(untrusted, dict) or type(size) is not int or size < 0:
        raise Invalid("the image's manifest has a malformed layer", where=where)
    digest = check_digest(untrusted.get("digest"), where)
    path = _blob_path(root, digest, where)
    return Blob(lambda: _open(path), digest, size)


def _small_blob(root: Path, entry: dict[str, Any], limits: Limits, where: str) -> bytes:
    """A manifest or config: read, and held to its digest."""
    digest = check_digest(entry.get("digest"), where)
    data = _read(_blob_path(root, digest, where), limits, where)
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        raise Invalid(f"the blob {digest} has another content", where=where)
    return data


def _blob_path(root: Path, digest: str, where: str) -> Path:
    path = root / "blobs" / "sha256" / digest.removeprefix("sha256:")
    if not path.is_file():
        raise NotFound(f"the layout lacks the blob {digest}", where=where)
    return path


def _read(path: Path, limits: Limits, where: str) -> bytes:
    with _open(path) as file:
        data = file.read(limits.manifest_bytes + 1)
    if len(data) > limits.manifest_bytes:
        raise NoResources(f"{path.name} is larger than {limits.manifest_bytes} bytes", where=where)
    return data


def _open(path: Path) -> BinaryIO:
    """Plain files only: a pipe or device in a stranger's layout must not block us."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
