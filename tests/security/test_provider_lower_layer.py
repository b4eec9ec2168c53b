"""The way to a user domain: first contact, pin, chain, and what happens when they do not fit."""

import asyncio
import datetime as dt
import shutil

import pytest

from supercloud.model.errors import Denied, Exists, Temporary
from supercloud.providers.base import MemoryPins
from supercloud.providers.lower_layer import rendezvous
from supercloud.providers.lower_layer.provider import target_of
from supercloud.trust import authority as authorities
from supercloud.trust import keys, tls
from supercloud.trust.names import Identity
from supercloud.wire.messages import CsrResult
from supercloud.wire.peer import ConnectionLost
from support.host import LoopbackHost, entry_of, provider_of
from support.link import Link, request


@pytest.fixture
def link(tmp_path):
    return Link(tmp_path / "trust")


@pytest.fixture
async def host(tmp_path, link):
    async with LoopbackHost(tmp_path / "host", link.authority.root_pem).running() as made:
        yield made


async def test_at_first_contact_the_key_is_pinned_and_a_certificate_signed(link, host):
    pins = MemoryPins()
    provider = provider_of(link, host, pins)
    assert (await provider.hosts())[0].name == "h1"
    signed = (host.directory / "identity" / "signed.pem").read_text()
    assert pins.pins == {"host": tls.pin_of_pem(signed)}
    issued = (link.directory / "demo" / "issued.jsonl").read_text()
    assert issued.count("supercloud://demo/host/h1") == 1
    await provider.close()
    again = provider_of(link, host, pins)
    await again.hosts()
    assert (link.directory / "demo" / "issued.jsonl").read_text() == issued
    await again.close()


async def test_many_connections_at_once_make_one_introduction(link, host):
    provider = provider_of(link, host)
    task = asyncio.ensure_future(provider.rendezvous(link.hub.serve_relayed))
    await asyncio.gather(*(provider.hosts() for _ in range(5)))
    issued = (link.directory / "demo" / "issued.jsonl").read_text()
    assert issued.count("supercloud://demo/host/h1") == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await provider.close()


async def test_a_changed_key_is_denied_and_nothing_is_signed_for_it(link, host):
    pins = MemoryPins()
    provider = provider_of(link, host, pins)
    await provider.hosts()
    await provider.close()
    before, pinned = (link.directory / "demo" / "issued.jsonl").read_text(), dict(pins.pins)
    host.forget("made-anew")
    again = provider_of(link, host, pins)
    for _ in range(2):
        with pytest.raises(Denied, match="another key than the one that was pinned") as caught:
            await again.hosts()
    assert caught.value.details["pinned"] == pinned["host"]
    assert caught.value.hint
    assert (link.directory / "demo" / "issued.jsonl").read_text() == before
    assert pins.pins == pinned


async def test_a_changed_key_with_a_good_certificate_is_denied_as_well(link, host):
    """Somebody stole the intermediate, or the domain's certificate was issued twice."""
    pins = MemoryPins()
    first = provider_of(link, host, pins)
    await first.hosts()
    await first.close()
    host.forget("other")
    other = provider_of(link, host, MemoryPins())
    await other.hosts()
    await other.close()
    with pytest.raises(Denied, match="another key"):
        await provider_of(link, host, pins).hosts()


async def test_a_domain_that_lost_its_certificate_is_given_one_over_the_same_key(link, host):
    pins = MemoryPins()
    provider = provider_of(link, host, pins)
    await provider.hosts()
    await provider.close()
    (host.directory / "identity" / "signed.pem").unlink()
    again = provider_of(link, host, pins)
    await again.hosts()
    assert (host.directory / "identity" / "signed.pem").exists()
    await again.close()


async def test_a_certificate_is_renewed_when_it_is_due(link, host, monkeypatch):
    monkeypatch.setattr(authorities, "RENEW_AFTER", 0.0)
    provider = provider_of(link, host)
    await provider.hosts()
    first = (host.directory / "identity" / "signed.pem").read_text()
    await provider.close()
    await provider.hosts()
    assert (host.directory / "identity" / "signed.pem").read_text() != first
    await provider.close()


async def test_a_request_over_a_foreign_key_is_not_signed(link, host):
    """A domain that relays somebody else's request: the key must be the connection's."""
    keys.make_key(str(link.directory / "foreign.key"))
    name = Identity("demo", "host", "h1")
    csr = keys.make_request(str(link.directory / "foreign.key"), name.uri, name.dns)

    async def foreign(_call, _params):
        return CsrResult(csr_pem=csr)

    host.calls["identity.request"] = foreign
    with pytest.raises(Denied, match="another key"):
        await provider_of(link, host).hosts()
    path = link.directory / "demo" / "issued.jsonl"
    assert "supercloud://demo/host/" not in path.read_text()


async def test_a_domain_that_keeps_its_old_certificate_is_denied(link, host):
    async def ignore(_call, _given):
        return {}

    host.calls["identity.install"] = ignore
    with pytest.raises(Denied, match="does not show the certificate"):
        await provider_of(link, host).hosts()


async def test_an_entry_may_be_renamed_but_not_lead_to_another_key(link, host):
    pins = MemoryPins()
    first = provider_of(link, host, pins)
    await first.hosts()
    await first.close()
    renamed = provider_of(link, host, pins, name="h2")
    assert (await renamed.hosts())[0].name == "h2"
    await renamed.close()
    assert "supercloud://demo/host/h2" in (link.directory / "demo" / "issued.jsonl").read_text()
    pins.pins["host"] = "sha256:" + "0" * 64
    with pytest.raises(Denied, match="another key"):
        await provider_of(link, host, pins, name="h3").hosts()


async def test_a_domain_of_another_ucloud_of_the_same_user_is_denied(link, host, tmp_path):
    first = provider_of(link, host)
    await first.hosts()
    await first.close()
    prod = Link(link.directory, "prod")
    with pytest.raises(Denied, match="another U-Cloud than prod"):
        await provider_of(prod, host).hosts()


async def test_a_host_where_another_user_is_enrolled_lets_us_in_nowhere(link, tmp_path):
    stranger = Link(tmp_path / "stranger")
    async with LoopbackHost(tmp_path / "host", stranger.authority.root_pem).running() as host:
        with pytest.raises((ConnectionLost, Denied, Temporary)):
            await provider_of(link, host).hosts()
        assert not (host.directory / "identity" / "signed.pem").exists()
        assert not (host.directory / "identity" / "ucloud").exists()


async def test_a_host_that_is_not_there_is_temporary_and_comes_back(link, host):
    provider = provider_of(link, host)
    await provider.hosts()
    await host.stop()
    with pytest.raises(Temporary):
        await provider.hosts()
    with pytest.raises(Temporary, match="cannot be reached"):
        await provider.hosts()
    await host.start()
    assert await provider.hosts()
    await provider.close()


async def test_what_is_no_tls_at_all_is_temporary(link, host):
    async def serve(_reader, writer):
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Temporary, match="cannot be reached"):
            await provider_of(link, host, endpoint=endpoint).hosts()


async def test_who_never_answers_is_given_up(link, host, monkeypatch):
    from supercloud.providers.lower_layer import dial

    monkeypatch.setattr(dial, "CONNECT_TIMEOUT_S", 0.2)
    held = []  # a writer that is forgotten closes its connection
    server = await asyncio.start_server(lambda *streams: held.append(streams), "127.0.0.1", 0)
    async with server:
        endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Temporary, match="did not answer"):
            await provider_of(link, host, endpoint=endpoint).hosts()
        for _reader, writer in held:
            writer.close()


async def test_answers_that_are_malformed_are_refused(link, host):
    provider = provider_of(link, host)

    async def wrong(_call, _params):
        return {"platforms": [{"name": 7}]}

    host.calls["platform.list"] = wrong
    with pytest.raises(Exception, match=r"platform\.list\.platforms\[0\]\.name"):
        await provider.platforms()
    await provider.close()


async def test_the_rendezvous_outlives_its_host(link, host, monkeypatch):
    monkeypatch.setattr(rendezvous, "FIRST_DELAY_S", 0.05)
    provider = provider_of(link, host)
    capacity = (await provider.hosts())[0]
    task = asyncio.ensure_future(provider.rendezvous(link.hub.serve_relayed))
    await provider.ensure_platform(request(link, capacity.name, image=capacity.images[0]))
    await link.owner.until("connected")
    await host.stop()
    await link.owner.until("lost")
    await asyncio.sleep(0.2)
    await host.start()
    await link.owner.until("connected")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.hub.close()
    await provider.close()


async def test_two_connections_are_parked_and_one_that_is_taken_is_replaced(link, host):
    provider = provider_of(link, host)
    capacity = (await provider.hosts())[0]
    task = asyncio.ensure_future(provider.rendezvous(link.hub.serve_relayed))

    async def parked(count):
        async with asyncio.timeout(60):
            while len(host.rendezvous._parked) != count:
                await asyncio.sleep(0.01)

    await parked(2)
    for name in ("p1", "p2", "p3"):
        await provider.ensure_platform(request(link, capacity.name, name, image=capacity.images[0]))
        await link.owner.until("connected", name)
    await parked(2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.hub.close()
    await provider.close()


async def test_a_failing_agent_costs_only_its_own_connection(link, host, caplog):
    provider = provider_of(link, host)
    capacity = (await provider.hosts())[0]
    tries = []

    async def accept(reader, writer):
        tries.append(1)
        if len(tries) == 1:
            raise ZeroDivisionError
        await link.hub.serve_relayed(reader, writer)

    task = asyncio.ensure_future(provider.rendezvous(accept))
    await provider.ensure_platform(request(link, capacity.name, image=capacity.images[0]))
    await link.owner.until("connected")
    assert "ZeroDivisionError" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await link.hub.close()
    await provider.close()


async def test_a_pin_of_another_key_cannot_be_put_over_the_first():
    pins = MemoryPins()
    await pins.put("host", "sha256:a")
    await pins.put("host", "sha256:a")
    with pytest.raises(Exists):
        await pins.put("host", "sha256:b")


@pytest.mark.parametrize(
    ("endpoint", "address", "port"),
    [
        ("127.0.0.1:7443", "127.0.0.1", 7443),
        ("[::1]:1", "::1", 1),
        ("h.example:65535", "h.example", 65535),
    ],
)
def test_endpoints(host, endpoint, address, port):
    target = target_of(entry_of(host, endpoint=endpoint), "u")
    assert (target.address, target.port) == (address, port)


async def test_an_expired_host_certificate_is_made_anew(link, host, monkeypatch):
    monkeypatch.setattr(authorities, "LEAF_LIFETIME", dt.timedelta(days=30))
    provider = provider_of(link, host)
    await provider.hosts()
    await provider.close()
    home = host.directory / "identity"
    name = Identity("demo", "host", "h1")
    csr = keys.make_request(str(home / "key.pem"), name.uri, name.dns)
    old = link.authority.issue(csr, name, dt.timedelta(seconds=-1))
    (home / "signed.pem").write_text(old.cert_pem + old.chain_pem)
    await provider.hosts()
    assert (home / "signed.pem").read_text() != old.cert_pem + old.chain_pem
    await provider.close()
    shutil.rmtree(home)
