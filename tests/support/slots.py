"""Slots for virtual machines, shared by all runs of tests on this machine."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

VM_SLOTS = ("supercloud-vm.lock", "supercloud-vm-2.lock")


@contextlib.contextmanager
def vm_slots(count: int = 1) -> Iterator[None]:
    """Hold as many slots, waited for; all or none are held, so that two waiters do not block."""
    held: list[int] = []
    try:
        while len(held := _take(count)) < count:
            time.sleep(0.2)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _take(count: int) -> list[int]:
    """Descriptors of ``count`` locked slots, or an empty list."""
    held: list[int] = []
    for name in VM_SLOTS:
        path = Path(tempfile.gettempdir()) / name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if len(held) < count and _locked(descriptor):
            held.append(descriptor)
        else:
            os.close(descriptor)
    if len(held) == count:
        return held
    for descriptor in held:
        os.close(descriptor)
    return []


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
