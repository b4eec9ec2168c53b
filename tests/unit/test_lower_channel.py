"""A channel of the user's domain: whose descriptors come with answers, and when nobody waits."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from supercloud.lower.user_domain.channel import Channel
from supercloud.model.errors import Temporary
from supercloud.wire import portal


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel("other")
    channel.use(ours.detach())
    with theirs, contextlib.closing(channel):
        yield channel, theirs


def answer(theirs: socket.socket, call_id: int, descriptor: int) -> None:
    portal.send(theirs, {"i": call_id, "r": {}}, [descriptor])


async def is_closed_elsewhere(end: int) -> bool:
    """Whether no copy of a pipe's writing end is open any more."""
    os.set_blocking(end, False)
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            return os.read(end, 1) == b""
        await asyncio.sleep(0.01)
    return False


async def test_descriptors_of_an_answer_are_the_callers(
    ends: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = ends
    reading, writing = os.pipe()
    asking = asyncio.ensure_future(channel.call("it"))
    await asyncio.sleep(0)
    answer(theirs, 1, writing)
    os.close(writing)
    (descriptor,) = (await asking).descriptors
    os.write(descriptor, b"x")
    assert os.read(reading, 1) == b"x"
    os.close(descriptor)
    os.close(reading)


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_an_answer_that_comes_in_the_moment_its_caller_gives_up_leaves_nothing_open(
    ends: tuple[Channel, socket.socket], how: str
) -> None:
    channel, theirs = ends
    reading, writing = os.pipe()
    asking = asyncio.ensure_future(channel.call("it", timeout_s=0.0 if how == "late" else 5.0))
    if how == "cancelled":
        await asyncio.sleep(0)
    answer(theirs, 1, writing)
    os.close(writing)
    if how == "cancelled":
        channel._readable()  # in one turn of the loop: the answer is there, and then
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    else:
        with pytest.raises(Temporary, match="no answer to it"):
            await asking
    assert await is_closed_elsewhere(reading)
    os.close(reading)
