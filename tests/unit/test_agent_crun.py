"""crun out of a sealed copy: the copy is what was there, runs, and cannot be written."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.upper.platform.agent import crun


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PATH of its own."""
    monkeypatch.setenv("PATH", str(tmp_path))
    crun._sealed.cache_clear()
    yield tmp_path
    copy = crun._sealed()
    if copy >= 0:
        os.close(copy)
    crun._sealed.cache_clear()


def test_it_runs_whatever_becomes_of_the_file_and_nobody_can_write_to_it(place: Path) -> None:
    shutil.copy("/bin/cat", place / "crun")
    how = crun.spawning()
    (place / "crun").write_bytes(b"something else")
    (copy,) = how["pass_fds"]
    assert subprocess.run(["crun"], input=b"said", capture_output=True, **how).stdout == b"said"
    for write in (lambda: os.pwrite(copy, b"x", 0), lambda: os.ftruncate(copy, 0)):
        with pytest.raises(PermissionError):
            write()
    assert crun.spawning() == how, "one copy for all starts"


def test_where_there_is_none_its_name_is_all_that_is_run() -> None:
    assert crun.spawning() == {}
