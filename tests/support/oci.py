"""Hand-made container images, good and bad, and what became of them as erofs."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supercloud.upper.platform.image.tools import ToolTree

MEDIA = "application/vnd.oci.image"


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> tuple:
    """A tar entry; ``xattrs`` maps names to text or, with surrogates, bytes."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime, info.mode = kind, len(data), 1_600_000_000, 0o644
    if kind == tarfile.DIRTYPE:
        info.mode = 0o755
    xattrs = fields.pop("xattrs", {})
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in xattrs.items()}
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def file(name: str, data: bytes = b"", **fields: Any) -> tuple:
    return entry(name, data=data, **fields)


def directory(name: str, **fields: Any) -> tuple:
    return entry(name, tarfile.DIRTYPE, **fields)


def symlink(name: str, target: str) -> tuple:
    return entry(name, tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple:
    return entry(name, tarfile.LNKTYPE, linkname=target)


def layer(*entries: tuple) -> bytes:
    """An uncompressed layer. TarInfo is written as it is: names are not cleaned up."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class Layout:
    """An OCI layout being written; ``config`` is merged into the image's config."""

    root: Path
    layers: Sequence[bytes] = ()
    config: dict[str, Any] = field(default_factory=dict)
    architecture: str = "amd64"
    tag: str = "latest"

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        path = self.root / "blobs" / "sha256" / sha256(data).removeprefix("sha256:")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def pack(self, data: bytes) -> tuple[bytes, str]:
        """What is stored for a layer, and how its media type ends."""
        return gzip.compress(data, 1, mtime=0), "tar+gzip"

    def manifest(self) -> dict[str, Any]:
        """Write the image's blobs; the manifest's descriptor."""
        config = {
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in self.layers]},
        }
        packed = [self.pack(data) for data in self.layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{MEDIA}.manifest.v1+json",
            "config": self.blob(json.dumps(config).encode(), f"{MEDIA}.config.v1+json"),
            "layers": [self.blob(data, f"{MEDIA}.layer.v1.{kind}") for data, kind in packed],
        }
        found = self.blob(json.dumps(manifest).encode(), f"{MEDIA}.manifest.v1+json")
        found["platform"] = {"os": "linux", "architecture": self.architecture}
        return found

    def write(self) -> str:
        """Write the layout; a reference to it."""
        self.root.mkdir(parents=True, exist_ok=True)
        entry_of_index = self.manifest()
        entry_of_index["annotations"] = {"org.opencontainers.image.ref.name": self.tag}
        self.index([entry_of_index])
        return f"oci:{self.root}:{self.tag}"

    def index(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write ``index.json`` and the marker file."""
        index = {"schemaVersion": 2, "manifests": list(entries)}
        (self.root / "index.json").write_text(json.dumps(index))
        (self.root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


class Plain(Layout):
    """Layers stored uncompressed."""

    def pack(self, data: bytes) -> tuple[bytes, str]:
        return data, "tar"


def docker_archive(path: Path, layers: Sequence[bytes], *, compress: bool = False) -> str:
    """What ``docker save`` would write; a reference to it."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [sha256(data) for data in layers]},
    }
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": ["x:latest"], "Layers": names}]
    data = layer(
        *(file(name, content) for name, content in zip(names, layers, strict=True)),
        file("config.json", json.dumps(config).encode()),
        file("manifest.json", json.dumps(manifest).encode()),
    )
    path.write_bytes(gzip.compress(data, 1) if compress else data)
    return f"docker-archive:{path}"


def extract(image: Path, to: Path, tools: ToolTree) -> Path:
    """Unpack an erofs file with owners, modes and attributes."""
    tools.run("fsck.erofs", f"--extract={to}", "--xattrs", image)
    return to


def listing(root: Path) -> set[str]:
    """All paths below ``root``."""
    return {
        os.path.relpath(os.path.join(place, name), root)
        for place, directories, files in os.walk(root)
        for name in (*directories, *files)
    }
