"""The peer: calls, errors, streams with credit, hand-over, hostile frames."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.model.errors import NotFound, Permanent, Temporary, Unsupported
from supercloud.wire import peer as wire
from supercloud.wire.peer import Call, ConnectionLost, Detach, Handler, Peer


@asynccontextmanager
async def pair(handlers: Mapping[str, Handler]) -> AsyncIterator[tuple[Peer, Peer]]:
    """A client and the server's end of one connection, both running."""
    ends: asyncio.Queue[Peer] = asyncio.Queue()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = Peer(reader, writer, handlers, accepted=True, name="server")
        ends.put_nowait(end)
        await end.run()

    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    reader, writer = await asyncio.open_connection(host, port)
    client = Peer(reader, writer, {"double": double}, accepted=False, name="client")
    running = asyncio.ensure_future(client.run())
    try:
        yield client, await ends.get()
    finally:
        client.close()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        server.close()
        writer.transport.abort()


async def double(call: Call) -> int:
    return call.untrusted_params * 2


async def refuse(_call: Call) -> None:
    raise Unsupported("not here", hint="go there", where="a.b")


async def bug(_call: Call) -> None:
    raise ZeroDivisionError("a secret in a message")


async def echo(call: Call) -> dict[str, int]:
    stream, total = call.accept({"hello": 1}), 0
    async for chunk in stream.chunks():
        total += len(chunk)
        await stream.write(chunk)
    return {"total": total}


HANDLERS = {"double": double, "refuse": refuse, "bug": bug, "echo": echo}


async def test_both_sides_may_call() -> None:
    async with pair(HANDLERS) as (client, server):
        assert await client.call("double", 21) == 42
        assert await server.call("double", 4) == 8


async def test_an_error_keeps_its_type_hint_and_place() -> None:
    async with pair(HANDLERS) as (client, _):
        with pytest.raises(Unsupported, match="not here") as caught:
            await client.call("refuse")
        assert (caught.value.hint, caught.value.where) == ("go there", "a.b")


async def test_a_bug_shows_its_id_only() -> None:
    async with pair(HANDLERS) as (client, _):
        with pytest.raises(Permanent, match=r"^internal error [0-9a-f]{20}$"):
            await client.call("bug")
        assert await client.call("double", 1) == 2


async def test_an_unknown_method_is_not_found() -> None:
    async with pair(HANDLERS) as (client, _):
        with pytest.raises(NotFound):
            await client.call("nothing")


async def test_a_stream_carries_more_than_its_window_both_ways() -> None:
    async with pair(HANDLERS) as (client, _), client.open("echo") as stream:
        size = 3 * wire.WINDOW_BYTES + 17

        async def send() -> None:
            await stream.write(bytes(size))
            stream.end()

        sending = asyncio.ensure_future(send())
        received = [len(chunk) async for chunk in stream.chunks()]
        await sending
        assert sum(received) == size
        assert stream.result == {"hello": 1}
        assert stream.trailer == {"total": size}


async def test_a_slow_reader_holds_the_writer_back() -> None:
    async with pair(HANDLERS) as (client, _), client.open("echo") as stream:
        writing = asyncio.ensure_future(stream.write(bytes(4 * wire.WINDOW_BYTES)))
        await asyncio.sleep(0.3)
        assert not writing.done()
        assert stream._inbox.qsize() * wire.MAX_DATA_BYTES <= 2 * wire.WINDOW_BYTES
        writing.cancel()


async def test_a_lost_connection_fails_calls_and_streams() -> None:
    async def never(_call: Call) -> None:
        await asyncio.sleep(60)

    async with pair({**HANDLERS, "never": never}) as (client, server):
        waiting = asyncio.ensure_future(client.call("never"))
        await asyncio.sleep(0.05)
        server.writer.transport.abort()
        with pytest.raises(ConnectionLost):
            await waiting
        with pytest.raises(ConnectionLost):
            await client.call("double", 1)


async def test_a_call_that_takes_too_long_is_temporary() -> None:
    async def never(_call: Call) -> None:
        await asyncio.sleep(60)

    async with pair({"never": never}) as (client, _):
        with pytest.raises(Temporary, match="no answer"):
            await client.call("never", timeout_s=0.05)


async def test_who_ends_before_the_hand_over_is_told_so() -> None:
    done = list[str]()

    async def then(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        done.append("then")

    async def detach(_call: Call) -> Detach:
        return Detach(None, then, lambda: done.append("abandoned"))

    reader = asyncio.StreamReader()
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=ours)
    peer = Peer(reader, writer, {"detach": detach}, accepted=True, name="server")
    writer.transport.set_write_buffer_limits(0)
    writer.write(bytes(8 << 20))  # nobody takes it: the answer has to wait
    running = asyncio.ensure_future(peer.run())
    with theirs:
        peer._requested(1, b'{"m": "detach"}')
        while not peer._detached:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    writer.transport.abort()
    assert done == ["abandoned"]


async def test_a_detached_connection_is_raw() -> None:
    async def detach(_call: Call) -> Detach:
        async def then(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readexactly(5))[::-1])
            await writer.drain()
            writer.close()

        return Detach({"name": "x"}, then)

    async with pair({"detach": detach}) as (client, _):
        result, reader, writer = await client.call_detach("detach")
        writer.write(b"hello")
        assert result == {"name": "x"}
        assert await reader.readexactly(5) == b"olleh"


async def test_a_frame_too_long_ends_the_connection_before_it_is_read() -> None:
    async with pair(HANDLERS) as (client, server):
        client.writer.write(wire.HEADER.pack(wire.MAX_JSON_BYTES + 1, wire.REQUEST, 1))
        await asyncio.wait_for(server.closed.wait(), 30)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.binary(max_size=64)), max_size=8)
)
def test_garbage_frames_end_the_connection_or_are_ignored(
    frames: list[tuple[int, int, bytes]],
) -> None:
    async def attack() -> None:
        async with pair(HANDLERS) as (client, server):
            for kind, call_id, payload in frames:
                client.writer.write(struct.pack(">IBI", len(payload), kind, call_id) + payload)
            client.writer.write_eof()
            await asyncio.wait_for(server.closed.wait(), 30)

    asyncio.run(attack())


async def test_a_writer_that_ignores_credit_is_cut_off() -> None:
    async def hold(call: Call) -> None:
        call.accept()
        await asyncio.sleep(60)

    async with pair({"hold": hold}) as (client, server), client.open("hold"):
        for _ in range(wire.WINDOW_BYTES // wire.MAX_DATA_BYTES + 2):
            client._send(wire.DATA, 1, bytes(wire.MAX_DATA_BYTES))
        await asyncio.wait_for(server.closed.wait(), 30)
