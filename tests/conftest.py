"""Fixtures that every suite shares."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def vm_lock() -> Iterator[None]:
    """One virtual machine at a time on this machine: two cores bear no more."""
    path = Path(tempfile.gettempdir()) / "supercloud-vm.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
