"""How the certificates of a U-Cloud are put together, and how keys are kept; control plane only."""

import datetime as dt
import os
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from supercloud.model.errors import Denied, Invalid
from supercloud.trust.names import DOMAIN, Identity

CLOCK_SKEW: Final = dt.timedelta(minutes=10)


def pem(certificate: x509.Certificate) -> bytes:
    """The certificate in PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_certificate(path: str) -> x509.Certificate:
    """The first certificate of a file."""
    with open(path, "rb") as file:
        return x509.load_pem_x509_certificate(file.read())


def write_file(path: str, data: bytes, mode: int) -> None:
    """Put ``data`` at ``path`` atomically and durably."""
    part = f"{path}.{os.getpid()}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(part, flags, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def ensure_key(path: str, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of a file of mode 0600, made when it is not there.

    Denied when the passphrase is wrong or others may read the file.
    """
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        write_file(path, _encoded(ec.generate_private_key(ec.SECP256R1()), passphrase), 0o600)
    return _load_key(path, passphrase)


def _load_key(path: str, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise Denied(f"others may read the key file {path}", hint=f"chmod 600 {path}")
        data = file.read()
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except (TypeError, ValueError) as error:
        raise Denied(f"the key in {path} cannot be opened: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Invalid(f"the key in {path} is not on an elliptic curve")
    return key


def _encoded(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        how = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def root(key: ec.EllipticCurvePrivateKey, lifetime: dt.timedelta) -> x509.Certificate:
    """A self-signed root that may sign intermediates."""
    name = _name("supercloud user root")
    builder = _started(name, name, key.public_key(), lifetime)
    return _authority(builder, key.public_key(), 1).sign(key, hashes.SHA256())


def intermediate(
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    ucloud: str,
    lifetime: dt.timedelta,
) -> x509.Certificate:
    """One U-Cloud's intermediate: its name constraints hold for whoever checks the chain."""
    name = _name(f"supercloud {ucloud}")
    constraints = x509.NameConstraints(
        permitted_subtrees=[
            x509.DNSName(f"{ucloud}.{DOMAIN}"),
            x509.UniformResourceIdentifier(ucloud),
        ],
        excluded_subtrees=None,
    )
    builder = _authority(_started(name, issuer.subject, key, lifetime, issuer), key, 0)
    builder = builder.add_extension(constraints, critical=True)
    return _issued_by(builder, issuer).sign(issuer_key, hashes.SHA256())


def leaf(
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    identity: Identity,
    lifetime: dt.timedelta,
) -> x509.Certificate:
    """A leaf for both ends of TLS, with the identity's URI and DNS names."""
    names = [x509.UniformResourceIdentifier(identity.uri), x509.DNSName(identity.dns)]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _started(_name(identity.name), issuer.subject, key, lifetime, issuer)
    for extension, critical in (
        (x509.SubjectAlternativeName(names), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(authority=False), True),
        (x509.ExtendedKeyUsage(uses), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
    ):
        builder = builder.add_extension(extension, critical)
    return _issued_by(builder, issuer).sign(issuer_key, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _started(
    subject: x509.Name,
    issuer_name: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: dt.timedelta,
    issuer: x509.Certificate | None = None,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    end = now + lifetime
    if issuer is not None:
        end = min(end, issuer.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SKEW)
        .not_valid_after(end)
    )


def _authority(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePublicKey, path_length: int
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=path_length), critical=True
        )
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issued_by(
    builder: x509.CertificateBuilder, issuer: x509.Certificate
) -> x509.CertificateBuilder:
    key = issuer.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise Invalid("the issuer's key is not on an elliptic curve")
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return builder.add_extension(identifier, critical=False)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
