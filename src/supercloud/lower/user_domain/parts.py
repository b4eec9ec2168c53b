"""Pieces that machines and templates are put together from alike."""

import os
from typing import Final

from supercloud.lower.client import Core, Domain
from supercloud.model.capability import Rights

PAGE_BYTES: Final = 4096
READ: Final = Rights.USE | Rights.READ
READ_WRITE: Final = Rights.USE | Rights.READ | Rights.WRITE
CONFIG_DISK_BYTES: Final = 1 << 20
"""Of every config disk: a clone's kernel knows the size from its template."""


def whole_pages(size_bytes: int) -> int:
    """That size, rounded up to pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def sealed_memory(
    core: Core, name: str, content: bytes, scheduling: int, size_bytes: int = 0
) -> tuple[int, str]:
    """A memory object with ``content`` and zeros up to ``size_bytes``: selector and SHA-256."""
    size = whole_pages(max(1, len(content), size_bytes))
    memory = core.create_memory(size, name, scheduling=scheduling)
    descriptor = core.take(memory)
    try:
        os.pwrite(descriptor, content, 0)
    finally:
        os.close(descriptor)
    return memory, core.seal(memory).hex()


def give_config(core: Core, name: str, config: bytes, vmm: Domain) -> None:
    """The machine's config disk, booked on it."""
    disk, _ = sealed_memory(core, name, config, vmm.scheduling, CONFIG_DISK_BYTES)
    core.delegate(disk, vmm.selector, READ, "config")


def give_image(core: Core, vmm: Domain, *parts: str) -> None:
    """These parts of the L1 image."""
    for part in parts:
        core.delegate(core.lookup(f"image.0.{part}").selector, vmm.selector, READ, part)
