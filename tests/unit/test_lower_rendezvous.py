"""Agents are joined to parked connections, once each; the relay waits for slow readers."""

import asyncio
import os
import socket
from typing import Any

import pytest

from supercloud.lower.user_domain.rendezvous import (
    MAX_AGENTS_WAITING,
    MAX_PARKED,
    Rendezvous,
    relay,
)
from supercloud.model.errors import Busy


def agent() -> tuple[socket.socket, socket.socket]:
    """(the user domain's end, the agent's)."""
    here, there = socket.socketpair()
    here.setblocking(False)
    return here, there


async def parked(rendezvous: Rendezvous) -> "asyncio.Task[Any]":
    task = asyncio.ensure_future(rendezvous.accept())
    await asyncio.sleep(0)
    return task


async def test_who_is_parked_first_is_joined_first_and_the_platform_is_named() -> None:
    rendezvous = Rendezvous()
    first, second = await parked(rendezvous), await parked(rendezvous)
    kept = [agent(), agent()]
    rendezvous.agent("p1", kept[0][0])
    rendezvous.agent("p2", kept[1][0])
    assert (await first).result == {"name": "p1"}
    assert (await second).result == {"name": "p2"}


async def test_an_agent_waits_for_somebody_to_be_parked() -> None:
    rendezvous, (here, _there) = Rendezvous(), agent()
    rendezvous.agent("p1", here)
    assert (await rendezvous.accept()).result == {"name": "p1"}


@pytest.mark.parametrize("says_something_first", [True, False])
async def test_an_agent_that_hung_up_is_not_joined(says_something_first: bool) -> None:
    rendezvous, (here, there) = Rendezvous(), agent()
    rendezvous.agent("gone", here)
    if says_something_first:
        there.send(b"hello")
    there.close()
    task = await parked(rendezvous)
    assert not task.done()
    alive = agent()
    rendezvous.agent("p2", alive[0])
    assert (await task).result == {"name": "p2"}


async def test_a_parked_connection_that_is_lost_takes_no_agent_along() -> None:
    rendezvous, (here, _there) = Rendezvous(), agent()
    lost, next_ = await parked(rendezvous), await parked(rendezvous)
    lost.cancel()
    rendezvous.agent("p1", here)  # before the cancellation has run
    assert (await next_).result == {"name": "p1"}
    await asyncio.gather(lost, return_exceptions=True)
    assert not rendezvous._parked


async def test_a_platform_that_is_deleted_leaves_no_agent_behind() -> None:
    rendezvous, (here, _there) = Rendezvous(), agent()
    rendezvous.agent("p1", here)
    rendezvous.drop("p1")
    assert here.fileno() < 0
    assert not (await parked(rendezvous)).done()


async def test_neither_side_can_pile_up() -> None:
    rendezvous = Rendezvous()
    tasks = [await parked(rendezvous) for _ in range(MAX_PARKED)]
    with pytest.raises(Busy):
        await rendezvous.accept()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    agents = [agent() for _ in range(MAX_AGENTS_WAITING + 1)]
    for here, _ in agents:
        rendezvous.agent("p1", here)
    assert agents[-1][0].fileno() < 0
    assert agents[0][0].fileno() >= 0


class Relayed:
    """A relay between an agent's socket and a control plane's, each side ours."""

    def __init__(self) -> None:
        here, self.agent = agent()
        control_here, self.control = socket.socketpair()
        for sock in (self.agent, self.control):
            sock.setblocking(False)
        self.ends = here, control_here
        self.task: asyncio.Task[None]

    async def __aenter__(self) -> "Relayed":
        reader, writer = await asyncio.open_connection(sock=self.ends[1])
        self.task = asyncio.ensure_future(relay(self.ends[0], "p1", reader, writer))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.agent.close()
        self.control.close()
        await asyncio.wait_for(self.task, 60)


async def test_bytes_pass_both_ways_unchanged() -> None:
    loop = asyncio.get_running_loop()
    async with Relayed() as relayed:
        for source, target in (
            (relayed.agent, relayed.control),
            (relayed.control, relayed.agent),
        ):
            sent, got = os.urandom(1 << 20), b""
            sending = asyncio.ensure_future(loop.sock_sendall(source, sent))
            while len(got) < len(sent):
                got += await loop.sock_recv(target, 1 << 16)
            await sending
            assert got == sent


async def test_who_does_not_read_stops_who_sends() -> None:
    loop = asyncio.get_running_loop()
    async with Relayed() as relayed:
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 << 20:
                async with asyncio.timeout(0.5):
                    await loop.sock_sendall(relayed.agent, bytes(1 << 16))
                sent += 1 << 16
        assert sent < 8 << 20  # what sockets and buffers hold, no more


@pytest.mark.parametrize("who", ["agent", "control"])
async def test_when_one_side_ends_the_other_does(who: str) -> None:
    loop = asyncio.get_running_loop()
    async with Relayed() as relayed:
        ending = getattr(relayed, who)
        other = relayed.control if who == "agent" else relayed.agent
        await loop.sock_sendall(ending, b"last words")
        ending.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(60):
            assert await loop.sock_recv(other, 100) == b"last words"
            assert await loop.sock_recv(other, 100) == b""
