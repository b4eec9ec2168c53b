#!/usr/bin/env python3
"""Build the two example images from Debian packages: a container and a small virtual machine.

``--out DIR`` gets ``web/``, an OCI layout of an HTTP server on port 8080, and ``vm/``, a kernel
and an initramfs that takes its address by DHCP and serves HTTP on port 8080 too. Nothing but the
image builder's own lock and cache is used, and equal input gives equal files. What is current is
kept.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from supercloud.upper.platform.image import __file__ as builder
from supercloud.upper.platform.image import modules, recipe
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.kernel import vmlinux
from supercloud.upper.platform.image.locking import Locking
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.tools import ToolTree, default_cache

HERE = Path(__file__).parent
PORT = 8080
NOBODY = "65534:65534"
# Its random numbers start from what it is given once it knows who it is: see vm-init.
APPEND = "console=ttyS0 quiet panic=-1 random.trust_cpu=off random.trust_bootloader=off"
WEB_APPLETS = [
    "sh",
    "cat",
    "echo",
    "hostname",
    "httpd",
    "id",
    "ip",
    "ls",
    "mkdir",
    "nc",
    "ps",
    "sleep",
    "true",
    "uname",
    "wget",
]
VM_APPLETS = [
    "sh",
    "acpid",
    "base64",
    "cat",
    "cttyhack",
    "date",
    "echo",
    "free",
    "hostname",
    "httpd",
    "id",
    "ifconfig",
    "init",
    "ip",
    "kill",
    "ls",
    "mkdir",
    "modprobe",
    "mount",
    "nc",
    "ping",
    "poweroff",
    "ps",
    "reboot",
    "route",
    "setsid",
    "sleep",
    "tr",
    "true",
    "udhcpc",
    "umount",
    "uname",
    "wget",
]
VM_MODULES = ("virtio_net", "virtio_blk", "virtio_rng", "button", "evdev")
_CREATED = "2025-01-01T00:00:00Z"


def inputs(locking: Locking) -> str:
    """What the images are made of, as one hash: the lock, these files and the builder."""
    sources = [*HERE.iterdir(), *Path(builder).parent.glob("*.py")]
    hashes = [sha256(path.read_bytes()) for path in sorted(sources) if path.is_file()]
    return sha256("\n".join([locking.current().digest, *hashes]).encode())


def packages(locking: Locking, *names: str) -> trees.Tree:
    """The files of the locked packages whose names begin so."""
    _, debs = locking.obtain(
        lambda lock: [package for package in lock.packages if package.name.startswith(names)]
    )
    return trees.from_debs(debs.values(), recipe.SKIP)


def frame(busybox: trees.Node, applets: list[str]) -> trees.Tree:
    """Busybox with links for ``applets``, and the usual directories."""
    tree: trees.Tree = {name: trees.link(f"usr/{name}") for name in ("bin", "sbin", "lib")}
    tree |= {
        name: trees.directory()
        for name in ["dev", "etc", "proc", "run", "sys", "usr/sbin", "usr/lib"]
    }
    tree |= {f"usr/bin/{name}": trees.link("busybox") for name in applets}
    tree |= {"usr/bin/busybox": busybox, "tmp": trees.directory(0o1777)}
    tree["etc/passwd"] = trees.file(recipe.TEXTS["etc/passwd"])
    tree["etc/group"] = trees.file(recipe.TEXTS["etc/group"])
    return tree


def web(busybox: trees.Node, out: Path) -> None:
    """An OCI layout with one layer: ``serve`` writes a page with the host's name and serves it."""
    tree = frame(busybox, WEB_APPLETS)
    tree["usr/bin/serve"] = trees.file((HERE / "web-serve").read_bytes(), 0o755)
    layer = trees.to_tar(trees.with_parents(tree)) + trees.TAR_END
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": _CREATED,
        "config": {
            "Entrypoint": ["/bin/serve"],
            "Env": ["PATH=/usr/bin", f"PORT={PORT}"],
            "ExposedPorts": {f"{PORT}/tcp": {}},
            "StopSignal": "SIGTERM",
            "User": NOBODY,
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer)}"]},
    }
    media = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{media}.manifest.v1+json",
        "config": blob(out, text(config), f"{media}.config.v1+json"),
        "layers": [blob(out, gzip.compress(layer, 6, mtime=0), f"{media}.layer.v1.tar+gzip")],
    }
    entry = blob(out, text(manifest), f"{media}.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (out / "index.json").write_bytes(text({"schemaVersion": 2, "manifests": [entry]}))
    (out / "oci-layout").write_bytes(text({"imageLayoutVersion": "1.0.0"}))


def vm(busybox: trees.Node, linux: trees.Tree, tools: ToolTree, out: Path) -> None:
    """``kernel``, ``initrd`` and ``image.json``, which says how to boot them."""
    version = next(p.split("vmlinuz-")[1] for p in linux if p.startswith("boot/vmlinuz-"))
    available = modules.of_kernel(linux, version)
    found = available.indexed(available.closure(VM_MODULES)[0], tools)
    tree = frame(busybox, VM_APPLETS)
    tree |= {p: n for p, n in found.items() if p.endswith((".ko", "modules.dep"))}
    tree["init"] = trees.file((HERE / "vm-init").read_bytes(), 0o755)
    tree["etc/udhcpc.sh"] = trees.file((HERE / "vm-udhcpc").read_bytes(), 0o755)
    tree["etc/acpi/PWRF/00000080"] = trees.file("#!/bin/sh\nexec poweroff -f\n", 0o755)
    (out / "kernel").write_bytes(vmlinux(linux[f"boot/vmlinuz-{version}"].data, tools))
    (out / "initrd").write_bytes(trees.to_cpio(trees.with_parents(tree)))
    image = {"kind": "kernel", "kernel": "kernel", "initrd": "initrd", "append": APPEND}
    image |= {"identity": True}
    (out / "image.json").write_bytes(text(image))


def text(value: object) -> bytes:
    """Canonical JSON."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def blob(out: Path, data: bytes, media_type: str) -> dict[str, object]:
    """Store a blob of an OCI layout; its descriptor."""
    place = out / "blobs" / "sha256" / sha256(data)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{sha256(data)}", "size": len(data)}


def replace(new: Path, final: Path) -> None:
    """Put a finished directory in the place of an old one."""
    old = new.with_name(new.name + ".old")
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    """Build both unless they are current; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/examples"))
    parser.add_argument("--cache", type=Path, default=default_cache())
    given = parser.parse_args()
    out, cache, progress = given.out.absolute(), given.cache.absolute(), Progress()
    for directory in (out, cache):
        directory.mkdir(parents=True, exist_ok=True)
    locking, made_of = Locking(Archive(cache), progress), out / "inputs"
    if made_of.exists() and made_of.read_text() == inputs(locking):
        progress.note("the examples are current")
        return 0
    made_of.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as scratch:
        build(locking, progress, ToolTree(cache), Path(scratch))
        for name in ("web", "vm"):
            replace(Path(scratch) / name, out / name)
    made_of.write_text(inputs(locking))
    return 0


def build(locking: Locking, progress: Progress, tools: ToolTree, out: Path) -> None:
    """Both, below ``out``."""
    debian = packages(locking, "busybox-static", "linux-image-")
    busybox = debian["usr/bin/busybox"]
    for name in ("web", "vm"):
        (out / name).mkdir()
    with progress.step("web: OCI layout"):
        web(busybox, out / "web")
    with progress.step("vm: kernel and initramfs"):
        vm(busybox, debian, tools, out / "vm")


if __name__ == "__main__":
    sys.exit(main())
