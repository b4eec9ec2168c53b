"""``python -m supercloud.control.main``: the control plane as a process. Needs no privilege."""

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from supercloud.control import logs, settings
from supercloud.control.api.server import Server
from supercloud.control.app import ControlPlane
from supercloud.control.settings import Settings
from supercloud.control.store import SqliteStore
from supercloud.model.errors import STATUS, Busy, SupercloudError, UserError

log = logging.getLogger("supercloud.control.main")


@contextlib.contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold the state directory's lock. Raises Busy when another control plane has it."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise Busy(
                f"a control plane (process {owner or '?'}) runs on {state} already",
                hint="use it, or stop it first",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


async def serve(given: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store = await SqliteStore.open(given.state / "state.db")
    plane = ControlPlane(store, given.state, given.cache, own_endpoint=_routable(given))
    server = Server(plane, given)
    try:
        await plane.start()
        await server.start()
        log.info("serving on %s and %s", given.socket, given.listen or "no port")
        gc.collect()
        gc.freeze()
        await stop.wait()
        log.info("stopping")
    finally:
        await server.stop()
        await plane.stop()
        await store.close()


async def _move(given: Settings) -> int:
    from supercloud.control import moving  # noqa: PLC0415 - seldom

    if given.export:
        rows = await moving.export(given.state, given.export)
        print(f"{rows} rows and the keys are in {given.export}: keep it like a key")
    elif given.adopt:
        print(f"{await moving.adopt(given.state, given.adopt)} rows were adopted")
    return 0


def _routable(given: Settings) -> str:
    """Our own endpoint for agents, when one outside this machine could reach it."""
    address = given.address
    if address is None or address[0].startswith("127.") or address[0] in ("::1", "localhost"):
        return ""
    return "" if address[0] in ("0.0.0.0", "::") else given.listen  # noqa: S104 - compared only


def main(arguments: list[str]) -> int:
    """The exit status; errors go to standard error in one line."""
    os.umask(0o077)
    try:
        given = settings.parse(arguments, os.environ)
        with only_one(given.state):
            if given.export or given.adopt:
                return asyncio.run(_move(given))
            logs.configure(given.log)
            asyncio.run(serve(given))
    except SupercloudError as error:
        hint = getattr(error, "hint", "")
        more = f"; what to do: {hint}" if hint else ""
        print(f"supercloud control plane: {error}{more}", file=sys.stderr)
        code = error.code if isinstance(error, UserError) else "internal"
        return STATUS[code][1]
    except OSError as error:  # a directory or file of ours that cannot be used
        print(f"supercloud control plane: {error}", file=sys.stderr)
        return STATUS["internal"][1]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
