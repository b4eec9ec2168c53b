"""Scratch directories of processes that were killed, and things in a cache that nobody uses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supercloud.upper.platform.image import scratch as module
from supercloud.upper.platform.image.scratch import expire, scratch, used

HOLDER = """
import sys, time
from pathlib import Path
from supercloud.upper.platform.image.scratch import scratch
with scratch(Path(sys.argv[1]), ".work-") as place:
    (place / "file").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_scratch_directory_goes_away_also_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch(tmp_path, ".work-") as place:
            (place / "file").write_text("x")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_S", 0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            with scratch(tmp_path, ".work-"):
                assert len(list(tmp_path.iterdir())) == 2
            (left,) = tmp_path.iterdir()
            assert (left / "file").exists()
        finally:
            holder.send_signal(signal.SIGKILL)
    with scratch(tmp_path, ".work-") as mine:
        assert list(tmp_path.iterdir()) == [mine]


def test_a_directory_that_was_just_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".work-new").mkdir()
    with scratch(tmp_path, ".work-"):
        assert (tmp_path / ".work-new").exists()


def test_only_what_was_long_unused_expires(tmp_path: Path) -> None:
    for name in ("old", "old-but-used", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "old.deb").write_text("x")
    for name in ("old", "old-but-used", "old.deb"):
        os.utime(tmp_path / name, (0, time.time() - 1000))
    used(tmp_path / "old-but-used")
    gone = expire(tmp_path.iterdir(), unused_s=500)
    assert {path.name for path in gone} == {"old", "old.deb"}
    assert {path.name for path in tmp_path.iterdir()} == {"old-but-used", "new"}
