"""The agent's own way to the control plane, against the real hub, in one process."""

import asyncio
import contextlib
import datetime as dt

import pytest

from supercloud.trust import keys, tls
from supercloud.trust.names import Identity, control_of
from supercloud.upper.platform.agent import link as agent_link
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.bootdata import BootData
from supercloud.wire.codec import encode
from supercloud.wire.messages import PlatformReport
from support.link import Link


@pytest.fixture
async def link(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CERTIFICATE", str(tmp_path / "agent" / "certificate"))
    monkeypatch.setattr(paths, "KEY", str(tmp_path / "agent" / "key"))
    monkeypatch.setattr(agent_link, "BACK_OFF_S", (0.02, 0.1))
    async with Link(tmp_path / "trust").listening() as made:
        yield made


def boot_data(link, token, endpoints=None):
    return BootData(
        version=1,
        ucloud="demo",
        platform="p1",
        token=token,
        ca_pem=link.authority.root_pem,
        server_name=control_of("demo").dns,
        endpoints=endpoints or [f"127.0.0.1:{link.port}"],
    )


@contextlib.asynccontextmanager
async def agent(boot, handlers=None):
    ups = asyncio.Queue()
    made = agent_link.Link(
        boot,
        lambda: agent_link.hello(boot, {"crun": "1.21"}, "tcg", 1 << 30),
        handlers or {},
        lambda: ups.put_nowait(1),
    )
    made.make_key()
    running = asyncio.ensure_future(made.run())
    try:
        yield made, ups
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_it_enrols_connects_and_reports(link):
    async with agent(boot_data(link, link.owner.expect("p1"))) as (dialled, ups):
        session = await link.owner.until("connected")
        assert session.hello.engines == {"crun": "1.21"}
        await asyncio.wait_for(ups.get(), 60)
        report = PlatformReport(generation=1, environments=[])
        dialled.notify("agent.report", report)
        assert await link.owner.until("report") == report


async def test_it_dials_again_with_its_certificate_and_needs_no_token(link):
    token = link.owner.expect("p1")
    async with agent(boot_data(link, token)):
        first = await link.owner.until("connected")
        link.owner.token_hashes.clear()
        first.close()
        second = await link.owner.until("connected")
        assert second.pin == first.pin
    async with agent(boot_data(link, "0" * 64)):  # started again
        assert (await link.owner.until("connected")).pin == first.pin


async def test_it_goes_round_its_endpoints(link):
    boot = boot_data(link, link.owner.expect("p1"), ["127.0.0.1:1", f"127.0.0.1:{link.port}"])
    async with agent(boot):
        await link.owner.until("connected")


async def test_a_platform_that_was_put_back_does_not_wait_for_what_failed_before(link, monkeypatch):
    monkeypatch.setattr(agent_link, "BACK_OFF_S", (600.0, 600.0))
    boot = boot_data(link, link.owner.expect("p1"), ["127.0.0.1:1", f"127.0.0.1:{link.port}"])
    async with agent(boot) as (dialled, ups):
        await asyncio.sleep(0.2)  # the first endpoint has refused it
        dialled.dial_again()
        async with asyncio.timeout(60):
            session = await link.owner.until("connected")
            await ups.get()
            dialled.dial_again()
            assert (await link.owner.until("connected")).pin == session.pin


async def test_a_refused_agent_stays_out_and_keeps_trying(link, caplog):
    link.owner.expect("p1")
    async with agent(boot_data(link, "f" * 64)):
        async with asyncio.timeout(60):
            while caplog.text.count("wrong enrolment token") < 2:
                await asyncio.sleep(0.05)
        assert link.hub.sessions == {}


async def test_it_does_not_talk_to_another_control_plane(link, tmp_path, caplog):
    stranger = Link(tmp_path / "stranger")
    async with stranger.listening():
        boot = boot_data(link, link.owner.expect("p1"), [f"127.0.0.1:{stranger.port}"])
        async with agent(boot):
            async with asyncio.timeout(60):
                while "CERTIFICATE_VERIFY_FAILED" not in caplog.text:
                    await asyncio.sleep(0.05)
        assert stranger.owner.seen.empty()
        assert stranger.owner.pins == {}


async def test_it_enrols_again_over_its_key_when_its_certificate_has_ended(link, tmp_path):
    token = link.owner.expect("p1")
    async with agent(boot_data(link, token)):
        first = await link.owner.until("connected")
    name = Identity("demo", "platform", "p1")
    csr = keys.make_request(str(tmp_path / "agent" / "key"), name.uri, name.dns)
    ended = link.authority.issue(csr, name, dt.timedelta(seconds=-1))
    (tmp_path / "agent" / "certificate").write_text(ended.cert_pem + ended.chain_pem)
    async with agent(boot_data(link, token)):
        assert (await link.owner.until("connected")).pin == first.pin


async def test_its_certificate_is_renewed_at_half_of_its_life(link, tmp_path, monkeypatch):
    monkeypatch.setattr(agent_link, "RENEW_RETRY_S", (0.05, 0.05))

    async def now(_path):
        return 0.0

    monkeypatch.setattr(agent_link, "half_life_s", now)
    async with agent(boot_data(link, link.owner.expect("p1"))):
        await link.owner.until("connected")
        path = tmp_path / "agent" / "certificate"
        first = path.read_text()
        async with asyncio.timeout(60):
            while path.read_text() == first:
                await asyncio.sleep(0.05)
        assert tls.pin_of_pem(path.read_text()) == tls.pin_of_pem(first)
        assert encode(link.owner.pins) == {"p1": tls.pin_of_pem(first)}
