"""The user's root, the intermediate of a U-Cloud, and what they sign."""

import datetime as dt
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from supercloud.model.errors import Denied, Invalid, NotFound
from supercloud.trust import authority as authorities
from supercloud.trust import builder, keys, tls
from supercloud.trust.authority import Authority, Root
from supercloud.trust.names import Identity

P1 = Identity("demo", "platform", "p1")


def request(key=None, hash_=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder_ = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return (
        builder_.sign(key, hash_ or hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )


def load(pem):
    return x509.load_pem_x509_certificate(pem.encode())


def test_openssl_accepts_the_chain_strictly(tmp_path):
    authority = Authority.ensure(str(tmp_path), "demo")
    made = authority.issue(request(), P1)
    (tmp_path / "leaf.pem").write_text(made.cert_pem)
    (tmp_path / "chain.pem").write_text(made.chain_pem)
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose]
        files = ["-CAfile", tmp_path / "root.pem", "-untrusted", tmp_path / "chain.pem"]
        done = subprocess.run(
            [*command, *files, tmp_path / "leaf.pem"], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_leaf_has_the_names_of_the_identity_and_not_those_of_the_request(tmp_path):
    keys.make_key(str(tmp_path / "k"))
    other = Identity("demo", "control", "control")
    asked = keys.make_request(str(tmp_path / "k"), other.uri, other.dns)
    leaf = load(Authority.ensure(str(tmp_path), "demo").issue(asked, P1).cert_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [P1.uri]
    assert names.get_values_for_type(x509.DNSName) == [P1.dns]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_an_authority_signs_for_its_own_ucloud_only(tmp_path):
    with pytest.raises(Denied, match="another U-Cloud"):
        Authority.ensure(str(tmp_path), "demo").issue(request(), Identity("prod", "platform", "p1"))


@pytest.mark.parametrize(
    ("csr", "why"),
    [
        (lambda: request(rsa.generate_private_key(65537, 2048)), "P-256"),
        (lambda: request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda: request(hash_=hashes.SHA512()), "SHA-256"),
        (
            lambda: (
                "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
            ),
            "PEM",
        ),
        (lambda: "", "PEM"),
        (lambda: "x" * 20_000, "20000 bytes"),
    ],
)
def test_requests_that_are_refused(tmp_path, csr, why):
    with pytest.raises(Invalid, match=why):
        Authority.ensure(str(tmp_path), "demo").issue(csr(), P1)


def test_a_request_with_a_foreign_key_put_into_it_is_refused(tmp_path):
    """The signature must be by the key in the request: replace the key, keep the signature."""
    mine, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    spki = [
        key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        for key in (mine, theirs)
    ]
    der = x509.load_pem_x509_csr(request(mine).encode()).public_bytes(serialization.Encoding.DER)
    assert spki[0] in der
    forged = x509.load_der_x509_csr(der.replace(*spki)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Invalid, match="own key"):
        Authority.ensure(str(tmp_path), "demo").issue(forged.decode(), P1)


def test_every_leaf_is_recorded_before_it_is_handed_out(tmp_path):
    authority = Authority.ensure(str(tmp_path), "demo")
    made = load(authority.issue(request(), P1).cert_pem)
    lines = (tmp_path / "demo" / "issued.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert record["serial"] == f"{made.serial_number:x}"
    assert record["uri"] == P1.uri
    assert record["pin"] == tls.pin_of_der(made.public_bytes(serialization.Encoding.DER))
    assert stat.S_IMODE(os.stat(tmp_path / "demo" / "issued.jsonl").st_mode) == 0o600


def test_nothing_is_handed_out_when_it_cannot_be_recorded(tmp_path):
    def full(_issued):
        raise OSError(28, "No space left on device")

    authority = Authority.ensure(str(tmp_path), "demo", record=full)
    with pytest.raises(OSError, match="No space"):
        authority.issue(request(), P1)


def test_keys_are_private_and_everything_is_found_again(tmp_path):
    first = Authority.ensure(str(tmp_path), "demo")
    paths = first.own_files(str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    second = Authority.ensure(str(tmp_path), "demo")
    assert second.own_files(str(tmp_path)) == paths
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    for path in tmp_path.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_others_may_read_is_not_used(tmp_path):
    Authority.ensure(str(tmp_path), "demo")
    (tmp_path / "demo" / "intermediate.key").chmod(0o644)
    with pytest.raises(Denied, match="others may read"):
        Authority.ensure(str(tmp_path), "demo")


def test_the_root_may_be_locked_and_is_needed_for_a_new_ucloud_only(tmp_path):
    Authority.ensure(str(tmp_path), "demo", b"open sesame")
    assert b"ENCRYPTED" in (tmp_path / "root.key").read_bytes()
    Authority.ensure(str(tmp_path), "demo")
    for wrong in (None, b"abracadabra"):
        with pytest.raises(Denied, match=r"root\.key"):
            Authority.ensure(str(tmp_path), "prod", wrong)
    Authority.ensure(str(tmp_path), "prod", b"open sesame")


def test_a_passphrase_comes_over_a_descriptor():
    reading, writing = os.pipe()
    os.write(writing, b"open sesame\n")
    os.close(writing)
    assert authorities.passphrase_from(reading) == b"open sesame"
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(NotFound):
        authorities.passphrase_from(reading)


def test_renewal_is_due_after_half_of_the_life(tmp_path):
    made = Authority.ensure(str(tmp_path), "demo").issue(request(), P1, dt.timedelta(days=10))
    now = dt.datetime.now(dt.UTC)
    assert not authorities.due_pem(made.cert_pem, now + dt.timedelta(days=4.9))
    assert authorities.due_pem(made.cert_pem, now + dt.timedelta(days=5.1))


def test_own_certificate_and_intermediate_are_renewed_over_the_same_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(authorities, "INTERMEDIATE_LIFETIME", dt.timedelta(minutes=5))
    monkeypatch.setattr(authorities, "LEAF_LIFETIME", dt.timedelta(minutes=4))
    first = Authority.ensure(str(tmp_path), "demo")
    path, _key = first.own_files(str(tmp_path))
    old, old_chain = Path(path).read_text(), first.chain_pem
    monkeypatch.undo()
    second = Authority.ensure(str(tmp_path), "demo")
    second.own_files(str(tmp_path))
    assert second.chain_pem != old_chain
    assert Path(path).read_text() != old
    assert tls.pin_of_pem(Path(path).read_text()) == tls.pin_of_pem(old)
    assert tls.pin_of_pem(second.chain_pem) == tls.pin_of_pem(old_chain)


def test_a_leaf_never_outlives_its_issuer(tmp_path):
    made = Authority.ensure(str(tmp_path), "demo").issue(request(), P1, dt.timedelta(days=4000))
    assert load(made.cert_pem).not_valid_after_utc == load(made.chain_pem).not_valid_after_utc


def test_the_intermediate_may_not_make_another(tmp_path):
    root = Root.ensure(str(tmp_path))
    key = ec.generate_private_key(ec.SECP256R1())
    made = root.intermediate("demo", key.public_key())
    limits = made.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.value.path_length, limits.critical) == (0, True)
    assert builder.pem(made).startswith(b"-----BEGIN CERTIFICATE")
