"""The checkpoint store against borg, of the same bytes: first, again with changes, and back.

The image is like a guest's memory: a tenth of it zeros, the rest text, code and tables that
compress to about two thirds. All write to a directory on the same disk, encrypted and
authenticated, zstd-1; borg once with chunks as ours (64 KiB, fixed), once as it comes.
``--directory`` says where.

Again means 12.5 MiB of other contents, in 50 places. Borg and "the whole" read and look at all 256
MiB; "dirty pages" is told which they are, as a machine's page table tells the service, and makes a
new base when they are too many. Borg is started anew each time, as its users do; ours runs in this
process, as in its service, and syncs as in production.
"""

import argparse
import functools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ab

from supercloud.services.checkpoint.directory import Directory
from supercloud.services.checkpoint.keys import Keys
from supercloud.services.checkpoint.pages import Run, is_rebase_due
from supercloud.services.checkpoint.reader import Reader
from supercloud.services.checkpoint.store import Store
from supercloud.services.checkpoint.writer import Writer

IMAGE_BYTES, PAGE_BYTES = 256 << 20, 4096
PLACES, PAGES_OF_PLACE = 50, 64  # 12.5 MiB
AT_MOST_FIRST, AT_MOST_AGAIN, AT_MOST_DIRTY, AT_MOST_BACK = 0.8, 0.6, 0.4, 1.0


def make_image(path: Path) -> None:
    chance = random.Random(7)
    words = [chance.randbytes(chance.randrange(3, 12)) for _ in range(3000)]
    pages = [bytes(PAGE_BYTES)] * 40
    for _ in range(400):
        text = b"".join(chance.choice(words) + bytes(chance.choice((0, 1, 4))) for _ in range(600))
        pages.append(text[:PAGE_BYTES].ljust(PAGE_BYTES, b"\0"))
    with path.open("wb") as file:
        for _ in range(IMAGE_BYTES // PAGE_BYTES):
            page = bytearray(chance.choice(pages))
            if chance.random() < 0.8:  # no two pages alike
                page[:1200] = chance.randbytes(1200)
            file.write(page)


def change(path: Path, chance: random.Random) -> set[int]:
    """The pages that are others now."""
    firsts = chance.sample(range(0, IMAGE_BYTES // PAGE_BYTES, PAGES_OF_PLACE), PLACES)
    pages = {page for first in firsts for page in range(first, first + PAGES_OF_PLACE)}
    with path.open("r+b") as file:
        for page in sorted(pages):
            file.seek(page * PAGE_BYTES)
            file.write(chance.randbytes(2048))
    return pages


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


class Borg:
    """A repository of borg; ``options`` of ``borg create``."""

    def __init__(self, top: Path, name: str, options: list[str]) -> None:
        self.directory, self.image = top / name, top / f"{name}.image"
        self._options = options
        home = str(top / f"{name}.home")
        self._environment = {"PATH": os.environ["PATH"], "HOME": home, "BORG_PASSPHRASE": "bench"}

    def empty(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._environment["HOME"], ignore_errors=True)
        self._borg("init", "--encryption=repokey-blake2", str(self.directory))

    def take(self, _changed: set[int]) -> None:
        self._archive = f"{self.directory}::{time.monotonic_ns()}"
        how = ["--compression=zstd,1", *self._options]
        self._borg("create", *how, self._archive, str(self.image))

    def back(self) -> None:
        self._borg("extract", "--stdout", self._archive)

    def _borg(self, *words: str) -> None:
        quiet = subprocess.DEVNULL
        run = ["borg", *words]
        subprocess.run(run, env=self._environment, check=True, stdout=quiet, stderr=quiet)


class Ours:
    """A store of ours; the whole each time, or the dirty pages over a base."""

    def __init__(self, top: Path, name: str, *, is_told: bool) -> None:
        self.directory, self.image = top / name, top / f"{name}.image"
        self._is_told = is_told

    def empty(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self._store = Store(Directory(self.directory), Keys(bytes(32), "bench"))
        self._head, self._base = None, None
        self._dirty: set[int] = set()

    def take(self, changed: set[int]) -> None:
        self._dirty |= changed
        is_due = is_rebase_due(len(self._dirty) * PAGE_BYTES, IMAGE_BYTES)
        with self.image.open("rb") as file, Writer(self._store, "vm", "qemu", self._head) as writer:
            read_at = functools.partial(_read_at, file.fileno())
            if self._is_told and self._base and not is_due:
                runs = [Run(page, 1) for page in sorted(self._dirty)]
                writer.increment("memory", self._base, runs, read_at)
                self._head = writer.commit()
                return
            writer.write_at("memory", IMAGE_BYTES, read_at)
            self._head = writer.commit()
        self._dirty = set()
        self._base = self._store.open("vm", self._head).manifest.part("memory").tree

    def back(self) -> None:
        reader = Reader(self._store, self._store.open("vm", self._head))
        with open(os.devnull, "wb", buffering=0) as sink:
            reader.stream("memory", sink.write)


def _read_at(descriptor: int, offset: int, size: int) -> bytes:
    return os.pread(descriptor, size, offset)


def first(side: Borg | Ours) -> ab.Measure:
    def measure() -> float:
        side.empty()
        os.sync()
        return ab.seconds(lambda: side.take(set()))()

    return measure


def again(side: Borg | Ours, grown: list[int]) -> ab.Measure:
    """Each time after other changes; what it grew by goes to ``grown``."""
    chance = random.Random(1)
    side.empty()
    side.take(set())

    def measure() -> float:
        changed = change(side.image, chance)
        before = size_of(side.directory)
        os.sync()
        taken_s = ab.seconds(lambda: side.take(changed))()
        grown.append(size_of(side.directory) - before)
        return taken_s

    return measure


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--directory", default=None)
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = ab.arguments(8)
    if shutil.which("borg") is None:
        sys.exit("borg is not installed (Debian's borgbackup)")
    with tempfile.TemporaryDirectory(dir=own.directory) as name:
        return compare(Path(name), options)


def compare(top: Path, options: argparse.Namespace) -> int:
    alike = ["--chunker-params=fixed,65536"]
    sides: dict[str, Borg | Ours] = {
        "borg, 64 KiB chunks": Borg(top, "borg", alike),
        "borg as it comes": Borg(top, "borg-plain", []),
        "supercloud, the whole": Ours(top, "whole", is_told=False),
        "supercloud, dirty pages": Ours(top, "dirty", is_told=True),
    }
    make_image(top / "image")
    for side in sides.values():
        shutil.copy(top / "image", side.image)
    grown: dict[str, list[int]] = {name: [] for name in sides}
    whole, dirty = [*sides][2:]
    measured = [
        ("256 MiB, the first time", [*sides][:3], first, {whole: AT_MOST_FIRST}),
        (
            "256 MiB again, 12.5 MiB of it changed",
            [*sides],
            lambda side: again(side, grown[next(n for n in sides if sides[n] is side)]),
            {whole: AT_MOST_AGAIN, dirty: AT_MOST_DIRTY},
        ),
        ("and back", [*sides], lambda side: ab.seconds(side.back), {whole: AT_MOST_BACK}),
    ]
    status = 0
    for title, names, measure, limits in measured:
        shown = [ab.Side(name, measure(sides[name]), limits.get(name)) for name in names]
        status |= ab.run(title, "s", shown, options)
    for name, sizes in grown.items():
        print(f"{name:44} grew by {statistics.median(sizes) / (1 << 20):6.1f} MiB each time")
    return status


if __name__ == "__main__":
    sys.exit(main())
