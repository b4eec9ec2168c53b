"""Keys of devices, wrapped for their user: AES Key Wrap (RFC 3394) with a 256-bit wrapping key.

The control plane stores what is wrapped, next to what it belongs to, and holds the wrapping key. A
new wrapping key means wrapping the few device keys again; no data is rewritten.
"""

import os
from typing import Final

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from supercloud.model.errors import Denied, Invalid

KEY_BYTES: Final = 32
WRAPPED_BYTES: Final = KEY_BYTES + 8


def new_key() -> bytes:
    """A fresh key, for a device or for wrapping."""
    return os.urandom(KEY_BYTES)


def wrap(wrapping_key: bytes, key: bytes) -> bytes:
    """The key, sealed (40 bytes); deterministic. Invalid when either has another size."""
    if len(wrapping_key) != KEY_BYTES or len(key) != KEY_BYTES:
        raise Invalid(f"keys have {KEY_BYTES} bytes")
    return aes_key_wrap(wrapping_key, key)


def unwrap(wrapping_key: bytes, untrusted_wrapped: bytes) -> bytes:
    """The key; Denied when it was wrapped with another one, or altered."""
    if len(untrusted_wrapped) != WRAPPED_BYTES:
        raise Denied("this is no wrapped key")
    try:
        return aes_key_unwrap(wrapping_key, untrusted_wrapped)
    except InvalidUnwrap as error:
        raise Denied("the key was wrapped with another wrapping key, or was altered") from error
