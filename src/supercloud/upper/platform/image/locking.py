"""Which lock a build uses: the committed one, unless the archive has moved on."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from supercloud.model.errors import Unsupported
from supercloud.upper.platform.image import lock as locks
from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image.archive import Archive, Dropped
from supercloud.upper.platform.image.lock import Lock, Package
from supercloud.upper.platform.image.progress import Progress

_NAMES = tuple(sorted((*recipe.WANTED, *recipe.TEST_ONLY)))
_ASKED = (*_NAMES, recipe.KERNEL_META)


def for_build(lock: Lock) -> list[Package]:
    """The packages that the products and the tool tree are made of."""
    return [package for package in lock.packages if package.name not in recipe.TEST_ONLY]


@dataclass
class Locking:
    """Chooses a lock. ``locked``: refuse anything but the committed one."""

    archive: Archive
    progress: Progress
    locked: bool = False
    committed_path: Path = locks.COMMITTED

    def current(self) -> Lock:
        """The lock to try first: committed, or what an earlier build resolved in its place."""
        committed = self._committed()
        if committed is None:
            return self._resolve_instead(None, "there is no lock for this recipe")
        instead = self._instead(committed)
        return committed if self.locked or not instead.exists() else locks.read(instead)

    def obtain(self, needed: Callable[[Lock], Iterable[Package]]) -> tuple[Lock, dict[str, Path]]:
        """A lock, and those of its packages that are ``needed``, verified.

        ``needed`` answers nothing when what would be made of the packages exists already.
        """
        lock = self.current()
        try:
            return lock, self._fetch(needed(lock))
        except Dropped as error:
            if self.locked:
                raise
            lock = self._resolve_instead(self._committed(), str(error))
            return lock, self._fetch(needed(lock))

    def update(self) -> Lock:
        """Resolve anew and replace the committed lock."""
        lock = self._resolve(self._committed())
        self.committed_path.write_text(lock.to_json())
        return lock

    def _committed(self) -> Lock | None:
        if not self.committed_path.exists():
            return None
        lock = locks.read(self.committed_path)
        return lock if lock.wanted == _ASKED else None

    def _instead(self, committed: Lock | None) -> Path:
        return self.archive.cache / f"lock-instead-of-{committed.digest if committed else 'none'}"

    def _resolve_instead(self, committed: Lock | None, why: str) -> Lock:
        if self.locked:
            raise Unsupported(f"--locked, but {why}", hint="run the build with --update-lock")
        self.progress.note(f"resolving anew: {why}")
        lock = self._resolve(committed)
        path = self._instead(committed)
        partial = path.with_suffix(".partial")
        partial.write_text(lock.to_json())
        partial.replace(path)
        return lock

    def _resolve(self, committed: Lock | None) -> Lock:
        with self.progress.step("resolve") as detail:
            lock = self.archive.resolve(_NAMES, recipe.KERNEL_META)
            detail.append(f"{len(lock.packages)} packages")
        for line in locks.differences(committed, lock) if committed else ():
            self.progress.note(f"  {line}")
        return lock

    def _fetch(self, needed: Iterable[Package]) -> dict[str, Path]:
        packages = list(needed)
        if not packages:
            return {}
        with self.progress.step("fetch and verify") as detail:
            megabytes = sum(package.size_bytes for package in packages) / 1e6
            detail.append(f"{len(packages)} packages, {megabytes:.0f} MB")
            return self.archive.fetch(packages)
