"""Wrapped keys of devices."""

import pytest

from supercloud.model.errors import Denied, Invalid
from supercloud.trust.keywrap import new_key, unwrap, wrap


def test_the_vector_of_rfc_3394() -> None:
    """Section 4.6: 256 bits of key data with a 256-bit wrapping key."""
    kek = bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    key = bytes.fromhex("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
    wrapped = bytes.fromhex(
        "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
    )
    assert wrap(kek, key) == wrapped
    assert unwrap(kek, wrapped) == key


def test_another_wrapping_key_or_an_altered_bit_is_denied() -> None:
    kek, key = new_key(), new_key()
    wrapped = wrap(kek, key)
    assert len(wrapped) == len(key) + 8
    assert key not in wrapped
    for bad in (bytes([wrapped[0] ^ 1]) + wrapped[1:], wrapped[:-1], b"", wrapped + b"x"):
        with pytest.raises(Denied):
            unwrap(kek, bad)
    with pytest.raises(Denied):
        unwrap(new_key(), wrapped)


def test_rotation_keeps_the_key_and_ends_the_old_wrapping() -> None:
    old, new, key = new_key(), new_key(), new_key()
    again = wrap(new, unwrap(old, wrap(old, key)))
    assert unwrap(new, again) == key
    with pytest.raises(Denied):
        unwrap(old, again)


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(Invalid):
        wrap(new_key(), b"short")
    with pytest.raises(Invalid):
        wrap(b"short", new_key())
