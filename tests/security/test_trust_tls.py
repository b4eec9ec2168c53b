"""Over real connections: whoever should not get in does not, and the reason is the right one."""

import asyncio
import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from supercloud.model.errors import Denied
from supercloud.trust import builder, keys, tls
from supercloud.trust.authority import Authority, Root
from supercloud.trust.names import Identity, control_of
from support.link import leaf

HOUR = dt.timedelta(hours=1)


@pytest.fixture
def home(tmp_path):
    """A user's directory with the U-Cloud demo."""
    return tmp_path


@pytest.fixture
def demo(home):
    return Authority.ensure(str(home), "demo")


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = ""):
    """A handshake and one byte each way: whom the server saw, whom the client saw.

    In memory, for asyncio's server drops the alert that tells a client why it was refused.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name or control_of("demo").dns)
    waiting = [theirs, ours]
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                other = theirs if end is ours else ours
                if _alert(other) is None:
                    raise AssertionError(f"{error} without an alert") from error
                raise
    theirs.write(b"x")
    ours.write(ours.read(1))
    assert theirs.read(1) == b"x"
    return tls.peer_identity(ours), tls.peer_identity(theirs)


def _alert(end: ssl.SSLObject) -> ssl.SSLError | None:
    """What the end learns of a handshake that the other one gave up."""
    try:
        end.do_handshake()
        end.read(1)
    except ssl.SSLWantReadError:
        return None
    except ssl.SSLError as error:
        return error
    return None


def server(home, authority, require=True):
    return tls.server_context(*authority.own_files(str(home)), authority.root_pem, require)


def client(home, authority, identity=None, lifetime=HOUR, ca_pem=""):
    identity = identity or Identity(authority.ucloud, "platform", "p1")
    files = leaf(authority, home, identity, lifetime)
    return tls.client_context(ca_pem or authority.root_pem, *files)


async def test_both_ends_see_who_the_other_is(home, demo):
    seen = shake(server(home, demo), client(home, demo))
    assert seen == (Identity("demo", "platform", "p1"), control_of("demo"))


async def test_a_client_of_another_user_is_refused(home, demo, tmp_path_factory):
    stranger = tmp_path_factory.mktemp("stranger")
    theirs = Authority.ensure(str(stranger), "demo")
    with pytest.raises(ssl.SSLError, match=r"self-signed certificate|unable to get"):
        shake(server(home, demo), client(stranger, theirs, ca_pem=demo.root_pem))


async def test_a_server_of_another_user_is_refused(home, demo, tmp_path_factory):
    stranger = tmp_path_factory.mktemp("stranger")
    theirs = Authority.ensure(str(stranger), "demo")
    with pytest.raises(
        ssl.SSLCertVerificationError, match=r"self-signed certificate|unable to get"
    ):
        shake(server(stranger, theirs, None), tls.client_context(demo.root_pem))


async def test_a_server_of_another_ucloud_is_refused_by_its_name(home, demo):
    prod = Authority.ensure(str(home), "prod")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake(server(home, prod, None), tls.client_context(demo.root_pem))


async def test_an_expired_certificate_is_refused_at_either_end(home, demo):
    expired = dt.timedelta(seconds=-1)
    with pytest.raises(ssl.SSLError, match="expired"):
        shake(server(home, demo), client(home, demo, lifetime=expired))
    files = leaf(demo, home, control_of("demo"), expired)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(tls.server_context(*files, demo.root_pem, None), tls.client_context(demo.root_pem))


async def test_no_certificate_is_refused_where_one_is_required(home, demo):
    with pytest.raises(ssl.SSLError, match=r"(?i)did.not.return.a.certificate"):
        shake(server(home, demo), tls.client_context(demo.root_pem))


async def test_tls_1_2_is_not_spoken(home, demo):
    old = client(home, demo)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(server(home, demo), old)


def forged(home, name):
    """A leaf for ``name`` made with the stolen intermediate of another U-Cloud."""
    Authority.ensure(str(home), "prod")
    key = builder.ensure_key(str(home / "forged.key"), None)
    stolen = builder.ensure_key(str(home / "prod" / "intermediate.key"), None)
    issuer = builder.load_certificate(str(home / "prod" / "intermediate.pem"))
    made = builder.leaf(issuer, stolen, key.public_key(), name, HOUR)
    (home / "forged.pem").write_bytes(builder.pem(made) + builder.pem(issuer))
    return str(home / "forged.pem"), str(home / "forged.key")


async def test_a_stolen_intermediate_is_of_no_use_in_another_ucloud(home, demo):
    """The name constraints: no code of ours has to run for that."""
    files = forged(home, Identity("demo", "platform", "p1"))
    with pytest.raises(ssl.SSLError, match="permitted subtree violation"):
        shake(server(home, demo), tls.client_context(demo.root_pem, *files))
    files = forged(home, control_of("demo"))
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        shake(tls.server_context(*files, demo.root_pem, None), tls.client_context(demo.root_pem))


def test_a_leaf_cannot_sign_another(home, demo):
    path, key_path = leaf(demo, home, Identity("demo", "platform", "p1"), HOUR)
    signer = builder.ensure_key(key_path, None)
    issuer = builder.load_certificate(path)
    key = builder.ensure_key(str(home / "second.key"), None)
    made = builder.leaf(issuer, signer, key.public_key(), control_of("demo"), HOUR)
    chain = Path(path).read_bytes()
    (home / "second.pem").write_bytes(builder.pem(made) + chain)
    files = str(home / "second.pem"), str(home / "second.key")
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA certificate"):
        shake(tls.server_context(*files, demo.root_pem, None), tls.client_context(demo.root_pem))


async def test_an_intermediate_cannot_make_an_intermediate(home, demo):
    stolen = builder.ensure_key(str(home / "demo" / "intermediate.key"), None)
    issuer = builder.load_certificate(str(home / "demo" / "intermediate.pem"))
    key = ec.generate_private_key(ec.SECP256R1())
    middle = builder.intermediate(issuer, stolen, key.public_key(), "other", HOUR)
    mine = builder.ensure_key(str(home / "third.key"), None)
    made = builder.leaf(middle, key, mine.public_key(), control_of("demo"), HOUR)
    pems = (builder.pem(each) for each in (made, middle, issuer))
    (home / "third.pem").write_bytes(b"".join(pems))
    files = str(home / "third.pem"), str(home / "third.key")
    with pytest.raises(ssl.SSLCertVerificationError, match="path length constraint exceeded"):
        shake(tls.server_context(*files, demo.root_pem, None), tls.client_context(demo.root_pem))


async def test_a_certificate_with_two_uri_names_is_nobodys(home, demo):
    stolen = builder.ensure_key(str(home / "demo" / "intermediate.key"), None)
    issuer = builder.load_certificate(str(home / "demo" / "intermediate.pem"))
    key = builder.ensure_key(str(home / "two.key"), None)
    names = [
        x509.UniformResourceIdentifier(Identity("demo", "platform", name).uri)
        for name in ("a", "b")
    ]
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(
            issuer.subject, issuer.subject, key.public_key(), 7, now, now + HOUR
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(stolen.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(stolen, hashes.SHA256())
    )
    (home / "two.pem").write_bytes(builder.pem(made) + builder.pem(issuer))
    refused = []

    async def serve(_reader, writer):
        try:
            tls.peer_identity(writer.get_extra_info("ssl_object"))
        except Denied as error:
            refused.append(str(error))
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server(home, demo))
    async with listener:
        context = tls.client_context(demo.root_pem, str(home / "two.pem"), str(home / "two.key"))
        reader, writer = await asyncio.open_connection(
            *listener.sockets[0].getsockname(), ssl=context, server_hostname=control_of("demo").dns
        )
        await reader.read()
        writer.close()
    assert refused == ["the certificate has 2 URI names instead of one"]


def test_demands_say_what_is_wrong():
    p1 = Identity("demo", "platform", "p1")
    for identity, wanted, why in (
        (None, {}, "no certificate"),
        (p1, {"ucloud": "prod"}, "another U-Cloud"),
        (p1, {"role": "host"}, "has the role platform"),
        (p1, {"name": "p2"}, "is not p2"),
    ):
        with pytest.raises(Denied, match=why):
            tls.demand(identity, **{"ucloud": "demo", "role": "platform", **wanted})
    assert tls.demand(p1, ucloud="demo", role="platform", name="p1") == p1


async def test_one_listener_serves_several_uclouds_by_server_name(home, demo):
    prod = Authority.ensure(str(home), "prod")
    contexts = {control_of(a.ucloud).dns: server(home, a, None) for a in (demo, prod)}
    listener = tls.by_server_name(server(home, demo, None), contexts.get)
    for authority in (demo, prod):
        seen = shake(listener, client(home, authority), control_of(authority.ucloud).dns)
        assert seen == (Identity(authority.ucloud, "platform", "p1"), control_of(authority.ucloud))


async def test_a_first_contact_is_pinned_to_a_key_that_is_really_held(home, demo):
    """The pin is of a key that signed this handshake, and it survives the signed certificate."""
    key = str(home / "host.key")
    keys.make_key(key)
    name = Identity("demo", "host", "h1")
    (home / "self.pem").write_text(keys.make_self_signed(key, name.uri, name.dns, 1))
    signed = demo.issue(keys.make_request(key, name.uri, name.dns), name)
    (home / "signed.pem").write_text(signed.cert_pem + signed.chain_pem)
    pins = []
    for certificate in ("self.pem", "signed.pem"):
        context = tls.server_context(
            str(home / certificate), key, demo.root_pem, require_client=True
        )
        listener = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0, ssl=context)
        async with listener:
            _, writer = await asyncio.open_connection(
                *listener.sockets[0].getsockname(),
                server_hostname="x",
                ssl=tls.unverified_client_context(*demo.own_files(str(home))),
            )
            pins.append(tls.pin_of_peer(writer.get_extra_info("ssl_object")))
            writer.close()
    assert pins[0] == pins[1]
    tls.check_pin(pins[0], pins[1], "h1")
    with pytest.raises(Denied, match="another key"):
        tls.check_pin(pins[0], "sha256:" + "0" * 64, "h1")


def test_the_root_alone_is_no_leaf(home):
    root = Root.ensure(str(home))
    assert root.certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
