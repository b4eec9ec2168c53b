"""Content-addressed files on their way to a platform."""

import asyncio
import os
from typing import Final

from supercloud.model.errors import Invalid, Permanent
from supercloud.wire.codec import encode
from supercloud.wire.messages import Blob, Empty
from supercloud.wire.peer import MAX_DATA_BYTES, Call

READ_BYTES: Final = 4 * MAX_DATA_BYTES
"""Read at once, off the event loop: large enough that the detour costs nothing."""


async def send(call: Call, asked: Blob, path: str) -> None:
    """Stream the file from the offset to its end; Permanent when it is not of the size asked."""
    descriptor = await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != asked.size_bytes:
            raise Permanent(f"{asked.digest} has {size} bytes, asked for are {asked.size_bytes}")
        if asked.offset_bytes > size:
            raise Invalid(f"offset {asked.offset_bytes} is past the end of {asked.digest}")
        await _stream(call, descriptor, asked.offset_bytes, size)
    finally:
        os.close(descriptor)


async def _stream(call: Call, descriptor: int, offset: int, size: int) -> None:
    stream = call.accept(encode(Empty()))
    coming = _read(descriptor, offset)
    while offset < size:
        data = await coming
        if not data:
            raise Permanent("the file became shorter while it was sent")
        offset += len(data)
        coming = _read(descriptor, offset)  # while this piece goes out
        try:
            await stream.write(data)
        except BaseException:
            await asyncio.gather(coming, return_exceptions=True)  # it uses the descriptor
            raise
    await coming


def _read(descriptor: int, offset: int) -> "asyncio.Future[bytes]":
    return asyncio.ensure_future(asyncio.to_thread(os.pread, descriptor, READ_BYTES, offset))
