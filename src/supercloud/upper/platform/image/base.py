"""The Debian layer of both images, cached: it changes with the lock or the recipe only."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Permanent
from supercloud.upper.platform.image import kernel, modules, own, recipe, tools
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.closure import close, matching
from supercloud.upper.platform.image.lock import Lock
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.scratch import scratch
from supercloud.upper.platform.image.tools import ToolTree

RUNTIME, L1, VMLINUX, VMLINUZ, INITRD, KERNEL_VERSION = [
    "runtime.tar",
    "l1.tar",
    "vmlinux",
    "vmlinuz",
    "initrd",
    "kernel-version",
]
_SOURCES = (
    "base",
    "bootdisk",
    "bytecode",
    "closure",
    "elf",
    "erofs",
    "kernel",
    "modules",
    "own",
    "recipe",
    "tree",
)


@dataclass(frozen=True)
class Base:
    """The cached files, in ``place``: two tars without end, kernel, initramfs."""

    place: Path

    def read(self, name: str) -> bytes:
        """One of the files."""
        return (self.place / name).read_bytes()

    @property
    def kernel_version(self) -> str:
        """As ``uname -r`` prints it in L1."""
        return self.read(KERNEL_VERSION).decode()


def place(cache: Path, lock: Lock) -> Path:
    """Where the base for a lock and this builder is."""
    key = hashlib.sha256(lock.digest.encode())
    here = Path(__file__).parent
    data = (recipe.FILES / "boot-init", recipe.FILES / "l1-modules")
    for path in (*(here / f"{name}.py" for name in _SOURCES), *data):
        key.update(path.read_bytes())
    return cache / f"base-{key.hexdigest()[:24]}"


def make(cache: Path, lock: Lock, debs: Mapping[str, Path], progress: Progress) -> Base:
    """Build the base from verified packages; atomic."""
    with progress.step("read packages") as detail:
        tree = trees.from_debs(debs.values(), recipe.SKIP)
        detail.append(f"{len(tree)} files")
    with progress.step("tool tree"):
        tool_tree = ToolTree(cache, root=tools.unpack(cache, lock, tree))
    final = place(cache, lock)
    with scratch(cache, ".base-") as place_now:
        made = place_now / "base"
        made.mkdir()
        for name, data in _files(tree, tool_tree, progress).items():
            (made / name).write_bytes(data)
        if not final.exists():  # else another build was faster
            made.rename(final)
    return Base(final)


def _files(tree: trees.Tree, tool_tree: ToolTree, progress: Progress) -> dict[str, bytes]:
    version = _kernel_version(tree)
    vmlinuz = tree[f"boot/vmlinuz-{version}"].data
    available = modules.of_kernel(tree, version)
    with progress.step("kernel") as detail:
        vmlinux = kernel.vmlinux(vmlinuz, tool_tree)
        detail.append(f"{version}, {len(vmlinux) / 1e6:.0f} MB")
    with progress.step("kernel modules") as detail:
        found, absent = available.closure(recipe.l1_modules())
        l1_modules = available.indexed(found, tool_tree)
        detail.append(f"{len(found)}; built in or not there: {' '.join(absent)}")
    with progress.step("initramfs") as detail:
        initrd = trees.to_cpio(_initramfs(tree, available, tool_tree))
        detail.append(f"{len(initrd) / 1e6:.1f} MB")
    with progress.step("runtime image, Debian's part") as detail:
        runtime = _image(tree, tool_tree, recipe.RUNTIME_ROOTS, recipe.RUNTIME_LINKS, {})
        detail.append(f"{len(runtime)} files, {trees.size_bytes(runtime) / 1e6:.0f} MB")
    with progress.step("L1 image, Debian's part") as detail:
        links = recipe.L1_LINKS | _busybox_links(tool_tree, recipe.L1_LINKS)
        l1 = _image(tree, tool_tree, recipe.L1_ROOTS, links, l1_modules)
        detail.append(f"{len(l1)} files, {trees.size_bytes(l1) / 1e6:.0f} MB")
    return {
        RUNTIME: trees.to_tar(runtime),
        L1: trees.to_tar(l1),
        VMLINUX: vmlinux,
        VMLINUZ: vmlinuz,
        INITRD: initrd,
        KERNEL_VERSION: version.encode(),
    }


def _kernel_version(tree: trees.Tree) -> str:
    versions = [path.removeprefix("boot/vmlinuz-") for path in tree if "boot/vmlinuz-" in path]
    if len(versions) != 1:
        raise Permanent(f"expected one kernel, found {versions}")
    return versions[0]


def _image(
    tree: trees.Tree,
    tool_tree: ToolTree,
    roots: Iterable[str],
    links: Mapping[str, str],
    extra: trees.Tree,
) -> trees.Tree:
    kept = own.compiled(close(tree, matching(tree, roots)), tool_tree) | extra
    for path, target in links.items():
        kept.setdefault(path, trees.link(target))
    return trees.with_parents(kept | _frame())


def _frame() -> trees.Tree:
    """Merged /usr, mount points, the few texts of /etc."""
    frame: trees.Tree = {
        name: trees.link(f"usr/{name}") for name in ("bin", "sbin", "lib", "lib64")
    }
    frame |= {name: trees.directory() for name in recipe.DIRECTORIES}
    frame |= {name: trees.file(text) for name, text in recipe.TEXTS.items()}
    return frame | {"tmp": trees.directory(0o1777), "var/tmp": trees.directory(0o1777)}


def _busybox_links(tool_tree: ToolTree, taken: Mapping[str, str]) -> dict[str, str]:
    """Applets of busybox for what no real program in the image does."""
    real = {Path(path).name for path in (*recipe.L1_ROOTS, *taken)}
    applets = tool_tree.run("busybox", "--list").decode().split()
    return {f"usr/bin/{name}": "busybox" for name in applets if name not in real}


def _initramfs(tree: trees.Tree, available: modules.Modules, tool_tree: ToolTree) -> trees.Tree:
    wanted = (*recipe.BOOT_MODULES, *recipe.BOOT_MODULES_LEGACY)
    found = available.indexed(available.closure(wanted)[0], tool_tree)
    kept = {path: node for path, node in found.items() if not path.endswith((".bin", ".symbols"))}
    applets = ["sh", "mount", "mkdir", "modprobe", "dd", "hexdump", "sleep", "switch_root"]
    kept |= {f"usr/bin/{name}": trees.link("busybox") for name in applets}
    kept |= {name: trees.link(f"usr/{name}") for name in ("bin", "sbin", "lib")}
    kept |= {
        name: trees.directory()
        for name in ["dev", "proc", "sys", "lower", "upper", "newroot", "usr/sbin"]
    }
    kept |= {"init": own.boot_init(), "usr/bin/busybox": tree["usr/bin/busybox"]}
    return trees.with_parents(kept)
