"""The front door's only parser, on good hellos cut anywhere and on anything else."""

import ssl
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.lower.provider.client_hello import MAX_HELLO_BYTES, Short, server_name
from supercloud.model.errors import Invalid

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join).filter(lambda n: not n[-1].isdigit())


def hello(name: str | None) -> bytes:
    """What OpenSSL sends first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@given(NAME)
def test_the_name_that_openssl_asks_for_is_found(name: str) -> None:
    assert server_name(hello(name)) == name


def test_every_cut_of_a_hello_is_short_and_what_follows_does_not_matter() -> None:
    whole = hello("demo.user.supercloud.internal")
    for end in range(len(whole)):
        with pytest.raises(Short):
            server_name(whole[:end])
    assert server_name(whole + b"\x17\x03\x03") == "demo.user.supercloud.internal"


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_a_hello_in_several_records_is_the_same_hello(sizes: list[int]) -> None:
    body, records = hello("demo.user.supercloud.internal")[5:], b""
    for size in [*sizes, len(body)]:
        part, body = body[:size], body[size:]
        if part:
            records += struct.pack(">BHH", 22, 0x0301, len(part)) + part
    assert server_name(records) == "demo.user.supercloud.internal"


def test_no_name_is_refused() -> None:
    with pytest.raises(Invalid, match="no server name"):
        server_name(hello(None))


@given(st.binary(max_size=MAX_HELLO_BYTES))
def test_anything_else_is_refused_or_short_and_nothing_worse(untrusted: bytes) -> None:
    with pytest.raises((Invalid, Short)):
        server_name(untrusted)


@given(st.data())
def test_a_hello_with_bytes_changed_never_breaks_the_parser(data: st.DataObject) -> None:
    changed = bytearray(hello("demo.user.supercloud.internal"))
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = server_name(bytes(changed))
    except (Invalid, Short):
        return
    assert found.isascii()
    assert len(found) <= 253


def test_a_hello_that_never_ends_is_given_up() -> None:
    endless = (
        struct.pack(">BHH", 22, 0x0301, 1 << 14) + b"\x01\x00\x3f\xff" + bytes(MAX_HELLO_BYTES)
    )
    with pytest.raises(Invalid):
        server_name(endless[:MAX_HELLO_BYTES])
