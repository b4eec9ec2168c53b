"""Names of domains: readable, deterministic, and within what the core allows."""

import hashlib

DRIVERS = ("disk", "uplink")
"""Domains of the provider's that hold something for users."""
MAX_DOMAIN_NAME = 55
_HASH = 10


def domain_name(kind: str, user: str, platform: str = "") -> str:
    """``kind:user[:platform]``; long ones are cut and get a hash of the whole.

    >>> domain_name("vmm", "shop", "eu-1")
    'vmm:shop:eu-1'
    """
    whole = ":".join(part for part in (kind, user, platform) if part)
    if len(whole) <= MAX_DOMAIN_NAME:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:_HASH]
    return f"{whole[: MAX_DOMAIN_NAME - _HASH - 1]}-{digest}"
