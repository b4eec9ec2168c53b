"""A symmetric peer over one byte stream: calls both ways, notifications, flow-controlled streams.

Frame: length of the payload (u32), type (u8), call id (u32), payload; big endian. The side that
connected uses odd ids, the side that accepted even ones. A call may carry a stream: the handler
answers with ``call.accept(result)`` and then both sides send DATA, SIGNAL and, once each, END.
Credit is per stream and counted in bytes of DATA that the reader has taken.
"""

import asyncio
import contextlib
import json
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from supercloud.model.errors import (
    Invalid,
    NotFound,
    SupercloudError,
    Temporary,
    UserError,
    from_wire,
    to_wire,
)
from supercloud.model.events import event_id
from supercloud.model.records import dataclass

REQUEST, RESPONSE, NOTIFY, DATA, SIGNAL, END, RESET, CREDIT, PING, PONG = range(1, 11)

HEADER = struct.Struct(">IBI")
MAX_JSON_BYTES = 4 << 20
MAX_DATA_BYTES = 256 << 10
WINDOW_BYTES = 2 << 20
SMALL_BYTES = 8 << 10
MAX_OPEN_CALLS = 1024
IDLE_PING_S = 10.0
DEAD_AFTER_S = 35.0

log = logging.getLogger("supercloud.wire.peer")


class ConnectionLost(Temporary):
    """The other side went away before it answered."""


@dataclass(frozen=True, slots=True)
class Detach:
    """What a handler returns to answer ``result`` and then own the raw connection.

    ``then`` is called with the reader and the writer once the answer is out, or ``abandoned`` when
    it cannot come to that any more: one of the two, once.
    """

    result: Any
    then: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    abandoned: Callable[[], None] = lambda: None


class Stream:
    """One direction-pair of bytes inside a call."""

    def __init__(self, peer: "Peer", call_id: int) -> None:
        self._peer, self._id = peer, call_id
        self._inbox: asyncio.Queue[bytes | dict[str, Any] | None] = asyncio.Queue()
        self._credit = WINDOW_BYTES
        self._taken = self._held = 0
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._ended = self._got_end = False
        self._error: SupercloudError | None = None
        self.result: Any = None
        self.trailer: Any = None

    async def read(self) -> bytes | dict[str, Any] | None:
        """The next bytes, or a signal (a dict), or None after the other side's END."""
        if self._got_end and self._inbox.empty():
            if self._error:
                raise self._error
            return None
        item = await self._inbox.get()
        if isinstance(item, bytes):
            self._taken += len(item)
            if self._taken >= WINDOW_BYTES // 4:
                taken, self._taken = self._taken, 0
                self._held -= taken
                self._peer._send(CREDIT, self._id, struct.pack(">I", taken))
        elif item is None:
            self._got_end = True
            if self._error:
                raise self._error
        return item

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes until END; signals are dropped."""
        while (item := await self.read()) is not None:
            if isinstance(item, bytes):
                yield item

    async def write(self, data: bytes | memoryview) -> None:
        """Send bytes, waiting for the reader's credit; raises what ended the stream."""
        view = memoryview(data)
        while view:
            while self._credit <= 0 and not self._error:
                self._may_write.clear()
                await self._may_write.wait()
            if self._error:
                raise self._error
            part = view[: min(MAX_DATA_BYTES, self._credit)]
            self._credit -= len(part)
            self._peer._send(DATA, self._id, part)
            await self._peer.drain()
            view = view[len(part) :]

    def signal(self, **signal: Any) -> None:
        """Send a small message in order with the bytes (``resize=[rows, columns]``)."""
        if not self._ended:
            self._peer._send_json(SIGNAL, self._id, signal)

    def end(self, trailer: Any = None) -> None:
        """No more from this side; ``trailer`` reaches the other side's ``trailer``."""
        if not self._ended:
            self._ended = True
            self._peer._send_json(END, self._id, trailer)

    def reset(self, error: SupercloudError) -> None:
        """Give up in both directions."""
        if not self._ended:
            self._ended = True
            self._peer._send_json(RESET, self._id, to_wire(error))
        self._fail(error)

    def _fail(self, error: SupercloudError) -> None:
        self._error = self._error or error
        self._ended = True
        self._may_write.set()
        self._inbox.put_nowait(None)

    def _arrived(self, kind: int, payload: bytes) -> None:
        if kind == DATA:
            self._held += len(payload)
            if self._held > WINDOW_BYTES:
                raise Invalid("more bytes than there was credit for")
            self._inbox.put_nowait(payload)
        elif kind == SIGNAL:
            self._inbox.put_nowait(_json(payload))
        elif kind == CREDIT and len(payload) == 4:
            self._credit += struct.unpack(">I", payload)[0]
            self._may_write.set()
        elif kind == END:
            self.trailer = _parse(payload)
            self._inbox.put_nowait(None)
        elif kind == RESET:
            self._fail(from_wire(_json(payload)))


class Call:
    """A request as its handler sees it. ``untrusted_params`` are to be decoded before use."""

    def __init__(self, peer: "Peer", call_id: int, method: str, untrusted_params: Any) -> None:
        self.peer, self.id, self.method = peer, call_id, method
        self.untrusted_params = untrusted_params
        self.stream: Stream | None = None

    def accept(self, result: Any = None) -> Stream:
        """Answer now, and go on with a stream; what the handler returns becomes its trailer."""
        self.stream = self.peer._open_stream(self.id)
        self.peer._send_json(RESPONSE, self.id, {"r": result})
        return self.stream


Handler = Callable[[Call], Awaitable[Any]]


class Peer:
    """One end of a connection. ``run`` must be awaited (or made a task) for anything to move."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handlers: Mapping[str, Handler] | None = None,
        *,
        accepted: bool,
        name: str = "peer",
    ) -> None:
        self.reader, self.writer, self.name = reader, writer, name
        self.handlers = handlers or {}
        self.notified: Callable[[str, Any], None] = lambda _method, _params: None
        self.context: dict[str, Any] = {}
        self.closed = asyncio.Event()
        self._next_id = 2 if accepted else 1
        self._mine = self._next_id % 2
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._detaching: set[int] = set()
        self._detached = False
        self._hand_over_to: tuple[int, Detach] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._last_heard = 0.0

    # -- calling

    async def call(self, method: str, params: Any = None, *, timeout_s: float = 60.0) -> Any:
        """The result of ``method`` at the other side; raises its error, or ConnectionLost."""
        call_id, future = self._request(method, params)
        try:
            return await self._answer(method, future, timeout_s)
        finally:
            self._waiting.pop(call_id, None)

    async def _answer(self, method: str, future: asyncio.Future[Any], timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):  # 3.11's wait_for swallows a late cancellation
                return await future
        except TimeoutError:
            raise Temporary(f"{self.name}: no answer to {method} in {timeout_s:g} s") from None

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, params: Any = None, *, timeout_s: float = 60.0
    ) -> AsyncIterator[Stream]:
        """Call ``method`` and keep a stream to its handler; ``stream.result`` is its answer."""
        call_id, future = self._request(method, params)
        stream = self._open_stream(call_id)
        try:
            stream.result = await self._answer(method, future, timeout_s)
            yield stream
        finally:
            self._waiting.pop(call_id, None)
            if not stream._ended:
                stream.end()
            self._streams.pop(call_id, None)

    def notify(self, method: str, params: Any = None) -> None:
        """Tell the other side; no answer, lost when the connection is."""
        self._send_json(NOTIFY, 0, {"m": method, "p": params})

    async def call_detach(
        self, method: str, params: Any = None
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Call ``method``; after its answer the connection is raw and belongs to the caller."""
        call_id, future = self._request(method, params)
        self._detaching.add(call_id)
        result = await future
        return result, self.reader, self.writer

    def _request(self, method: str, params: Any) -> tuple[int, asyncio.Future[Any]]:
        if self.closed.is_set():
            raise ConnectionLost(f"{self.name}: the connection is closed")
        call_id, self._next_id = self._next_id, self._next_id + 2
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        self._send_json(REQUEST, call_id, {"m": method, "p": params})
        return call_id, future

    # -- running

    async def run(self) -> None:
        """Read until the connection ends (or is detached); then fail whatever is open."""
        self._reading = asyncio.ensure_future(self._read_loop())
        beat = asyncio.ensure_future(self._heartbeat())
        try:
            await self._reading
        except asyncio.CancelledError:
            if not self._detached:
                raise
        except (OSError, EOFError, Invalid) as error:
            log.debug("%s: %s", self.name, error)
        finally:
            beat.cancel()
            self._finish()
        if self._hand_over_to is not None:
            await self._hand_over(*self._hand_over_to)

    def close(self) -> None:
        """Close the connection; ``run`` returns soon after."""
        if not self._detached:
            self.writer.close()

    async def drain(self) -> None:
        """Wait until the transport has room."""
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    def _finish(self) -> None:
        self.closed.set()
        lost = ConnectionLost(f"{self.name}: the connection was lost")
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(lost)
                future.exception()  # somebody may have stopped waiting: not a stray error
        for stream in self._streams.values():
            stream._fail(lost)
        for task in self._tasks.values():
            if task is not asyncio.current_task():
                task.cancel()
        if not self._detached:
            self.writer.close()

    async def _heartbeat(self) -> None:
        loop = asyncio.get_running_loop()
        self._last_heard = loop.time()
        while True:
            await asyncio.sleep(IDLE_PING_S)
            quiet_s = loop.time() - self._last_heard
            if quiet_s > DEAD_AFTER_S:
                self.writer.transport.abort()
                return
            if quiet_s >= IDLE_PING_S / 2:
                self._send(PING, 0, b"")

    async def _read_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            header = await self.reader.readexactly(HEADER.size)
            length, kind, call_id = HEADER.unpack(header)
            if length > (MAX_DATA_BYTES if kind == DATA else MAX_JSON_BYTES):
                raise Invalid(f"a frame of {length} bytes (type {kind})")
            payload = await self.reader.readexactly(length) if length else b""
            self._last_heard = loop.time()
            if self._dispatch(kind, call_id, payload):
                return

    def _dispatch(self, kind: int, call_id: int, payload: bytes) -> bool:
        """Act on one frame; True when the connection is detached by it."""
        if kind == REQUEST:
            self._requested(call_id, payload)
        elif kind == RESPONSE:
            return self._answered(call_id, payload)
        elif kind == NOTIFY:
            message = _json(payload)
            self.notified(str(message.get("m")), message.get("p"))
        elif kind == PING:
            self._send(PONG, 0, b"")
        elif kind in (DATA, SIGNAL, END, RESET, CREDIT):
            stream = self._streams.get(call_id)
            if stream is not None:  # late frames of an ended stream are dropped
                stream._arrived(kind, payload)
        elif kind != PONG:
            raise Invalid(f"unknown frame type {kind}")
        return False

    def _answered(self, call_id: int, payload: bytes) -> bool:
        future = self._waiting.pop(call_id, None)
        message = _json(payload)
        if future is None or future.done():
            return False
        if "e" in message:
            future.set_exception(from_wire(message["e"]))
            return False
        if call_id in self._detaching:
            self._detached = True
        future.set_result(message.get("r"))
        return self._detached

    def _requested(self, call_id: int, payload: bytes) -> None:
        message = _json(payload)
        if call_id % 2 == self._mine or call_id in self._tasks:
            raise Invalid(f"call id {call_id} is not the other side's to use")
        call = Call(self, call_id, str(message.get("m"))[:128], message.get("p"))
        if len(self._tasks) >= MAX_OPEN_CALLS:
            self._send_json(
                RESPONSE, call_id, {"e": {"code": "busy", "message": "too many open calls"}}
            )
            return
        task = asyncio.ensure_future(self._serve(call))
        self._tasks[call_id] = task
        task.add_done_callback(lambda _task: self._tasks.pop(call_id, None))

    async def _serve(self, call: Call) -> None:
        try:
            handler = self.handlers.get(call.method)
            if handler is None:
                raise NotFound(f"no method {call.method!r}")
            result = await handler(call)
            if isinstance(result, Detach):
                # ``run`` answers, once nobody reads frames any more. Cancelling readexactly
                # loses nothing, for the other side is quiet until it has the answer.
                self._detached, self._hand_over_to = True, (call.id, result)
                if self._reading is not None:
                    self._reading.cancel()
            elif call.stream is not None:
                call.stream.end(result)
            else:
                self._send_json(RESPONSE, call.id, {"r": result})
                await self.drain()
        except (UserError, SupercloudError) as error:
            self._refuse(call, to_wire(error), error)
        except Exception as error:
            bug = event_id()
            log.exception("%s: bug %s in %s", self.name, bug, call.method)
            self._refuse(call, to_wire(error, bug_id=bug), Temporary("internal error"))
        finally:
            if call.stream is not None:
                self._streams.pop(call.id, None)

    def _refuse(self, call: Call, wire: dict[str, Any], error: SupercloudError) -> None:
        if call.stream is None:
            self._send_json(RESPONSE, call.id, {"e": wire})
        else:
            call.stream.reset(error)

    async def _hand_over(self, call_id: int, detach: Detach) -> None:
        try:
            await self.drain()
            self._send_json(RESPONSE, call_id, {"r": detach.result})
            await self.drain()
        except BaseException:
            detach.abandoned()
            raise
        await detach.then(self.reader, self.writer)

    def _open_stream(self, call_id: int) -> Stream:
        stream = self._streams[call_id] = Stream(self, call_id)
        return stream

    # -- sending

    def _send(self, kind: int, call_id: int, payload: bytes | memoryview) -> None:
        if self.writer.is_closing():
            return
        header = HEADER.pack(len(payload), kind, call_id)
        if len(payload) <= SMALL_BYTES:  # one TLS record, and one segment
            self.writer.write(b"".join((header, payload)))
        else:
            self.writer.write(header)
            self.writer.write(payload)

    def _send_json(self, kind: int, call_id: int, message: Any) -> None:
        payload = json.dumps(message, separators=(",", ":")).encode()
        if len(payload) > MAX_JSON_BYTES:
            raise Invalid(f"a message of {len(payload)} bytes; at most {MAX_JSON_BYTES}")
        self._send(kind, call_id, payload)


def _parse(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Invalid("a frame that is not JSON") from error


def _json(payload: bytes) -> dict[str, Any]:
    message = _parse(payload)
    if not isinstance(message, dict):
        raise Invalid("a frame that is not an object")
    return message
