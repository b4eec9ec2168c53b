"""Fixtures that every suite shares."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


VM_SLOTS = ("supercloud-vm.lock", "supercloud-vm-2.lock")


@pytest.fixture
def vm_lock() -> Iterator[None]:
    """At most as many virtual machines at a time, over all runs, as two cores bear."""
    descriptors = [
        os.open(Path(tempfile.gettempdir()) / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for name in VM_SLOTS
    ]
    try:
        while not any(_try_lock(descriptor) for descriptor in descriptors):
            time.sleep(0.2)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
