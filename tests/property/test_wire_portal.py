"""Portals between domains: whatever comes over one, the other side answers, refuses, stays."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import Invalid, NoResources, NotFound, Permanent, Temporary
from supercloud.wire import portal
from supercloud.wire.portal import Closed, Portal, Reply, Request

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def refuse(_request: Request) -> None:
    raise NoResources("too much", hint="less", details={"left": 1})


def pipe_end(_request: Request) -> Reply:
    reading, writing = os.pipe()
    os.close(writing)
    return Reply({"n": 1}, [reading])


HANDLERS = {
    "echo": lambda request: request.untrusted,
    "count": lambda request: len(request.descriptors),
    "refuse": refuse,
    "bug": lambda _request: 1 // 0,
    "descriptor": pipe_end,
}


@contextmanager
def served() -> Iterator[socket.socket]:
    """Our end of a channel whose other end answers by ``HANDLERS``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=serve, args=(theirs,))
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(10)
        theirs.close()
        assert not thread.is_alive()


def serve(end: socket.socket) -> None:
    while True:
        try:
            message = portal.receive(end)
        except Invalid:
            continue
        if message is None:
            return
        try:
            portal.answer(end, "test", message, HANDLERS)
        except Closed:
            return


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.lists(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()), max_size=10))
@settings(max_examples=60, deadline=None)
def test_garbage_is_survived_and_leaks_no_descriptor(messages: list[bytes]) -> None:
    before = open_descriptors()
    with served() as end:
        for message in messages:
            socket.send_fds(end, [message], [0, 0])
        assert Portal(end, "test").call("echo", {"still": "there"}) == {"still": "there"}
    assert open_descriptors() == before


def test_errors_cross_as_what_they_are() -> None:
    with served() as end:
        caller = Portal(end, "test")
        with pytest.raises(NoResources) as refused:
            caller.call("refuse")
        assert (refused.value.hint, refused.value.details) == ("less", {"left": 1})
        with pytest.raises(NotFound):
            caller.call("no such")
        with pytest.raises(Permanent, match=r"internal error [0-9a-f]+"):
            caller.call("bug")  # shown as its id, not as what it was


def test_descriptors_cross_and_unwanted_ones_are_closed() -> None:
    before = open_descriptors()
    with served() as end:
        caller = Portal(end, "test")
        assert caller.call("count", descriptors=[0, 1, 2]) == 3
        reply = caller.call_for_descriptors("descriptor")
        assert os.read(reply.descriptors[0], 1) == b""
        os.close(reply.descriptors[0])
        assert caller.call("descriptor") == {"n": 1}
    assert open_descriptors() == before


def test_too_much_is_refused_before_it_is_sent() -> None:
    with served() as end:
        caller = Portal(end, "test")
        with pytest.raises(Invalid):
            caller.call("echo", {"x": "y" * portal.MAX_MESSAGE_BYTES})
        with pytest.raises(Invalid):
            caller.call("count", descriptors=[0] * (portal.MAX_DESCRIPTORS + 1))
        assert caller.call("echo", {"a": 1}) == {"a": 1}


def test_a_late_answer_to_somebody_before_is_not_taken_for_ours() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(Temporary):
            Portal(ours, "slow").call("echo", timeout_s=0.05)
        asked = portal.receive(theirs)
        assert asked is not None
        portal.send(theirs, {"i": asked.untrusted["i"], "r": "late"})
        with pytest.raises(Temporary):
            Portal(ours, "slow").call("echo", timeout_s=0.05)


def test_the_end_is_told_from_an_empty_message() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.send(b"")
        with pytest.raises(Invalid, match="empty"):
            portal.receive(theirs)
        ours.close()
        assert portal.receive(theirs) is None
