"""A block service in this process, called as a launcher would call it."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from supercloud.services.block.daemon import Programs
from supercloud.services.block.service import BlockService
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.wire.portal import Reply, Request
from supercloud.wire.reactor import Reactor
from support.nbd import MIB, Client, Device

DEADLINE_S = 120.0
# The service's children (and the machine's QEMU) run under the filter of their domain here too.
CONFINE = """
import os, sys
from supercloud.isolation import seccomp
from supercloud.lower.core import system
system.call("prctl", 38, 1, 0, 0, 0)  # no new privileges
system.install_filter(seccomp.compiled(sys.argv[1])[0])
os.execv(sys.argv[2], sys.argv[2:])
"""


def confined_by(name: str) -> tuple[str, ...]:
    """The beginning of a command line that runs the rest under a filter."""
    return (sys.executable, "-c", CONFINE, name)


class Bench:
    """The service, its devices, and what it told."""

    def __init__(self, place: Path) -> None:
        self.tools, self.place = ToolTree(), place
        self.reactor = Reactor()
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.devices: dict[str, Any] = {}
        confined = confined_by("block")
        programs = Programs(
            (*confined, *self.tools.argv("qemu-storage-daemon")),
            (*confined, *self.tools.argv("qemu-img")),
        )
        tell = lambda method, parameters: self.told.append((method, parameters))  # noqa: E731
        self.service = BlockService(self.reactor, tell, programs)
        self._handlers = self.service.handlers()

    def device(self, name: str, size_bytes: int = 256 * MIB, no_room: int | None = None) -> Any:
        """The device of that name, started when it is not there."""
        if name not in self.devices:
            path = self.place / f"{name}.img"
            self.devices[name] = Device(self.tools, path, size_bytes, no_room)
        return self.devices[name]

    def call(self, method: str, descriptors: list[int] | None = None, **parameters: Any) -> Any:
        """A call's result; a Reply when descriptors come with it."""
        request = Request("test", method, parameters, descriptors or [])
        try:
            return self._handlers[method](request)
        finally:
            for descriptor in request.descriptors:
                os.close(descriptor)

    def create(self, name: str, size_bytes: int = 64 * MIB, **more: Any) -> Any:
        """``has_bytes``: what the device has of the ``device_bytes`` that it announces."""
        device = self.device(name, more.pop("device_bytes", 256 * MIB))
        if "has_bytes" in more:
            more["device_bytes"] = more.pop("has_bytes")
        parameters = {"volume": name, "format": "qcow2", "size_bytes": size_bytes, **more}
        return self.call("volume.create", [device.descriptor()], export="device", **parameters)

    def open(self, name: str, image_format: str = "qcow2", **more: Any) -> Any:
        device = self.device(name)
        parameters = {"volume": name, "format": image_format, "export": "device", **more}
        return self.call("volume.open", [device.descriptor()], **parameters)

    def attach(self, name: str, machine: str = "m", **more: Any) -> socket.socket:
        wish = {"mode": "nbd", "ram_shared": False, **more}
        reply = self.call("volume.attach", volume=name, machine=machine, **wish)
        assert isinstance(reply, Reply)
        return socket.socket(fileno=reply.descriptors[0])

    def clone(self, name: str, to: str, snapshot: str) -> None:
        """Begin to copy a snapshot."""
        parameters = {"volume": name, "to": to, "snapshot": snapshot, "export": "device"}
        self.call("volume.clone", [self.device(name).descriptor()], **parameters)

    @contextlib.contextmanager
    def client(self, name: str, **more: Any) -> Iterator[Client]:
        """The volume's content, attached meanwhile."""
        client = Client(self.attach(name, **more), name)
        try:
            yield client
        finally:
            client.close()
            self.call("volume.detach", volume=name)

    def read(self, name: str, offset: int, length: int) -> bytes:
        with self.client(name) as client:
            return client.read(offset, length)

    def write(self, name: str, offset: int, data: bytes) -> None:
        with self.client(name) as client:
            client.write(offset, data)
            client.flush()

    def until(self, so: Callable[[], Any]) -> None:
        """Turn the service's loop until something is so."""
        deadline_s = time.monotonic() + DEADLINE_S

        def look() -> None:
            if so() or time.monotonic() > deadline_s:
                self.reactor.stop()
            else:
                self.reactor.after(0.01, look)

        self.reactor._stopped = False
        self.reactor.after(0, look)
        self.reactor.run()
        assert so()

    def heard(self, method: str) -> Mapping[str, Any]:
        """The next thing told by that name, waited for."""
        self.until(lambda: any(name == method for name, _ in self.told))
        index = next(i for i, (name, _) in enumerate(self.told) if name == method)
        return self.told.pop(index)[1]

    def pid(self, name: str) -> int:
        return self.service._volumes[name].daemon.pid

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)
        self.heard("volume.lost")

    def close(self) -> None:
        self.service.close()
        for device in self.devices.values():
            device.close()
