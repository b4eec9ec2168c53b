"""Who this domain is: its key, made here and never shown, and the certificate over it.

The first control plane with a certificate of the user's root binds the domain to its U-Cloud;
those of other U-Clouds of the same root are refused from then on.
"""

import json
import logging
import os
import re
import ssl
import subprocess
from dataclasses import dataclass
from typing import Final

from supercloud.model.errors import BadState, Denied, Invalid, Permanent
from supercloud.trust import keys, tls
from supercloud.trust.names import CONTROL, HOST, Identity, parse_uri
from supercloud.wire.messages import Certificate

SELF_SIGNED_DAYS: Final = 3650
_URI: Final = re.compile(r"URI:(\S+?)(?:,|\s|$)")
_OPENSSL_TIMEOUT_S: Final = 30

log = logging.getLogger("supercloud.lower.user_domain.identity")


@dataclass(frozen=True, slots=True)
class Birth:
    """What the domain was told when it was made: sealed and measured."""

    user: str
    ca_pem: str


def read_birth(descriptor: int) -> Birth:
    """Out of the sealed memory object; Permanent when it is not as the multiplexing writes it."""
    size = os.fstat(descriptor).st_size
    try:
        told = json.loads(os.pread(descriptor, size, 0).rstrip(b"\0"))
        return Birth(str(told["user"]), str(told["ca_pem"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Permanent(f"this domain's identity cannot be read: {error}") from error


class IdentityStore:
    """Key, certificate and the U-Cloud that this domain belongs to, in ``directory``."""

    def __init__(self, directory: str, birth: Birth, instance: str) -> None:
        self._directory, self._birth, self._instance = directory, birth, instance
        self._key = f"{directory}/key.pem"
        self._first, self._signed = f"{directory}/first.pem", f"{directory}/signed.pem"
        self.ucloud = self._read_ucloud()
        if keys.ensure_key(self._key) or not os.path.exists(self._first):
            _write(self._first, self._self_signed())

    def context(self) -> ssl.SSLContext:
        """Server side of the host wire: nobody without a certificate of the user's root gets in."""
        certificate = self._signed if os.path.exists(self._signed) else self._first
        return tls.server_context(certificate, self._key, self._birth.ca_pem, require_client=True)

    def admit(self, shown: Identity | None) -> Identity:
        """The peer when it is the control plane of this domain's U-Cloud; Denied."""
        wanted = self.ucloud or (shown.ucloud if shown else "")
        identity = tls.demand(shown, ucloud=wanted, role=CONTROL)
        if not self.ucloud:
            _write(f"{self._directory}/ucloud", identity.ucloud)
            self.ucloud = identity.ucloud
            log.info("this domain belongs to the U-Cloud %s", self.ucloud)
        return identity

    def admit_host(self, shown: Identity | None) -> Identity:
        """The peer when it is a host of this domain's U-Cloud, which one must be known; Denied."""
        if not self.ucloud:
            raise Denied("this domain belongs to no U-Cloud yet")
        return tls.demand(shown, ucloud=self.ucloud, role=HOST)

    def client_context(self) -> ssl.SSLContext:
        """Client side, towards other hosts: the caller checks who they are. BadState: unsigned."""
        if not os.path.exists(self._signed):
            raise BadState("no certificate of the U-Cloud was installed yet")
        return tls.client_context(self._birth.ca_pem, self._signed, self._key, check_hostname=False)

    def request(self) -> str:
        """A certificate request over the key. The signer puts its own names in."""
        own = Identity(self.ucloud, HOST, self._instance)
        return keys.make_request(self._key, own.uri, own.dns)

    def install(self, given: Certificate) -> None:
        """Present this from now on; Invalid unless it is of our root, key and U-Cloud."""
        part = f"{self._signed}.part"
        _write(part, given.cert_pem + given.chain_pem)
        try:
            tls.server_context(part, self._key, self._birth.ca_pem, require_client=True)
            self._verify(part, given)
        except (ssl.SSLError, Permanent) as error:
            os.unlink(part)
            raise Invalid(f"the certificate does not fit: {error}") from error
        os.replace(part, self._signed)
        log.info("a certificate was installed")

    def _verify(self, path: str, given: Certificate) -> None:
        root, chain = f"{path}.root", f"{path}.chain"
        _write(root, self._birth.ca_pem)
        _write(chain, given.chain_pem)
        try:
            _openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", root,
                     "-untrusted", chain, path)  # fmt: skip
            shown = _openssl("x509", "-in", path, "-noout", "-ext", "subjectAltName")
        finally:
            for name in (root, chain):
                os.unlink(name)
        uris = _URI.findall(shown)
        if len(uris) != 1:
            raise Permanent(f"it has {len(uris)} URI names")
        try:
            tls.demand(parse_uri(uris[0]), ucloud=self.ucloud, role=HOST)
        except (Denied, Invalid) as error:
            raise Permanent(str(error)) from error

    def _self_signed(self) -> str:
        own = Identity(self._birth.user, HOST, self._instance)
        return keys.make_self_signed(self._key, own.uri, own.dns, SELF_SIGNED_DAYS)

    def _read_ucloud(self) -> str:
        try:
            with open(f"{self._directory}/ucloud", encoding="ascii") as file:
                return file.read()
        except FileNotFoundError:
            return ""


def _openssl(*arguments: str) -> str:
    done = subprocess.run(
        ["openssl", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_OPENSSL_TIMEOUT_S,
        env={"PATH": "/usr/bin:/bin", "OPENSSL_CONF": "/dev/null"},
    )  # fmt: skip
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode:
        raise Permanent((said or ["no reason"])[-1][:300])
    return done.stdout.decode("utf-8", "replace")


def _write(path: str, text: str) -> None:
    part = f"{path}.new"
    with open(part, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
