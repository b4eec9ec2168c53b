"""Keys and requests made with openssl."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import Exists, Invalid, Permanent
from supercloud.trust import keys, libcrypto
from supercloud.trust.names import Identity, parse_uri

WEB = Identity("demo", "platform", "web-1")


@pytest.fixture
def key(tmp_path):
    path = str(tmp_path / "key")
    keys.make_key(path)
    return path


def names_of(certificate):
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def test_a_key_is_p256_and_private_to_its_owner(key):
    made = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    assert isinstance(made, ec.EllipticCurvePrivateKey)
    assert made.curve.name == "secp256r1"
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert os.listdir(os.path.dirname(key)) == ["key"]


def test_a_key_is_never_overwritten(key):
    before = Path(key).read_bytes()
    with pytest.raises(Exists):
        keys.make_key(key)
    assert keys.ensure_key(key) is False
    assert Path(key).read_bytes() == before
    assert os.listdir(os.path.dirname(key)) == ["key"]


def test_ensure_makes_a_missing_key(tmp_path):
    assert keys.ensure_key(str(tmp_path / "new")) is True
    assert (tmp_path / "new").exists()


def test_a_request_carries_both_names_and_is_signed_by_the_key(key):
    request = x509.load_pem_x509_csr(keys.make_request(key, WEB.uri, WEB.dns).encode())
    assert request.is_signature_valid
    names = names_of(request)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [WEB.uri]
    assert names.get_values_for_type(x509.DNSName) == [WEB.dns]


def test_a_self_signed_certificate_is_a_leaf_with_the_days_asked(key):
    pem = keys.make_self_signed(key, WEB.uri, WEB.dns, days=3)
    made = x509.load_pem_x509_certificate(pem.encode())
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (made.not_valid_after_utc - made.not_valid_before_utc).days == 3
    assert names_of(made).get_values_for_type(x509.UniformResourceIdentifier) == [WEB.uri]


def test_the_longest_names_still_fit(key):
    long = Identity("u" * 63, "platform", "p" * 63)
    request = x509.load_pem_x509_csr(keys.make_request(key, long.uri, long.dns).encode())
    assert names_of(request).get_values_for_type(x509.DNSName) == [long.dns]


@pytest.mark.parametrize(
    ("uri", "dns"),
    [
        (WEB.uri + "\nDNS:evil", WEB.dns),
        (WEB.uri, WEB.dns + ",DNS:evil"),
        (WEB.uri, "evil.example"),
        ("https://demo/platform/web-1", WEB.dns),
    ],
)
def test_names_cannot_smuggle_others_into_the_request(key, uri, dns):
    with pytest.raises(Invalid):
        keys.make_request(key, uri, dns)


def test_the_complaint_of_openssl_is_in_the_error(tmp_path):
    with pytest.raises(Permanent, match="openssl req failed"):
        keys.make_request(str(tmp_path / "nothing"), WEB.uri, WEB.dns)


def test_no_openssl_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Permanent, match="could not run"):
        keys.make_key(str(tmp_path / "key"))
    assert os.listdir(tmp_path) == []


def test_the_key_is_not_in_any_argument(key, monkeypatch):
    seen = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda argv, **kw: seen.append(argv) or real(argv, **kw))
    keys.make_request(key, WEB.uri, WEB.dns)
    secret = Path(key).read_text().splitlines()[1]
    assert seen
    assert not any(secret in part for argv in seen for part in argv)


def test_libcrypto_in_the_process_makes_what_the_command_makes(tmp_path: Path) -> None:
    uri = "supercloud://demo/platform/p1"
    key, request = libcrypto.make_key_and_request(uri)
    keys.keep_key(str(tmp_path / "key"), key)
    with pytest.raises(Exists):
        keys.keep_key(str(tmp_path / "key"), key)
    again = keys.make_request(str(tmp_path / "key"), uri, parse_uri(uri).dns)
    ours, theirs = (x509.load_pem_x509_csr(text.encode()) for text in (request, again))
    assert ours.is_signature_valid
    assert ours.subject == theirs.subject
    assert ours.public_key() == theirs.public_key()
    names = [csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for csr in (ours, theirs)]  # fmt: skip
    assert names[0] == names[1]
    assert key != libcrypto.make_key_and_request(uri)[0]
    loaded = serialization.load_pem_private_key(key, None)
    der = loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert der == key


def test_no_identity_gets_no_key_of_libcrypto() -> None:
    with pytest.raises(Invalid):
        libcrypto.make_key_and_request("supercloud://demo/platform/p1,DNS:evil.example")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij0123456789-"), min_size=1, max_size=61).map(lambda t: "x" + "".join(t) + "x"))  # fmt: skip
def test_names_of_any_length_are_encoded(name: str) -> None:
    request = libcrypto.make_key_and_request(f"supercloud://{name}/platform/{name}")[1]
    csr = x509.load_pem_x509_csr(request.encode())
    names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"supercloud://{name}/platform/{name}"]  # fmt: skip
