"""What is refused of a platform before anything is done for it."""

import base64
import binascii
from typing import Final

from supercloud.model.errors import Invalid, NoResources
from supercloud.wire.host import PlatformSpec

MAX_CONFIG_BYTES: Final = 1 << 20


def config_of(spec: PlatformSpec) -> bytes:
    """Its config disk; Invalid."""
    try:
        config = base64.b64decode(spec.config_base64, validate=True)
    except binascii.Error as error:
        raise Invalid("the config disk is not base64", where="config_base64") from error
    if len(config) > MAX_CONFIG_BYTES:
        raise Invalid(f"a config disk of {len(config)} bytes", where="config_base64")
    if spec.memory_bytes % (1 << 20):
        raise Invalid("memory is a multiple of 1 MiB", where="memory_bytes")
    return config


def over_quota(what: str, asked: int, most: int, now: int) -> NoResources:
    """The refusal."""
    return NoResources(
        f"the quota does not allow it: {what} {asked} asked, {most - now} of {most} left",
        hint="delete platforms, or ask the provider for a larger quota",
        details={"what": what, "asked": asked, "quota": most, "used": now},
    )
