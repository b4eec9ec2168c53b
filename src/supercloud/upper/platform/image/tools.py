"""Programs of the pinned Debian release, run on the building machine through their own loader.

A Debian 12 host's libraries are too old for them, so each is started as
``ld.so --library-path TREE/usr/lib/... TREE/usr/bin/PROGRAM``: no chroot, no privilege.
"""

import hashlib
import os
import subprocess
from pathlib import Path

from supercloud.model.errors import NotFound, Permanent
from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.closure import close, matching
from supercloud.upper.platform.image.lock import Lock
from supercloud.upper.platform.image.locking import Locking, for_build
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.scratch import scratch, used

_FORMAT = "1"
_LOADER = "usr/lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_PLACES = ("usr/bin", "usr/sbin")
_STATIC = {"busybox"}


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/supercloud/image``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "supercloud" / "image"


class ToolTree:
    """The tools, unpacked below ``cache`` when first asked for."""

    def __init__(self, cache: Path | None = None, *, root: Path | None = None) -> None:
        self.cache = cache or default_cache()
        self._root = root

    @property
    def root(self) -> Path:
        """The directory that the tools are in; makes it when it is missing."""
        if self._root is None:
            self._root = used(self._prepare())
        return self._root

    def path(self, tool: str) -> Path:
        """Where the program's file is. Raises ``NotFound``."""
        for place in _PLACES:
            path = self.root / place / tool
            if path.exists():
                return path
        raise NotFound(f"the tool tree has no {tool}")

    def argv(self, tool: str) -> list[str]:
        """The beginning of a command line that runs the tool on this machine."""
        path, root = str(self.path(tool)), self.root
        if tool in _STATIC:
            return [path]
        libraries = str(root / _LIBRARIES)
        # The host's ld.so.cache names the host's libraries: never look there.
        loader = [str(root / _LOADER), "--inhibit-cache", "--library-path", libraries, path]
        if tool.startswith("python"):
            home = f"PYTHONHOME={root / 'usr'}"
            return ["/usr/bin/env", home, "PYTHONHASHSEED=0", "PYTHONDONTWRITEBYTECODE=1", *loader]
        if tool.startswith("qemu-system"):
            return [*loader, "-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios"]
        return loader

    def run(self, tool: str, *arguments: str | Path, given: bytes = b"") -> bytes:
        """Run a tool with ``given`` on stdin; its standard output. Raises ``Permanent``."""
        command = [*self.argv(tool), *map(str, arguments)]
        done = subprocess.run(
            command, input=given, capture_output=True, check=False, env={"PATH": "/usr/bin:/bin"}
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()[-2000:]
            raise Permanent(f"{tool} failed with status {done.returncode}: {said}")
        return done.stdout

    def _prepare(self) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        locking = Locking(Archive(self.cache), Progress(quiet=True))
        lock, debs = locking.obtain(
            lambda lock: () if place(self.cache, lock).exists() else for_build(lock)
        )
        if not debs:
            return place(self.cache, lock)
        return unpack(self.cache, lock, trees.from_debs(debs.values(), recipe.SKIP))


def place(cache: Path, lock: Lock) -> Path:
    """The tool tree's directory for a lock."""
    roots = "\n".join((_FORMAT, *recipe.TOOL_ROOTS, recipe.SKIP.pattern))
    key = hashlib.sha256((lock.digest + roots).encode()).hexdigest()[:24]
    return cache / f"tools-{key}"


def unpack(cache: Path, lock: Lock, tree: trees.Tree) -> Path:
    """Unpack the tools out of the packages' files; atomic."""
    final = place(cache, lock)
    if final.exists():
        return final
    kept = close(tree, matching(tree, recipe.TOOL_ROOTS))
    kept |= {path: trees.link(target) for path, target in recipe.TOOL_LINKS.items()}
    with scratch(cache, ".tools-") as place_now:
        made = place_now / "tools"
        made.mkdir()
        trees.unpack(kept, made)
        if not final.exists():  # else another build was faster
            made.rename(final)
    return final
