"""The head of a disk image, as far as it could lead QEMU to other files."""

import struct

from supercloud.model.errors import Invalid

_QCOW2 = struct.Struct(">4sIQI")


def check_qcow2(untrusted_head: bytes) -> int:
    """The virtual size of a qcow2 image; Invalid for one that names other files of the platform."""
    if len(untrusted_head) < 104:
        raise Invalid("no qcow2 image: too short")
    magic, version, backing, _ = _QCOW2.unpack_from(untrusted_head)
    size_bytes = int(struct.unpack_from(">Q", untrusted_head, 24)[0])
    if magic != b"QFI\xfb" or version not in (2, 3):
        raise Invalid("no qcow2 image")
    if backing:
        raise Invalid("a qcow2 image with a backing file", hint="flatten it: qemu-img convert")
    if version == 3 and struct.unpack_from(">Q", untrusted_head, 72)[0] & 4:
        raise Invalid("a qcow2 image with an external data file")
    if not 0 < size_bytes <= 1 << 46:
        raise Invalid(f"a disk of {size_bytes} bytes")
    return size_bytes
