"""Fixtures that every suite shares."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from support.slots import vm_slots

# A test run that was started in the background has Ctrl-C ignored, and hands that down to what it
# starts; programs under test are to meet the usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes is the machine's business.
SLOW = [HealthCheck.too_slow]
settings.register_profile("supercloud", deadline=None, suppress_health_check=SLOW)
settings.load_profile("supercloud")


@pytest.fixture
def vm_lock() -> Iterator[None]:
    """At most as many virtual machines at a time, over all runs, as two cores bear."""
    with vm_slots():
        yield


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that other users may enter, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory(prefix="supercloud-open-") as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2 --dist loadfile``: see ``support.sharing``."""
    from support.sharing import Sharing

    return Sharing(config, log) if config.getvalue("dist") == "loadfile" else None
