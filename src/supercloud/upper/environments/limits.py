"""Limits on what a container image may be: its layers are data from strangers."""

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limits:
    """All sizes are of uncompressed content."""

    layers: int = 128
    total_bytes: int = 32 * GIB
    entries: int = 1_000_000
    manifest_bytes: int = 4 * MIB
    header_bytes: int = 256 * KIB  # of one entry's extended headers: names, attributes
    path_bytes: int = 4095
    name_bytes: int = 255
    depth: int = 512
    link_hops: int = 40
    index_depth: int = 4


LIMITS = Limits()
