"""Keys of devices, wrapped for their user: AES Key Wrap (RFC 3394) with a 256-bit wrapping key.

The control plane stores what is wrapped, next to what it belongs to, and holds the wrapping key. A
new wrapping key means wrapping the few device keys again; no data is rewritten.
"""

import os
from typing import Final

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from supercloud.model.errors import Denied, Invalid

KEY_BYTES: Final = 32
_UNIT_BYTES: Final = 8


def new_key() -> bytes:
    """A fresh key, for a device or for wrapping."""
    return os.urandom(KEY_BYTES)


def wrap(wrapping_key: bytes, secret: bytes) -> bytes:
    """The secret, sealed (8 bytes more); deterministic. Invalid unless 16, 24, 32, ... bytes."""
    if len(wrapping_key) != KEY_BYTES:
        raise Invalid(f"a wrapping key has {KEY_BYTES} bytes")
    if len(secret) < 2 * _UNIT_BYTES or len(secret) % _UNIT_BYTES:
        raise Invalid(f"a secret of {len(secret)} bytes cannot be wrapped")
    return aes_key_wrap(wrapping_key, secret)


def unwrap(wrapping_key: bytes, untrusted_wrapped: bytes) -> bytes:
    """The secret; Denied when it was wrapped with another key, or altered."""
    try:
        return aes_key_unwrap(wrapping_key, untrusted_wrapped)
    except (InvalidUnwrap, ValueError) as error:
        raise Denied("it was wrapped with another wrapping key, or was altered") from error
