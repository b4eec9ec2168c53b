"""Whether an EE serves: its first TCP port takes connections."""

import asyncio
import contextlib
import socket

STARTING_S = {"container": 0.07, "vm": 0.13}
"""Between two looks; a guest that boots would lose more by being looked at than is won."""
STEADY_S = 3.0
CONNECT_TIMEOUT_S = 0.4
CONFIRM_TIMEOUT_S = 2.0


async def accepts(address: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
    """One connect, closed at once with a reset so that nothing lingers on either side."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(probe, (address, port))
            return True
    return False
