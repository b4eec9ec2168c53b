"""Agents that should get nothing: each is refused, with its reason."""

import asyncio
import datetime as dt
import secrets
import ssl
import struct
from contextlib import suppress

import pytest

from supercloud.model.errors import Denied, Invalid
from supercloud.trust import keys
from supercloud.trust.authority import Authority
from supercloud.trust.names import Identity
from supercloud.upper.platform.link import hub, upgrade
from supercloud.upper.platform.link.upgrade import accept_tls
from supercloud.wire.messages import AGENT_TO_CONTROL
from supercloud.wire.peer import HEADER, MAX_JSON_BYTES, REQUEST
from support.link import Link, leaf

HOUR = dt.timedelta(hours=1)


@pytest.fixture
async def link(tmp_path):
    async with Link(tmp_path / "trust").listening() as made:
        yield made


def enrolment(link, platform="p1", token="0" * 64, **changes):
    name = Identity(link.ucloud, "platform", platform)
    key = str(link.directory / secrets.token_hex(4))
    keys.make_key(key)
    csr = keys.make_request(key, name.uri, name.dns)
    return {"ucloud": "demo", "platform": platform, "token": token, "csr_pem": csr, **changes}


async def test_without_a_certificate_nothing_but_enrolment_works(link):
    async with link.dial(link.context()) as peer:
        for method in AGENT_TO_CONTROL:
            if method != "agent.enroll":
                with pytest.raises(Denied, match="needs a certificate of this U-Cloud"):
                    await peer.call(method, link.hello())


async def test_wrong_tokens_are_refused(link):
    link.owner.expect("p1")
    async with link.dial(link.context()) as peer:
        for platform in ("p1", "unknown"):
            with pytest.raises(Denied, match="wrong enrolment token"):
                await peer.call("agent.enroll", enrolment(link, platform))
        for token in ("", "x" * 31, "x" * 129, 7, None):
            with pytest.raises(Invalid, match="token"):
                await peer.call("agent.enroll", enrolment(link, token=token))
    assert link.owner.pins == {}


async def test_a_replayed_token_with_another_key_is_refused(link):
    token = link.owner.expect("p1")
    await link.enroll("p1", token)
    before = dict(link.owner.pins)
    async with link.dial(link.context()) as peer:
        with pytest.raises(Denied, match="used already"):
            await peer.call("agent.enroll", enrolment(link, token=token))
    assert link.owner.pins == before


async def test_a_token_of_one_platform_is_none_of_anothers(link):
    token = link.owner.expect("p1")
    link.owner.expect("p2")
    async with link.dial(link.context()) as peer:
        with pytest.raises(Denied, match="wrong enrolment token"):
            await peer.call("agent.enroll", enrolment(link, "p2", token))


async def test_an_enrolment_for_another_ucloud_is_refused_and_spends_no_token(link):
    token = link.owner.expect("p1")
    async with link.dial(link.context()) as peer:
        with pytest.raises(Denied, match="this is U-Cloud demo, not prod"):
            await peer.call("agent.enroll", enrolment(link, token=token, ucloud="prod"))
    await link.enroll("p1", token)


@pytest.mark.parametrize("csr", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\n"])
async def test_a_bad_request_spends_no_token(link, csr):
    token = link.owner.expect("p1")
    async with link.dial(link.context()) as peer:
        with pytest.raises(Invalid):
            await peer.call("agent.enroll", enrolment(link, token=token, csr_pem=csr))
    await link.enroll("p1", token)


async def test_an_enrolled_agent_cannot_enrol_as_another(link):
    files = await link.enroll("p1", link.owner.expect("p1"))
    async with link.dial(link.context(files)) as peer:
        with pytest.raises(Denied, match="enrolled already"):
            await peer.call("agent.enroll", enrolment(link, "p2", link.owner.expect("p2")))


@pytest.mark.parametrize("role", ["control", "host"])
async def test_a_wrong_role_is_refused_whatever_it_calls(link, role):
    async with link.dial(link.context(link.leaf(role, "p1"))) as peer:
        for method, params in (
            ("agent.hello", link.hello()),
            ("agent.enroll", enrolment(link, token=link.owner.expect("p1"))),
            ("blob.get", {"digest": "sha256:" + "0" * 64, "size_bytes": 0}),
        ):
            with pytest.raises(Denied, match=f"has the role {role}, needed is platform"):
                await peer.call(method, params)


async def test_a_platform_of_another_ucloud_of_the_same_user_is_refused(link):
    prod = Authority.ensure(str(link.directory), "prod")
    files = leaf(prod, link.directory, Identity("prod", "platform", "p1"), HOUR)
    async with link.dial(link.context(files)) as peer:
        with pytest.raises(Denied, match="another U-Cloud than demo"):
            await peer.call("agent.hello", link.hello())


async def test_a_platform_cannot_say_hello_as_another(link):
    files = await link.enroll("p1", link.owner.expect("p1"))
    async with link.dial(link.context(files)) as peer:
        with pytest.raises(Denied, match="is not p2"):
            await peer.call("agent.hello", link.hello("p2"))
        with pytest.raises(Denied, match="another U-Cloud than prod"):
            await peer.call("agent.hello", link.hello(ucloud="prod"))


async def test_a_certificate_of_a_former_incarnation_is_refused(link):
    """Deleted and made anew under the same name: the old key's certificate is still valid."""
    old = await link.enroll("p1", link.owner.expect("p1"))
    link.owner.pins.clear()
    await link.enroll("p1", link.owner.expect("p1"))
    async with link.dial(link.context(old)) as peer:
        with pytest.raises(Denied, match="enrolled with another key"):
            await peer.call("agent.hello", link.hello())
    assert link.hub.sessions == {}


@pytest.mark.parametrize("protocol", [-1, 3, 1 << 40])
async def test_a_protocol_too_far_off_is_refused(link, protocol):
    files = await link.enroll("p1", link.owner.expect("p1"))
    async with link.dial(link.context(files)) as peer:
        with pytest.raises(Denied, match=f"protocol {protocol}"):
            await peer.call("agent.hello", link.hello(protocol=protocol))


async def refusal(link, context, server_context=None):
    """Why the hub's end of TLS refuses a client."""
    accepted = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    async with server:
        client = asyncio.ensure_future(
            asyncio.open_connection(
                *server.sockets[0].getsockname(),
                ssl=context,
                server_hostname="control.control.demo.supercloud.internal",
            )
        )
        with pytest.raises(Denied) as caught:
            await accept_tls(*await accepted, server_context or link.hub.server_context)
        done = await asyncio.gather(client, return_exceptions=True)
        if not isinstance(done[0], BaseException):
            done[0][1].close()
        return str(caught.value)


async def test_a_certificate_of_another_user_fails_the_handshake(link, tmp_path):
    stranger = Authority.ensure(str(tmp_path / "stranger"), "demo")
    files = leaf(stranger, tmp_path, Identity("demo", "platform", "p1"), HOUR)
    why = await refusal(link, link.context(files))
    assert "self-signed certificate" in why or "unable to get" in why


async def test_an_expired_certificate_fails_the_handshake(link):
    files = link.leaf("platform", "p1", dt.timedelta(seconds=-1))
    assert "certificate has expired" in await refusal(link, link.context(files))


async def test_a_self_signed_certificate_fails_the_handshake(link):
    name, key = Identity("demo", "platform", "p1"), str(link.directory / "self.key")
    keys.make_key(key)
    (link.directory / "self.pem").write_text(keys.make_self_signed(key, name.uri, name.dns, 1))
    assert "self-signed" in await refusal(
        link, link.context((str(link.directory / "self.pem"), key))
    )


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000, b""]
)
async def test_what_is_no_tls_ends_at_once(link, monkeypatch, garbage):
    monkeypatch.setattr(upgrade, "HANDSHAKE_TIMEOUT_S", 600)
    accepted = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0)
    async with server, asyncio.timeout(60):
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(garbage)
        writer.close()
        with pytest.raises(Denied, match="handshake failed"):
            await link.hub.serve_relayed(*await accepted)
    assert link.hub.sessions == {}


@pytest.mark.parametrize("inside_tls", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_who_never_shakes_hands_is_refused_in_time(link, monkeypatch, inside_tls, leaves):
    """Silent, or silent and then gone; over a plain stream and, as relayed, inside another TLS."""
    monkeypatch.setattr(upgrade, "HANDSHAKE_TIMEOUT_S", 0.3)
    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    accepted = asyncio.get_running_loop().create_future()
    outer = {"ssl": link.hub.server_context} if inside_tls else {}
    server = await asyncio.start_server(
        lambda r, w: accepted.set_result((r, w)), "127.0.0.1", 0, **outer
    )
    name = "control.control.demo.supercloud.internal"
    theirs = {"ssl": link.context(), "server_hostname": name} if inside_tls else {}
    async with server, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), **theirs)
        streams = await accepted
        refused = asyncio.ensure_future(accept_tls(*streams, link.hub.server_context))
        if leaves:
            await asyncio.sleep(0.05)
            writer.transport.abort()
        with pytest.raises(Denied, match="handshake failed"):
            await refused
        with suppress(ConnectionError):
            assert await reader.read() == b""  # we hung up
        writer.close()
        await asyncio.sleep(1)  # asyncio's own time limit is past
    assert not faults


@pytest.mark.parametrize("enrolled", [False, True])
@pytest.mark.parametrize(
    "frame",
    [
        HEADER.pack(MAX_JSON_BYTES + 1, REQUEST, 1),
        HEADER.pack(0xFFFFFFFF, REQUEST, 1),
        HEADER.pack(2, 99, 1) + b"{}",
        HEADER.pack(2, REQUEST, 2) + b"{}",
        HEADER.pack(1, REQUEST, 1) + b"{",
        HEADER.pack(6, REQUEST, 1) + b"[[[[[[",
        struct.pack(">I", 7),
    ],
    ids=["oversized", "4 GiB", "unknown type", "foreign id", "no JSON", "nested", "short"],
)
async def test_bad_frames_end_the_connection_and_nothing_else(link, monkeypatch, enrolled, frame):
    monkeypatch.setattr(hub, "HELLO_TIMEOUT_S", 600)
    context = link.context()
    if enrolled:
        context = link.context(await link.enroll("p1", link.owner.expect("p1")))
    async with link.dial(context) as peer, asyncio.timeout(30):
        if enrolled:
            await peer.call("agent.hello", link.hello())
        peer.writer.write(frame)
        if len(frame) == 4:
            peer.writer.close()
        await peer.closed.wait()
    async with link.dial(link.context(await link.enroll("p2", link.owner.expect("p2")))) as good:
        await good.call("agent.hello", link.hello("p2"))


async def test_a_refused_call_tells_nothing_of_a_bug(link):
    files = await link.enroll("p1", link.owner.expect("p1"))

    async def broken(_hello, _pin):
        raise RuntimeError("the secret is swordfish")

    link.owner.admit = broken
    async with link.dial(link.context(files)) as peer:
        with pytest.raises(Exception, match="internal error") as caught:
            await peer.call("agent.hello", link.hello())
        assert "swordfish" not in str(caught.value)


async def test_under_tls_the_hub_shows_itself_to_nobody_who_asks_for_another(link):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        await asyncio.open_connection(
            "127.0.0.1",
            link.port,
            ssl=link.context(),
            server_hostname="control.control.prod.supercloud.internal",
        )
