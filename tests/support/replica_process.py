"""A protected device in a process of its own, to be killed: ``BACKING SIZE`` and a listener as 3.

On its standard input: ``again`` (closed in order and opened anew, which ends its connections),
``figures``; each is answered by one line of JSON.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path

from supercloud.services.protection.engine import Device, backing_bytes, format_device
from supercloud.wire.volumes import Seal
from support.protection import KEY, NAME


class Served:
    def __init__(self, path: Path, size_bytes: int) -> None:
        self.kept = path.with_suffix(".seal")
        fresh = not path.exists()
        self.backing = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if fresh:
            os.truncate(self.backing, backing_bytes(size_bytes))
            self.keep(format_device(self.backing, KEY, NAME, size_bytes))
        self.serve()

    def keep(self, seal: Seal) -> None:
        seal_text = json.dumps([seal.epoch, seal.sequence, seal.root])
        self.kept.with_suffix(".new").write_text(seal_text)
        self.kept.with_suffix(".new").rename(self.kept)

    def serve(self) -> None:
        epoch, sequence, root = json.loads(self.kept.read_text())
        seal = Seal(epoch=epoch, sequence=sequence, root=root)
        self.device = Device(self.backing, KEY, NAME, seal)
        found = self.device.found
        kept = Seal(epoch=self.device.next_epoch, sequence=found.sequence, root=found.root)
        self.keep(kept)
        self.device.serve(kept.epoch)

    def again(self) -> None:
        seal = self.device.close()
        assert seal is not None
        self.keep(seal)
        self.serve()


def main() -> None:
    served = Served(Path(sys.argv[1]), int(sys.argv[2]))
    listener = socket.socket(fileno=3)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            served.device.connect(connection.detach())

    threading.Thread(target=accept, daemon=True).start()
    print("{}", flush=True)
    for line in sys.stdin:
        if line.strip() == "again":
            served.again()
        print(json.dumps(served.device.figures()), flush=True)


if __name__ == "__main__":
    main()
