"""A pretended platform's key: as a real one's, but made in the process, for cheapness."""

import os

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from supercloud.providers.fake.files import write_private
from supercloud.trust import builder


def request(key_path: str, name: str) -> str:
    """A certificate request (PEM) over the key in ``key_path``, which is made if need be."""
    key = builder.ensure_key(key_path, None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    made = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def keep(path: str, pem: str) -> None:
    """Keep the certificate."""
    write_private(path, pem.encode())
    os.chmod(path, 0o600)
