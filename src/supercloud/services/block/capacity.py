"""How large a device must be so that an image on it never runs full.

qcow2 on a device that is full fails its writers, and no export of the storage daemon can pause
them instead (measured: EINVAL from the device, an I/O error in the guest). So it must not come to
that: what the image may grow to in the worst case, every block written anew after the last
snapshot, has to fit before a volume is made, grown or snapshotted. That costs addresses only: a
protected device stores what is written, nothing else.
"""

from typing import Final

from supercloud.model.errors import NoResources

_MIB: Final = 1 << 20
_FIXED_BYTES: Final = 4 * _MIB  # header, refcount table, first tables of each kind, bitmaps


def image_bytes(size_bytes: int, image_format: str = "qcow2", *, used_bytes: int = 0) -> int:
    """The most that the image takes: ``used_bytes`` kept by snapshots, and the volume once over.

    Tables: 8 bytes in L2 and 2 in refcounts per 64 KiB cluster, doubled for good measure.
    """
    if image_format == "raw":
        return size_bytes
    return used_bytes + size_bytes + (used_bytes + size_bytes) // 2048 + _FIXED_BYTES


def device_bytes(size_bytes: int, image_format: str = "qcow2", *, snapshots: int = 0) -> int:
    """How large to make the device of a volume with room for so many snapshots."""
    kept = 0
    for _ in range(snapshots):
        kept = image_bytes(size_bytes, image_format, used_bytes=kept)
    return image_bytes(size_bytes, image_format, used_bytes=kept)


def require(device: int, needed: int, what: str, **details: int) -> None:
    """NoResources when the device is smaller than needed; it has these ``details``, too."""
    if needed > device:
        raise NoResources(
            f"{what} needs a device of {needed} bytes in the worst case, this one has {device}",
            hint="grow the device",
            details={"device_bytes": device, "needed_bytes": needed, **details},
        )
