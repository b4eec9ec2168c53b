"""Whether an EE serves: its first TCP port takes connections."""

import asyncio
import socket
from functools import partial

STARTING_S = 0.07
SILENT_S = 1.5
STEADY_S = 3.0
CONNECT_TIMEOUT_S = 0.4
CONFIRM_TIMEOUT_S = 2.0


async def accepts(address: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
    """One connect, closed at once with a reset so that nothing lingers on either side."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        try:
            probe.connect((address, port))
        except BlockingIOError:
            return await _is_made(probe, timeout_s)
        except OSError:
            return False
        return True


async def _is_made(probe: socket.socket, timeout_s: float) -> bool:
    """Whether the connection that has begun comes about in time."""
    loop = asyncio.get_running_loop()
    decided: asyncio.Future[bool] = loop.create_future()

    def decide(*, answered: bool) -> None:
        if not decided.done():
            decided.set_result(answered)

    loop.add_writer(probe, partial(decide, answered=True))
    timer = loop.call_later(timeout_s, partial(decide, answered=False))
    try:
        answered = await decided
    finally:
        timer.cancel()
        loop.remove_writer(probe)
    return answered and probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def has_spoken(tap: str) -> bool:
    """Whether a guest has ever sent anything by that device; True where nobody knows.

    One that has not is hardly able to answer, and each question costs it some of its boot.
    """
    try:
        with open(f"/sys/class/net/{tap}/statistics/rx_packets") as file:
            return int(file.read()) > 0
    except OSError:
        return True
