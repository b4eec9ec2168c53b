"""Images as the code is now, in places that everybody may read: the control plane is not root."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.upper.platform.image.build import build
from support.guardian import Guardian

EXAMPLES = Path(__file__).parents[2] / "examples" / "images" / "build.py"


@pytest.fixture(scope="session")
def product_images() -> Iterator[Path]:
    """The runtime and L1 images."""
    with _directory("images") as out:
        build(out, quiet=True)
        yield out


@pytest.fixture(scope="session")
def example_images() -> Iterator[Path]:
    """``web`` and ``vm`` of the examples."""
    with _directory("examples") as out:
        command = [sys.executable, str(EXAMPLES), "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        yield out


@contextlib.contextmanager
def _directory(name: str) -> Iterator[Path]:
    """Not pytest's own: those are for root alone. Removed even when the tests are killed."""
    guardian = Guardian()
    try:
        out = Path(tempfile.mkdtemp(prefix=f"supercloud-{name}-"))
        out.chmod(0o755)
        guardian.directory(out)
        yield out
    finally:
        guardian.close()
