"""``exec`` and ``console``: a terminal or a pipe over a WebSocket of the API.

Binary messages are bytes, texts are small JSON messages, as ``wire.messages.Exec`` has them. On a
terminal ours is made raw, so that every key goes to the other side, Ctrl-C among them.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import Any

import aiohttp

from supercloud.cli import client
from supercloud.cli.failure import EXIT_INTERRUPTED, Unavailable
from supercloud.cli.listing import environment_path
from supercloud.model.errors import Invalid, Permanent, from_wire

CHUNK_BYTES = 1 << 16
ESCAPE = b"\x1d"  # Ctrl-]
IN, OUT, ERR = 0, 1, 2


def execute(arguments: argparse.Namespace) -> int:
    """Run a program in a container; its exit status is ours."""
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise Invalid("a program to run is missing", hint="supercloud exec -it NAME sh")
    if arguments.tty and arguments.interactive and not os.isatty(IN):
        raise Invalid("-t needs a terminal, and the input is none", hint="leave -t out")
    place = environment_path(arguments.environment)
    rows, columns = _size()
    first = {
        "name": place[-1],
        "argv": argv,
        "tty": arguments.tty,
        "rows": rows,
        "columns": columns,
        "env": _env(arguments),
        "workdir": arguments.workdir,
        "user": arguments.user,
    }
    session = _Session(first, reads=arguments.interactive, raw=arguments.tty)
    return _run(session, place, "exec")


def console(arguments: argparse.Namespace) -> int:
    """Join the serial console of a virtual machine until Ctrl-]."""
    place = environment_path(arguments.environment)
    if os.isatty(IN):
        print(f"The console of {place[-1]}; Ctrl-] leaves it.", file=sys.stderr)
    session = _Session({"name": place[-1]}, reads=True, raw=True, escape=ESCAPE)
    return _run(session, place, "console")


def _env(arguments: argparse.Namespace) -> dict[str, str]:
    env = {"TERM": os.environ.get("TERM", "xterm")} if arguments.tty else {}
    for item in arguments.env:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise Invalid(f"found {item!r}, allowed is NAME=VALUE", where="--env")
        env[name] = value
    return env


def _size() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    for descriptor in (OUT, IN, ERR):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(descriptor)
            if size.lines and size.columns:
                return min(size.lines, 1000), min(size.columns, 1000)
    return 24, 80


def _run(session: "_Session", place: tuple[str, str, str], what: str) -> int:
    path = client.path("uclouds", *place, what)
    with _raw(session.raw and os.isatty(IN)):
        try:
            return asyncio.run(_connected(session, path))
        except aiohttp.WSServerHandshakeError as error:
            refused = error.status
        except aiohttp.ClientConnectorError:
            refused = 0
    client.get(client.path("uclouds", *place))  # raises what is wrong, if it is that
    raise Permanent(f"the control plane refused the {what} (status {refused})")


@contextlib.contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """Our terminal raw, and as it was afterwards."""
    if not wanted:
        yield
        return
    before = termios.tcgetattr(IN)
    tty.setraw(IN)
    try:
        yield
    finally:
        termios.tcsetattr(IN, termios.TCSADRAIN, before)


async def _connected(session: "_Session", path: str) -> int:
    connector = aiohttp.UnixConnector(path=client.socket_path())
    async with (
        aiohttp.ClientSession(connector=connector) as http,
        http.ws_connect(f"http://localhost{path}", max_msg_size=4 << 20) as socket,
    ):
        return await session.run(socket)


class _Session:
    """One exec or console. ``escape`` is the byte that leaves it."""

    def __init__(
        self, first: dict[str, Any], *, reads: bool, raw: bool, escape: bytes = b""
    ) -> None:
        self.raw = raw
        self._first, self._reads, self._escape = first, reads, escape
        self._left: asyncio.Future[int] | None = None
        self._interrupted = False

    async def run(self, socket: aiohttp.ClientWebSocketResponse) -> int:
        """Carry bytes and signals until the other side ends; its exit status."""
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        await socket.send_str(json.dumps(self._first))
        self._handle_signals(socket)
        if self._reads:
            # A thread, for a file or /dev/null cannot be waited for by the loop. A daemon, for a
            # read of a terminal does not end when we do.
            arguments = (socket, asyncio.get_running_loop())
            threading.Thread(target=self._read_input, args=arguments, daemon=True).start()
        elif not self._escape:
            await _tell(socket, {"eof": True})
        output = asyncio.ensure_future(self._output(socket))
        await asyncio.wait((output, self._left), return_when=asyncio.FIRST_COMPLETED)
        if self._left.done():
            output.cancel()
            return self._left.result()
        return output.result()

    async def _output(self, socket: aiohttp.ClientWebSocketResponse) -> int:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                _write(OUT, message.data)
            elif message.type is aiohttp.WSMsgType.TEXT:
                status = _told(message.data)
                if status is not None:
                    return status
        raise Unavailable(
            "the connection was lost before the program ended", hint="supercloud inspect NAME"
        )

    def _read_input(
        self, socket: aiohttp.ClientWebSocketResponse, loop: asyncio.AbstractEventLoop
    ) -> None:
        # RuntimeError: the loop was closed meanwhile; ConnectionError: the other side has gone.
        with contextlib.suppress(RuntimeError, ConnectionError, OSError):
            while data := os.read(IN, CHUNK_BYTES):
                before, escape, _ = (
                    data.partition(self._escape) if self._escape else (data, b"", b"")
                )
                if before:
                    self._in_loop(socket.send_bytes(before), loop)
                if escape:
                    loop.call_soon_threadsafe(self._leave, 0)
                    return
            self._in_loop(socket.send_str('{"eof": true}'), loop)

    @staticmethod
    def _in_loop(sending: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for it: that is the back pressure on our input."""
        try:
            asyncio.run_coroutine_threadsafe(sending, loop).result()
        except RuntimeError:
            sending.close()
            raise

    def _leave(self, status: int) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_result(status)

    def _handle_signals(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        def tell(message: dict[str, Any]) -> None:
            task = asyncio.ensure_future(_tell(socket, message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        def interrupt() -> None:
            if self._interrupted or self._escape:  # the program ignores it: leave it alone
                self._leave(EXIT_INTERRUPTED)
            self._interrupted = True
            tell({"signal": "INT"})

        def end(number: int) -> None:
            tell({"signal": signal.Signals(number).name.removeprefix("SIG")})
            self._leave(128 + number)

        loop.add_signal_handler(signal.SIGINT, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        if self.raw:
            loop.add_signal_handler(signal.SIGWINCH, lambda: tell({"resize": list(_size())}))


async def _tell(socket: aiohttp.ClientWebSocketResponse, message: dict[str, Any]) -> None:
    """Say something to the other side, unless it has ended: how, is among what it said."""
    with contextlib.suppress(ConnectionError):
        await socket.send_str(json.dumps(message))


def _told(text: str) -> int | None:
    """Act on a message of the other side; the exit status, when that is what it is."""
    message = json.loads(text)
    if "error" in message:
        raise from_wire(message["error"])
    if "stderr" in message:
        _write(ERR, base64.b64decode(message["stderr"]))
    if "exit_status" in message:
        return int(message["exit_status"] or 0) & 0xFF
    return None


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
