"""From an environment's image reference to blobs by digest that its platform can pull.

Containers: an OCI image becomes one erofs file (``upper.environments.oci``). VMs: kernel, initrd
or disk are copied under their hash, so that what runs is what was hashed.

::

    CACHE/blobs/sha256/HEX     the blobs
    CACHE/known.json           path, size, mtime and inode of files hashed before -> digest
"""

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Invalid, NotFound, UserError
from supercloud.model.resources import Environment, split_image
from supercloud.wire.messages import Blob, ImageRef, Process

Progress = Callable[[float], None]
"""Told the part done, 0 to 1; from any thread."""

CHUNK_BYTES = 4 << 20
REGISTRY_FRESH_S = 10.0
"""For so long a registry's answer holds for the other EEs that ask."""
MAX_APPEND_CHARS = 4096
_HINT = "put it there, readable for the control plane, or change `image` in the manifest"
QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Converted:
    """The erofs file that a container image became, and what the image says of its process."""

    digest: str
    path: str
    size_bytes: int
    process: Process


Convert = Callable[[str], Converted]
"""Turns a container image's reference into an erofs file; blocking."""
Pack = Callable[[Mapping[str, Path], Path], None]
"""Makes one erofs file of files under new names; blocking."""


Look = Callable[[Sequence[str]], dict[str, UserError]]
"""Those of the references that their registries do not give us, and why; blocking."""


class Images:
    """Prepares images; the same image is prepared once, however many EEs run from it."""

    def __init__(
        self, cache: Path, convert: Convert, pack: Pack | None = None, look: Look | None = None
    ) -> None:
        """``cache`` is made if missing. Without ``pack`` kernel and initrd are blobs each.

        Without ``look`` nothing is known to be refused.
        """
        self._blobs = cache / "blobs" / "sha256"
        self._blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._known_path = cache / "known.json"
        self._known: dict[str, str] = _load(self._known_path)
        self._convert, self._pack, self._look = convert, pack, look
        self._locks: dict[str, asyncio.Lock] = {}
        self._prepared: dict[str, tuple[float, ImageRef]] = {}

    def blob(self, digest: str) -> Path:
        """The file of ``digest``. NotFound."""
        path = self._blobs / digest.removeprefix("sha256:")
        if not path.is_file():
            raise NotFound(f"no blob {digest}")
        return path

    def complete(self, image: ImageRef) -> bool:
        """Whether all blobs of ``image`` are in the cache."""
        hexes = [blob.digest.removeprefix("sha256:") for blob in image.blobs.values()]
        return all((self._blobs / name).is_file() for name in hexes)

    async def refused(self, references: Sequence[str]) -> dict[str, UserError]:
        """Those that their registries do not have, or do not give us, and why."""
        if not references or self._look is None:
            return {}
        return await asyncio.to_thread(self._look, references)

    async def prepare(self, environment: Environment, mark: str, progress: Progress) -> ImageRef:
        """The image of ``environment`` as blobs. Raises Invalid, NotFound, Temporary.

        ``mark`` (see :func:`mark_of`) tells apart what the same reference meant at other times.
        """
        name = source_of(environment.image, mark)
        async with self._locks.setdefault(name, asyncio.Lock()):
            if known := self._known_as(name, forever=bool(mark)):
                return known
            transport, _, _ = split_image(environment.image)
            work = self._container if transport else self._machine
            image = await asyncio.to_thread(work, environment.image, progress)
            self._prepared[name] = (time.monotonic(), image)
            return image

    def _known_as(self, name: str, *, forever: bool) -> ImageRef | None:
        prepared_s, image = self._prepared.get(name, (0.0, None))
        fresh = forever or time.monotonic() - prepared_s < REGISTRY_FRESH_S
        return image if image is not None and fresh and self.complete(image) else None

    # -- in a worker thread

    def _container(self, reference: str, _progress: Progress) -> ImageRef:
        converted = self._convert(reference)
        target = self._blobs / converted.digest.removeprefix("sha256:")
        if not target.exists():
            _place(Path(converted.path), target)
        blob = Blob(digest=converted.digest, size_bytes=converted.size_bytes)
        return ImageRef(format="erofs", blobs={"root": blob}, process=converted.process)

    def _machine(self, reference: str, progress: Progress) -> ImageRef:
        path = Path(reference)
        if path.is_dir():
            return self._kernel(path, progress)
        with path.open("rb") as file:
            qcow2 = file.read(4) == QCOW2_MAGIC
        blob = self._add(path, progress)
        return ImageRef(format="qcow2" if qcow2 else "raw", blobs={"disk": blob})

    def _kernel(self, directory: Path, progress: Progress) -> ImageRef:
        names = kernel_files(directory)
        if self._pack is not None:
            files = {role: directory / names[role] for role in ("kernel", "initrd")}
            blob = self._packed(files, self._pack, progress)
            return _kernel_image({"root": blob}, names)
        kernel = self._add(directory / names["kernel"], lambda part: progress(part / 2))
        initrd = self._add(directory / names["initrd"], lambda part: progress(0.5 + part / 2))
        return _kernel_image({"kernel": kernel, "initrd": initrd}, names)

    def _packed(self, files: Mapping[str, Path], pack: Pack, progress: Progress) -> Blob:
        """The blob of the files in one erofs, made unless it was of these very files before."""
        identity = "packed " + " ".join(_identity(path) for path in files.values())
        digest = self._known.get(identity, "")
        blob = self._blobs / (digest.removeprefix("sha256:") or "none")
        if not blob.exists():
            mark = hashlib.sha256(identity.encode()).hexdigest()[:16]
            part = self._blobs / f".{os.getpid()}-{mark}"
            pack(files, part)
            progress(0.5)
            with part.open("rb") as file:
                digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            blob = part.replace(self._blobs / digest.removeprefix("sha256:"))
            self._known[identity] = digest
            _save(self._known_path, self._known)
        progress(1.0)
        return Blob(digest=digest, size_bytes=blob.stat().st_size)

    def _add(self, path: Path, progress: Progress) -> Blob:
        """The file's blob, copied and hashed unless this very file was before."""
        status = path.stat()
        identity = _identity(path)
        digest = self._known.get(identity)
        if digest is None or not (self._blobs / digest.removeprefix("sha256:")).exists():
            digest = self._copy(path, status.st_size, progress)
            self._known[identity] = digest
            _save(self._known_path, self._known)
        return Blob(digest=digest, size_bytes=status.st_size)

    def _copy(self, path: Path, size_bytes: int, progress: Progress) -> str:
        part = self._blobs / f".{os.getpid()}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        hasher, done = hashlib.sha256(), 0
        with path.open("rb") as source, part.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                hasher.update(chunk)
                target.write(chunk)
                done += len(chunk)
                progress(min(1.0, done / max(1, size_bytes)))
        part.replace(self._blobs / hasher.hexdigest())
        return f"sha256:{hasher.hexdigest()}"


def _kernel_image(blobs: dict[str, Blob], names: Mapping[str, str]) -> ImageRef:
    waits = bool(names["identity"])
    return ImageRef(format="kernel", blobs=blobs, append=names["append"], identity=waits)


def _identity(path: Path) -> str:
    """Of a file's content, as far as its status tells."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"


def source_of(reference: str, mark: str) -> str:
    """What an image is made from: a reference, as of the time of its mark."""
    return f"{reference} {mark}"


def mark_of(reference: str) -> str:
    """What changes when the image that a local reference names does; "" for a registry's.

    Cheap: sizes and times of the files that say what is in it. Blocking. Raises NotFound.
    """
    transport, place, _ = split_image(reference)
    if transport == "docker":
        return ""
    path = Path(place)
    files = [path / "index.json"] if transport == "oci" else [path]
    try:
        if not transport and path.is_dir():
            names = kernel_files(path)
            files = [path / names["kernel"], path / names["initrd"], path / "image.json"]
        seen = [file.stat() for file in files if file.exists()]
    except OSError as error:
        text = f"the image {reference} cannot be read: {error.strerror}"
        raise NotFound(text, hint=_HINT) from error
    if not seen:
        raise NotFound(f"there is no image {reference}", hint=_HINT)
    about = [(item.st_size, item.st_mtime_ns, item.st_ino) for item in seen]
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def kernel_files(directory: Path) -> dict[str, str]:
    """``kernel`` and ``initrd`` (file names in ``directory``) and ``append`` of a VM's image.

    From ``image.json`` if it is there, else the files of those names. ``identity`` is not empty
    for one that waits to be told who it is. Raises Invalid, NotFound.
    """
    names: dict[str, str] = {"kernel": "kernel", "initrd": "initrd", "append": "", "identity": ""}
    description = directory / "image.json"
    if description.exists():
        names |= _described(description)
    for role in ("kernel", "initrd"):
        if not (directory / names[role]).is_file():
            raise NotFound(
                f"{directory} has no {role}: {names[role]} is missing",
                hint="put it there, or name another file in image.json beside it",
            )
    return names


def _described(path: Path) -> dict[str, str]:
    try:
        untrusted = json.loads(path.read_bytes()[: 64 << 10])
        found = {key: untrusted[key] for key in ("kernel", "initrd", "append") if key in untrusted}
        found["identity"] = "yes" if untrusted.get("identity") is True else ""
    except (ValueError, TypeError, AttributeError) as error:
        raise Invalid("is not a description of a VM's image", where=str(path)) from error
    for key, value in found.items():
        if not isinstance(value, str) or len(value) > MAX_APPEND_CHARS:
            raise Invalid(f"{key} is not a text", where=str(path))
        if key in ("kernel", "initrd") and ("/" in value or value.startswith(".")):
            raise Invalid(f"{key} is not the name of a file beside it", where=str(path))
    return found


def _place(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        part = target.with_name(f".{target.name}-{os.getpid()}")
        shutil.copyfile(source, part)
        part.replace(target)


def _load(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # a cache: hashing again is all that it costs
    return known if isinstance(known, dict) else {}


def _save(path: Path, known: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known))
    part.replace(path)
