"""A small NBD client, and devices to put volumes on: raw files behind storage daemons."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supercloud.upper.platform.image.tools import ToolTree

_OPTION_MAGIC, _REQUEST_MAGIC, _REPLY_MAGIC = 0x49484156454F5054, 0x25609513, 0x67446698
_GO, _READ, _WRITE, _END, _FLUSH = 7, 0, 1, 2, 3
MIB = 1 << 20


class NbdError(Exception):
    """The server refused a request; ``args[0]`` is the error number."""


class Client:
    """One connection, one request at a time."""

    def __init__(self, sock: socket.socket, export: str, timeout_s: float = 120) -> None:
        self.sock = sock
        sock.settimeout(timeout_s)
        self._get(18)
        sock.sendall(struct.pack(">I", 3))
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        sock.sendall(struct.pack(">QII", _OPTION_MAGIC, _GO, len(data)) + data)
        self.size_bytes = 0
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._get(20))
            data = self._get(length)
            if kind == 1:
                break
            if kind & 1 << 31:
                raise NbdError(kind, data)
            if data[:2] == b"\0\0":
                self.size_bytes = struct.unpack(">Q", data[2:10])[0]

    def read(self, offset: int, length: int) -> bytes:
        self._ask(_READ, offset, length)
        return self._get(length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(_WRITE, offset, len(data), data)

    def flush(self) -> None:
        self._ask(_FLUSH, 0, 0)

    def send_write(self, offset: int, data: bytes) -> None:
        """Ask, and do not wait for the answer."""
        self.sock.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _WRITE, 1, offset, len(data)))
        self.sock.sendall(data)

    def answered(self) -> None:
        """Take one answer."""
        magic, error, _ = struct.unpack(">IIQ", self._get(16))
        assert magic == _REPLY_MAGIC
        if error:
            raise NbdError(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _END, 1, 0, 0))
        self.sock.close()

    def _ask(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        head = struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, kind, 1, offset, length)
        self.sock.sendall(head + data)
        self.answered()

    def _get(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.sock.recv(length - len(data))
            if not more:
                raise ConnectionResetError("the server has gone")
            data += more
        return data


class Device:
    """A raw file behind a storage daemon of its own, as the protection service would serve it.

    The first write of the sector ``no_room`` finds no room on the file's disk (ENOSPC).
    """

    def __init__(
        self, tools: ToolTree, path: Path, size_bytes: int, no_room: int | None = None
    ) -> None:
        with path.open("ab") as file:
            file.truncate(max(size_bytes, path.stat().st_size))
        self.path = path
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # a name of the kernel's choice in the abstract namespace
            listener.listen(16)
            self._address = listener.getsockname()
            file_node: dict[str, Any] = {"driver": "file", "filename": str(path)}
            if no_room is not None:
                full = {"event": "none", "iotype": "write", "errno": 28, "once": True}
                errors = [full | {"sector": no_room}]
                file_node = {"driver": "blkdebug", "image": file_node, "inject-error": errors}
            file_node["node-name"] = "file"
            self.process = subprocess.Popen(
                [
                    *tools.argv("qemu-storage-daemon"),
                    *("--blockdev", json.dumps(file_node)),
                    *("--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"),
                    *("--export", "nbd,id=device,node-name=file,name=device,writable=on"),
                ],
                pass_fds=[listener.fileno()],
            )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(self._address)
        sock.setblocking(True)
        return sock

    def descriptor(self) -> int:
        return self.connect().detach()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """It answers nothing for a while, as a device does that waits for room."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
