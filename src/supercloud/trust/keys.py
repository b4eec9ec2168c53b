"""Keys, requests and self-signed certificates by the ``openssl`` command; standard library only.

Runs in user domains and in platforms, which have no ``cryptography``. A key never leaves the place
where it was made: only its request does. Keys are P-256.
"""

import os
import subprocess
from typing import Final

from supercloud.model.errors import Exists, Invalid, Permanent
from supercloud.trust.names import DOMAIN, parse_uri

_TIMEOUT_S: Final = 60
_GENERATE: Final = ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def make_key(path: str) -> None:
    """Make a P-256 key in ``path`` (PEM, mode 0600). Exists when something is there."""
    keep_key(path, _openssl(*_GENERATE, "-pkeyopt", "ec_param_enc:named_curve"))


def keep_key(path: str, pem: bytes) -> None:
    """Put a key into ``path``, as ``make_key`` does.

    The file appears complete or not at all, whenever the process dies.
    """
    part = f"{path}.{os.getpid()}.part"
    try:
        _write_private(part, pem)
        os.link(part, path)
    except FileExistsError as error:
        raise Exists(f"there is a key in {path} already") from error
    finally:
        if os.path.exists(part):
            os.unlink(part)


def ensure_key(path: str) -> bool:
    """Make the key unless it is there; True when it was made."""
    if os.path.exists(path):
        return False
    make_key(path)
    return True


def make_request(key_path: str, uri: str, dns: str) -> str:
    """A certificate request (PKCS #10, PEM) over the key, with both names."""
    return _openssl("req", "-new", *_subject(key_path, uri, dns)).decode()


def make_self_signed(key_path: str, uri: str, dns: str, days: int) -> str:
    """A self-signed leaf certificate (PEM): for the first contact, when nobody has signed yet."""
    extensions = (
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-addext", "keyUsage=critical,digitalSignature",
        "-addext", "extendedKeyUsage=serverAuth,clientAuth",
    )  # fmt: skip
    subject = _subject(key_path, uri, dns)
    return _openssl("req", "-x509", "-new", "-days", str(int(days)), *subject, *extensions).decode()


def _subject(key_path: str, uri: str, dns: str) -> tuple[str, ...]:
    if dns != parse_uri(uri).dns or not dns.endswith(DOMAIN):
        raise Invalid(f"{dns!r:.300} is not the DNS name of {uri!r:.120}")
    name = parse_uri(uri).name
    alternatives = f"subjectAltName=URI:{uri},DNS:{dns}"
    return ("-key", key_path, "-config", "/dev/null", "-sha256", "-subj", f"/CN={name}",
            "-addext", alternatives)  # fmt: skip


def _openssl(*arguments: str) -> bytes:
    """Standard output of the command; Permanent with the last line of its complaint."""
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OPENSSL_CONF": "/dev/null"}
    try:
        done = subprocess.run(
            ["openssl", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Permanent(f"openssl {arguments[0]} could not run: {error}") from error
    if done.returncode:
        complaint = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise Permanent(f"openssl {arguments[0]} failed: {(complaint or ['no reason'])[-1]:.300}")
    return done.stdout


def _write_private(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
