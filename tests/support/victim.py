"""A process that serves a device over NBD, to be killed in the middle."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from supercloud.wire.volumes import Seal

DEADLINE_S = 240.0
_PROGRAM = """
import socket, sys, threading
from supercloud.services.protection.engine import Device
from supercloud.wire.volumes import Seal
from support.protection import KEY, NAME
descriptor, listener = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
seal = Seal(epoch=int(sys.argv[3]), sequence=int(sys.argv[4]), root=sys.argv[5])
device = Device(descriptor, KEY, NAME, seal)
device.serve(device.next_epoch)

def accept():
    while True:
        device.connect(listener.accept()[0].detach())

threading.Thread(target=accept, daemon=True).start()
while True:
    now, written = device.seal, device.figures()["write_bytes"]
    print(now.epoch, now.sequence, now.root, written, flush=True)
    if not sys.stdin.readline():
        break
"""


class Victim:
    """Serves on ``path``; ``seal`` is the one that its epoch was begun with. Killed at the end."""

    def __init__(self, descriptor: int, seal: Seal, path: Path) -> None:
        self.path = path
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(16)
            numbers = [descriptor, listener.fileno()]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _PROGRAM, *map(str, numbers)),
                    *(str(seal.epoch), str(seal.sequence), seal.root),
                ],
                pass_fds=numbers,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
        self.seal, _ = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self.path.unlink()

    def now(self) -> Seal:
        """The newest durable state."""
        return self._state()[0]

    def until_written(self, more_bytes: int) -> None:
        """So much more has come."""
        deadline_s, wanted = time.monotonic() + DEADLINE_S, self._state()[1] + more_bytes
        while self._state()[1] < wanted:
            assert time.monotonic() < deadline_s, "nobody writes"
            time.sleep(0.005)

    def kill(self) -> None:
        """At once, with all that it has in memory."""
        self._process.kill()
        self._process.wait()

    def _state(self) -> tuple[Seal, int]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> tuple[Seal, int]:
        assert self._process.stdout is not None
        epoch, sequence, root, written = self._process.stdout.readline().split()
        return Seal(epoch=int(epoch), sequence=int(sequence), root=root), int(written)
