"""The API's exec and console with real programs and real terminals behind them, on this machine.

``python terminal_server.py SOCKET``. It keeps to the contract of ``wire.messages.Exec``: what a
platform's agent does behind the control plane, this does directly.
"""

import asyncio
import base64
import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import sys
import termios

from aiohttp import WSMsgType, web

ROWS = [
    {"ucloud": "hello", "name": "web", "kind": "container", "state": "serving"},
    {"ucloud": "hello", "name": "machine", "kind": "vm", "state": "serving"},
]


def resize(descriptor, rows, columns):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class OnTerminal:
    def __init__(self, wanted):
        self.wanted = wanted

    async def start(self):
        self.master, slave = pty.openpty()
        resize(self.master, self.wanted["rows"], self.wanted["columns"])
        self.process = await asyncio.create_subprocess_exec(
            *self.wanted["argv"], stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal,
            env={**os.environ, **self.wanted["env"]},
        )  # fmt: skip
        os.close(slave)

    async def output(self, socket):
        with contextlib.suppress(OSError):  # EIO: the last program closed it
            while data := await asyncio.to_thread(os.read, self.master, 65536):
                await socket.send_bytes(data)

    async def input(self, data):
        await asyncio.to_thread(os.write, self.master, data)

    async def told(self, message):
        if "resize" in message:
            resize(self.master, *message["resize"])

    def end(self):
        os.close(self.master)


class OnPipes:
    def __init__(self, wanted):
        self.wanted = wanted

    async def start(self):
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *self.wanted["argv"], stdin=pipe, stdout=pipe, stderr=pipe,
            env={**os.environ, **self.wanted["env"]},
        )  # fmt: skip

    async def output(self, socket):
        async def errors():
            while data := await self.process.stderr.read(65536):
                await socket.send_str(json.dumps({"stderr": base64.b64encode(data).decode()}))

        other = asyncio.ensure_future(errors())
        while data := await self.process.stdout.read(65536):
            await socket.send_bytes(data)
        await other

    async def input(self, data):
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(data)
            await self.process.stdin.drain()

    async def told(self, message):
        if "eof" in message:
            self.process.stdin.close()
        if "signal" in message:
            self.process.send_signal(getattr(signal, f"SIG{message['signal']}"))

    def end(self):
        pass


async def run(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    wanted = json.loads(await socket.receive_str())
    if request.match_info["name"] == "machine":
        error = {"code": "unsupported", "message": "a vm has no exec", "hint": "console"}
        await socket.send_json({"error": error})
        await socket.close()
        return socket
    if request.match_info["name"] == "cut":
        request.transport.abort()
        return socket
    program = (OnTerminal if wanted["tty"] else OnPipes)(wanted)
    await program.start()
    output = asyncio.ensure_future(program.output(socket))
    inputs = asyncio.ensure_future(inwards(socket, program))
    await asyncio.wait((output, inputs), return_when=asyncio.FIRST_COMPLETED)
    if not output.done():  # the user went away
        program.process.kill()
        await program.process.wait()
    status = await program.process.wait()
    program.end()
    # As the product does: aiohttp cuts the connection when it closes while another task receives,
    # and what a client has not read when it writes again is lost then, its exit status too.
    inputs.cancel()
    await asyncio.gather(inputs, return_exceptions=True)
    if not socket.closed:
        await socket.send_json({"exit_status": 128 - status if status < 0 else status})
        await socket.close()
    return socket


async def inwards(socket, program):
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            await program.input(message.data)
        elif message.type is WSMsgType.TEXT:
            await program.told(json.loads(message.data))


async def console(request):
    """Echoes what comes, in brackets."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    first = json.loads(await socket.receive_str())
    await socket.send_bytes(f"{first['name']} login: ".encode())
    async for message in socket:
        if message.type is WSMsgType.BINARY:
            await socket.send_bytes(b"[" + message.data + b"]")
    return socket


async def environments(_request):
    return web.json_response(ROWS)


async def environment(request):
    for row in ROWS:
        if row["name"] == request.match_info["name"]:
            return web.json_response(row)
    error = {"code": "not_found", "message": "there is no such environment"}
    return web.json_response({"error": error}, status=404)


def main():
    app = web.Application()
    one = "/v1/uclouds/{ucloud}/environments/{name}"
    app.router.add_get("/v1/environments", environments)
    app.router.add_get(one, environment)
    app.router.add_get(one + "/exec", run)
    app.router.add_get(one + "/console", console)
    web.run_app(app, path=sys.argv[1], print=None)


if __name__ == "__main__":
    main()
