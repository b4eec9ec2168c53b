"""A key and its request, and a cipher, by the libcrypto that Python's ``ssl`` has loaded.

No process is started.
Under emulation a run of the ``openssl`` command costs some 200 ms, and a platform that starts from
memory would spend most of its start on two of them. The results are the same as of ``trust.keys``:
P-256, PKCS #8 (RFC 5208, 5915), PKCS #10 with both names (RFC 2986). libcrypto makes the key and
signs; the structures around are few and fixed, and are written here.
"""

import base64
import ctypes
from contextlib import ExitStack
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from typing import Any, Final, Self

from supercloud.model.errors import Permanent
from supercloud.trust.names import PLATFORM, Identity, parse_uri
from supercloud.wire.native import Library

_NUMBER_BYTES: Final = 32
_KEY_BYTES, _BLOCK_BYTES = 32, 16
_MAX_SIGNATURE_BYTES: Final = 80
_EC_P256: Final = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
_ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
_COMMON_NAME: Final = bytes.fromhex("0603550403")
_EXTENSION_REQUEST: Final = bytes.fromhex("06092a864886f70d01090e")
_SUBJECT_ALT_NAME: Final = bytes.fromhex("0603551d11")
_INTEGER, _BITS, _OCTETS, _UTF8, _SEQUENCE, _SET = 0x02, 0x03, 0x04, 0x0C, 0x30, 0x31
_ATTRIBUTES, _PUBLIC, _DNS, _URI = 0xA0, 0xA1, 0x82, 0x86  # context-specific

# see the manual pages of OpenSSL 3
_LIBRARY: Final = Library(
    "libcrypto.so.3",
    {
        "EVP_PKEY_Q_keygen": (c_void_p, c_void_p, c_char_p, c_char_p, c_char_p),
        "EVP_PKEY_free": (None, c_void_p),
        "EVP_PKEY_get1_encoded_public_key": (c_size_t, c_void_p, POINTER(c_void_p)),
        "EVP_PKEY_get_bn_param": (c_int, c_void_p, c_char_p, POINTER(c_void_p)),
        "BN_bn2binpad": (c_int, c_void_p, c_char_p, c_int),
        "BN_clear_free": (None, c_void_p),
        "CRYPTO_free": (None, c_void_p, c_char_p, c_int),
        "EVP_sha256": (c_void_p,),
        "EVP_MD_CTX_new": (c_void_p,),
        "EVP_MD_CTX_free": (None, c_void_p),
        "EVP_DigestSignInit": (c_int, *[c_void_p] * 5),
        "EVP_CIPHER_CTX_new": (c_void_p,),
        "EVP_CIPHER_CTX_free": (None, c_void_p),
        "EVP_aes_256_ctr": (c_void_p,),
        "EVP_DecryptInit_ex": (c_int, c_void_p, c_void_p, c_void_p, c_char_p, c_char_p),
        "EVP_DecryptUpdate": (c_int, c_void_p, c_void_p, POINTER(c_int), c_void_p, c_int),
        "EVP_DigestSign": (c_int, c_void_p, c_char_p, POINTER(c_size_t), c_char_p, c_size_t),
    },
)


def is_there() -> bool:
    """Whether this can be used here; the ``openssl`` command is the other way."""
    return _LIBRARY.is_there()


def make_key_and_request(uri: str) -> tuple[bytes, str]:
    """A fresh key (PEM, PKCS #8) and the request over it (PEM, PKCS #10), with both names.

    Invalid when ``uri`` is no identity of ours.
    """
    identity, lib = parse_uri(uri), _LIBRARY.load()
    with ExitStack() as owned:
        key = _made(lib.EVP_PKEY_Q_keygen(None, None, b"EC", b"P-256"))
        owned.callback(lib.EVP_PKEY_free, key)
        public = _public(lib, key)
        private = _pem("PRIVATE KEY", _pkcs8(_private(lib, key), public))
        info = _request_info(identity, public)
        signed = _der(_SEQUENCE, info, _ECDSA_SHA256, _der(_BITS, b"\0", _sign(lib, key, info)))
        return private, _pem("CERTIFICATE REQUEST", signed).decode()


class Deciphering:
    """AES-256-CTR from a counter block of zeros; a context manager. Permanent: it cannot be had."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise Permanent(f"a key of {len(key)} bytes")
        self._lib = _LIBRARY.load()
        self._context = _made(self._lib.EVP_CIPHER_CTX_new())
        start, cipher = self._lib.EVP_DecryptInit_ex, self._lib.EVP_aes_256_ctr()
        try:
            _made(start(self._context, cipher, None, key, bytes(_BLOCK_BYTES)))
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.EVP_CIPHER_CTX_free(self._context)

    def apply(self, buffer: Any, size: int) -> None:
        """Decipher the next ``size`` bytes, in place: the first ones of a writable buffer."""
        if not 0 <= size <= len(buffer):
            raise ValueError(f"{size} bytes of a buffer of {len(buffer)}")
        place, count = (ctypes.c_char * len(buffer)).from_buffer(buffer), c_int()
        _made(self._lib.EVP_DecryptUpdate(self._context, place, byref(count), place, size))


def rehearse() -> None:
    """Look up what OpenSSL looks up once, and Python compiles or caches; no key is made."""
    lib = _LIBRARY.load()
    lib.EVP_MD_CTX_free(lib.EVP_MD_CTX_new())
    _request_info(Identity("rehearsal", PLATFORM, "nobody"), bytes(65))


def _public(lib: Any, key: int) -> bytes:
    """The point, uncompressed."""
    pointer = c_void_p()
    length = _made(lib.EVP_PKEY_get1_encoded_public_key(key, byref(pointer)))
    try:
        return ctypes.string_at(_made(pointer.value), length)
    finally:
        lib.CRYPTO_free(pointer, b"", 0)


def _private(lib: Any, key: int) -> bytes:
    number = c_void_p()
    _made(lib.EVP_PKEY_get_bn_param(key, b"priv", byref(number)))
    try:
        buffer = ctypes.create_string_buffer(_NUMBER_BYTES)
        _made(lib.BN_bn2binpad(number, buffer, _NUMBER_BYTES))
        return buffer.raw
    finally:
        lib.BN_clear_free(number)


def _sign(lib: Any, key: int, data: bytes) -> bytes:
    context = _made(lib.EVP_MD_CTX_new())
    try:
        _made(lib.EVP_DigestSignInit(context, None, lib.EVP_sha256(), None, key))
        signature, length = ctypes.create_string_buffer(_MAX_SIGNATURE_BYTES), c_size_t(80)
        _made(lib.EVP_DigestSign(context, signature, byref(length), data, len(data)))
        return signature.raw[: length.value]
    finally:
        lib.EVP_MD_CTX_free(context)


def _pkcs8(private: bytes, public: bytes) -> bytes:
    one = _der(_INTEGER, b"\1")
    bits = _der(_PUBLIC, _der(_BITS, b"\0", public))
    inner = _der(_SEQUENCE, one, _der(_OCTETS, private), bits)
    return _der(_SEQUENCE, _der(_INTEGER, b"\0"), _EC_P256, _der(_OCTETS, inner))


def _request_info(identity: Identity, public: bytes) -> bytes:
    """What is signed: version, subject, public key, and the names as an extension asked for."""
    common = _der(_SEQUENCE, _COMMON_NAME, _der(_UTF8, identity.name.encode()))
    names = _der(_URI, identity.uri.encode()) + _der(_DNS, identity.dns.encode())
    extension = _der(_SEQUENCE, _SUBJECT_ALT_NAME, _der(_OCTETS, _der(_SEQUENCE, names)))
    asked = _der(_SEQUENCE, _EXTENSION_REQUEST, _der(_SET, _der(_SEQUENCE, extension)))
    return _der(
        _SEQUENCE,
        _der(_INTEGER, b"\0"),
        _der(_SEQUENCE, _der(_SET, common)),
        _der(_SEQUENCE, _EC_P256, _der(_BITS, b"\0", public)),
        _der(_ATTRIBUTES, asked),
    )


def _der(tag: int, *parts: bytes) -> bytes:
    """One element of DER (X.690)."""
    content = b"".join(parts)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def _pem(kind: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join((f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----", "")).encode()


def _made(result: int | None) -> int:
    if result is None or result <= 0:
        raise Permanent("libcrypto did not do what was asked")
    return result
