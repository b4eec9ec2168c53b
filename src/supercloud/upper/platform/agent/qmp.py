"""QEMU's machine protocol, over a unix socket: a few commands, and its events."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from supercloud.model.errors import Permanent, Temporary

MAX_LINE_BYTES = 1 << 20
CALL_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 20.0


class Qmp:
    """One connection. ``event`` is called with the name and data of each event."""

    def __init__(self, event: Callable[[str, dict[str, Any]], None]) -> None:
        self._event = event
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: list[asyncio.Future[Any]] = []
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, path: str) -> None:
        """Connect and negotiate; Temporary when QEMU does not answer in time."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, self._writer = await asyncio.open_unix_connection(
                    path, limit=MAX_LINE_BYTES
                )
                await reader.readline()
                self._reading = asyncio.ensure_future(self._read(reader))
                await self.call("qmp_capabilities")
        except (TimeoutError, OSError) as error:
            self.close()
            raise Temporary(f"QEMU does not answer: {error}") from error

    async def call(self, command: str, files: Sequence[int] = (), /, **arguments: Any) -> Any:
        """The command's return value; Permanent with QEMU's words when it refuses.

        ``files`` are descriptors that go with it.
        """
        if self._writer is None:
            raise Temporary("not connected to QEMU")
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        message = {"execute": command, "arguments": arguments}
        await self._send(self._writer, json.dumps(message).encode() + b"\n", files)
        try:
            return await asyncio.wait_for(answer, CALL_TIMEOUT_S)
        except TimeoutError:
            raise Temporary(f"QEMU did not answer {command}") from None

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, line: bytes, files: Sequence[int]) -> None:
        """Descriptors travel with the first byte of their line, past the stream, which is empty."""
        if files:
            await writer.drain()
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as raw:
                socket.send_fds(raw, [line[:1]], list(files))
            line = line[1:]
        writer.write(line)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._arrived(json.loads(line))
        except (OSError, ValueError):
            self.close()
        finally:
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(Temporary("QEMU has gone"))
                    answer.exception()

    def _arrived(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._event(message["event"], message.get("data", {}))
        elif self._waiting:
            answer = self._waiting.pop(0)
            if answer.done():
                return
            if "error" in message:
                answer.set_exception(Permanent(f"QEMU: {message['error'].get('desc')}"))
            else:
                answer.set_result(message.get("return"))

    def close(self) -> None:
        """Close the connection; QEMU goes on."""
        if self._reading:
            self._reading.cancel()
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


async def shout(path: str, command: str) -> None:
    """One command, sent before anything else has its turn; Temporary when QEMU does not do it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
        both = ({"execute": "qmp_capabilities"}, {"execute": command})
        sock.send(b"".join(json.dumps(each).encode() + b"\n" for each in both))
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE_BYTES)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                returned = 0
                while returned < len(both):
                    message = json.loads(await reader.readline() or b'{"error": {}}')
                    if "error" in message:
                        raise Temporary(f"QEMU did not {command}: {message['error']}")
                    returned += "return" in message
        finally:
            writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        sock.close()
        raise Temporary(f"QEMU does not answer: {error}") from error
