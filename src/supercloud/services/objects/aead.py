"""AES-256-GCM of the system's libcrypto: the standard library has no cipher, the image has this."""

import ctypes
from typing import Final

from supercloud.model.errors import Invalid

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_GET_TAG, _SET_TAG = 0x10, 0x11

_crypto = ctypes.CDLL("libcrypto.so.3")
_pointer, _bytes, _int = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
_crypto.EVP_aes_256_gcm.restype = _pointer
_crypto.EVP_CIPHER_CTX_new.restype = _pointer
_crypto.EVP_CIPHER_CTX_free.argtypes = [_pointer]
_crypto.EVP_CIPHER_CTX_ctrl.argtypes = [_pointer, _int, _int, _pointer]
_crypto.EVP_CipherInit_ex.argtypes = [_pointer, _pointer, _pointer, _bytes, _bytes, _int]
_crypto.EVP_CipherUpdate.argtypes = [_pointer, _pointer, ctypes.POINTER(_int), _bytes, _int]
_crypto.EVP_CipherFinal_ex.argtypes = [_pointer, _pointer, ctypes.POINTER(_int)]


class Aead:
    """One key. A nonce must never be used twice; not for several threads at once."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise Invalid(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._context = _crypto.EVP_CIPHER_CTX_new()
        self._length = _int()
        self._start(_crypto.EVP_aes_256_gcm(), key, None, 1)

    def __del__(self) -> None:
        if context := getattr(self, "_context", None):
            _crypto.EVP_CIPHER_CTX_free(context)

    def seal(self, nonce: bytes, plain: bytes, bound: bytes) -> bytes:
        """Ciphertext and tag over ``plain`` and ``bound``."""
        out, tag = ctypes.create_string_buffer(len(plain) + 1), ctypes.create_string_buffer(16)
        self._start(None, None, nonce, 1)
        self._update(None, bound)
        self._update(out, plain)
        self._check(_crypto.EVP_CipherFinal_ex(self._context, tag, ctypes.byref(self._length)))
        self._check(_crypto.EVP_CIPHER_CTX_ctrl(self._context, _GET_TAG, TAG_BYTES, tag))
        return out.raw[: len(plain)] + tag.raw[:TAG_BYTES]

    def open(self, nonce: bytes, untrusted: bytes, bound: bytes) -> bytes:
        """What was sealed. Invalid when anything of it, or ``bound``, is not what it was."""
        if len(untrusted) < TAG_BYTES:
            raise Invalid("shorter than a tag")
        size = len(untrusted) - TAG_BYTES
        out = ctypes.create_string_buffer(size + 1)
        tag = ctypes.create_string_buffer(untrusted[size:], TAG_BYTES)
        self._start(None, None, nonce, 0)
        self._update(None, bound)
        self._update(out, untrusted[:size])
        self._check(_crypto.EVP_CIPHER_CTX_ctrl(self._context, _SET_TAG, TAG_BYTES, tag))
        spare = ctypes.create_string_buffer(TAG_BYTES)
        length = ctypes.byref(self._length)
        if _crypto.EVP_CipherFinal_ex(self._context, spare, length) != 1:
            raise Invalid("not what was sealed under this key")
        return out.raw[:size]

    def _start(
        self, cipher: int | None, key: bytes | None, nonce: bytes | None, sealing: int
    ) -> None:
        self._check(_crypto.EVP_CipherInit_ex(self._context, cipher, None, key, nonce, sealing))

    def _update(self, out: ctypes.Array[ctypes.c_char] | None, data: bytes) -> None:
        length = ctypes.byref(self._length)
        if data:
            self._check(_crypto.EVP_CipherUpdate(self._context, out, length, data, len(data)))

    @staticmethod
    def _check(result: int) -> None:
        if result != 1:
            raise OSError("libcrypto refused")
