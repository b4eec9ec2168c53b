"""Who may use the control plane: the attacks are real connections to a real process."""

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys

import aiohttp
import pytest

from supercloud.control.bootdata import Tokens, user_data
from supercloud.providers.fake.agent import FakeAgent
from supercloud.providers.fake.cloud import FakeCloud, Platform
from supercloud.trust import tls
from supercloud.trust.authority import Authority
from supercloud.trust.names import CONTROL, HOST, PLATFORM, SERVICE, Identity, control_of
from support.control import environment, manifest_of
from support.control_process import Client, Process
from support.ports import free_port

ONE = [environment("web")]
LIMIT_S = 15  # below the server's own, by which it would hang up on anybody


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    running = Process(tmp_path_factory.mktemp("access"), listen=f"127.0.0.1:{free_port()}")
    running.start()
    yield running
    running.stop()


@pytest.fixture
async def ucloud(process):
    """A U-Cloud ``test`` and another, ``other``, both up."""
    async with process.client() as client:
        await client.up(ONE)
        await client.up(ONE, name="other")
        await client.until("ready")
        await client.until("ready", "other")
        yield client


def context_of(process, ucloud, identity=None, tmp=None, alpn="http/1.1"):
    """A client's TLS, with a certificate of ``identity`` signed by that U-Cloud's authority."""
    trust = process.state / "trust"
    authority = Authority.ensure(str(trust), ucloud)
    paths = ("", "")
    if identity is not None:
        from supercloud.providers.fake import identity as made

        key = str(tmp / f"{identity.role}-{identity.name}.key")
        signed = authority.issue(made.request(key, identity.name), identity)
        certificate = str(tmp / f"{identity.role}-{identity.name}.pem")
        made.keep(certificate, signed.cert_pem + signed.chain_pem)
        paths = certificate, key
    return tls.client_context(authority.root_pem, *paths, alpn=alpn)


def port_of(process):
    return int(process.listen.rpartition(":")[2])


async def ask(process, context, path, *, server="test", method="GET", body=None):
    """Status and body of a request over TLS."""
    connector = aiohttp.TCPConnector(ssl=context)
    async with Client(connector, process.directory, "https://x") as client:
        url = f"https://127.0.0.1:{port_of(process)}{path}"
        name = control_of(server).dns
        async with client.http.request(method, url, json=body, server_hostname=name) as answer:
            return answer.status, await answer.json()


@pytest.mark.root
@pytest.mark.parametrize("opened", [False, True])
async def test_another_uid_of_this_machine_is_refused(process, ucloud, opened):
    """By the socket's mode, and by the control plane itself should the mode be opened."""
    script = (
        "import http.client, os, socket, sys\n"
        "c = http.client.HTTPConnection('x'); c.sock = socket.socket(socket.AF_UNIX)\n"
        "os.setgroups([]); os.setresgid(64321, 64321, 64321); os.setresuid(64321, 64321, 64321)\n"
        "c.sock.connect(sys.argv[1])\n"
        "for path in ('/v1/version', '/v1/nothing', '/v1/uclouds'):\n"
        "    c.request('GET', path); a = c.getresponse(); print(a.status); a.read()\n"
    )
    ours = [
        path for path in (process.socket, *process.socket.parents) if path.stat().st_mode & 7 < 5
    ]
    before = {path: path.stat().st_mode & 0o7777 for path in ours}
    try:
        for path in ours if opened else ():
            os.chmod(path, 0o777)
        done = subprocess.run(
            [sys.executable, "-I", "-c", script, str(process.socket)],
            capture_output=True,
            text=True,
        )
    finally:
        for path, mode in before.items():
            os.chmod(path, mode)
    if opened:
        assert done.stdout.split() == ["403"] * 3, done.stderr
    else:
        assert done.returncode != 0
        assert "PermissionError" in done.stderr


async def test_without_a_certificate_nothing_is_told_over_tcp(process, ucloud):
    for path in ("/v1/version", "/v1/uclouds", "/v1/openapi.json", "/v1/nothing"):
        status, answer = await ask(process, context_of(process, "test"), path)
        assert (status, answer["error"]["code"]) == (403, "denied"), path


async def test_a_certificate_of_the_ucloud_opens_that_ucloud_only(process, ucloud, tmp_path):
    me = Identity("test", CONTROL, "me")
    context = context_of(process, "test", me, tmp_path)
    status, views = await ask(process, context, "/v1/uclouds")
    assert status == 200
    assert [view["name"] for view in views] == ["test"]
    status, rows = await ask(process, context, "/v1/environments")
    assert {row["ucloud"] for row in rows} == {"test"}
    assert (await ask(process, context, "/v1/environments?ucloud=test"))[0] == 200
    asked = manifest_of(process.directory, ONE, name="other")
    theirs = {"manifest": asked.manifest, "file": asked.file, "directory": asked.directory}
    for method, path, body in (
        ("GET", "/v1/uclouds/other", None),
        ("GET", "/v1/environments?ucloud=other", None),
        ("GET", "/v1/events?ucloud=other", None),
        ("GET", "/v1/uclouds/other/environments/web", None),
        ("GET", "/v1/uclouds/other/environments/web/logs", None),
        ("GET", "/v1/uclouds/other/environments/web/exec", None),
        ("POST", "/v1/uclouds/other/down", None),
        ("POST", "/v1/plan", theirs),
        ("POST", "/v1/up", theirs),
    ):
        status, answer = await ask(process, context, path, method=method, body=body)
        assert (status, answer["error"]["code"]) == (403, "denied"), path
    assert (await ucloud.get("/v1/uclouds/other"))["generation"] == 1


async def test_events_over_tcp_are_of_the_own_ucloud_only(process, ucloud, tmp_path):
    context = context_of(process, "test", Identity("test", CONTROL, "me"), tmp_path)
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as http:
        url = f"https://127.0.0.1:{port_of(process)}/v1/events"
        async with http.get(url, server_hostname=control_of("test").dns) as answer:
            lines = (await answer.read()).splitlines()
    assert lines
    assert {json.loads(line)["ucloud"] for line in lines} == {"test"}


@pytest.mark.parametrize("role", [PLATFORM, HOST, SERVICE])
async def test_platforms_and_hosts_may_not_use_the_api(process, ucloud, tmp_path, role):
    context = context_of(process, "test", Identity("test", role, "evil"), tmp_path)
    status, answer = await ask(process, context, "/v1/uclouds")
    assert (status, answer["error"]["code"]) == (403, "denied")


async def test_another_uclouds_certificate_is_held_to_its_own_name(process, ucloud, tmp_path):
    """Same root, so TLS accepts it, even under the other's server name; it opens only its own."""
    context = context_of(process, "other", Identity("other", CONTROL, "me"), tmp_path)
    status, answer = await ask(process, context, "/v1/uclouds/test", server="test")
    assert (status, answer["error"]["code"]) == (403, "denied")


async def test_a_strangers_authority_is_refused_by_tls(process, ucloud, tmp_path):
    stranger = Authority.ensure(str(tmp_path / "stranger"), "test")
    paths = stranger.own_files(str(tmp_path / "stranger"))
    ours = Authority.ensure(str(process.state / "trust"), "test")
    context = tls.client_context(ours.root_pem, *paths, alpn="http/1.1")
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await ask(process, context, "/v1/uclouds")


@pytest.mark.parametrize(
    "name", [None, "nobody.example", "control.control.nobody.supercloud.internal"]
)
def test_who_asks_for_no_ucloud_gets_no_certificate(process, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port_of(process)), LIMIT_S) as raw:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname=name)


def test_old_tls_is_refused(process):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", port_of(process)), LIMIT_S) as raw:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(raw, server_hostname=control_of("test").dns)


# -- agents on the same port


def _agent(process, tmp_path, ucloud, name, token):
    """An agent of our own making, with this token, that dials over TCP."""
    from supercloud.providers.fake import bootdata

    ca_pem = Authority.ensure(str(process.state / "trust"), ucloud).root_pem
    boot = json.loads(user_data(ucloud, name, token, ca_pem, []))
    fields = {
        key: boot[key]
        for key in ("version", "ucloud", "platform", "token", "ca_pem", "server_name")
    }
    cloud = FakeCloud("mine", directory=str(tmp_path / "cloud"))
    cloud.platforms[name] = Platform(
        name=name, host="mine-0", image="", cpus=1, memory_bytes=0, scratch_bytes=0, ports=0,
        tag="", shape="", first_port=0, address="", boot=bootdata.BootData(**fields),
    )  # fmt: skip
    return FakeAgent(cloud, cloud.platforms[name])


def _dialled(process):
    sock = socket.create_connection(("127.0.0.1", port_of(process)))
    sock.setblocking(False)
    return sock


async def test_an_agent_with_a_made_up_token_is_refused(process, ucloud, tmp_path):
    platform = (await ucloud.get("/v1/uclouds/test"))["platforms"][0]["name"]
    agent = _agent(process, tmp_path, "test", platform, "0" * 64)
    with pytest.raises(Exception, match="token"):
        await agent.connect(_dialled(process))
    assert not agent.enrolled()


async def test_a_used_token_is_worth_nothing_to_another_key(process, ucloud, tmp_path):
    """Even the true token, as the provider can read it from the config disk."""
    name, files = next(
        (path.stem, json.loads(path.read_text()))
        for path in process.state.glob("providers/test/*/*.json")
    )
    agent = _agent(process, tmp_path, "test", name, files["boot"]["token"])
    with pytest.raises(Exception, match="used already"):
        await agent.connect(_dialled(process))
    await asyncio.sleep(0.3)
    view = await ucloud.get("/v1/uclouds/test")
    assert view["platforms"][0]["state"] == "ready"  # a platform that is connected is left alone
    async with ucloud.http.get("http://x/v1/events?ucloud=test") as answer:
        codes = [json.loads(line)["code"] for line in (await answer.read()).splitlines()]
    assert "control.platform.refused" in codes


async def test_a_token_is_no_good_in_another_ucloud(process, ucloud, tmp_path):
    theirs = next(process.state.glob("providers/other/*/*.json"))
    token = json.loads(theirs.read_text())["boot"]["token"]
    mine = (await ucloud.get("/v1/uclouds/test"))["platforms"][0]["name"]
    agent = _agent(process, tmp_path, "test", mine, token)
    with pytest.raises(Exception, match="token"):
        await agent.connect(_dialled(process))


async def test_an_agent_cannot_be_a_platform_that_does_not_exist(process, ucloud, tmp_path):
    agent = _agent(process, tmp_path, "test", "invented", "0" * 64)
    with pytest.raises(Exception, match="no platform invented"):
        await agent.connect(_dialled(process))


async def test_a_platforms_true_certificate_is_admitted_over_tcp(process, ucloud, tmp_path):
    """The port that the API has serves agents, too, by ALPN."""
    home = next(path.parent for path in process.state.glob("providers/test/*/*.json"))
    name = next(path.stem for path in home.glob("*.json"))
    token = json.loads((home / f"{name}.json").read_text())["boot"]["token"]
    agent = _agent(process, tmp_path, "test", name, token)
    for suffix in (".key", ".pem"):
        (tmp_path / "cloud" / f"{name}{suffix}").write_bytes(
            (home / f"{name}{suffix}").read_bytes()
        )
    connected = asyncio.ensure_future(agent.connect(_dialled(process)))
    async with asyncio.timeout(60):
        while agent._peer is None and not connected.done():
            await asyncio.sleep(0.01)
    assert agent._peer is not None
    connected.cancel()
    await asyncio.gather(connected, return_exceptions=True)


async def test_a_forged_certificate_for_a_platform_is_not_admitted(process, ucloud, tmp_path):
    """Signed by the right authority, but over another key than the one that enrolled."""
    name = (await ucloud.get("/v1/uclouds/test"))["platforms"][0]["name"]
    agent = _agent(process, tmp_path, "test", name, "0" * 64)
    context_of(process, "test", Identity("test", PLATFORM, name), tmp_path)
    for suffix in (".key", ".pem"):
        made = tmp_path / f"{PLATFORM}-{name}{suffix}"
        (tmp_path / "cloud" / f"{name}{suffix}").write_bytes(made.read_bytes())
    with pytest.raises(Exception, match="another key"):
        await agent.connect(_dialled(process))


def test_tokens_differ_by_platform_ucloud_and_incarnation(tmp_path):
    from dataclasses import replace

    from supercloud.control.documents import PlatformDocument, PlatformWish
    from supercloud.model.resources import PlatformSize, Provider

    wish = PlatformWish(
        name="p", provider=Provider(name="f", kind="fake"), host="h", region="", jurisdiction="",
        index=0, size=PlatformSize(), image="",
    )  # fmt: skip
    tokens = Tokens.ensure(tmp_path / "key")
    document = PlatformDocument(ucloud="u", name="p", wish=wish)
    variants = [
        (document, "uid"),
        (document, "uid2"),
        (replace(document, name="q"), "uid"),
        (replace(document, ucloud="v"), "uid"),
        (replace(document, incarnation=2), "uid"),
    ]
    made = [tokens.token(*variant) for variant in variants]
    assert len(set(made)) == len(made)
    assert all(len(token) == 64 for token in made)
    assert tokens.token(document, "uid") == Tokens.ensure(tmp_path / "key").token(document, "uid")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
