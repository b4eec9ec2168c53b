"""The engine under the address and undefined-behaviour sanitizers, and fuzzed there."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/component/test_protection_nbd.py",
    "tests/component/test_protection_backing.py",
    "tests/component/test_protection_room.py",
    "tests/security/test_protection_fuzz.py",
    pytest.param("tests/security/test_protection_provider.py", marks=pytest.mark.long),
    pytest.param("tests/property/test_protection_crash.py", marks=pytest.mark.long),
)
PROGRAM = """
import os
import sys

del os.environ["LD_PRELOAD"]  # not for the programs that tests start
from pathlib import Path
from supercloud.services.protection import engine
engine.LIBRARY = Path(sys.argv[1])
import pytest
sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = runpy.run_path(str(ROOT / "scripts" / "engine.py"))["build"]
    return build(tmp_path_factory.mktemp("engine") / "libprotection.so", sanitize=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tests", TESTS)
def test_the_sanitizers_find_nothing(sanitized: Path, tests: str) -> None:
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = subprocess.run(
        # a victim of SIGKILL starts the plain engine in a process of its own
        [sys.executable, "-c", PROGRAM, str(sanitized), str(ROOT / tests), "-k", "not killed"],
        env=os.environ | {
            "LD_PRELOAD": runtime, "PYTHONPATH": str(ROOT / "tests"),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:verify_asan_link_order=0",
            "PYTHONMALLOC": "malloc",
        },
        cwd=ROOT, capture_output=True, text=True, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
