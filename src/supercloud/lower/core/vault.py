"""The core's end of the keeper: descriptors that outlive the core, and ends of adopted children."""

import socket
from collections.abc import Callable

_MAX_MESSAGE = 256


class Vault:
    """Descriptors by name at the keeper; see its docstring for the messages."""

    def __init__(self, link: socket.socket) -> None:
        self._link, self.fileno = link, link.fileno

    def put(self, name: str, descriptor: int) -> None:
        """Store a copy; it is safe there when this returns, even if the core dies at once."""
        socket.send_fds(self._link, [f"P {name}".encode()], [descriptor])

    def drop(self, name: str) -> None:
        """Forget a descriptor."""
        self._link.send(f"D {name}".encode())

    def load(self) -> tuple[dict[str, int], list[tuple[int, int]]]:
        """All that is stored, and (process id, wait status) of children that ended."""
        stored: dict[str, int] = {}
        ends: list[tuple[int, int]] = []
        self._link.send(b"L")
        while True:
            message, descriptors, _, _ = socket.recv_fds(
                self._link, _MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC
            )
            kind, *words = message.decode().split(" ")
            if kind == "F":
                stored[words[0]] = descriptors[0]
            elif kind == "X":
                ends.append((int(words[0]), int(words[1])))
            elif kind == ".":
                return stored, ends
            else:
                raise ConnectionError("the keeper is gone")

    def read_ends(self, ended: Callable[[int, int], None]) -> bool:
        """Pass on (process id, wait status) of children that ended; False: the keeper is gone."""
        while True:
            try:
                message = self._link.recv(_MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            if not message:
                return False
            _, pid, status = message.split(b" ")
            ended(int(pid), int(status))
