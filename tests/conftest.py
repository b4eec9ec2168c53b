"""Fixtures that every suite shares."""

import signal
from collections.abc import Iterator

import pytest

from support.slots import vm_slots

# A test run that was started in the background has Ctrl-C ignored, and hands that down to what it
# starts; programs under test are to meet the usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def vm_lock() -> Iterator[None]:
    """At most as many virtual machines at a time, over all runs, as two cores bear."""
    with vm_slots():
        yield
