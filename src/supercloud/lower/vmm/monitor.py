"""Process 1 of a machine's domain: starts QEMU, watches over it, tells the user's domain.

It is asked over the channel ``control``: ``machine.start``, ``machine.stop``, ``machine.status``,
``machine.attach``, ``machine.detach``, ``machine.disks``, ``console.attach``; it tells
``machine.state`` and ``machine.disk`` there. RAM, kernel, initrd, root, config and the
network's streams are capabilities in this domain's own table; the scratch disk's descriptor comes
with ``machine.start``. A restarted user's domain finds the machine running and asks its status.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.lower.vmm.console import Console
from supercloud.lower.vmm.disks import Disks
from supercloud.lower.vmm.lifecycle import Lifecycle, Patience, Watchdog
from supercloud.lower.vmm.machine import Descriptors, Machine, command_line
from supercloud.model.errors import BadState, Invalid, SupercloudError
from supercloud.wire import portal
from supercloud.wire.children import Children, how_it_ended
from supercloud.wire.codec import decode
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.qmp import Qmp

_READ_ONLY = ("kernel", "initrd", "root", "config")
_CONNECTED = ("ram", "uplink", "link")
_MAX_GRACE_S = 120.0

log = logging.getLogger("supercloud.lower.vmm")


class Monitor(Component):
    """One machine: none yet, running, or ended."""

    def __init__(self, core: Core, patience: Patience | None = None) -> None:
        super().__init__(core)
        self._patience = patience or Patience()
        self._children = Children(self.reactor)
        self._life = Lifecycle(self._tell_state)
        self._console: Console | None = None
        self._qmp: Qmp | None = None
        self._disks: Disks | None = None
        self._watchdog: Watchdog | None = None
        self._pid = 0
        self._why = ""
        self.serve(
            "control",
            {
                "machine.start": self.start,
                "machine.stop": self.stop,
                "machine.status": self.status,
                "machine.attach": self._with_disks(lambda disks: disks.attach),
                "machine.detach": self._with_disks(lambda disks: disks.detach),
                "machine.disks": self._with_disks(lambda disks: disks.list),
                "console.attach": self.attach,
            },
        )

    # -- what the user's domain may ask

    def start(self, request: Request) -> dict[str, Any]:
        """``Machine`` and the scratch disk's descriptor. BadState when there was a machine."""
        machine = decode(Machine, request.untrusted, "machine", ignore_unknown=True)
        if self._life.state != "creating":
            raise BadState(f"the machine is {self._life.state}")
        if len(request.descriptors) != 1:
            raise Invalid("the scratch disk's descriptor is missing")
        self._life.go("starting")
        try:
            self._launch(machine, request.descriptors[0])
        except (OSError, SupercloudError) as error:
            self._life.go("failed", f"QEMU could not be started: {error}")
            raise
        return self.status(request)

    def stop(self, request: Request) -> dict[str, Any]:
        """``{grace_ms}``: ask the guest to power off; after that time QEMU is made to quit."""
        grace_s = request.number("grace_ms", 0, int(_MAX_GRACE_S * 1000)) / 1000
        if self._pid and self._life.state != "stopping":
            self._life.go("stopping")
            if self._qmp is not None and grace_s:
                self._qmp.command("system_powerdown")
            self.reactor.after(grace_s, self._quit)
        return self.status(request)

    def status(self, _request: Request) -> dict[str, Any]:
        """``{state, reason}``."""
        return {"state": self._life.state, "reason": self._life.reason}

    def attach(self, _request: Request) -> Reply:
        """A stream: the console's last output, then live, both ways."""
        if self._console is None:
            raise BadState("there is no console before the machine is started")
        return Reply({}, [self._console.attach().detach()])

    def _with_disks(self, method: Callable[[Disks], Handler]) -> Handler:
        """A call to the disks of the machine; BadState when it does not run."""

        def handler(request: Request) -> Any:
            if self._disks is None or self._life.state != "running":
                raise BadState(f"the machine is {self._life.state}")
            return method(self._disks)(request)

        return handler

    # -- QEMU

    def _launch(self, machine: Machine, scratch: int) -> None:
        with ExitStack() as opened:
            qmp, qmp_theirs = socket.socketpair()
            console, console_theirs = socket.socketpair()
            for theirs in (qmp_theirs, console_theirs):
                opened.callback(theirs.close)
            numbers = {name: self._read_only(name, opened) for name in _READ_ONLY}
            numbers |= {name: self._taken(name, opened) for name in _CONNECTED}
            given = Descriptors(
                **numbers,
                scratch=scratch,
                qmp=qmp_theirs.fileno(),
                console=console_theirs.fileno(),
            )
            self._console = Console(self.reactor, console)
            argv = command_line(machine, given)
            self._pid = self._children.start(argv, given.all(), self._ended)
        self._qmp = Qmp(self.reactor, qmp, self._on_qmp, lambda: None)
        shared = machine.ram_share
        self._disks = Disks(self.reactor, self._qmp, self._tell, ram_shared=shared)
        self.reactor.after(self._patience.start_s, self._give_up_starting)

    def _taken(self, name: str, opened: ExitStack) -> int:
        descriptor = self.core.take(self.core.lookup(name).selector)
        opened.callback(os.close, descriptor)
        return descriptor

    def _read_only(self, name: str, opened: ExitStack) -> int:
        """The same file, open for reading only: QEMU wants a disk's descriptor to say so."""
        descriptor = self._taken(name, opened)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return descriptor
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        opened.callback(os.close, again)
        return again

    def _on_qmp(self, name: str, data: dict[str, Any]) -> None:
        if name == "GREETING" and self._life.state == "starting" and self._qmp is not None:
            self._life.go("running")
            self._watchdog = Watchdog(
                self.reactor, self._qmp, self._life, self._kill, self._patience
            )
        elif self._disks is not None:
            self._disks.on_qmp(name, data)
        if name == "GUEST_PANICKED":
            self._why = "the guest's kernel panicked"
        elif name == "SHUTDOWN":
            self._why = self._why or f"the machine was shut down ({data.get('reason', 'unknown')})"
        if name not in ("RTC_CHANGE", "GREETING"):
            log.info("QEMU: %s %s", name, data)

    def _give_up_starting(self) -> None:
        if self._life.state == "starting":
            self._why = f"QEMU did not answer within {self._patience.start_s:g} s"
            self._kill()

    def _quit(self) -> None:
        if self._pid and self._qmp is not None:
            self._qmp.command("quit")
            self.reactor.after(self._patience.quit_s, self._kill)

    def _kill(self) -> None:
        if self._pid:
            self._children.kill(self._pid)

    def _ended(self, status: int) -> None:
        log.info("QEMU ended: %s", how_it_ended(status))
        self._pid = 0
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._qmp is not None:
            self._qmp.close()
        if self._console is not None:
            self._console.close()
        if self._life.state == "stopping":
            self._life.go("stopped")
        else:
            self._life.go("failed", self._why or f"QEMU ended: {how_it_ended(status)}")

    def _tell_state(self, state: str, reason: str) -> None:
        log.info("machine is %s %s", state, reason)
        self._tell("machine.state", {"state": state, "reason": reason})

    def _tell(self, method: str, parameters: Mapping[str, Any]) -> None:
        channel = self.channels.get("control")
        if channel is None:
            return
        try:
            portal.send(channel, {"m": method, "p": dict(parameters)})
        except (OSError, SupercloudError) as error:  # it asks when it is there again
            log.info("the user's domain was not told: %s", error)


if __name__ == "__main__":
    os.umask(0o077)
    Monitor(Core()).run()
