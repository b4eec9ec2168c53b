"""The build: lock -> base layer -> base plus our code -> products, each written atomically."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supercloud.model.errors import Invalid
from supercloud.model.images import L1_FILES, l1_digest
from supercloud.upper.platform.image import base as bases
from supercloud.upper.platform.image import bootdisk, erofs, own, recipe, tools, wheels
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.base import Base
from supercloud.upper.platform.image.lock import Lock, Package
from supercloud.upper.platform.image.locking import Locking, for_build
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.scratch import expire, scratch, used
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.upper.platform.image.wheels import WheelFile

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class _Product:
    """``root`` is the erofs file's name; ``also`` are files taken from the base as they are.

    ``disk`` names a bootable disk of the same parts.
    """

    root: str
    base: str
    parts: tuple[str, ...]
    files: Callable[[], trees.Tree]
    also: tuple[str, ...] = ()
    disk: str = ""
    wheel_files: tuple[WheelFile, ...] = ()


_PRODUCTS = {
    "runtime": _Product(
        "runtime.erofs",
        bases.RUNTIME,
        recipe.OWN_RUNTIME,
        own.runtime_files,
        wheel_files=recipe.RUNTIME_WHEEL_FILES,
    ),
    "l1": _Product(
        "root.erofs",
        bases.L1,
        recipe.OWN_L1,
        own.l1_files,
        (bases.VMLINUX, bases.VMLINUZ, bases.INITRD),
        "l1.qcow2",
    ),
}
PRODUCTS = tuple(_PRODUCTS)


@dataclass(frozen=True)
class _Job:
    out: Path
    cache: Path
    scratch: Path
    lock: Lock
    base: Base
    tools: ToolTree
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
    with scratch(out, ".build-") as place:
        lock, base = _base(cache, locking, progress)
        tool_tree = ToolTree(cache, root=used(tools.place(cache, lock)))
        used(base.place)
        expire([*cache.glob("base-*"), *cache.glob("tools-*"), *cache.glob("debs/*.deb")])
        expire(cache.glob(f"{wheels.PLACE}/*"))
        job = _Job(out, cache, place, lock, base, tool_tree, progress)
        made = {name: _make(job, name) for name in wanted}
        return _publish(job, made)


def _base(cache: Path, locking: Locking, progress: Progress) -> tuple[Lock, Base]:
    def needed(lock: Lock) -> Iterable[Package]:
        made = bases.place(cache, lock).exists() and tools.place(cache, lock).exists()
        return () if made else for_build(lock)

    lock, debs = locking.obtain(needed)
    if not debs:
        return lock, Base(bases.place(cache, lock))
    return lock, bases.make(cache, lock, debs, progress)


def _make(job: _Job, name: str) -> dict[str, Any]:
    """One product's entry for the manifest; its files are in scratch unless they are current."""
    product = _PRODUCTS[name]
    sources, files = own.sources(product.parts), product.files()
    files |= wheels.tree(product.wheel_files, job.cache)
    code_sha256 = own.digest(sources | files)
    inputs = {"base": job.base.place.name, "code_sha256": code_sha256}
    previous: dict[str, Any] | None = _previous(job.out).get(name)
    if previous and previous["inputs"] == inputs:
        job.progress.note(f"{product.root} is current")
        return previous
    with job.progress.step(product.root) as detail:
        layer = trees.with_parents(own.compiled(sources, job.tools) | files)
        tars = (job.base.read(product.base), trees.to_tar(layer))
        erofs.from_tars(job.scratch / product.root, tars, job.tools)
        for also in product.also:
            shutil.copyfile(job.base.place / also, job.scratch / also)
        names = (product.root, *product.also)
        if product.disk:
            _disk(job, product)
            names += (product.disk,)
        made = {path: _described(job.scratch / path) for path in names}
        detail.append(f"{made[product.root]['size_bytes'] / 1e6:.0f} MB")
    return {"inputs": inputs, "files": made}


def _disk(job: _Job, product: _Product) -> None:
    vmlinuz, initrd = job.base.read(bases.VMLINUZ), job.base.read(bases.INITRD)
    out, root = job.scratch / product.disk, job.scratch / product.root
    bootdisk.make(out, vmlinuz, initrd, root, job.tools)


def _publish(job: _Job, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    products = _previous(job.out) | made
    files = {name: entry for one in products.values() for name, entry in one["files"].items()}
    manifest = {
        "format": 1,
        "release": job.lock.release,
        "kernel": job.base.kernel_version,
        "lock_sha256": job.lock.digest,
        "products": products,
        "files": files,
        "packages": job.lock.versions(),
    }
    if set(L1_FILES) <= files.keys():
        manifest["l1_digest"] = l1_digest({name: files[name]["sha256"] for name in L1_FILES})
    (job.scratch / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    made_now = [path for path in job.scratch.iterdir() if path.name != MANIFEST]
    for path in (*made_now, job.scratch / MANIFEST):
        path.chmod(0o644)
        path.replace(job.out / path.name)
    return manifest


def _previous(out: Path) -> dict[str, Any]:
    """The products that earlier builds left in ``out``."""
    path = out / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    products = found.get("products", {})
    return {name: entry for name, entry in products.items() if _present(out, entry)}


def _present(out: Path, product: dict[str, Any]) -> bool:
    return all(
        (out / name).is_file() and (out / name).stat().st_size == entry["size_bytes"]
        for name, entry in product["files"].items()
    )


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": path.stat().st_size}
