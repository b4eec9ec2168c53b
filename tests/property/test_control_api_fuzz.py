"""Whatever is asked of the API, it answers by its table, stays alive, and logs no bug."""

import http.client
import json
import socket
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supercloud.model.errors import STATUS
from support.control import environment, manifest_of
from support.control_process import Process

NAMES = st.sampled_from(["test", "web", "nobody", "..", "", "%00", "a" * 64]) | st.text(max_size=12)
PATHS = st.one_of(
    st.builds("/v1/{}".format, NAMES.map(quote)),
    st.builds("/v1/uclouds/{}".format, NAMES.map(quote)),
    st.builds("/v1/uclouds/{}/{}".format, NAMES.map(quote), st.sampled_from(["down", "x"])),
    st.builds(
        "/v1/uclouds/{}/environments/{}/{}".format,
        NAMES.map(quote),
        NAMES.map(quote),
        st.sampled_from(["", "logs", "exec", "console"]),
    ),
    st.builds(
        "/v1/uclouds/{}/volumes/{}{}".format,
        NAMES.map(quote),
        (NAMES | st.just("data")).map(quote),
        st.sampled_from(["", "/snapshot", "/revert", "/forget", "/delete", "/accept"]),
    ),
    st.builds("/v1/uclouds/{}/rotate-key".format, NAMES.map(quote)),
    st.sampled_from(["/v1/plan", "/v1/up", "/v1/environments", "/v1/version", "/v1/ca"]),
    st.just("/v1/volumes"),
)
QUERIES = st.dictionaries(
    st.sampled_from(["ucloud", "tail", "since", "x"]), st.text(max_size=20), max_size=3
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
MANIFESTS = st.fixed_dictionaries(
    {"manifest": JSON | JSON.map(json.dumps) | st.text(max_size=200)},
    optional={"file": JSON, "directory": st.sampled_from(["/", "/nowhere", "x", ""]) | JSON},
)
BODIES = st.one_of(
    st.just(b""), st.binary(max_size=60), JSON.map(json.dumps), MANIFESTS.map(json.dumps)
)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    running = Process(tmp_path_factory.mktemp("fuzz"))
    running.start()
    stored = environment("web", volumes=[{"name": "data", "path": "/data"}])
    volumes = [{"name": "data", "size": "1MiB"}]
    asked = manifest_of(running.directory, [stored], volumes=volumes)
    body = {"manifest": asked.manifest, "file": asked.file, "directory": asked.directory}
    assert ask(running, "POST", "/v1/up", json.dumps(body))[0] == 200
    yield running
    running.stop()


def ask(process, method, path, body=None):
    connection = http.client.HTTPConnection("x", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(20)
    connection.sock.connect(str(process.socket))
    try:
        connection.request(
            method, path, body if body is None or isinstance(body, bytes) else body.encode()
        )
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()
    finally:
        connection.close()


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    method=st.sampled_from(["GET", "GET", "POST", "POST", "PUT", "DELETE", "HEAD"]),
    path=PATHS,
    query=QUERIES,
    body=BODIES,
)
def test_any_request_is_answered_by_the_table(process, method, path, query, body):
    if path.endswith("/down") and "/test/" in path:
        return  # a wish like any other; it would end the others' fun
    text = "&".join(f"{quote(key)}={quote(value)}" for key, value in query.items())
    status, kind, answer = ask(process, method, f"{path}?{text}" if text else path, body)
    assert status != 500, answer
    if status >= 400 and method != "HEAD":
        assert kind.startswith("application/json"), (kind, answer)
        error = json.loads(answer)["error"]
        assert STATUS[error["code"]][0] == status
        assert error["message"]
    assert process.process.poll() is None


def test_no_bug_was_met(process):
    assert not [line for line in process.log() if line["level"] in ("error", "critical")]
