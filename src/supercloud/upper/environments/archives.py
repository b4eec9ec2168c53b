"""docker-archive, as ``docker save`` writes it: a tar of manifest.json, config and layers."""

import hashlib
import io
import posixpath
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from supercloud.model.errors import Invalid, NoResources, NotFound, Unsupported
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.references import Reference
from supercloud.upper.environments.sources import PACKED, Blob, Source, load_object, source, unpack
from supercloud.upper.environments.tars import Members, opened

if TYPE_CHECKING:  # as in ``sources``
    from _typeshed import WriteableBuffer as Buffer

    from supercloud.upper.platform.image.tools import ToolTree


def open_archive(reference: Reference, scratch: Path, tools: "ToolTree", limits: Limits) -> Source:
    """Open the (only) image of the archive, which may be compressed as a whole.

    Raises ``NotFound``, ``Invalid``, ``NoResources``.
    """
    given, where = Path(reference.place), reference.text
    if not given.is_file():
        raise NotFound(f"there is no file {given}", where=where)
    path = scratch / "archive.tar"
    unpack(Blob(lambda: given.open("rb")), path, limits.total_bytes, tools, where)
    members, entry = _listed(path, limits, where)
    config = _read(path, members, str(entry.get("Config")), limits, where)
    layers = entry.get("Layers")
    if not isinstance(layers, list):
        raise Invalid("the archive's manifest lists no layers", where=where)
    blobs = [_layer(path, members, str(name), where) for name in layers]
    key = f"sha256:{hashlib.sha256(config).hexdigest()}"
    return source(where, key, config, blobs, limits)


def look(path: Path, limits: Limits) -> None:
    """Whether it lists one image, as far as that can be told without unpacking it.

    Raises as ``open_archive``.
    """
    with path.open("rb") as file:
        is_packed = file.read(4).startswith(PACKED)
    if not is_packed:
        _listed(path, limits, str(path))


def _listed(
    path: Path, limits: Limits, where: str
) -> tuple[dict[str, tarfile.TarInfo], dict[str, Any]]:
    """All members, and what the archive says of its image."""
    members = _members(path, limits, where)
    return members, _only_image(_read(path, members, "manifest.json", limits, where), where)


def _members(path: Path, limits: Limits, where: str) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    with opened(path, limits, where) as tar:
        for member in Members(tar, limits, where):
            found[posixpath.normpath(member.name)] = member
    return found


def _only_image(untrusted: bytes, where: str) -> dict[str, Any]:
    entries = load_object(b'{"images":' + untrusted + b"}", "manifest.json", where)["images"]
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise Invalid("the archive's manifest lists no image", where=where)
    if len(entries) > 1:
        hint = "save one image an archive"
        raise Invalid(f"the archive has {len(entries)} images", where=where, hint=hint)
    return entries[0]


def _find(members: dict[str, tarfile.TarInfo], name: str, where: str) -> tarfile.TarInfo:
    """A regular member; old archives link equal layers to one another."""
    for _ in range(8):
        member = members.get(posixpath.normpath(name))
        if member is None:
            break
        if member.isreg():
            return member
        base = posixpath.dirname(name) if member.issym() else ""
        name = posixpath.join(base, member.linkname)
    raise Invalid(f"the archive lacks {name[:200]!r}", where=where)


def _read(
    path: Path, members: dict[str, tarfile.TarInfo], name: str, limits: Limits, where: str
) -> bytes:
    member = _find(members, name, where)
    if member.size > limits.manifest_bytes:
        raise NoResources(f"{name[:200]!r} is too large", where=where)
    with _open_member(path, member, where) as file:
        return file.read()


def _layer(path: Path, members: dict[str, tarfile.TarInfo], name: str, where: str) -> Blob:
    member = _find(members, name, where)
    return Blob(lambda: _open_member(path, member, where))


def _open_member(path: Path, member: tarfile.TarInfo, where: str) -> BinaryIO:
    if member.issparse():
        raise Unsupported("the archive holds a layer as a sparse file", where=where)
    file = path.open("rb")
    file.seek(member.offset_data)
    return cast("BinaryIO", io.BufferedReader(_Slice(file, member.size)))


class _Slice(io.RawIOBase):
    """The next ``size_bytes`` of a file, which it closes."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self.file, self.left_bytes = file, size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        chunk = self.file.read(min(self.left_bytes, len(memoryview(buffer))))
        memoryview(buffer)[: len(chunk)] = chunk
        self.left_bytes -= len(chunk)
        return len(chunk)

    def close(self) -> None:
        self.file.close()
        super().close()
