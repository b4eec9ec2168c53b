"""A host's own copies of the runtime and L1 images, by content; hashed while they are copied.

The image directory may belong to an ordinary user. What a host runs is read once, hashed, and
compared with the directory's manifest; from then on only the copy is used.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Final

from supercloud.model.errors import Invalid, NotFound
from supercloud.model.images import L1_FILES, l1_digest

RUNTIME: Final = "runtime.erofs"
_CHUNK_BYTES: Final = 1 << 20
_MAX_MANIFEST_BYTES: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Images:
    """Paths of the copies; ``digest`` names the L1 image."""

    runtime: str
    runtime_sha256: str
    kernel: str
    initrd: str
    root: str
    digest: str


def adopt(directory: str, state: str) -> Images:
    """Copy what ``directory`` holds below ``state``. NotFound, Invalid when a hash differs."""
    wanted = _hashes(directory)
    kept = f"{state}/images"
    os.makedirs(kept, mode=0o755, exist_ok=True)
    paths = {
        name: _copy(f"{directory}/{name}", f"{kept}/{sha256}", sha256)
        for name, sha256 in wanted.items()
    }
    _prune(kept, set(wanted.values()))
    kernel, initrd, root = (paths[name] for name in L1_FILES)
    digest = l1_digest({name: wanted[name] for name in L1_FILES})
    return Images(paths[RUNTIME], wanted[RUNTIME], kernel, initrd, root, digest)


def sealed(path: str, name: str) -> int:
    """A memory file with the content of ``path`` that nobody can change any more."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            _write_all(descriptor, chunk)
    os.fchmod(descriptor, 0o444)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return descriptor


def _hashes(directory: str) -> dict[str, str]:
    try:
        with open(f"{directory}/manifest.json", "rb") as file:
            manifest: Any = json.loads(file.read(_MAX_MANIFEST_BYTES))
        return {name: str(manifest["files"][name]["sha256"]) for name in (RUNTIME, *L1_FILES)}
    except FileNotFoundError as error:
        raise NotFound(
            f"no images in {directory}",
            hint="build them: python -m supercloud.upper.platform.image build --out DIR",
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"{directory}/manifest.json is not an image manifest: {error}") from error


def _copy(source: str, target: str, sha256: str) -> str:
    if os.path.exists(target):
        return target
    found = hashlib.sha256()
    part = f"{target}.part"
    with open(source, "rb") as reading, open(part, "wb") as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            found.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    if found.hexdigest() != sha256:
        os.unlink(part)
        raise Invalid(f"{source} is not what its manifest says", hint="build the images again")
    os.chmod(part, 0o444)
    os.replace(part, target)
    return target


def _prune(directory: str, wanted: set[str]) -> None:
    for name in os.listdir(directory):
        if name not in wanted:
            os.unlink(f"{directory}/{name}")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
