"""The lock: exactly which packages, by version and SHA-256, an image is made of."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from supercloud.model.errors import Invalid

FORMAT = 1
COMMITTED = Path(__file__).with_name("lock.json")
_MAX_PACKAGES = 2000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_PATH = re.compile(r"pool/[A-Za-z0-9+.:~%_/-]+\.deb")


@dataclass(frozen=True, order=True)
class Package:
    """One .deb. ``archive`` names the tree it is in, ``path`` its place below that tree."""

    name: str
    version: str
    archive: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Lock:
    """``wanted``: what was asked of the resolver; ``packages``: all that follows from it."""

    release: str
    architecture: str
    wanted: tuple[str, ...]
    packages: tuple[Package, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the content, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def versions(self) -> dict[str, str]:
        """Package name -> version."""
        return {package.name: package.version for package in self.packages}

    def to_json(self) -> str:
        """Canonical text, one package a line group, for small diffs."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"


def parse(untrusted: str, *, where: str) -> Lock:
    """Read a lock's text; raises ``Invalid``."""
    try:
        raw = json.loads(untrusted)
        if raw["format"] != FORMAT or len(raw["packages"]) > _MAX_PACKAGES:
            raise Invalid("the lock has another format or too many packages", where=where)
        packages = tuple(_package(entry) for entry in raw["packages"])
        return Lock(str(raw["release"]), str(raw["architecture"]), tuple(raw["wanted"]), packages)
    except (ValueError, KeyError, TypeError) as error:
        raise Invalid(f"the lock cannot be read: {error!r}", where=where) from error


def read(path: Path) -> Lock:
    """Read a lock file; raises ``Invalid``."""
    return parse(path.read_text(), where=str(path))


def _package(untrusted: dict[str, Any]) -> Package:
    package = Package(**untrusted)
    checks = (
        (_NAME, package.name),
        (_PATH, package.path),
        (_SHA256, package.sha256),
    )
    if ".." in package.path or not all(pattern.fullmatch(text) for pattern, text in checks):
        raise ValueError(f"package {package.name!r}")
    return package


def differences(old: Lock, new: Lock) -> list[str]:
    """Human lines: what changed from ``old`` to ``new``."""
    before, after = old.versions(), new.versions()
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
