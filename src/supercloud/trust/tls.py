"""TLS 1.3 contexts, who the peer is, and pins of public keys; standard library only.

Chains are checked by OpenSSL against the user's root, strictly (RFC 5280). Who may do what is
decided on the URI name in the leaf, which the U-Cloud's intermediate constrains (see authority).
"""

import hashlib
import hmac
import ssl
from collections.abc import Callable
from typing import Any, Final

from supercloud.model.errors import Denied, Invalid
from supercloud.trust.names import Identity, parse_uri

__all__ = ["Identity"]

_SEQUENCE: Final = 0x30
_INTEGER: Final = 0x02
_VERSION: Final = 0xA0
_MAX_CERTIFICATE_BYTES: Final = 64 << 10


def server_context(
    cert_path: str, key_path: str, ca_pem: str, require_client: bool | None
) -> ssl.SSLContext:
    """Server side. ``cert_path`` holds the leaf and its chain.

    ``require_client``: True demands a client certificate under ``ca_pem``, None checks one when it
    is shown, False never asks.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_path, key_path)
    if require_client is not False:
        context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=ca_pem)
    return _hardened(context)


def check_pair(cert_path: str, key_path: str) -> None:
    """Invalid unless the certificate in the first file is over the key in the second."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_path, key_path)
    except (OSError, ssl.SSLError) as error:
        raise Invalid(f"the certificate does not fit: {error}") from error


def client_context(
    ca_pem: str,
    cert_path: str = "",
    key_path: str = "",
    *,
    check_hostname: bool = True,
    alpn: str = "",
) -> ssl.SSLContext:
    """Client side, checking the server's chain against ``ca_pem``.

    Without ``check_hostname`` the caller must check ``peer_identity``, for there the server name
    is an address (the front door's) and no identity.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = check_hostname
    context.load_verify_locations(cadata=ca_pem)
    if cert_path:
        context.load_cert_chain(cert_path, key_path)
    if alpn:
        context.set_alpn_protocols([alpn])
    return _hardened(context)


def bare_context() -> ssl.SSLContext:
    """Client side that trusts nobody."""
    return _hardened(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


def unverified_client_context(cert_path: str, key_path: str) -> ssl.SSLContext:
    """Client side for a first contact: checks no chain; the caller must check the peer's pin."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(cert_path, key_path)
    return _hardened(context)


def _hardened(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def by_server_name(
    default: ssl.SSLContext, find: Callable[[str], ssl.SSLContext | None]
) -> ssl.SSLContext:
    """Make ``default`` hand a connection over to the context that ``find`` has for its SNI.

    Whether and how strictly a client is verified stays ``default``'s: OpenSSL takes over the
    other's certificate, trust and ALPN only.
    """

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: object) -> None:
        found = find(name) if name else None
        if found is not None:
            connection.context = found

    default.sni_callback = choose
    return default


# -- who the peer is


def peer_identity(connection: ssl.SSLObject | ssl.SSLSocket) -> Identity | None:
    """The verified identity of the peer; None when it showed no certificate (that was checked).

    Denied when the certificate has not exactly one URI name, or one that is not ours.
    """
    certificate = connection.getpeercert()
    return identity_in(certificate) if certificate else None


def identity_in(certificate: Any) -> Identity:
    """The identity in a certificate as ``getpeercert()`` gives it; Denied when there is none."""
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    if len(uris) != 1:
        raise Denied(f"the certificate has {len(uris)} URI names instead of one")
    try:
        return parse_uri(uris[0])
    except Invalid as error:
        raise Denied(f"the certificate is not of a U-Cloud: {error.message}") from error


def demand(identity: Identity | None, *, ucloud: str, role: str, name: str = "") -> Identity:
    """``identity`` when it is of this U-Cloud and role (and name); Denied, with why not."""
    if identity is None:
        raise Denied("no certificate was shown")
    if identity.ucloud != ucloud:
        raise Denied(f"{identity} is of another U-Cloud than {ucloud}")
    if identity.role != role:
        raise Denied(f"{identity} has the role {identity.role}, needed is {role}")
    if name and identity.name != name:
        raise Denied(f"{identity} is not {name}")
    return identity


# -- pins


def pin_of_der(untrusted_der: bytes) -> str:
    """``sha256:...`` of the SubjectPublicKeyInfo in a certificate (DER); Invalid if it is none."""
    return "sha256:" + hashlib.sha256(public_key_info(untrusted_der)).hexdigest()


def pin_of_peer(connection: ssl.SSLObject | ssl.SSLSocket) -> str:
    """The pin of the peer's key, whether or not its chain was checked; Denied without one."""
    der = connection.getpeercert(binary_form=True)
    if not der:
        raise Denied("no certificate was shown")
    return pin_of_der(der)


def pin_of_pem(pem: str) -> str:
    """The pin of the first certificate in ``pem``."""
    end = "-----END CERTIFICATE-----"
    try:
        return pin_of_der(ssl.PEM_cert_to_DER_cert(pem[: pem.index(end) + len(end)]))
    except ValueError as error:
        raise Invalid("that is no certificate in PEM") from error


def check_pin(found: str, pinned: str, whom: str) -> None:
    """Denied when the key is not the pinned one."""
    if not hmac.compare_digest(found, pinned):
        raise Denied(
            f"{whom} shows another key than the one that was pinned at first contact",
            hint="either its domain was made anew (then forget the pin) or somebody is in between",
            details={"found": found, "pinned": pinned},
        )


def public_key_info(untrusted_der: bytes) -> bytes:
    """The DER of the SubjectPublicKeyInfo in an X.509 certificate; Invalid when malformed.

    RFC 5280: Certificate { TBS { [0] version?, serial, algorithm, issuer, validity, subject,
    subjectPublicKeyInfo, ... }, ... }.
    """
    if len(untrusted_der) > _MAX_CERTIFICATE_BYTES:
        raise Invalid(f"a certificate of {len(untrusted_der)} bytes")
    start, end = _element(untrusted_der, 0, len(untrusted_der), _SEQUENCE)
    at, end = _element(untrusted_der, start, end, _SEQUENCE)
    if at < end and untrusted_der[at] == _VERSION:
        at = _element(untrusted_der, at, end, _VERSION)[1]
    for tag in (_INTEGER, *(_SEQUENCE,) * 4):
        at = _element(untrusted_der, at, end, tag)[1]
    return untrusted_der[at : _element(untrusted_der, at, end, _SEQUENCE)[1]]


def _element(der: bytes, at: int, limit: int, tag: int) -> tuple[int, int]:
    """Where the contents of the element at ``at`` begin and end, all within ``limit``."""
    if at + 2 > limit or der[at] != tag:
        raise Invalid("malformed certificate")
    length, at = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        if not 1 <= size <= 3 or at + size > limit:
            raise Invalid("malformed certificate")
        length, at = int.from_bytes(der[at : at + size], "big"), at + size
    if at + length > limit:
        raise Invalid("malformed certificate")
    return at, at + length
