"""A small NBD client that may misbehave, and a way for real clients to reach a device."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from supercloud.services.protection.engine import Device

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA = 1
OPTION_MAGIC = 0x49484156454F5054


class Client:
    """Speaks to a device over a socket of its own; simple replies."""

    def __init__(self, device: Device, reach_bytes: int = 0) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(60)
        device.connect(theirs.detach(), reach_bytes)
        self._cookie = self.size_bytes = 0

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def hello(self, flags: int = 3) -> bytes:
        greeting = self.exactly(18)
        self.sock.sendall(struct.pack(">I", flags))
        return greeting

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """The option's answers, up to the last."""
        self.sock.sendall(struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data)
        answers = []
        while True:
            magic, same, kind, length = struct.unpack(">QIII", self.exactly(20))
            assert (magic, same) == (0x3E889045565A9, option)
            answers.append((kind, self.exactly(length)))
            if kind == 1 or kind & 1 << 31:
                return answers

    def go(self) -> "Client":
        self.hello()
        answers = self.option(7, struct.pack(">IH", 0, 0))
        assert answers[-1][0] == 1
        (self.size_bytes,) = struct.unpack(">Q", answers[0][1][2:10])
        return self

    def send(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> None:
        self._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, length)
        self.sock.sendall(head + data)

    def reply(self, length: int = 0) -> tuple[int, bytes]:
        magic, error, _ = struct.unpack(">IIQ", self.exactly(16))
        assert magic == 0x67446698
        return error, b"" if error else self.exactly(length)

    def call(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        self.send(kind, offset, length or len(data), data, flags)
        return self.reply(length if kind == READ else 0)

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def listening(device: Device, place: Path) -> Iterator[str]:
    """A URI for programs that dial: what they open is passed on to the device."""
    path = place / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    device.connect(connection.detach())

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()
