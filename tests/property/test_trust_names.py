"""Names in certificates, and the walk to the public key in one."""

import contextlib
import datetime as dt
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import Denied, Invalid
from supercloud.trust import tls
from supercloud.trust.names import DOMAIN, ROLES, Identity, parse_uri, user_server_name

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
IDENTITIES = st.builds(Identity, LABELS, st.sampled_from(sorted(ROLES)), LABELS)
KEYS = [
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP521R1()),
    rsa.generate_private_key(65537, 2048),
    ed25519.Ed25519PrivateKey.generate(),
]
DER = serialization.Encoding.DER


@settings(deadline=None)
@given(IDENTITIES)
def test_a_uri_reads_back_as_its_identity(identity):
    assert parse_uri(identity.uri) == identity
    assert identity.dns.endswith(f".{identity.ucloud}.{DOMAIN}")


@settings(deadline=None)
@given(st.text(max_size=200))
def test_whatever_is_accepted_is_exactly_a_uri_of_ours(text):
    try:
        identity = parse_uri(text)
    except Invalid:
        return
    assert identity.uri == text


@settings(deadline=None)
@given(IDENTITIES, st.integers(0, 200), st.characters())
def test_a_uri_with_something_put_into_it_is_another_or_none(identity, at, character):
    uri = (
        identity.uri[: at % len(identity.uri)] + character + identity.uri[at % len(identity.uri) :]
    )
    with contextlib.suppress(Invalid):
        assert parse_uri(uri) != identity


@settings(deadline=None)
@given(st.text(max_size=80))
def test_a_server_name_holds_one_label_of_the_user(text):
    try:
        name = user_server_name(text)
    except Invalid:
        return
    assert name.split(".", 1) == [text, f"user.{DOMAIN}"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["URI", "DNS", "email"]), st.text(max_size=60)), max_size=4)
)
def test_a_certificate_names_one_of_ours_or_is_denied(names):
    try:
        identity = tls.identity_in({"subjectAltName": tuple(names)})
    except Denied:
        return
    assert [value for kind, value in names if kind == "URI"] == [identity.uri]


def certificate(key, subject, days, names):
    now = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, subject)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False
        )
    )
    return built.sign(KEYS[0], hashes.SHA256())


CERTIFICATES = st.builds(
    certificate,
    st.sampled_from(KEYS),
    st.text(min_size=1, max_size=16),  # at most 64 bytes
    st.integers(1, 100_000),
    st.lists(LABELS, min_size=1, max_size=30),
)


@settings(deadline=None)
@given(CERTIFICATES)
def test_the_walk_finds_the_key_that_cryptography_finds(made):
    wanted = made.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = made.public_bytes(DER)
    assert tls.public_key_info(der) == wanted
    assert tls.pin_of_pem(ssl.DER_cert_to_PEM_cert(der)) == tls.pin_of_der(der)


CHANGES = st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=4)


@settings(deadline=None)
@given(CERTIFICATES, CHANGES, st.integers(0, 9999))
def test_the_walk_through_a_broken_certificate_ends_in_invalid_or_inside(made, changes, end):
    der = bytearray(made.public_bytes(DER))  # its length varies with the signature's
    for at, value in changes:
        der[at % len(der)] = value
    cut = bytes(der[: end % (len(der) + 1)])
    with contextlib.suppress(Invalid):
        assert tls.public_key_info(cut) in cut


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_the_walk_through_garbage_ends_in_invalid_or_inside(garbage):
    with contextlib.suppress(Invalid):
        assert tls.public_key_info(garbage) in garbage


def test_a_certificate_too_large_is_not_walked():
    with pytest.raises(Invalid, match="65537 bytes"):
        tls.public_key_info(b"\x30" * 65537)


@settings(deadline=None)
@given(st.text(max_size=100))
def test_text_that_is_no_certificate_has_no_pin(text):
    with pytest.raises(Invalid):
        tls.pin_of_pem(text)
