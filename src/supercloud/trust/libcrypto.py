"""A key and its request by the libcrypto that Python's ``ssl`` has loaded: no process is started.

Under emulation a run of the ``openssl`` command costs some 200 ms, and a platform that starts from
memory would spend most of its start on two of them. The results are the same as of ``trust.keys``:
P-256, PKCS #8, PKCS #10 with both names. Function names and the order of arguments are OpenSSL 3's
(EVP_PKEY_Q_keygen(3), X509_REQ_sign(3), X509V3_EXT_conf_nid(3)).
"""

import ctypes
import functools
from contextlib import ExitStack
from ctypes import c_char_p, c_int, c_long, c_void_p
from typing import Any, Final

from supercloud.model.errors import Permanent
from supercloud.trust.names import Identity, parse_uri

_SUBJECT_ALT_NAME: Final = 85  # NID_subject_alt_name
_MBSTRING_ASC: Final = 0x1001
_MAX_PEM_BYTES: Final = 65536

# name -> (type of the result, types of the arguments)
_FUNCTIONS: Final[dict[str, tuple[Any, ...]]] = {
    "EVP_PKEY_Q_keygen": (c_void_p, c_void_p, c_char_p, c_char_p, c_char_p),
    "EVP_PKEY_free": (None, c_void_p),
    "EVP_sha256": (c_void_p,),
    "BIO_s_mem": (c_void_p,),
    "BIO_new": (c_void_p, c_void_p),
    "BIO_read": (c_int, c_void_p, c_char_p, c_int),
    "BIO_free": (c_int, c_void_p),
    "PEM_write_bio_PKCS8PrivateKey": (c_int, *[c_void_p] * 3, c_char_p, c_int, *[c_void_p] * 2),
    "PEM_write_bio_X509_REQ": (c_int, c_void_p, c_void_p),
    "X509_REQ_new": (c_void_p,),
    "X509_REQ_free": (None, c_void_p),
    "X509_REQ_set_version": (c_int, c_void_p, c_long),
    "X509_REQ_set_pubkey": (c_int, c_void_p, c_void_p),
    "X509_REQ_get_subject_name": (c_void_p, c_void_p),
    "X509_NAME_add_entry_by_txt": (c_int, c_void_p, c_char_p, c_int, c_char_p, *[c_int] * 3),
    "X509V3_EXT_conf_nid": (c_void_p, c_void_p, c_void_p, c_int, c_char_p),
    "X509_EXTENSION_free": (None, c_void_p),
    "OPENSSL_sk_new_null": (c_void_p,),
    "OPENSSL_sk_push": (c_int, c_void_p, c_void_p),
    "OPENSSL_sk_free": (None, c_void_p),
    "X509_REQ_add_extensions": (c_int, c_void_p, c_void_p),
    "X509_REQ_sign": (c_int, c_void_p, c_void_p, c_void_p),
}


@functools.cache
def _library() -> Any:
    """The functions; OSError or AttributeError where there is no such libcrypto."""
    library = ctypes.CDLL("libcrypto.so.3")
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def is_there() -> bool:
    """Whether this can be used here; the ``openssl`` command is the other way."""
    try:
        _library()
    except (OSError, AttributeError):
        return False
    return True


def make_key_and_request(uri: str) -> tuple[bytes, str]:
    """A fresh key (PEM, PKCS #8) and the request over it (PEM, PKCS #10), with both names.

    Invalid when ``uri`` is no identity of ours.
    """
    lib = _library()
    with ExitStack() as owned:
        key = _made(lib.EVP_PKEY_Q_keygen(None, None, b"EC", b"P-256"))
        owned.callback(lib.EVP_PKEY_free, key)
        request = _made(lib.X509_REQ_new())
        owned.callback(lib.X509_REQ_free, request)
        _fill(lib, request, key, parse_uri(uri))
        private = _pem(
            lambda bio: lib.PEM_write_bio_PKCS8PrivateKey(bio, key, None, None, 0, None, None)
        )
        return private, _pem(lambda bio: lib.PEM_write_bio_X509_REQ(bio, request)).decode()


def _fill(lib: Any, request: int, key: int, identity: Identity) -> None:
    name = identity.name.encode()
    subject = lib.X509_REQ_get_subject_name(request)
    names = f"URI:{identity.uri},DNS:{identity.dns}".encode()
    with ExitStack() as owned:
        extension = _made(lib.X509V3_EXT_conf_nid(None, None, _SUBJECT_ALT_NAME, names))
        owned.callback(lib.X509_EXTENSION_free, extension)
        extensions = _made(lib.OPENSSL_sk_new_null())
        owned.callback(lib.OPENSSL_sk_free, extensions)
        _made(lib.X509_REQ_set_version(request, 0))
        _made(lib.X509_NAME_add_entry_by_txt(subject, b"CN", _MBSTRING_ASC, name, -1, -1, 0))
        _made(lib.OPENSSL_sk_push(extensions, extension))
        _made(lib.X509_REQ_add_extensions(request, extensions))
        _made(lib.X509_REQ_set_pubkey(request, key))
        _made(lib.X509_REQ_sign(request, key, lib.EVP_sha256()))


def _pem(write: Any) -> bytes:
    lib = _library()
    bio = _made(lib.BIO_new(lib.BIO_s_mem()))
    try:
        _made(write(bio))
        buffer = ctypes.create_string_buffer(_MAX_PEM_BYTES)
        length = _made(lib.BIO_read(bio, buffer, _MAX_PEM_BYTES))
        return buffer.raw[:length]
    finally:
        lib.BIO_free(bio)


def _made(result: int | None) -> int:
    if result is None or result <= 0:
        raise Permanent("libcrypto could not make a key or its request")
    return result
