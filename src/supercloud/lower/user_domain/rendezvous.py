"""Joins an agent's connection to one that the control plane has parked, and relays bytes.

What passes is encrypted end to end between the platform and the control plane; this domain sees
lengths and times. Each direction waits for the other side to take what it sent.
"""

import asyncio
import contextlib
import logging
import select
import socket
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

from supercloud.model.errors import Busy
from supercloud.wire.peer import Detach

MAX_PARKED = 256
MAX_AGENTS_WAITING = 64
AGENT_PATIENCE_S = 30.0
_CHUNK_BYTES = 64 << 10

log = logging.getLogger("supercloud.lower.user_domain.rendezvous")


@dataclass(frozen=True, slots=True)
class _Agent:
    platform: str
    sock: socket.socket


class Rendezvous:
    """Parked connections of the control plane, and agents for whom none is parked yet."""

    def __init__(self) -> None:
        self._parked: deque[asyncio.Future[_Agent]] = deque()
        self._agents: deque[_Agent] = deque()

    def agent(self, platform: str, sock: socket.socket) -> None:
        """An agent of ``platform`` has dialled; it waits a while for somebody to be joined to."""
        agent = _Agent(platform, sock)
        while self._parked:
            future = self._parked.popleft()
            if not future.done():
                future.set_result(agent)
                return
        if len(self._agents) >= MAX_AGENTS_WAITING:
            log.warning("%s: too many agents wait, dropped", platform)
            sock.close()
            return
        self._agents.append(agent)
        asyncio.get_running_loop().call_later(AGENT_PATIENCE_S, self._give_up, agent)

    async def accept(self) -> Detach:
        """Park until an agent comes; Busy when too many are parked."""
        agent = self._next_agent()
        if agent is None:
            agent = await self._park()
        return Detach({"name": agent.platform}, partial(relay, agent.sock, agent.platform))

    def _next_agent(self) -> _Agent | None:
        while self._agents:
            agent = self._agents.popleft()
            if _is_open(agent.sock):
                return agent
            agent.sock.close()
        return None

    async def _park(self) -> _Agent:
        if len(self._parked) >= MAX_PARKED:
            raise Busy(f"{MAX_PARKED} connections are parked already")
        future: asyncio.Future[_Agent] = asyncio.get_running_loop().create_future()
        self._parked.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.agent(future.result().platform, future.result().sock)  # to the next one
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._parked.remove(future)

    def drop(self, platform: str) -> None:
        """The platform is gone: nobody is to be joined to an agent of it."""
        for agent in [agent for agent in self._agents if agent.platform == platform]:
            self._agents.remove(agent)
            agent.sock.close()

    def _give_up(self, agent: _Agent) -> None:
        if agent in self._agents:
            self._agents.remove(agent)
            agent.sock.close()
            log.info("%s: nobody was parked for its agent", agent.platform)


def _is_open(sock: socket.socket) -> bool:
    """Whether the agent has not hung up while it waited, be there bytes to read or not."""
    ends = select.POLLRDHUP | select.POLLHUP | select.POLLERR
    poll = select.poll()
    poll.register(sock, ends)
    return not any(event & ends for _, event in poll.poll(0))


async def relay(
    sock: socket.socket, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Copy both ways until either side ends; then close both."""
    agent_reader, agent_writer = await asyncio.open_connection(sock=sock, limit=_CHUNK_BYTES)
    log.info("%s: relaying", name)
    ways = {
        asyncio.ensure_future(_copy(reader, agent_writer)),
        asyncio.ensure_future(_copy(agent_reader, writer)),
    }
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        results: list[Any] = await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, agent_writer):
            end.close()
        log.info("%s: relay ended %s", name, [r for r in results if isinstance(r, OSError)] or "")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        await writer.drain()
