"""The hub over real TLS on loopback: enrolment, sessions, what agents tell, blobs."""

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path

import pytest

from supercloud.model.errors import (
    Busy,
    Denied,
    Invalid,
    NotFound,
    Permanent,
    SupercloudError,
    Temporary,
)
from supercloud.model.events import Event
from supercloud.trust import keys, tls
from supercloud.trust.names import Identity, control_of
from supercloud.upper.platform.link import hub as hubs
from supercloud.wire.codec import encode
from supercloud.wire.messages import Apply, EnvironmentStatus, PlatformReport
from supercloud.wire.peer import ConnectionLost, Peer
from support.link import Link, running


@pytest.fixture
async def link(tmp_path):
    async with Link(tmp_path / "trust").listening() as made:
        yield made


@pytest.fixture
async def agent(link):
    """An enrolled agent's TLS context."""
    return link.context(await link.enroll("p1", link.owner.expect("p1")))


async def test_enrol_then_hello_makes_a_session(link, agent):
    async with link.dial(agent) as peer:
        welcome = await peer.call("agent.hello", link.hello())
        assert welcome["protocol"] == 1
        session = await link.owner.until("connected")
        assert link.hub.session("p1") is session
        assert session.hello.version == "test"
    await link.owner.until("lost")
    with pytest.raises(Temporary, match="not connected"):
        link.hub.session("p1")


async def test_calls_reach_the_agent_and_its_errors_come_back(link, agent):
    seen = []

    async def apply(call):
        seen.append(call.untrusted_params)
        return {"generation": 4, "environments": []}

    async def restart(_call):
        raise NotFound("no environment web")

    async with link.dial(agent, {"ee.apply": apply, "ee.restart": restart}) as peer:
        await peer.call("agent.hello", link.hello())
        session = await link.owner.until("connected")
        report = await session.apply(Apply(generation=4, environments=[]))
        assert report == PlatformReport(generation=4, environments=[])
        assert seen[0]["generation"] == 4
        with pytest.raises(NotFound, match="no environment web"):
            await session.restart("web")
        with pytest.raises(NotFound, match="no method"):
            await session.list()


async def test_a_newer_session_takes_the_place_of_the_older(link, agent):
    async with link.dial(agent) as older:
        await older.call("agent.hello", link.hello())
        first = await link.owner.until("connected")
        async with link.dial(agent) as newer:
            await newer.call("agent.hello", link.hello(boot_id="2"))
            second = await link.owner.until("connected")
            async with asyncio.timeout(60):
                await older.closed.wait()
                await first.peer.closed.wait()
            assert link.hub.session("p1") is second
            assert not newer.closed.is_set()
            assert link.owner.seen.empty()  # the older one's end is no loss
    assert await link.owner.until("lost") is second


def status(state):
    return EnvironmentStatus(name="web", uid="w1", kind="container", state=state)


async def test_reports_and_events_reach_the_owner_in_order(link, agent):
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        event = Event(ucloud="demo", subject="environment/web", actor="platform/p1", code="a.b.c")
        peer.notify("agent.event", encode(event))
        report = PlatformReport(generation=2, environments=[status("serving")])
        peer.notify("agent.report", encode(report))
        assert await link.owner.until("event") == event
        assert await link.owner.until("report", "p1") == report


async def test_of_many_reports_the_newest_is_what_counts(link, agent):
    gate = asyncio.Event()

    async def slow(session, report):
        await gate.wait()
        link.owner.seen.put_nowait(("report", session.platform, report))

    link.owner.report = slow
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        for generation in range(1, 1001):
            peer.notify(
                "agent.report", encode(PlatformReport(generation=generation, environments=[]))
            )
        with pytest.raises(Denied, match="said already"):  # answered when all these were read
            await peer.call("agent.hello", link.hello())
        gate.set()
        first = await link.owner.until("report")
        last = first if first.generation == 1000 else await link.owner.until("report")
        assert last.generation == 1000


async def test_news_that_are_malformed_cost_nothing_else(link, agent):
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        peer.notify("agent.report", {"generation": "many"})
        peer.notify("agent.event", {"ucloud": "demo"})
        peer.notify("agent.event", encode(Event(ucloud="prod", subject="x", actor="y", code="z")))
        peer.notify("no.such", [])
        report = PlatformReport(generation=1, environments=[])
        peer.notify("agent.report", encode(report))
        await link.owner.until("connected")
        kind, _, value = await asyncio.wait_for(link.owner.seen.get(), 60)
        assert (kind, value) == ("report", report)


async def test_a_bug_in_the_owner_does_not_end_the_session(link, agent, caplog):
    async def broken(_session, _event):
        raise ZeroDivisionError

    link.owner.event = broken
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        peer.notify("agent.event", encode(Event(ucloud="demo", subject="x", actor="y", code="z")))
        peer.notify("agent.report", encode(PlatformReport(generation=1, environments=[])))
        await link.owner.until("report")
    assert "ZeroDivisionError" in caplog.text


async def test_a_certificate_is_renewed_over_the_same_key_only(link, agent):
    files = await link.enroll("p2", link.owner.expect("p2"))
    name = Identity("demo", "platform", "p2")
    keys.make_key(str(link.directory / "other.key"))
    async with link.dial(link.context(files)) as peer:
        csr = keys.make_request(files[1], name.uri, name.dns)
        with pytest.raises(Denied, match="hello comes first"):
            await peer.call("agent.renew", {"csr_pem": csr})
        await peer.call("agent.hello", link.hello("p2"))
        renewed = await peer.call("agent.renew", {"csr_pem": csr})
        assert tls.pin_of_pem(renewed["cert_pem"]) == link.owner.pins["p2"]
        assert renewed["cert_pem"] not in Path(files[0]).read_text()
        other = keys.make_request(str(link.directory / "other.key"), name.uri, name.dns)
        with pytest.raises(Denied, match="another key"):
            await peer.call("agent.renew", {"csr_pem": other})


async def test_the_answer_to_an_enrolment_may_get_lost(link):
    """The same token with the same key again is fine: nothing would ever come up otherwise."""
    name, token = Identity("demo", "platform", "p1"), link.owner.expect("p1")
    keys.make_key(str(link.directory / "k"))
    csr = keys.make_request(str(link.directory / "k"), name.uri, name.dns)
    asked = {"ucloud": "demo", "platform": "p1", "token": token, "csr_pem": csr}
    for _ in range(2):
        async with link.dial(link.context()) as peer:
            assert "BEGIN CERTIFICATE" in (await peer.call("agent.enroll", asked))["cert_pem"]


# -- blobs


@pytest.fixture
def blob(link, tmp_path):
    """A blob of 3 MiB and a bit."""
    data = os.urandom((3 << 20) + 4567)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    link.owner.paths[digest] = tmp_path / "blob"
    (tmp_path / "blob").write_bytes(data)
    return digest, data


async def fetched(link, agent, asked):
    """A file over a connection of its own, in the call that the agent's thread makes."""
    async with link.dial(agent) as peer:
        _, reader, writer = await peer.call_detach("blob.get", asked)
        data = await reader.read()
        writer.close()
        return data


@pytest.mark.parametrize("offset", [0, 1, 262_144, (3 << 20) + 4566, (3 << 20) + 4567])
async def test_a_blob_comes_whole_from_any_offset(link, agent, blob, offset):
    digest, data = blob
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        asked = {"digest": digest, "size_bytes": len(data), "offset_bytes": offset}
        assert await fetched(link, agent, asked) == data[offset:]


async def test_blobs_that_cannot_be_had(link, agent, blob):
    digest, data = blob
    asked = {"digest": digest, "size_bytes": len(data)}
    with pytest.raises(Denied, match="hello comes first"):
        await fetched(link, agent, asked)
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        with pytest.raises(Denied, match="on another connection"):
            await peer.call("blob.get", asked)
        for digest_, size, offset, why in (
            ("sha256:" + "0" * 64, 1, 0, NotFound),
            ("../../etc/passwd", 1, 0, Invalid),
            (digest, len(data) + 1, 0, Permanent),
            (digest, len(data), len(data) + 1, Invalid),
            (digest, len(data), -1, Invalid),
        ):
            asked = {"digest": digest_, "size_bytes": size, "offset_bytes": offset}
            with pytest.raises(why):
                await fetched(link, agent, asked)


async def test_a_platform_gets_so_many_files_at_once(link, agent, tmp_path):
    (tmp_path / "large").write_bytes(bytes(16 << 20))
    digest = "sha256:" + "1" * 64  # the hub takes its owner's word for it
    link.owner.paths[digest] = tmp_path / "large"
    asked = {"digest": digest, "size_bytes": 16 << 20}
    async with link.dial(agent) as peer, contextlib.AsyncExitStack() as others:
        await peer.call("agent.hello", link.hello())
        for _ in range(hubs.MAX_FILES):
            other = await others.enter_async_context(link.dial(agent))
            _, _, writer = await other.call_detach("blob.get", asked)
            others.callback(writer.transport.abort)
        with pytest.raises(Busy, match="files already"):
            await fetched(link, agent, asked)


async def test_no_more_than_that_however_many_ask_at_once(link, agent, tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(bytes(16 << 20))
    digest = "sha256:" + "1" * 64
    link.owner.paths[digest] = tmp_path / "large"
    asked = {"digest": digest, "size_bytes": 16 << 20}
    everybody, look_up = asyncio.Barrier(hubs.MAX_FILES), link.owner.blob

    async def slow(session, wanted):
        await everybody.wait()  # as long as nobody has an answer yet
        return await look_up(session, wanted)

    monkeypatch.setattr(link.owner, "blob", slow)
    async with link.dial(agent) as peer, contextlib.AsyncExitStack() as others:
        await peer.call("agent.hello", link.hello())
        dialled = [
            await others.enter_async_context(link.dial(agent)) for _ in range(2 * hubs.MAX_FILES)
        ]
        asking = [other.call_detach("blob.get", asked) for other in dialled]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, tuple):
                others.callback(answer[2].transport.abort)
        assert sum(isinstance(answer, Busy) for answer in answers) == hubs.MAX_FILES
        assert sum(isinstance(answer, tuple) for answer in answers) == hubs.MAX_FILES


async def test_files_that_could_not_be_had_leave_room_for_others(link, agent, blob):
    digest, data = blob
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        for _ in range(hubs.MAX_FILES + 1):
            with pytest.raises(NotFound):
                await fetched(link, agent, {"digest": "sha256:" + "0" * 64, "size_bytes": 1})
        assert await fetched(link, agent, {"digest": digest, "size_bytes": len(data)}) == data


async def test_a_blob_that_nobody_takes_on_leaves_nothing_open(link, agent, blob):
    digest, data = blob
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        async with link.dial(agent) as peer:
            await peer.call("agent.hello", link.hello())
            async with link.dial(agent) as other:
                asked = {"digest": digest, "size_bytes": len(data)}
                _, reader, writer = await other.call_detach("blob.get", asked)
                assert await reader.read(1)
                writer.transport.abort()
        await link.owner.until("lost")
    async with asyncio.timeout(60):
        while len(os.listdir("/proc/self/fd")) > before + 1:
            await asyncio.sleep(0.02)


async def test_a_second_file_on_one_connection_is_not_opened(link, agent, blob):
    """Asked for before the first one is answered: nobody would ever close it."""
    digest, data = blob
    asked = {"digest": digest, "size_bytes": len(data)}
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        async with link.dial(agent) as other:
            first = asyncio.ensure_future(other.call_detach("blob.get", asked))
            more = [asyncio.ensure_future(other.call("blob.get", asked)) for _ in range(8)]
            await asyncio.wait([first, *more])
            assert all(isinstance(one.exception(), Denied | ConnectionLost) for one in more)
            _, _, writer = first.result()
            writer.transport.abort()
        path = str(link.owner.paths[digest])
        async with asyncio.timeout(60):
            while path in opened():
                await asyncio.sleep(0.02)


def opened():
    """Paths of what this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


# -- relayed


@pytest.mark.parametrize("delay_s", [0, 0.1])
async def test_tls_inside_a_stream_that_has_read_ahead(link, agent, delay_s):
    """Whether the ClientHello is in the old reader's buffer already, or comes later."""
    accepted: asyncio.Queue = asyncio.Queue()
    server = await asyncio.start_server(lambda r, w: accepted.put_nowait((r, w)), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        dialling = asyncio.ensure_future(
            asyncio.open_connection(
                "127.0.0.1", port, ssl=agent, server_hostname=control_of("demo").dns
            )
        )
        reader, writer = await accepted.get()
        await asyncio.sleep(delay_s)
        serving = asyncio.ensure_future(link.hub.serve_relayed(reader, writer))
        async with running(*await dialling, {}) as peer:
            await peer.call("agent.hello", link.hello(), timeout_s=60)
        await asyncio.wait_for(serving, 60)
        await link.owner.until("lost")


async def test_tls_in_tls(link, agent, blob):
    """As with a real host: the outer TLS is the control plane's as client, the inner its own."""
    digest, data = blob
    parked: asyncio.Queue = asyncio.Queue()
    outer = tls.server_context(
        *link.leaf("host", "h1"), link.authority.root_pem, require_client=True
    )
    server = await asyncio.start_server(
        lambda r, w: parked.put_nowait((r, w)), "127.0.0.1", 0, ssl=outer
    )
    async with server, contextlib.AsyncExitStack() as stack:
        files = link.authority.own_files(str(link.directory))
        context = tls.client_context(link.authority.root_pem, *files, check_hostname=False)

        async def dial():
            """An agent's connection through the relay to the hub."""
            reader, writer = await asyncio.open_connection(
                *server.sockets[0].getsockname(), ssl=context, server_hostname="h1"
            )
            serving = asyncio.ensure_future(link.hub.serve_relayed(reader, writer))
            theirs = await parked.get()
            front = await asyncio.start_server(
                lambda r, w: asyncio.gather(pump(r, theirs[1]), pump(theirs[0], w)), "127.0.0.1", 0
            )
            await stack.enter_async_context(front)
            streams = await asyncio.open_connection(
                *front.sockets[0].getsockname(), ssl=agent, server_hostname=control_of("demo").dns
            )
            return await stack.enter_async_context(running(*streams, {})), serving

        peer, serving = await dial()
        await peer.call("agent.hello", link.hello())
        other, sending = await dial()
        asked = {"digest": digest, "size_bytes": len(data)}
        _, raw, writer = await other.call_detach("blob.get", asked)
        assert await raw.read() == data
        writer.close()
        await asyncio.wait_for(sending, 60)
        peer.close()
        await asyncio.wait_for(serving, 60)


async def pump(reader, writer):
    while data := await reader.read(1 << 18):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_the_hub_lets_go_of_everything_when_it_closes(link, agent):
    async with link.dial(agent) as peer:
        await peer.call("agent.hello", link.hello())
        await link.owner.until("connected")
        await link.hub.close()
        await link.owner.until("lost")
        async with asyncio.timeout(60):
            await peer.closed.wait()
        with pytest.raises(ConnectionLost):
            await peer.call("agent.hello", link.hello())


async def test_who_says_no_hello_is_shown_out(link, agent, monkeypatch):
    monkeypatch.setattr(hubs, "HELLO_TIMEOUT_S", 0.1)
    async with link.dial(agent) as peer, asyncio.timeout(60):
        await peer.closed.wait()


async def test_strangers_are_limited_and_do_not_keep_the_enrolled_out(link, agent, monkeypatch):
    monkeypatch.setattr(hubs, "MAX_STRANGERS", 2)
    monkeypatch.setattr(hubs, "HELLO_TIMEOUT_S", 600)
    peers: list[Peer] = []
    async with link.dial(link.context()) as one, link.dial(agent) as two:
        peers += [one, two]
        async with asyncio.timeout(60):
            while len(link.hub._strangers) < 2:
                await asyncio.sleep(0.01)
            async with link.dial(agent) as third:
                await third.closed.wait()
        await two.call("agent.hello", link.hello())  # no stranger any more
        async with link.dial(
            link.context(await link.enroll("p2", link.owner.expect("p2")))
        ) as late:
            await late.call("agent.hello", link.hello("p2"))


async def test_snapshots_are_asked_of_the_owner_by_the_present_session_alone(link):
    """What the owner answers, or raises, is what the agent hears."""
    asked = {"name": "web", "uid": "e1", "snapshot": "supercloud-0123456789abcdef"}
    token = link.owner.expect("p1")
    files = await link.enroll("p1", token)
    async with link.dial(link.context(files)) as older, link.dial(link.context(files)) as peer:
        with pytest.raises(Denied, match="hello comes first"):
            await peer.call("checkpoint.snapshot", asked)
        await older.call("agent.hello", link.hello())
        with pytest.raises(Denied, match="no checkpoint of web"):
            await older.call("checkpoint.snapshot", asked)
        seen = []

        async def take(wanted):
            seen.append(wanted.snapshot)

        link.owner.snapshotting = take
        await peer.call("agent.hello", link.hello())
        assert await peer.call("checkpoint.snapshot", asked) == {}
        assert seen == [asked["snapshot"]]
        with pytest.raises(Invalid):
            await peer.call("checkpoint.snapshot", {**asked, "snapshot": "mine"})
        with pytest.raises(SupercloudError):  # it was abandoned
            await older.call("checkpoint.snapshot", asked)
        assert len(seen) == 1
    async with link.dial(link.context()) as stranger:
        with pytest.raises(Denied):
            await stranger.call("checkpoint.snapshot", asked)
