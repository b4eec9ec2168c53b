"""Programs run in a container for somebody at the far end of a stream, with terminal or not."""

import array
import asyncio
import base64
import contextlib
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from typing import Any

from supercloud.model.errors import Invalid, Permanent, Temporary
from supercloud.upper.platform.agent import crun, paths
from supercloud.upper.platform.agent.container import Container
from supercloud.upper.platform.agent.processes import shell_status
from supercloud.upper.platform.agent.state import remove_tree, write_private
from supercloud.wire.messages import Exec
from supercloud.wire.peer import Call, Stream

READ_BYTES = 1 << 16
START_TIMEOUT_S = 20.0
PID_POLL_S = 0.01
DRAIN_S = 2.0
HANG_UP_S = 2.0
SIGNALS = {
    name: getattr(signal, f"SIG{name}")
    for name in ("HUP", "INT", "QUIT", "TERM", "KILL", "USR1", "USR2", "TSTP", "CONT", "WINCH")
}


class Execution:
    """One run of ``crun exec``. Files of it are in a directory of its own, gone afterwards."""

    def __init__(self, container: Container, wanted: Exec) -> None:
        self._container, self._wanted = container, wanted
        self._master = -1
        self._process: asyncio.subprocess.Process | None = None
        self._directory = ""

    async def serve(self, call: Call) -> dict[str, int]:
        """Run it on the call's stream; the trailer."""
        wanted = self._wanted
        text = self._container.exec_process(
            wanted.argv, wanted.env, wanted.workdir, wanted.user, terminal=wanted.tty
        )
        self._directory = f"{paths.RUN}/exec-{os.urandom(8).hex()}"
        os.mkdir(self._directory, 0o700)
        try:
            write_private(f"{self._directory}/process.json", text)
            await (self._start_terminal() if wanted.tty else self._start_pipes())
            return {"exit_status": await self._converse(call.accept())}
        finally:
            await self._stop()
            remove_tree(self._directory)

    def _argv(self, *more: str) -> list[str]:
        return [
            *crun.ARGUMENTS, "exec", "--process", f"{self._directory}/process.json",
            "--pid-file", f"{self._directory}/pid", *more, self._container.spec.uid,
        ]  # fmt: skip

    async def _start_pipes(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._argv(), stdin=pipe, stdout=pipe, stderr=pipe, **crun.spawning()
        )
        limit_s = time.monotonic() + START_TIMEOUT_S
        while not self._pid() and self._process.returncode is None:
            if time.monotonic() > limit_s:
                raise Temporary("the program did not start in time")
            await asyncio.sleep(PID_POLL_S)

    async def _start_terminal(self) -> None:
        path = f"{self._directory}/console"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.settimeout(0)
            listener.bind(path)
            listener.listen(1)
            self._process = await asyncio.create_subprocess_exec(
                *self._argv("--tty", "--console-socket", path),
                stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
                **crun.spawning(),
            )  # fmt: skip
            await self._receive_terminal(listener)
        self._resize([self._wanted.rows, self._wanted.columns])

    async def _receive_terminal(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        accepting = asyncio.ensure_future(loop.sock_accept(listener))
        process = self._process
        if process is None:
            raise Permanent("no process")
        ended = asyncio.ensure_future(process.wait())
        done, _ = await asyncio.wait(
            {accepting, ended}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        ended.cancel()
        if accepting not in done:
            accepting.cancel()
            raise Temporary(f"the program did not start: {await self._complaint()}")
        connection, _ = accepting.result()
        with connection:
            connection.settimeout(START_TIMEOUT_S)
            self._master = await asyncio.to_thread(_receive_descriptor, connection)
        os.set_blocking(self._master, False)

    async def _complaint(self) -> str:
        if self._process and self._process.stderr and self._process.returncode is not None:
            return (await self._process.stderr.read(4096)).decode("utf-8", "replace").strip()
        return "no answer"

    # -- the conversation

    async def _converse(self, stream: Stream) -> int:
        process = self._process
        if process is None:
            raise Permanent("no process")
        incoming = asyncio.ensure_future(self._incoming(stream))
        outgoing = asyncio.ensure_future(self._outgoing(stream))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({incoming, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                incoming.result()  # raises when the connection is lost
                self._kill(signal.SIGHUP)  # they have hung up
                await asyncio.wait({ended}, timeout=HANG_UP_S)
                self._kill(signal.SIGKILL)
            status = await ended
            await asyncio.wait({outgoing}, timeout=DRAIN_S)
            return shell_status(status)
        finally:
            for task in (incoming, outgoing, ended):
                task.cancel()
            await asyncio.wait({incoming, outgoing, ended})

    async def _incoming(self, stream: Stream) -> None:
        while (item := await stream.read()) is not None:
            if isinstance(item, bytes):
                await self._write(item)
            else:
                await self._signalled(item)

    async def _signalled(self, untrusted: dict[str, Any]) -> None:
        if "resize" in untrusted:
            self._resize(untrusted["resize"])
        elif "signal" in untrusted:
            number = SIGNALS.get(str(untrusted["signal"]).removeprefix("SIG"))
            if number is None:
                raise Invalid(f"no signal {untrusted['signal']!r:.40}")
            self._kill(number)
        elif untrusted.get("eof"):
            await self._end_of_input()

    async def _write(self, data: bytes) -> None:
        if self._wanted.tty:
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(self._master, view) :]
                except BlockingIOError:
                    await asyncio.sleep(0.01)
                except OSError:
                    return  # the terminal has hung up
        elif self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(data)
            with contextlib.suppress(ConnectionError):
                await self._process.stdin.drain()

    async def _end_of_input(self) -> None:
        if self._wanted.tty:
            await self._write(b"\x04")
        elif self._process and self._process.stdin:
            self._process.stdin.close()

    async def _outgoing(self, stream: Stream) -> None:
        process = self._process
        if self._wanted.tty:
            while data := await self._read_terminal():
                await stream.write(data)
        elif process and process.stdout and process.stderr:
            await asyncio.gather(
                _copy(process.stdout, stream), _copy_errors(process.stderr, stream)
            )

    async def _read_terminal(self) -> bytes:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._master, readable.set)
        try:
            await readable.wait()
            return os.read(self._master, READ_BYTES)
        except OSError:  # EIO: the last program of the terminal has ended
            return b""
        finally:
            loop.remove_reader(self._master)

    def _resize(self, untrusted: Any) -> None:
        if not self._wanted.tty:
            return
        rows, columns = (int(n) for n in untrusted)
        if not (1 <= rows <= 1000 and 1 <= columns <= 1000):
            raise Invalid(f"a terminal of {rows} x {columns}")
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pid := self._pid():
                os.kill(pid, number)

    def _pid(self) -> int:
        """The program's process id in the platform; 0 while crun has not written it."""
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"{self._directory}/pid") as file,
        ):
            return int(file.read() or 0)
        return 0

    async def _stop(self) -> None:
        """Nobody listens any more: what still runs is ended."""
        if self._process and self._process.returncode is None:
            self._kill(signal.SIGKILL)
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
        if self._master >= 0:
            os.close(self._master)
            self._master = -1


def _receive_descriptor(connection: socket.socket) -> int:
    space = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
    _, ancillary, _, _ = connection.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return array.array("i", data)[0]
    raise Permanent("crun sent no terminal")


async def _copy(source: asyncio.StreamReader, stream: Stream) -> None:
    while data := await source.read(READ_BYTES):
        await stream.write(data)


async def _copy_errors(source: asyncio.StreamReader, stream: Stream) -> None:
    while data := await source.read(READ_BYTES):
        stream.signal(stderr=base64.b64encode(data).decode())
