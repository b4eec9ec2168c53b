"""The build: lock -> base layer -> base plus our code -> products, each written atomically."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supercloud.model.errors import Invalid
from supercloud.upper.platform.image import base as bases
from supercloud.upper.platform.image import erofs, own, recipe, tools
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.base import Base
from supercloud.upper.platform.image.lock import Lock, Package
from supercloud.upper.platform.image.locking import Locking, for_build
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.tools import ToolTree

MANIFEST = "manifest.json"
PRODUCTS = ("runtime", "l1")


@dataclass(frozen=True)
class _Job:
    lock: Lock
    base: Base
    tools: ToolTree
    scratch: Path
    progress: Progress


def build(
    out: Path,
    *,
    cache: Path | None = None,
    product: str = "all",
    locked: bool = False,
    update_lock: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Build into ``out`` and return the manifest (which is also ``out/manifest.json``).

    ``product`` is one of ``PRODUCTS`` or ``all``. Raises ``Unsupported`` or ``NotFound`` when
    ``locked`` and the lock cannot be honoured, ``Temporary`` when the archive does not answer.
    """
    wanted = PRODUCTS if product == "all" else (product,)
    if not set(wanted) <= set(PRODUCTS):
        raise Invalid(f"no such product: {product}", hint=f"one of {', '.join(PRODUCTS)}, all")
    cache, progress = cache or tools.default_cache(), Progress(quiet=quiet)
    cache.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    locking = Locking(Archive(cache), progress, locked)
    if update_lock:
        locking.update()
    scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=out))
    try:
        lock, base = _base(cache, locking, progress)
        job = _Job(lock, base, ToolTree(cache, root=tools.place(cache, lock)), scratch, progress)
        code = {name: digest for one in wanted for name, digest in _MAKERS[one](job).items()}
        return _publish(job, out, code)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _base(cache: Path, locking: Locking, progress: Progress) -> tuple[Lock, Base]:
    def needed(lock: Lock) -> Iterable[Package]:
        made = bases.place(cache, lock).exists() and tools.place(cache, lock).exists()
        return () if made else for_build(lock)

    lock, debs = locking.obtain(needed)
    if not debs:
        return lock, Base(bases.place(cache, lock))
    return lock, bases.make(cache, lock, debs, progress)


def _runtime(job: _Job) -> dict[str, str]:
    return {
        "runtime": _root(
            job, "runtime.erofs", bases.RUNTIME, recipe.OWN_RUNTIME, own.runtime_files()
        )
    }


def _l1(job: _Job) -> dict[str, str]:
    for name in (bases.VMLINUX, bases.VMLINUZ, bases.INITRD):
        shutil.copyfile(job.base.place / name, job.scratch / name)
    return {"l1": _root(job, "root.erofs", bases.L1, recipe.OWN_L1, own.l1_files())}


_MAKERS: dict[str, Callable[[_Job], dict[str, str]]] = {"runtime": _runtime, "l1": _l1}


def _root(job: _Job, name: str, base: str, parts: tuple[str, ...], files: trees.Tree) -> str:
    """Make one erofs root; the hash of our code in it."""
    with job.progress.step(name) as detail:
        sources = own.sources(parts) | files
        compiled = own.compiled({p: n for p, n in sources.items() if p not in files}, job.tools)
        layer = trees.with_parents(compiled | files)
        erofs.from_tars(job.scratch / name, (job.base.read(base), trees.to_tar(layer)), job.tools)
        detail.append(f"{(job.scratch / name).stat().st_size / 1e6:.0f} MB")
        return own.digest(sources)


def _publish(job: _Job, out: Path, code: dict[str, str]) -> dict[str, Any]:
    made = sorted(job.scratch.iterdir())
    previous = _previous(out)
    manifest = {
        "format": 1,
        "release": job.lock.release,
        "kernel": job.base.kernel_version,
        "lock_sha256": job.lock.digest,
        "code_sha256": previous.get("code_sha256", {}) | code,
        "files": previous.get("files", {}) | {path.name: _described(path) for path in made},
        "packages": job.lock.versions(),
    }
    (job.scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for path in (*made, job.scratch / MANIFEST):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    return manifest


def _previous(out: Path) -> dict[str, Any]:
    """What an earlier build of the other product left here."""
    path = out / MANIFEST
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: entry for name, entry in found.get("files", {}).items() if (out / name).exists()}
    return {"code_sha256": found.get("code_sha256", {}), "files": kept}


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": path.stat().st_size}
