"""Requests that try to be two things at once, or to reach what is not theirs, end at the gate."""

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.model.errors import Denied, Invalid, NoResources
from supercloud.services.objects import http, requests
from supercloud.services.objects.quota import Book
from support.object_store import MIB, ObjectStore, object_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("gate")) as running:
        running.call("bucket.apply", {"name": "theirs", "quota_bytes": MIB})
        yield running


def said(store: ObjectStore, request: bytes, *, ends: bool = True) -> bytes:
    """All that comes back for these bytes."""
    context = ssl.create_default_context(cafile=str(store.identity))
    with context.wrap_socket(store.connect(), server_hostname="127.0.0.1") as connection:
        connection.settimeout(60)
        connection.sendall(request)
        answer = b""
        while block := connection.recv(65536):
            answer += block
            if not ends and b"</Error>" in answer:
                break
        return answer


HOST = b"Host: objects\r\n"
MALFORMED = {
    "two lengths": b"PUT /theirs/k HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 4\r\nContent-Length: 40\r\n\r\n",
    "length and chunks": b"PUT /theirs/k HTTP/1.1\r\n"
    + HOST
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    "another coding": b"PUT /theirs/k HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n",
    "signed length": b"PUT /theirs/k HTTP/1.1\r\n" + HOST + b"Content-Length: +4\r\n\r\n",
    "folded line": b"GET /theirs/k HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n",
    "space before colon": b"PUT /theirs/k HTTP/1.1\r\n" + HOST + b"Content-Length : 4\r\n\r\n",
    "bare newline": b"GET /theirs/k HTTP/1.1\nHost: objects\r\n\r\n",
    "another protocol": b"GET /theirs/k HTTP/1.0\r\n" + HOST + b"\r\n",
    "a whole address": b"GET http://x/theirs/k HTTP/1.1\r\n" + HOST + b"\r\n",
    "an encoded bucket": b"GET /%74heirs/k HTTP/1.1\r\n" + HOST + b"\r\n",
    "an empty bucket": b"GET //theirs/k HTTP/1.1\r\n" + HOST + b"\r\n",
    "dots": b"GET /theirs/../x HTTP/1.1\r\n" + HOST + b"\r\n",
    "encoded dots": b"GET /theirs/%2e%2E/x HTTP/1.1\r\n" + HOST + b"\r\n",
    "dots behind an encoded slash": b"GET /theirs/a%2F..%2fx HTTP/1.1\r\n" + HOST + b"\r\n",
    "a negative promise": b"PUT /theirs/k HTTP/1.1\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\nx-amz-decoded-content-length: -9\r\n\r\n",
    "a head too large": b"GET /theirs/k HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.root
@pytest.mark.parametrize("which", MALFORMED)
def test_what_could_be_read_in_two_ways_is_refused(store: ObjectStore, which: str) -> None:
    answer = said(store, MALFORMED[which])
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:200]
    assert b"InvalidRequest" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.root
@pytest.mark.parametrize(
    "line",
    [
        b"POST /",  # the server's own administration
        b"GET /?Action=ListUsers",
        b"POST /?Action=AssumeRole",
        b"PUT /theirs",
        b"DELETE /theirs",
        b"PUT /theirs?versioning",
        b"PUT /theirs?lifecycle",
        b"PUT /theirs?policy",
        b"PUT /theirs/?acl",
        b"DELETE /theirs?lifecycle",
        b"POST /theirs/k?restore",
        b"OPTIONS /theirs/k",
        b"PATCH /theirs/k",
    ],
)
def test_what_is_the_services_own_is_denied_to_all(store: ObjectStore, line: bytes) -> None:
    answer = said(store, line + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 "), answer[:200]
    assert b"AccessDenied" in answer


@pytest.mark.root
@pytest.mark.parametrize("name", [b"etc", b"topics", b"supercloud-ready", b"nowhere"])
def test_what_is_no_bucket_of_the_user_is_not_there(store: ObjectStore, name: bytes) -> None:
    answer = said(store, b"GET /" + name + b"/k HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"NoSuchBucket" in answer


@pytest.mark.root
def test_a_refused_connection_leaves_the_others_alone_and_plain_http_gets_nothing(
    store: ObjectStore,
) -> None:
    with store.connect() as plain:
        plain.settimeout(60)
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in plain.recv(4096)
    half = [store.connect() for _ in range(20)]
    assert b"AccessDenied" in said(
        store, b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    )
    for connection in half:
        connection.close()


@pytest.mark.root
def test_connections_are_bounded(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        held: list[socket.socket] = []
        with pytest.raises(NoResources):
            for _ in range(300):
                held.append(store.connect())  # noqa: PERF401
        assert len(held) == 256
        for connection in held:
            connection.close()
        assert store.call("objects.state")["state"] == "ready"


@given(st.binary(max_size=400))
def test_any_head_is_read_or_refused(data: bytes) -> None:
    for raw in (data, b"GET /a HTTP/1.1\r\n" + data, b"PUT /abc/" + data):
        try:
            head = http.parse(raw + b"\r\n\r\n")
            if head.method:
                requests.classify(head, lambda _path: 0)
        except (Invalid, Denied):
            pass


def head(line: str, **fields: str) -> http.Head:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return http.parse("\r\n".join([f"{line} HTTP/1.1", *lines, "", ""]).encode())


@pytest.mark.parametrize(
    ("asked", "least"),
    [
        (head("PUT /abc/k", content_length="1000"), 1000),
        (head("PUT /abc/k?partNumber=1&uploadId=u", content_length="1000"), 1000),
        (head("POST /abc", content_length="1000"), 1000),
        (head("PUT /abc/k", x_amz_copy_source="/src/key", content_length="0"), 777),
        (head("PUT /abc/k", x_amz_copy_source="src%2Fkey", content_length="0"), 777),
        (head("PUT /abc/k?tagging", x_amz_copy_source="src%2Fkey", content_length="0"), 0),
        (head("PUT /abc/k", transfer_encoding="chunked", x_amz_decoded_content_length="9"), 9),
    ],
)
def test_no_write_is_charged_less_than_it_stores(asked: http.Head, least: int) -> None:
    sizes = {b"/buckets/src/key": 777}
    found = requests.classify(asked, lambda path: sizes.get(path, 0))
    assert found.bucket == "abc"
    assert found.charge_bytes is not None
    assert found.charge_bytes >= least + 1024


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=30))
def test_reservations_and_usage_never_exceed_the_quota(asked: list[tuple[int, bool]]) -> None:
    """Each request reserves, then stores all of it or nothing, in any interleaving."""

    async def everything() -> None:
        stored, quota = 0, 100
        book = Book(lambda _bucket: stored)
        book.quotas["b"] = quota

        async def one(size: int, succeeds: bool) -> None:
            nonlocal stored
            reservation = book.reservation("b")
            try:
                await reservation.grow(size)
                assert stored + book.reserved["b"] <= quota
                await asyncio.sleep(0)
                stored += size if succeeds else 0
            except NoResources:
                assert stored + size > quota
            finally:
                reservation.release()

        await asyncio.gather(*(one(*request) for request in asked))
        assert stored <= quota
        assert not book.reserved

    asyncio.run(everything())
