"""The API's long answers: logs and events in chunks, exec and console as WebSockets."""

import asyncio
import contextlib
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from supercloud.control.api.declare import Asked
from supercloud.control.events import EventLog
from supercloud.control.service import Service
from supercloud.model.errors import Invalid, SupercloudError, Temporary, to_wire
from supercloud.wire.codec import decode
from supercloud.wire.messages import ByName, Exec, Logs
from supercloud.wire.peer import Stream

MAX_MESSAGE_BYTES = 1 << 20
FIRST_MESSAGE_TIMEOUT_S = 30.0
HEARTBEAT_S = 30.0
SIGNALS = frozenset({"resize", "signal", "eof"})


async def logs(service: Service, asked: Asked[Any], wanted: Logs) -> web.StreamResponse:
    """An EE's output as it is."""
    session = await service.session(asked.at["ucloud"], wanted.name)
    async with session.logs(wanted) as stream:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        response.enable_chunked_encoding()
        await response.prepare(asked.request)
        async for data in stream.chunks():
            await response.write(data)
        await response.write_eof()
    return response


async def events(
    log: EventLog, asked: Asked[Any], ucloud: str, since: str, *, follow: bool
) -> web.StreamResponse:
    """Events as JSON lines."""
    response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
    response.enable_chunked_encoding()
    await response.prepare(asked.request)
    if follow:
        async with contextlib.aclosing(log.follow(since, ucloud)) as following:
            async for event in following:
                await response.write(msgspec.json.encode(event) + b"\n")
    else:
        lines = [msgspec.json.encode(event) + b"\n" for event in log.since(since, ucloud)]
        await response.write(b"".join(lines))
    await response.write_eof()
    return response


async def run(service: Service, asked: Asked[Any]) -> web.WebSocketResponse:
    """``exec``: the first text message is the ``Exec``."""
    socket, name = await _socket(asked.request), asked.at["environment"]
    async with _telling(socket):
        wanted = decode(Exec, {**await _first(socket), "name": name}, "exec")
        session = await service.session(asked.at["ucloud"], name)
        await _join(socket, session.exec(wanted))
    return socket


async def console(service: Service, asked: Asked[Any]) -> web.WebSocketResponse:
    """A VM's serial console; the first text message is a ``ByName``."""
    socket, name = await _socket(asked.request), asked.at["environment"]
    async with _telling(socket):
        decode(ByName, {**await _first(socket), "name": name}, "console")
        session = await service.session(asked.at["ucloud"], name)
        await _join(socket, session.console(name), leaves_on_eof=True)
    return socket


async def _socket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, heartbeat=HEARTBEAT_S)
    await socket.prepare(request)
    return socket


@contextlib.asynccontextmanager
async def _telling(socket: web.WebSocketResponse) -> Any:
    """Tell the other side how it ended, then close."""
    try:
        yield
    except SupercloudError as error:
        if not socket.closed:
            await socket.send_json({"error": to_wire(error)})
    finally:
        await socket.close()


async def _first(socket: web.WebSocketResponse) -> dict[str, Any]:
    try:
        message = await socket.receive(timeout=FIRST_MESSAGE_TIMEOUT_S)
    except TimeoutError as error:
        raise Invalid(f"no first message came in {FIRST_MESSAGE_TIMEOUT_S:g} s") from error
    if message.type is not WSMsgType.TEXT:
        raise Invalid("the first message is not a text")
    return _json(message.data)


async def _join(
    socket: web.WebSocketResponse,
    opening: AbstractAsyncContextManager[Stream],
    *,
    leaves_on_eof: bool = False,
) -> None:
    """Carry bytes and signals both ways until the program ends, or its user goes away."""
    async with opening as stream:
        inwards = asyncio.ensure_future(_inwards(socket, stream, leaves_on_eof=leaves_on_eof))
        outwards = asyncio.ensure_future(_outwards(socket, stream))
        try:
            await asyncio.wait({inwards, outwards}, return_when=asyncio.FIRST_COMPLETED)
            if outwards.done():
                outwards.result()
                await socket.send_json(stream.trailer or {})
            else:
                stream.reset(Temporary("the user went away"))
                inwards.result()
                if not socket.closed:
                    await socket.send_json({"exit_status": 0})
        finally:
            for task in (inwards, outwards):
                task.cancel()
            await asyncio.gather(inwards, outwards, return_exceptions=True)


async def _inwards(socket: web.WebSocketResponse, stream: Stream, *, leaves_on_eof: bool) -> None:
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            await stream.write(message.data)
        elif message.type is WSMsgType.TEXT:
            untrusted = _json(message.data)
            if not untrusted.keys() <= SIGNALS:
                raise Invalid(f"signals are {', '.join(sorted(SIGNALS))}")
            if leaves_on_eof and "eof" in untrusted:
                return
            stream.signal(**untrusted)


async def _outwards(socket: web.WebSocketResponse, stream: Stream) -> None:
    while (item := await stream.read()) is not None:
        if isinstance(item, bytes):
            await socket.send_bytes(item)
        else:
            await socket.send_json(item)


def _json(untrusted: str) -> dict[str, Any]:
    try:
        message = msgspec.json.decode(untrusted)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Invalid("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise Invalid("a message that is not an object")
    return message
