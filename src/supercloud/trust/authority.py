"""The user's offline root and the intermediate of each U-Cloud; control plane only.

::

    DIRECTORY/root.key  root.pem               the user's root: path length 1, ten years
    DIRECTORY/UCLOUD/intermediate.key  .pem    path length 0, names of this U-Cloud only, one year
    DIRECTORY/UCLOUD/control.key  control.pem  the control plane's own leaf and chain
    DIRECTORY/UCLOUD/issued.jsonl              every leaf, written before it is handed out

The root key is needed only to make or renew an intermediate: it may be encrypted, or be kept
elsewhere in between. Certificates follow RFC 5280 strictly, for Python 3.13 checks that by default.
"""

import datetime as dt
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from supercloud.model.errors import Denied, Invalid, NotFound
from supercloud.trust import builder
from supercloud.trust.names import Identity, check_label, control_of
from supercloud.trust.tls import pin_of_der
from supercloud.wire.messages import Certificate

DAY: Final = dt.timedelta(days=1)
ROOT_LIFETIME: Final = 3650 * DAY
INTERMEDIATE_LIFETIME: Final = 365 * DAY
LEAF_LIFETIME: Final = 30 * DAY
RENEW_AFTER: Final = 0.5
"""The part of a certificate's life after which it is renewed."""

MAX_CSR_BYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Issued:
    """The record of one leaf. Times are seconds since the epoch; ``pin`` is of its public key."""

    serial: str
    uri: str
    pin: str
    not_before_s: float
    not_after_s: float


Record = Callable[[Issued], None]


class Root:
    """The user's root. ``passphrase`` encrypts its key file."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate, self._key = certificate, key

    @classmethod
    def ensure(cls, directory: str, passphrase: bytes | None = None) -> "Root":
        """The root of ``directory``, made when there is none yet."""
        certificate_path = os.path.join(directory, "root.pem")
        key = builder.ensure_key(os.path.join(directory, "root.key"), passphrase)
        if not os.path.exists(certificate_path):
            made = builder.root(key, ROOT_LIFETIME)
            builder.write_file(certificate_path, builder.pem(made), 0o644)
        return cls(builder.load_certificate(certificate_path), key)

    def intermediate(self, ucloud: str, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """A certificate with which ``key`` may sign leaves of ``ucloud`` and of nothing else."""
        return builder.intermediate(
            self.certificate, self._key, key, check_label(ucloud, "ucloud"), INTERMEDIATE_LIFETIME
        )


class Authority:
    """Signs the leaves of one U-Cloud."""

    def __init__(
        self,
        ucloud: str,
        root: x509.Certificate,
        certificate: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        record: Record,
    ) -> None:
        self.ucloud = ucloud
        self.root_pem = builder.pem(root).decode()
        self.chain_pem = builder.pem(certificate).decode()
        self._certificate, self._key, self._record = certificate, key, record

    @classmethod
    def ensure(
        cls,
        directory: str,
        ucloud: str,
        passphrase: bytes | None = None,
        record: Record | None = None,
    ) -> "Authority":
        """The authority of ``ucloud``; makes (or renews) what is missing, with the root's key."""
        home = os.path.join(directory, check_label(ucloud, "ucloud"))
        os.makedirs(home, mode=0o700, exist_ok=True)
        key = builder.ensure_key(os.path.join(home, "intermediate.key"), None)
        path = os.path.join(home, "intermediate.pem")
        if not os.path.exists(path) or due(builder.load_certificate(path)):
            made = Root.ensure(directory, passphrase).intermediate(ucloud, key.public_key())
            builder.write_file(path, builder.pem(made), 0o644)
        root = builder.load_certificate(os.path.join(directory, "root.pem"))
        record = record or IssuedLog(os.path.join(home, "issued.jsonl"))
        return cls(ucloud, root, builder.load_certificate(path), key, record)

    def issue(
        self,
        untrusted_csr_pem: str,
        identity: Identity,
        lifetime: dt.timedelta = LEAF_LIFETIME,
    ) -> Certificate:
        """Sign the request's key under ``identity``; the names that the request asks for are void.

        Invalid when the request is malformed, its signature is wrong or its key is not P-256;
        Denied when the identity is of another U-Cloud.
        """
        return self._sign(public_key_of_request(untrusted_csr_pem), identity, lifetime)

    def _sign(
        self, key: ec.EllipticCurvePublicKey, identity: Identity, lifetime: dt.timedelta
    ) -> Certificate:
        if identity.ucloud != self.ucloud:
            raise Denied(f"{identity} is of another U-Cloud than {self.ucloud}")
        leaf = builder.leaf(self._certificate, self._key, key, identity, lifetime)
        self._record(
            Issued(
                serial=f"{leaf.serial_number:x}",
                uri=identity.uri,
                pin=pin_of_der(leaf.public_bytes(serialization.Encoding.DER)),
                not_before_s=leaf.not_valid_before_utc.timestamp(),
                not_after_s=leaf.not_valid_after_utc.timestamp(),
            )
        )
        return Certificate(cert_pem=builder.pem(leaf).decode(), chain_pem=self.chain_pem)

    def own_files(self, directory: str) -> tuple[str, str]:
        """Paths of the control plane's certificate (with chain) and key, made or renewed if due."""
        home = os.path.join(directory, self.ucloud)
        os.makedirs(home, mode=0o700, exist_ok=True)
        key_path, path = os.path.join(home, "control.key"), os.path.join(home, "control.pem")
        key = builder.ensure_key(key_path, None)
        if not os.path.exists(path) or due(builder.load_certificate(path)):
            made = self._sign(key.public_key(), control_of(self.ucloud), LEAF_LIFETIME)
            builder.write_file(path, (made.cert_pem + made.chain_pem).encode(), 0o644)
        return path, key_path


class IssuedLog:
    """Records of leaves, one JSON object per line, on disk before the leaf is handed out."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, issued: Issued) -> None:
        """Append the record."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with open(os.open(self._path, flags, 0o600), "ab") as file:
            file.write(json.dumps(asdict(issued)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def due(certificate: x509.Certificate, now: dt.datetime | None = None) -> bool:
    """Whether the certificate has lived ``RENEW_AFTER`` of its life."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (now or dt.datetime.now(dt.UTC)) >= start + (end - start) * RENEW_AFTER


def due_pem(cert_pem: str, now: dt.datetime | None = None) -> bool:
    """``due`` of the first certificate in ``cert_pem``."""
    return due(x509.load_pem_x509_certificate(cert_pem.encode()), now)


def public_key_of_request(untrusted_csr_pem: str) -> ec.EllipticCurvePublicKey:
    """The P-256 key whose owner made the request; Invalid otherwise."""
    if len(untrusted_csr_pem) > MAX_CSR_BYTES:
        raise Invalid(f"a certificate request of {len(untrusted_csr_pem)} bytes")
    try:
        request = x509.load_pem_x509_csr(untrusted_csr_pem.encode())
        key, signed = request.public_key(), request.is_signature_valid
        algorithm = request.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise Invalid("that is no certificate request in PEM") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Invalid("the request's key is not on the curve P-256")
    if not isinstance(algorithm, hashes.SHA256) or not signed:
        raise Invalid("the request is not signed by its own key with SHA-256")
    return key


def pin_of_request(untrusted_csr_pem: str) -> str:
    """The pin of the request's key, which it proved to have; Invalid otherwise."""
    info = public_key_of_request(untrusted_csr_pem).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return "sha256:" + hashlib.sha256(info).hexdigest()


def passphrase_from(descriptor: int) -> bytes:
    """A passphrase of at most 1024 bytes from a descriptor, without the newline; closes it."""
    with os.fdopen(descriptor, "rb") as file:
        passphrase = file.read(1025).rstrip(b"\r\n")
    if not passphrase or len(passphrase) > 1024:
        raise NotFound("no usable passphrase came over the descriptor")
    return passphrase
