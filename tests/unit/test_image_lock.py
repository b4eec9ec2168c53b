"""The lock, and when a build may leave it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid, Unsupported
from supercloud.upper.platform.image import lock as locks
from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image.archive import Archive, Dropped
from supercloud.upper.platform.image.lock import Lock, Package
from supercloud.upper.platform.image.locking import Locking, for_build
from supercloud.upper.platform.image.progress import Progress


def package(name: str, version: str = "1") -> Package:
    path = f"pool/main/x/{name}_{version}_amd64.deb"
    return Package(name, version, "debian", path, "a" * 64, 100)


def lock(*packages: Package) -> Lock:
    wanted = (*sorted((*recipe.WANTED, *recipe.TEST_ONLY)), recipe.KERNEL_META)
    return Lock("trixie", "amd64", wanted, packages)


class Mirror(Archive):
    """An archive that has just ``has``, and resolves to it."""

    def __init__(self, cache: Path, has: Lock) -> None:
        super().__init__(cache)
        self.has, self.resolved = has, 0

    def resolve(self, wanted: Sequence[str], kernel_meta: str) -> Lock:
        self.resolved += 1
        return replace(self.has, wanted=(*wanted, kernel_meta))

    def fetch(self, packages: Iterable[Package]) -> dict[str, Path]:
        wanted = list(packages)
        for one in wanted:
            if one not in self.has.packages:
                raise Dropped(f"{one.name} {one.version} is gone")
        return {one.name: self.cache / one.sha256 for one in wanted}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    path = tmp_path / "lock.json"
    path.write_text(lock(package("aa"), package("bb")).to_json())
    return path


def locking(mirror: Mirror, committed: Path, *, locked: bool = False) -> Locking:
    return Locking(mirror, Progress(), locked, committed)


def everything(lock: Lock) -> Iterable[Package]:
    return lock.packages


def test_a_lock_survives_writing_and_reading() -> None:
    given = lock(package("aa"), package("bb"))
    assert locks.parse(given.to_json(), where="x") == given
    assert locks.parse(given.to_json(), where="x").digest == given.digest


def test_the_committed_lock_is_for_this_recipe_and_release() -> None:
    found = locks.read(locks.COMMITTED)
    assert found.release == "trixie"
    assert set(found.wanted) == {*recipe.WANTED, *recipe.TEST_ONLY, recipe.KERNEL_META}
    names = {one.name for one in found.packages}
    assert set(recipe.WANTED) <= names
    assert len([name for name in names if name.startswith("linux-image-")]) == 1
    assert not {one.name for one in for_build(found)} & set(recipe.TEST_ONLY)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "pool/../../etc/passwd.deb"},
        {"path": "/etc/passwd"},
        {"path": "http://evil/x.deb"},
        {"sha256": "A" * 64},
        {"sha256": ""},
        {"name": "../x"},
        {"extra": 1},
    ],
)
def test_malformed_packages_are_refused(change: dict[str, object]) -> None:
    raw = json.loads(lock(package("aa")).to_json())
    raw["packages"][0] |= change
    with pytest.raises(Invalid):
        locks.parse(json.dumps(raw), where="lock.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "packages": 3}'])
def test_malformed_locks_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        locks.parse(text, where="lock.json")


def test_a_lock_that_the_archive_still_has_is_used_as_it_is(
    tmp_path: Path, committed: Path
) -> None:
    mirror = Mirror(tmp_path, locks.read(committed))
    found, debs = locking(mirror, committed).obtain(everything)
    assert (found, set(debs), mirror.resolved) == (locks.read(committed), {"aa", "bb"}, 0)


def test_a_dropped_version_is_resolved_anew_and_the_difference_printed(
    tmp_path: Path, committed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = Mirror(tmp_path, lock(package("aa", "2"), package("cc")))
    found, debs = locking(mirror, committed).obtain(everything)
    assert found.versions() == {"aa": "2", "cc": "1"}
    assert set(debs) == {"aa", "cc"}
    printed = capsys.readouterr().err
    for line in ("aa: 1 -> 2", "bb: 1 -> absent", "cc: absent -> 1", "is gone"):
        assert line in printed
    locking(mirror, committed).obtain(everything)
    assert mirror.resolved == 1, "the second build remembers"
    assert locks.read(committed).versions() == {"aa": "1", "bb": "1"}, "and the lock is as it was"


def test_locked_refuses_what_is_not_in_the_lock(tmp_path: Path, committed: Path) -> None:
    mirror = Mirror(tmp_path, lock(package("aa", "2"), package("bb")))
    with pytest.raises(Dropped):
        locking(mirror, committed, locked=True).obtain(everything)
    locking(mirror, committed).obtain(everything)
    with pytest.raises(Dropped):
        locking(mirror, committed, locked=True).obtain(everything)
    assert mirror.resolved == 1


def test_a_changed_recipe_needs_a_new_lock(tmp_path: Path, committed: Path) -> None:
    other = replace(locks.read(committed), wanted=("something-else",))
    committed.write_text(other.to_json())
    mirror = Mirror(tmp_path, lock(package("aa")))
    with pytest.raises(Unsupported, match="--locked"):
        locking(mirror, committed, locked=True).obtain(everything)
    assert locking(mirror, committed).obtain(everything)[0].versions() == {"aa": "1"}


def test_update_replaces_the_committed_lock(tmp_path: Path, committed: Path) -> None:
    mirror = Mirror(tmp_path, lock(package("aa", "3")))
    locking(mirror, committed).update()
    assert locks.read(committed).versions() == {"aa": "3"}
