"""The core's frames: what is packed is unpacked, and no bytes break the parser."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.lower import client
from supercloud.model.errors import BY_CODE, Invalid, Permanent
from supercloud.wire import frames

numbers = st.integers(-(1 << 63), (1 << 63) - 1)
names = st.from_regex(frames.NAME, fullmatch=True) | st.just("")


@given(
    op=st.integers(0, 255),
    sequence=st.integers(1, (1 << 32) - 1),
    args=st.lists(numbers, max_size=8),
    first=names,
    second=names,
)
def test_a_request_comes_back(op, sequence, args, first, second):
    frame = client.pack_request(op, sequence, tuple(args), first, second)
    assert len(frame) == frames.REQUEST.size
    padded = (*args, *[0] * (8 - len(args)))
    assert frames.unpack_request(frame) == (op, sequence, padded, first, second)


@given(
    st.binary(max_size=400) | st.binary(min_size=frames.REQUEST.size, max_size=frames.REQUEST.size)
)
def test_any_bytes_are_a_request_or_invalid(untrusted):
    try:
        request = frames.unpack_request(untrusted)
    except Invalid:
        return
    assert client.pack_request(*request) == untrusted


@given(st.binary(min_size=64, max_size=64))
def test_any_name_field_is_a_name_or_invalid(untrusted):
    try:
        name = frames.unpack_name(untrusted)
    except Invalid:
        return
    assert not name or frames.NAME.match(name)


@given(
    op=st.integers(0, 255),
    status=st.integers(0, 99),
    sequence=st.integers(0, (1 << 32) - 1),
    values=st.lists(numbers, max_size=8),
    payload=st.binary(max_size=frames.MAX_PAYLOAD_BYTES),
)
def test_an_answer_comes_back(op, status, sequence, values, payload):
    frame = frames.pack_answer(op, status, sequence, tuple(values), payload)
    assert len(frame) <= frames.ANSWER.size + frames.MAX_PAYLOAD_BYTES
    padded = (*values, *[0] * (8 - len(values)))
    assert client.unpack_answer(frame) == (op, status, sequence, padded, payload)


@given(st.binary(max_size=5000))
def test_any_bytes_are_an_answer_or_refused(untrusted):
    with suppress(Permanent):
        client.unpack_answer(untrusted)


@pytest.mark.parametrize("code", frames.CODES)
def test_errors_come_back_as_themselves(code):
    error = BY_CODE[code]("what is wrong")
    back = client.error_of(frames.status_of(error), str(error).encode())
    assert type(back) is type(error)
    assert str(back) == "what is wrong"


def test_a_bug_shows_nothing_of_itself():
    assert isinstance(client.error_of(frames.BUG_STATUS, b"x"), Permanent)
