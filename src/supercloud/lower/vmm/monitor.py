"""Process 1 of a machine's domain: starts QEMU, watches over it, tells the user's domain.

It is asked over the channel ``control``: ``machine.start``, ``machine.stop``, ``machine.status``,
``machine.attach``, ``machine.detach``, ``machine.disks``, ``machine.hold``, ``machine.renew``,
``console.attach``, and what ``checkpoint`` has; it tells ``machine.state``, ``machine.disk``, and
what ``room`` has there. RAM, kernel, initrd, root, config and the network's streams are
capabilities in this domain's own table; the scratch disk's descriptor comes with
``machine.start``. A restarted user's domain finds the machine running and asks its status.

A machine that is to become a template ends, its RAM is sealed, and it is told of as
``template.saved`` with the devices' state; a clone is ``running`` once its agent has confirmed its
new identity.
"""

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from supercloud.lower.client import Core
from supercloud.lower.component import Component
from supercloud.lower.vmm import template
from supercloud.lower.vmm.checkpoint import Capture
from supercloud.lower.vmm.console import Console
from supercloud.lower.vmm.disks import Disks, Plug, Plugs
from supercloud.lower.vmm.gather import Gathered, gather
from supercloud.lower.vmm.identity import IdentityPort
from supercloud.lower.vmm.lifecycle import Lifecycle, Patience, Watchdog
from supercloud.lower.vmm.machine import PRIVATE, Machine, command_line
from supercloud.lower.vmm.room import Room
from supercloud.model.errors import BadState, Busy, Invalid, SupercloudError
from supercloud.wire import portal
from supercloud.wire.children import Children, how_it_ended
from supercloud.wire.codec import decode
from supercloud.wire.portal import Handler, Reply, Request
from supercloud.wire.qmp import Qmp

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
        self._room: Room | None = None
        self._capture: Capture | None = None
        self._watchdog: Watchdog | None = None
        self._machine: Machine | None = None
        self._given: Gathered | None = None
        self._identity: IdentityPort | None = None
        self._sequence: template.Sequence | None = None
        self._plugs: list[tuple[Plug, int]] = []  # until the machine has them
        self._is_saved = False
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
                "machine.hold": self._with_disks(self._hold),
                "machine.renew": self._with_disks(lambda disks: disks.renew),
                "console.attach": self.attach,
                "machine.extent": self._with_capture(lambda capture: capture.estimate),
                "machine.checkpoint": self._with_capture(lambda capture: capture.begin),
                "machine.checkpoint-end": self._with_capture(lambda capture: capture.end),
            },
        )

    # -- what the user's domain may ask

    def start(self, request: Request) -> dict[str, Any]:
        """``Machine`` and the scratch disk's descriptor (a template may do with a blank one).

        One that is restored is given its volumes, too: ``Plugs``, and as many connected sockets.
        BadState when there was a machine.
        """
        machine = decode(Machine, request.untrusted, "machine", ignore_unknown=True)
        disks = decode(Plugs, request.untrusted, "machine", ignore_unknown=True).disks
        if self._life.state != "creating":
            raise BadState(f"the machine is {self._life.state}")
        self._life.go("starting")
        try:
            own = len(request.descriptors) - len(disks)
            self._take_plugs(machine, disks, request.descriptors[own:])
            self._launch(machine, request.descriptors[:own])
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
        """``{state, reason, ram_shared}``."""
        machine = self._machine
        shared = machine is not None and machine.ram_shared
        return {"state": self._life.state, "reason": self._life.reason, "ram_shared": shared}

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

    def _hold(self, disks: Disks) -> Handler:
        """Busy while a checkpoint is taken, which sees to it that the machine goes on."""
        if self._capture is not None and self._capture.is_under_way:
            raise Busy("a checkpoint of the platform is being taken")
        return disks.hold

    def _with_capture(self, method: Callable[[Capture], Handler]) -> Handler:
        """A call about checkpoints of the machine; BadState when it does not run."""

        def handler(request: Request) -> Any:
            if self._capture is None or self._life.state != "running":
                raise BadState(f"the machine is {self._life.state}")
            return method(self._capture)(request)

        return handler

    # -- QEMU

    def _launch(self, machine: Machine, descriptors: list[int]) -> None:
        if machine.start == "restore":  # whoever filled it is done
            self.core.seal(self.core.lookup("ram").selector)
        with ExitStack() as opened:
            self._given = given = gather(self.core, machine, descriptors, opened)
            self._machine, self._console = machine, Console(self.reactor, given.console)
            self._identity = IdentityPort(self.reactor, given.identity, self._guest_said)
            argv = command_line(machine, given.numbers)
            self._pid = self._children.start(argv, given.numbers.all(), self._ended)
        self._qmp = qmp = Qmp(self.reactor, given.qmp, self._on_qmp, lambda: None)
        self._disks = Disks(self.reactor, qmp, self._tell, ram_shared=machine.ram_shared)
        self._room = Room(self.reactor, qmp, self._tell)
        identity, ram = self._identity, self._open_ram
        self._capture = Capture(
            self.reactor, qmp, identity, self._tell, machine, self._pid, ram, self._disks.statuses
        )
        self.reactor.after(self._patience.start_s, self._give_up_starting)

    def _open_ram(self) -> int:
        return self.core.take(self.core.lookup("ram").selector)

    def _on_qmp(self, name: str, data: dict[str, Any]) -> None:
        if name == "GREETING" and self._qmp is not None and self._machine is not None:
            if self._machine.start in PRIVATE:
                self.reactor.after(0, self._load)  # whoever reads this is not asked from here
            else:
                self._running()
        elif self._disks is not None and self._room is not None:
            self._disks.on_qmp(name, data)
            self._room.on_qmp(name, data)
        if self._capture is not None:
            self._capture.on_qmp(name, data)
        if name == "MIGRATION" and self._sequence is not None:
            self._sequence.migration(str(data.get("status")))
        elif name == "GUEST_PANICKED":
            self._why = "the guest's kernel panicked"
        elif name == "SHUTDOWN":
            self._why = self._why or f"the machine was shut down ({data.get('reason', 'unknown')})"
        if name not in ("RTC_CHANGE", "GREETING"):
            log.info("QEMU: %s %s", name, data)

    def _running(self) -> None:
        if self._life.state == "starting" and self._qmp is not None:
            self._life.go("running")
            self._watchdog = Watchdog(
                self.reactor, self._qmp, self._life, self._kill, self._patience
            )

    # -- templates and clones

    def _take_plugs(self, machine: Machine, plugs: list[Plug], descriptors: list[int]) -> None:
        if plugs and (machine.start != "restore" or len(descriptors) != len(plugs)):
            raise Invalid("volumes for a machine that does not know them, or without their streams")
        for plug, descriptor in zip(plugs, descriptors, strict=True):
            self._plugs.append((plug, os.dup(descriptor)))

    def _plug_in(self, disks: Disks) -> None:
        plugs, self._plugs = self._plugs, []
        with ExitStack() as opened:
            for _, descriptor in plugs:
                opened.callback(os.close, descriptor)
            for plug, descriptor in plugs:
                disks.plug(plug, descriptor)

    def _load(self) -> None:
        """Its volumes first: what it loads knows them, in these places."""
        if self._qmp is None or self._disks is None or not self._qmp.is_open:
            return
        try:
            self._plug_in(self._disks)
        except SupercloudError as error:
            self._broken(f"a volume could not be plugged in: {error}")
            return
        self._sequence = template.load(self._qmp, self._loaded, self._broken)

    def _loaded(self) -> None:
        """The clone is told who it is before its processors run."""
        if self._identity is not None and self._machine is not None and self._qmp is not None:
            self._identity.tell(self._machine)
            self._qmp.command("cont")

    def _guest_said(self, word: str) -> None:
        if self._machine is None or self._qmp is None:
            return
        if word == "ready" and self._machine.start in PRIVATE:
            self._running()
        elif word in ("paused", "refused") and self._capture is not None:
            self._capture.said(word)
        elif word == "waiting" and self._machine.start == "template" and self._sequence is None:
            self._sequence = template.save(self._qmp, self._saved, self._broken)

    def _saved(self) -> None:
        self._is_saved = True
        self._life.go("stopping")
        self._quit()

    def _hand_over(self) -> None:
        """QEMU is gone, nothing maps the RAM: it is sealed, and the state told of."""
        if self._given is not None:
            digest = self.core.seal(self.core.lookup("ram").selector)
            told = {"ram_sha256": digest.hex()}
            self._tell("template.saved", told, [self._given.state])

    def _broken(self, why: str) -> None:
        self._why = self._why or why
        self._kill()

    # -- its end

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
        if self._identity is not None:
            self._identity.close()
        if self._is_saved:
            self._hand_over()
        if self._life.state == "stopping":
            self._life.go("stopped")
        else:
            self._life.go("failed", self._why or f"QEMU ended: {how_it_ended(status)}")

    def _tell_state(self, state: str, reason: str) -> None:
        log.info("machine is %s %s", state, reason)
        self._tell("machine.state", {"state": state, "reason": reason})

    def _tell(
        self, what: str, parameters: Mapping[str, Any], descriptors: list[int] | None = None
    ) -> None:
        channel = self.channels.get("control")
        if channel is None:
            return
        try:
            portal.send(channel, {"m": what, "p": dict(parameters)}, descriptors)
        except (OSError, SupercloudError) as error:  # it asks when it is there again
            log.info("the user's domain was not told: %s", error)


if __name__ == "__main__":
    os.umask(0o077)
    Monitor(Core()).run()
