"""Content-addressed files on their way to a platform, each over a connection of its own."""

import asyncio
import os
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from typing import Final

from supercloud.model.errors import Invalid, Permanent
from supercloud.wire.codec import encode
from supercloud.wire.messages import Blob, Empty
from supercloud.wire.peer import Detach

READ_BYTES: Final = 1 << 20
"""Read at once, off the event loop: large enough that the detour costs nothing."""

SILENCE_S: Final = 60.0
"""A platform that takes nothing for so long has gone."""


async def send(asked: Blob, path: str) -> Detach:
    """The file from the offset to its end, raw; Permanent when it is not of the size asked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # here: a thread could be left with it
    try:
        size = os.fstat(descriptor).st_size
        if size != asked.size_bytes:
            raise Permanent(f"{asked.digest} has {size} bytes, asked for are {asked.size_bytes}")
        if asked.offset_bytes > size:
            raise Invalid(f"offset {asked.offset_bytes} is past the end of {asked.digest}")
    except BaseException:
        os.close(descriptor)
        raise
    sending = _Sending(descriptor, asked.offset_bytes)
    return Detach(encode(Empty()), sending.run, sending.close)


class _Sending:
    """The descriptor is its own."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor, self._offset = descriptor, offset

    async def run(self, _reader: StreamReader, writer: StreamWriter) -> None:
        """To the end of the file, or of the other side's patience; a short one is seen there."""
        coming = self._read()
        try:
            while data := await coming:
                self._offset += len(data)
                coming = self._read()  # while this piece goes out
                writer.write(data)
                async with asyncio.timeout(SILENCE_S):
                    await writer.drain()
            writer.close()
            async with asyncio.timeout(SILENCE_S):
                await writer.wait_closed()
        except (OSError, TimeoutError):
            writer.transport.abort()
        finally:
            with suppress(OSError):
                await asyncio.wait({coming})  # it uses the descriptor
            os.close(self._descriptor)

    def close(self) -> None:
        """When nothing has been read, nor will be."""
        os.close(self._descriptor)

    def _read(self) -> "asyncio.Future[bytes]":
        reading = asyncio.to_thread(os.pread, self._descriptor, READ_BYTES, self._offset)
        return asyncio.ensure_future(reading)
