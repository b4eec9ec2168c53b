"""What is refused of a volume before anything is done to it."""

import base64
import binascii

from supercloud.lower.user_domain.volume_records import Volume
from supercloud.model.errors import Exists, Invalid
from supercloud.wire.volumes import LIMITS, SIZE_UNIT_BYTES, VolumeOpen, VolumeSpec


def key_of(asked: VolumeOpen) -> bytes:
    """Its data key; Invalid."""
    try:
        key = base64.b64decode(asked.key_base64, validate=True)
    except binascii.Error as error:
        raise Invalid("the key is not base64", where="key_base64") from error
    if len(key) != 32:
        raise Invalid("a data key has 32 bytes", where="key_base64")
    return key


def check_spec(spec: VolumeSpec) -> None:
    """Invalid, with the field."""
    if spec.size_bytes % SIZE_UNIT_BYTES:
        raise Invalid(f"a volume is a multiple of {SIZE_UNIT_BYTES} bytes", where="size_bytes")
    for name, (least, most) in LIMITS.items():
        if (limit := getattr(spec, name)) and not least <= limit <= most:
            raise Invalid(f"{name} must be 0 (no limit) or {least} to {most}", where=name)


def check_alike(volume: Volume, spec: VolumeSpec) -> None:
    """It may be larger than the one that is there, and throttled otherwise."""
    old = volume.spec
    if spec.format != old.format:
        raise Exists(f"volume {spec.name} is there: {old.size_bytes} bytes, {old.format}")
    if spec.size_bytes < old.size_bytes:
        raise Invalid(
            f"volume {spec.name} has {old.size_bytes} bytes and does not shrink", where="size_bytes"
        )
