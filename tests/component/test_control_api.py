"""The API of a real control plane process over its unix socket, on the fake provider."""

import asyncio
import json
import re
import stat

import pytest

from supercloud.control.api.declare import MAX_BODY_BYTES
from supercloud.model.errors import STATUS
from supercloud.model.states import ENVIRONMENT, PLATFORM
from support.control import environment, manifest_of
from support.control_process import Process

TWO = [environment("web", replicas=2), environment("db", kind="vm", image="vm", ports=[])]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    running = Process(tmp_path_factory.mktemp("api"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
async def client(process):
    async with process.client() as made:
        yield made
        for view in await made.get("/v1/uclouds"):
            await made.ask("POST", f"/v1/uclouds/{view['name']}/down")
            await made.until(None, view["name"])


async def test_the_socket_is_its_owners_only(process):
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(process.socket.parent.stat().st_mode) == 0o700
    for name in ("state.db", "tokens.key", "control.log", "lock"):
        assert stat.S_IMODE((process.state / name).stat().st_mode) == 0o600


async def test_version(client, process):
    answer = await client.get("/v1/version")
    assert answer["pid"] == process.process.pid
    assert answer["protocol"] == 1


async def test_up_serves_and_down_leaves_nothing(client):
    applied = await client.up(TWO)
    assert (applied["ucloud"], applied["generation"]) == ("test", 1)
    view = await client.until("ready")
    assert {row["name"]: row["state"] for row in view["environments"]} == {
        "web": "serving", "web-2": "serving", "db": "serving",
    }  # fmt: skip
    assert [p["state"] for p in view["platforms"]] == ["ready"]
    assert all(step["state"] == "done" for step in view["steps"])
    assert {step["subject"].partition("/")[0] for step in view["steps"]} == {
        "platform", "environment",
    }  # fmt: skip
    status, _ = await client.ask("POST", "/v1/uclouds/test/down")
    assert status == 200
    await client.until(None)
    assert await client.get("/v1/environments") == []


async def test_the_same_up_again_changes_nothing(client):
    await client.up(TWO)
    await client.until("ready")
    before = await client.get("/v1/environments")
    again = await client.up(TWO)
    assert again["plan"]["changes"] == []
    assert again["generation"] == 1
    assert await client.get("/v1/environments") == before


async def test_a_change_keeps_what_stays_and_remakes_what_changed(client):
    await client.up(TWO)
    await client.until("ready")
    before = {row["name"]: row for row in await client.get("/v1/environments")}
    uid = (await client.get("/v1/uclouds/test/environments/web"))["uid"]
    applied = await client.up([environment("web", image="oci:web2"), TWO[1]])
    assert {(c["action"], c["subject"]) for c in applied["plan"]["changes"]} == {
        ("change", "environment/web"),
        ("delete", "environment/web-2"),
    }
    await client.until("ready")
    after = {row["name"]: row for row in await client.get("/v1/environments")}
    assert after.keys() == {"web", "db"}
    assert after["db"] == before["db"]
    assert after["web"]["urls"] == before["web"]["urls"]
    assert after["web"]["address"] == before["web"]["address"]
    assert (await client.get("/v1/uclouds/test/environments/web"))["uid"] != uid


async def test_plan_says_what_up_would_do_and_does_nothing(client):
    asked = manifest_of(client.directory, TWO)
    body = {"manifest": asked.manifest, "file": asked.file, "directory": asked.directory}
    status, plan = await client.ask("POST", "/v1/plan", body)
    assert status == 200
    created = {c["subject"] for c in plan["changes"] if c["action"] == "create"}
    assert {"environment/web", "environment/web-2", "environment/db"} <= created
    assert await client.get("/v1/uclouds") == []


async def test_inspect_shows_the_wish_and_what_became_of_it(client):
    await client.up(TWO)
    await client.until("ready")
    shown = await client.get("/v1/uclouds/test/environments/db")
    assert shown["spec"]["kind"] == "vm"
    assert shown["state"] == "serving"
    assert shown["engine"] == "qemu/tcg"
    assert re.fullmatch(r"02:5c(:[0-9a-f]{2}){4}", shown["mac"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/uclouds/nobody", None, 404, "not_found"),
        ("GET", "/v1/uclouds/nobody/environments/web", None, 404, "not_found"),
        ("POST", "/v1/uclouds/nobody/down", None, 404, "not_found"),
        ("GET", "/v1/environments?ucloud=nobody", None, 404, "not_found"),
        ("GET", "/v1/environments?what=1", None, 400, "invalid"),
        ("GET", "/v1/events?follow=perhaps", None, 400, "invalid"),
        ("GET", "/v1/nothing", None, 404, "not_found"),
        ("DELETE", "/v1/uclouds", None, 404, "not_found"),
        ("GET", "/v1/up", None, 404, "not_found"),
        ("POST", "/v1/up", {}, 400, "invalid"),
        ("POST", "/v1/up", [1], 400, "invalid"),
        ("POST", "/v1/up", {"manifest": 1}, 400, "invalid"),
        ("POST", "/v1/up", {"manifest": "x", "directory": "relative"}, 400, "invalid"),
        ("POST", "/v1/up", {"manifest": "kind: Nothing", "file": "f.yaml"}, 400, "invalid"),
        ("GET", "/v1/uclouds/" + "x" * 200, None, 404, "not_found"),
    ],
)
async def test_errors_have_the_tables_status_and_say_what_is_wrong(
    client, method, path, body, status, code
):
    got, answer = await client.ask(method, path, body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert STATUS[code][0] == status
    assert answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
async def test_a_body_that_is_not_json_is_invalid(client, body):
    async with client.http.post("http://x/v1/up", data=body) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid"


async def test_a_body_beyond_the_limit_is_refused(client):
    async with client.http.post("http://x/v1/up", data=b"x" * (MAX_BODY_BYTES + 1)) as answer:
        assert answer.status == 400
        assert "larger" in (await answer.json())["error"]["message"]


@pytest.mark.parametrize(
    ("environments", "options", "reason"),
    [
        ([environment("web")], {"hosts": "3", "platforms": "0"}, "quota of platforms"),
        (
            [environment("web", replicas=4, placement={"spread": "host"})],
            {"hosts": "3"},
            "(spread)",
        ),
    ],
)
async def test_what_fits_nowhere_is_refused_with_every_hosts_reason(
    client, environments, options, reason
):
    asked = manifest_of(client.directory, environments, options=options)
    body = {"manifest": asked.manifest, "file": asked.file, "directory": asked.directory}
    status, answer = await client.ask("POST", "/v1/up", body)
    assert (status, answer["error"]["code"]) == (507, "no_resources")
    assert len(answer["error"]["details"]["candidates"]) == 3
    assert all(reason in why for why in answer["error"]["details"]["candidates"])
    assert await client.get("/v1/uclouds") == []


async def test_logs_come_whole_or_by_their_tail_or_followed(client):
    await client.up(TWO)
    await client.until("ready")
    place = "http://x/v1/uclouds/test/environments/web/logs"
    async with client.http.get(place) as answer:
        assert (await answer.read()).decode().splitlines()[-1] == "web: serving"
    async with client.http.get(place + "?tail=1") as answer:
        assert (await answer.read()).decode().splitlines() == ["web: serving"]
    async with client.http.get(place + "?follow=1") as answer:
        assert await answer.content.readline() == b"web: starting\n"


async def _socket(client, name, what, first):
    place = f"http://x/v1/uclouds/test/environments/{name}/{what}"
    socket = await client.http.ws_connect(place)
    await socket.send_str(json.dumps(first))
    return socket


async def test_exec_carries_bytes_signals_and_the_exit_status(client):
    await client.up(TWO)
    await client.until("ready")
    socket = await _socket(client, "web", "exec", {"name": "web", "argv": ["exit", "7"]})
    assert json.loads((await socket.receive()).data) == {"exit_status": 7}
    socket = await _socket(client, "web", "exec", {"name": "web", "argv": ["cat"]})
    await socket.send_bytes(b"through")
    assert (await socket.receive()).data == b"through"
    await socket.send_str('{"eof": true}')
    assert json.loads((await socket.receive()).data) == {"exit_status": 0}
    socket = await _socket(client, "web", "exec", {"name": "web", "argv": ["stderr", "no"]})
    assert json.loads((await socket.receive()).data) == {"stderr": "bm8="}


@pytest.mark.parametrize(
    ("name", "first", "code"),
    [
        ("web", {"argv": []}, "invalid"),
        ("web", {"argv": ["x"], "unknown": 1}, "invalid"),
        ("nobody", {"argv": ["x"]}, "not_found"),
    ],
)
async def test_an_exec_that_cannot_be_says_so(client, name, first, code):
    await client.up(TWO)
    await client.until("ready")
    socket = await _socket(client, name, "exec", first)
    assert json.loads((await socket.receive()).data)["error"]["code"] == code


async def test_bad_messages_end_an_exec_and_nothing_else(client):
    await client.up(TWO)
    await client.until("ready")
    for bad in ("no json", "[1]", '{"rm": "-rf"}'):
        socket = await _socket(client, "web", "exec", {"name": "web", "argv": ["cat"]})
        await socket.send_str(bad)
        assert json.loads((await socket.receive()).data)["error"]["code"] == "invalid"
    assert len(await client.get("/v1/environments")) == 3


async def test_console_of_a_vm(client):
    await client.up(TWO)
    await client.until("ready")
    socket = await _socket(client, "db", "console", {"name": "db"})
    assert (await socket.receive()).data == b"db login: "
    await socket.send_bytes(b"root")
    assert (await socket.receive()).data == b"root"
    await socket.send_str('{"eof": true}')
    assert json.loads((await socket.receive()).data) == {"exit_status": 0}
    socket = await _socket(client, "web", "console", {"name": "web"})
    assert json.loads((await socket.receive()).data)["error"]["code"] == "bad_state"


async def test_a_plain_request_for_a_websocket_is_invalid(client):
    status, answer = await client.ask("GET", "/v1/uclouds/test/environments/web/exec")
    assert (status, answer["error"]["code"]) == (400, "invalid")


async def test_events_tell_the_story_in_order_and_may_be_followed(client):
    await client.up(TWO)
    await client.until("ready")
    async with client.http.get("http://x/v1/events?ucloud=test") as answer:
        events = [json.loads(line) for line in (await answer.read()).splitlines()]
    assert [e["id"] for e in events] == sorted(e["id"] for e in events)
    codes = [e["code"] for e in events if e["actor"] == "control"]
    assert codes.index("control.platform.ready") < codes.index("control.ucloud.ready")
    last = events[-1]["id"]
    async with client.http.get(f"http://x/v1/events?follow=1&since={last}") as answer:
        await client.ask("POST", "/v1/uclouds/test/down")
        seen = []
        while "control.ucloud.deleted" not in seen:
            line = await asyncio.wait_for(answer.content.readline(), 10)
            seen.append(json.loads(line)["code"])
    assert "control.platform.deleted" in seen


async def test_states_shown_are_those_of_the_tables(client):
    await client.up(TWO)
    view = await client.get("/v1/uclouds/test")
    while view["state"] != "ready":
        assert all(row["state"] in ENVIRONMENT for row in view["environments"])
        assert all(row["state"] in PLATFORM for row in view["platforms"])
        view = await client.get("/v1/uclouds/test")


async def test_the_api_document_describes_every_route_and_resolves(client):
    document = await client.get("/v1/openapi.json")
    assert document["openapi"].startswith("3.1")
    assert {"/v1/plan", "/v1/up", "/v1/uclouds", "/v1/environments", "/v1/events"} <= document[
        "paths"
    ].keys()
    text = json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert references
    assert references <= document["components"]["schemas"].keys()
    names = [o["operationId"] for path in document["paths"].values() for o in path.values()]
    assert len(names) == len(set(names))


async def test_doctor_looks_at_disk_state_providers_and_platforms(client):
    await client.up(TWO)
    await client.until("ready")
    checks = {check["name"]: check for check in await client.get("/v1/doctor")}
    assert all(check["ok"] for check in checks.values()), checks
    assert {"state on disk", "provider test/fake"} <= checks.keys()
    assert any(name.startswith("platform test/") for name in checks)


async def test_what_goes_wrong_is_shown_and_tried_again(client):
    await client.up([environment("web")], options={"fail_create": "3"})
    view = await client.until("ready")
    assert view["error"] is None
    assert all(platform["reason"] == "" for platform in view["platforms"])


async def test_a_client_that_goes_away_in_the_middle_harms_nobody(client, process):
    await client.up(TWO)
    await client.until("ready")
    for _ in range(20):
        other = process.client()
        socket = await _socket(other, "web", "exec", {"name": "web", "argv": ["cat"]})
        await other.http.get("http://x/v1/events?follow=1")
        await socket.send_bytes(b"x" * 1000)
        await other.http.close()
    assert len(await client.get("/v1/environments")) == 3
    assert not [line for line in process.log() if line["level"] == "error"]


async def test_half_a_request_does_not_hold_up_others(client, process):
    readers = []
    for _ in range(50):
        reader, writer = await asyncio.open_unix_connection(str(process.socket))
        writer.write(b"GET /v1/version HTTP/1.1\r\nHost")
        readers.append((reader, writer))
    assert (await asyncio.wait_for(client.get("/v1/version"), 60))["protocol"] == 1
    for _, writer in readers:
        writer.close()


async def test_garbage_instead_of_http_is_answered_and_closed(client, process):
    for garbage in (b"\0" * 100, b"\x16\x03\x01 hello", b"GET " + b"/" * 100_000 + b"\r\n\r\n"):
        reader, writer = await asyncio.open_unix_connection(str(process.socket))
        writer.write(garbage)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 60)
        writer.close()
    assert (await client.get("/v1/version"))["protocol"] == 1


async def test_who_waits_for_another_state_is_answered_when_it_comes(client):
    await client.up(TWO)
    path = "/v1/uclouds/test/state"
    assert (await client.get(f"{path}?state=applying&wait_ms=20000"))["state"] == "ready"
    assert (await client.get(f"{path}?state=ready&wait_ms=50"))["state"] == "ready"
    assert (await client.get(f"{path}?state=applying"))["state"] == "ready"
    waiting = asyncio.ensure_future(client.get(f"{path}?state=ready&wait_ms=20000"))
    await asyncio.sleep(0.05)
    await client.ask("POST", "/v1/uclouds/test/down")
    assert (await waiting)["state"] in ("deleting", "gone")
    status, _ = await client.ask("GET", "/v1/uclouds/none/state?state=ready&wait_ms=20000")
    assert status == 404
