"""fio against a device whose process is killed: what a flush acknowledged is there, verified by fio."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.services.protection.engine import Device, backing_bytes, format_device
from support.protection import KEY, NAME
from support.victim import Victim

MIB = 1 << 20
AREA_BYTES, AREAS = 4 * MIB, 4
ROUNDS_BETWEEN = 3
"""Finished writers between two kills."""
LIVES = 3


class Struck:
    """A device on a file, and a process that serves it and is killed over and over."""

    def __init__(self, place: Path) -> None:
        self.place, size = place, AREA_BYTES * AREAS
        self.descriptor = os.open(place / "backing", os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self.descriptor, backing_bytes(size))
        self.seal = format_device(self.descriptor, KEY, NAME, size)
        self.kept: dict[int, int] = {}  # area -> seed of the last writer whose flush was answered

    def writer(self, uri: str, area: int, seed: int, *words: str) -> list[str]:
        """Blocks in a random order; each holds the seed and its place, over and over."""
        return [
            "fio", f"--name=area{area}", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite",
            f"--offset={area * AREA_BYTES}", f"--size={AREA_BYTES}", "--bs=4k",
            "--iodepth=16", "--verify=pattern", f"--verify_pattern=0x{seed + 1:08x}%o", f"--randseed={seed}", "--fsync=32", "--end_fsync=1",
            "--serialize_overlap=1", *words,
        ]  # fmt: skip

    def writes(self, uri: str, area: int, seed: int) -> None:
        """From its beginning to an acknowledged flush."""
        self.kept.pop(area, None)
        self._run(self.writer(uri, area, seed, "--do_verify=0"))
        self.kept[area] = seed

    def is_whole(self, uri: str) -> None:
        """fio finds in every area what its last finished writer wrote."""
        for area, seed in self.kept.items():
            self._run(self.writer(uri, area, seed, "--verify_only=1", "--verify_fatal=1"))

    def _run(self, argv: list[str]) -> None:
        done = subprocess.run(argv, cwd=self.place, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (argv, done.stdout[-2000:], done.stderr[-2000:])

    def life(self, number: int) -> None:
        """Look at what is there, write some more, and be killed amid a writer."""
        with Victim(self.descriptor, self.seal, self.place / f"sock{number}") as victim:
            uri = f"nbd+unix:///?socket={victim.path}"
            self.is_whole(uri)
            for step in range(ROUNDS_BETWEEN):
                self.writes(uri, (number + step) % AREAS, number * 100 + step)
            last = (number + ROUNDS_BETWEEN) % AREAS
            self.kept.pop(last, None)
            argv = self.writer(uri, last, number * 100 + 99, "--do_verify=0", "--loops=100000")
            with subprocess.Popen(argv, cwd=self.place, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) as writer:  # fmt: skip
                victim.until_written(MIB * (number + 1))
                victim.kill()
                assert writer.wait(240) != 0
        device = Device(self.descriptor, KEY, NAME, victim.seal)
        assert {found.kind for found in device.evidence()} <= {"discarded"}
        self.seal = device.found
        device.close(commit=False)


@pytest.fixture
def struck(tmp_path: Path) -> Iterator[Struck]:
    made = Struck(tmp_path)
    yield made
    os.close(made.descriptor)


def test_what_fio_flushed_is_there_after_every_kill(struck: Struck) -> None:
    for number in range(LIVES):
        struck.life(number)
    with Victim(struck.descriptor, struck.seal, struck.place / "sock") as victim:
        struck.is_whole(f"nbd+unix:///?socket={victim.path}")
    assert len(struck.kept) >= ROUNDS_BETWEEN


def test_fio_would_notice_a_lost_write(struck: Struck) -> None:
    """The test above can fail: an older state, put back with its own seal, is found out by fio."""
    old = struck.place / "old"
    with Victim(struck.descriptor, struck.seal, struck.place / "first") as victim:
        uri = f"nbd+unix:///?socket={victim.path}"
        struck.writes(uri, 0, 1)
        kept = victim.now()
        old.write_bytes((struck.place / "backing").read_bytes())
        struck.writes(uri, 0, 2)
    (struck.place / "backing").write_bytes(old.read_bytes())
    with Victim(struck.descriptor, kept, struck.place / "second") as victim:
        with pytest.raises(AssertionError):
            struck.is_whole(f"nbd+unix:///?socket={victim.path}")
