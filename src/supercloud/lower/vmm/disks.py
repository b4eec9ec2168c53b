"""Volumes of a running machine: plugged into its free PCIe root ports, and out again.

A volume comes as a connected socket of the user's block service: vhost-user-blk where the RAM is
shared, else NBD. Its *slot* (1..) is the root port ``free0``.. that it is in; the guest finds it by
that, since vhost-user disks have no serial of their own.

NBD tells a client the size only once. So that a disk grows while it is used, its machine is *held*,
and goes on with a new connection (``renew``); a disk by vhost-user-blk grows by itself.

A disk that QEMU itself reads and writes (NBD, and the machine's own) stops the machine when there
is no room for a write; nothing is lost, the write is tried again until there is.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal

from supercloud.model.errors import (
    BadState,
    Busy,
    Exists,
    Invalid,
    NoResources,
    NotFound,
    SupercloudError,
    Temporary,
    Unsupported,
)
from supercloud.wire.codec import Limit, Name, decode
from supercloud.wire.places import VOLUME_SLOTS
from supercloud.wire.portal import Request
from supercloud.wire.qmp import Qmp, Refused
from supercloud.wire.reactor import Reactor, Timer

HOLD_S: Final = 30.0
"""Longer than a user's domain takes to be there again, and to be asked again."""
_SERIAL_LENGTH: Final = 20

log = logging.getLogger("supercloud.lower.vmm")

Tell = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plug:
    """What to plug in; ``slot`` 0 is any. ``export`` is its name over NBD."""

    volume: Name
    mode: Literal["vhost-user-blk", "nbd"]
    read_only: bool = False
    export: Annotated[str, Limit(max_length=255)] = ""
    slot: Annotated[int, Limit(ge=0, le=VOLUME_SLOTS)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugs:
    """Those that a machine that is restored has from its start, beside what it is."""

    disks: Annotated[list[Plug], Limit(max_length=VOLUME_SLOTS)] = field(default_factory=list)


@dataclass(slots=True)
class Disk:
    """A slot in use. ``state`` is attached or detaching."""

    plug: Plug
    slot: int
    state: str = "attached"
    renewed: int = 0

    @property
    def node(self) -> str:
        """QEMU's name for what is behind the device, by NBD."""
        return f"volume{self.slot}-{self.renewed}"

    def status(self) -> dict[str, Any]:
        """``{volume, slot, mode, state}``."""
        plug = self.plug
        return {
            "volume": plug.volume,
            "slot": self.slot,
            "mode": plug.mode,
            "state": self.state,
        }


class Disks:
    """The slots of one machine. ``tell`` gets ``machine.disk`` with a disk's status."""

    def __init__(self, reactor: Reactor, qmp: Qmp, tell: Tell, *, ram_shared: bool) -> None:
        self._reactor, self._qmp, self._tell = reactor, qmp, tell
        self._ram_shared = ram_shared
        self._disks: dict[int, Disk] = {}
        self._held: tuple[str, Timer] | None = None  # for which volume, and until when

    def attach(self, request: Request) -> dict[str, Any]:
        """``Plug`` and the socket: its status. Unsupported: vhost-user-blk onto private RAM."""
        plug = decode(Plug, request.untrusted, "disk", ignore_unknown=True)
        if len(request.descriptors) != 1:
            raise Invalid("the volume's descriptor is missing")
        self._may(plug)
        return self.plug(plug, request.descriptors[0]).status()

    def plug(self, plug: Plug, descriptor: int) -> Disk:
        """Into a machine that runs, or that is about to load a state which knows it there."""
        disk = Disk(plug, self._free_slot(plug.slot))
        {"nbd": self._plug_nbd, "vhost-user-blk": self._plug_vhost}[plug.mode](disk, descriptor)
        self._disks[disk.slot] = disk
        return disk

    def detach(self, request: Request) -> dict[str, Any]:
        """``{volume}``: ask the guest to let go; ``machine.disk`` tells when it has.

        May be asked again of a guest that did not listen.
        """
        disk = self._of(request.name("volume"))
        if disk is None:
            raise NotFound(f"volume {request.name('volume')} is not attached", where="volume")
        try:
            self._qmp.ask("device_del", {"id": f"disk{disk.slot}"})
        except Refused as error:  # asked again too soon: the first time still counts
            if "already in the process" not in str(error):
                raise
        disk.state = "detaching"
        return disk.status()

    def list(self, _request: Request) -> dict[str, Any]:
        """``{disks: [status]}``."""
        return {"disks": [*self.statuses()]}

    def statuses(self) -> Sequence[dict[str, Any]]:
        """Of all that are plugged in."""
        return [disk.status() for disk in self._disks.values()]

    # -- a disk by NBD that grows

    def hold(self, request: Request) -> dict[str, Any]:
        """``{volume}``: nothing of the machine is under way from here on, until ``renew``.

        It goes on by itself after ``HOLD_S``. BadState when it stands still for another reason,
        Busy when it is held for another volume.
        """
        disk = self._by_nbd(request)
        if self._held is not None:  # whoever asked before has died meanwhile
            volume, timer = self._held
            if volume != disk.plug.volume:
                raise Busy(f"the machine is held for volume {volume}")
            timer.cancel()
        elif self._qmp.ask("query-status").get("status") != "running":
            raise BadState("the machine stands still already: a disk is full, or it is ending")
        self._held = (disk.plug.volume, self._reactor.after(HOLD_S, self._go_on))
        try:
            self._qmp.ask("stop")
        except SupercloudError:
            self._go_on()
            raise
        return disk.status()

    def renew(self, request: Request) -> dict[str, Any]:
        """``{volume, size_bytes, export}`` and the socket: go on with that. BadState: not held."""
        disk, size_bytes = self._by_nbd(request), request.number("size_bytes", 0, 1 << 44)
        if len(request.descriptors) != 1:
            raise Invalid("the volume's descriptor is missing")
        if self._held is None or self._held[0] != disk.plug.volume:
            raise BadState("the machine is not held")
        new = replace(disk, renewed=disk.renewed + 1)
        new.plug = replace(disk.plug, export=request.text("export", most=255))
        try:
            self._add_node(new, request.descriptors[0])
            self._replace(disk, new)
            self._qmp.ask("block_resize", {"node-name": new.node, "size": size_bytes})
        finally:
            self._go_on()
        return new.status()

    def _replace(self, old: Disk, new: Disk) -> None:
        """The device, which its guest keeps, is over another connection from now on."""
        drive = {"path": f"/machine/peripheral/disk{old.slot}", "property": "drive"}
        try:
            self._qmp.ask("qom-set", drive | {"value": new.node})
        except SupercloudError:
            self._qmp.command("blockdev-del", {"node-name": new.node})
            raise
        self._disks[old.slot] = new
        self._qmp.command("blockdev-del", {"node-name": old.node})

    def _go_on(self) -> None:
        if self._held is not None:
            self._held[1].cancel()
            self._held = None
        self._qmp.command("cont")

    def _by_nbd(self, request: Request) -> Disk:
        name = request.name("volume")
        disk = self._of(name)
        if disk is None or disk.state != "attached":
            raise NotFound(f"volume {name} is not attached", where="volume")
        if disk.plug.mode != "nbd":
            raise BadState(f"volume {name} is attached by {disk.plug.mode}: it grows by itself")
        return disk

    # -- what must hold

    def _may(self, plug: Plug) -> None:
        if plug.mode == "vhost-user-blk" and not self._ram_shared:
            raise Unsupported(
                "this machine's RAM is private: vhost-user-blk would not reach it",
                hint="attach the volume by NBD",
            )
        if self._of(plug.volume) is not None:
            raise Exists(f"volume {plug.volume} is attached already", hint="detach it first")

    def _free_slot(self, wanted: int) -> int:
        if wanted and wanted in self._disks:
            volume = self._disks[wanted].plug.volume
            raise BadState(f"slot {wanted} holds volume {volume}")
        free = [slot for slot in range(1, VOLUME_SLOTS + 1) if slot not in self._disks]
        if not free:
            raise NoResources(f"a machine takes {VOLUME_SLOTS} volumes", hint="detach one")
        return wanted or free[0]

    def _of(self, volume: str) -> Disk | None:
        return next((d for d in self._disks.values() if d.plug.volume == volume), None)

    # -- QEMU

    def _plug_nbd(self, disk: Disk, descriptor: int) -> None:
        self._add_node(disk, descriptor)
        serial = disk.plug.volume[:_SERIAL_LENGTH]
        device = {"driver": "virtio-blk-pci", "drive": disk.node, "serial": serial}
        self._plug(disk, device | {"werror": "report", "rerror": "report"})

    def _add_node(self, disk: Disk, descriptor: int) -> None:
        name, plug = self._pass(disk, descriptor), disk.plug
        node = {
            "driver": "nbd",
            "node-name": disk.node,
            "server": {"type": "fd", "str": name},
            "export": plug.export,
            "read-only": plug.read_only,
            "discard": "unmap",
        }
        self._ask("blockdev-add", node, name)

    def _plug_vhost(self, disk: Disk, descriptor: int) -> None:
        name = self._pass(disk, descriptor)
        address = {"type": "fd", "data": {"str": name}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self._ask("chardev-add", {"id": f"vhost{disk.slot}", "backend": backend}, name)
        device = {"driver": "vhost-user-blk-pci", "chardev": f"vhost{disk.slot}", "num-queues": 1}
        self._plug(disk, device)

    def _plug(self, disk: Disk, device: dict[str, Any]) -> None:
        place = {"id": f"disk{disk.slot}", "bus": f"free{disk.slot - 1}"}
        try:
            self._qmp.ask("device_add", device | place)
        except SupercloudError as error:
            self._let_go(disk)
            if "has not been found" in str(error):  # it looks for the descriptor to dial again
                volume = disk.plug.volume
                raise Temporary(f"the storage daemon of volume {volume} has hung up") from error
            raise

    def _pass(self, disk: Disk, descriptor: int) -> str:
        """QEMU's name for the descriptor that it is given."""
        name = f"slot{disk.slot}"
        self._qmp.ask("getfd", {"fdname": name}, descriptors=[descriptor])
        return name

    def _ask(self, command: str, arguments: dict[str, Any], name: str) -> None:
        """A command that takes a descriptor; if it does not, it is closed."""
        try:
            self._qmp.ask(command, arguments)
        except SupercloudError:
            self._qmp.command("closefd", {"fdname": name})  # an error when it was taken: well
            raise

    def _let_go(self, disk: Disk) -> None:
        """Of what was behind the device."""
        if disk.plug.mode == "nbd":
            self._qmp.command("blockdev-del", {"node-name": disk.node})
        else:
            self._qmp.command("chardev-remove", {"id": f"vhost{disk.slot}"})

    # -- what QEMU says

    def on_qmp(self, name: str, data: dict[str, Any]) -> None:
        """An event of QEMU's."""
        if name == "DEVICE_DELETED":
            self._deleted(str(data.get("device", "")))
        elif name == "DEVICE_UNPLUG_GUEST_ERROR":
            self._refused(str(data.get("device", "")))

    def _deleted(self, device: str) -> None:
        disk = self._by_device(device)
        if disk is not None:
            del self._disks[disk.slot]
            self._let_go(disk)
            disk.state = "detached"
            self._tell("machine.disk", disk.status())

    def _refused(self, device: str) -> None:
        disk = self._by_device(device)
        if disk is not None:
            disk.state = "attached"
            self._tell("machine.disk", disk.status() | {"reason": "the guest did not let go"})

    def _by_device(self, device: str) -> Disk | None:
        return next((d for d in self._disks.values() if f"disk{d.slot}" == device), None)
