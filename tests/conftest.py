"""Fixtures that every suite shares."""

from collections.abc import Iterator

import pytest

from support.slots import vm_slots


@pytest.fixture
def vm_lock() -> Iterator[None]:
    """At most as many virtual machines at a time, over all runs, as two cores bear."""
    with vm_slots():
        yield
