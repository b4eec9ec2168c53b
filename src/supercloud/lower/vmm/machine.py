"""A platform's machine: what it is (``Machine``), and QEMU's command line for it.

QEMU gets nothing but descriptors: its disks as fdsets, RAM, kernel and initrd by /proc/self/fd,
network and monitor as connected sockets. The machine is q35 without what a platform does not use,
with free PCIe root ports, since templates freeze the topology.

``start`` says how it comes to life. ``boot``: by its kernel, RAM shared. ``template``: also, but
its agent waits for an identity, to be saved then. ``clone``: out of a saved one: RAM is a private
view of the template's, which nobody can write to, and there is no kernel. ``restore``: likewise,
out of a checkpoint of the same machine. Devices are the same in all of them. Over the port
``identity`` a clone is told who it is.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from supercloud.model.emulation import EMULATED_CPU
from supercloud.wire.codec import Limit, Text
from supercloud.wire.lease import Lease
from supercloud.wire.places import VOLUME_SLOTS

QEMU = "/usr/bin/qemu-system-x86_64"
FIRMWARE = ("/usr/share/seabios", "/usr/share/qemu")
FREE_ROOT_PORTS = VOLUME_SLOTS
TRANSLATION_CACHE_MIB = 128
IDENTITY_PORT = "supercloud.identity"
STATE_SET = 9
"""QEMU's name (an fdset) for the file with the devices' state."""
# Beside the console: what a kernel need not try in a virtual machine; a fifth of its boot.
# jitterentropy tests itself for a tenth of a second; only FIPS would ask it for anything.
KERNEL_ARGUMENTS = (
    "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check noreplace-smp cryptomgr.notests "
    "rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1 "
    "initcall_blacklist=jent_mod_init"
)
WAITS_FOR_IDENTITY = "supercloud.start=template"
_MAC = r"([0-9a-f]{2}:){5}[0-9a-f]{2}"

Start = Literal["boot", "template", "clone", "restore"]
PRIVATE: Final = ("clone", "restore")
"""Starts whose RAM is a private view of a sealed object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a monitor is asked to run.

    ``scratch_bytes`` is for a template, which has no disk, ``lease`` for a clone, which is told it.
    """

    name: Text
    cpus: Annotated[int, Limit(ge=1, le=64)]
    memory_bytes: Annotated[int, Limit(ge=64 << 20, le=1 << 42)]
    accelerator: Literal["kvm", "tcg"]
    uplink_mac: Annotated[str, Limit(pattern=_MAC)]
    link_mac: Annotated[str, Limit(pattern=_MAC)]
    start: Start = "boot"
    scratch_bytes: Annotated[int, Limit(ge=0, le=1 << 45)] = 0
    lease: Lease | None = None

    @property
    def ram_shared(self) -> bool:
        """Whether others that have the RAM's descriptor see what the guest writes."""
        return self.start not in PRIVATE


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Numbers of open descriptors, as QEMU inherits them; -1 for what the start does without.

    ``state`` is written by a template, read by a clone.
    """

    ram: int
    root: int
    config: int
    scratch: int
    uplink: int
    link: int
    qmp: int
    console: int
    identity: int
    kernel: int = -1
    initrd: int = -1
    state: int = -1

    def all(self) -> list[int]:
        """Every one that is there."""
        return [n for name in self.__slots__ if (n := getattr(self, name)) >= 0]


def command_line(machine: Machine, given: Descriptors) -> list[str]:
    """The whole argv."""
    return [
        QEMU,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-L", FIRMWARE[0], "-L", FIRMWARE[1]),
        *_platform(machine, given),
        *_disk("l1root", given.root, 1, read_only=True),
        *_disk("config", given.config, 2, read_only=True),
        *_disk("scratch", given.scratch, 3, read_only=False),
        *_nic("uplink", machine.uplink_mac, given.uplink),
        *_nic("link", machine.link_mac, given.link),
        *_extras(given),
        *_START[machine.start](given),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
    ]


def _platform(machine: Machine, given: Descriptors) -> list[str]:
    tcg = f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"
    is_kvm = machine.accelerator == "kvm"
    size, access = machine.memory_bytes, _RAM_ACCESS[machine.start]
    return [
        *("-M", "q35,usb=off,sata=off,smbus=off,hpet=off,vmport=off,memory-backend=ram"),
        *("-accel", "kvm" if is_kvm else tcg),
        *("-cpu", "host" if is_kvm else EMULATED_CPU),  # both show svm or vmx to the guest
        *("-smp", str(machine.cpus), "-m", f"{size >> 10}K"),
        *(
            "-object",
            f"memory-backend-file,id=ram,size={size},mem-path={_path(given.ram)},{access}",
        ),
        *("-name", machine.name.replace(",", ",,")),
    ]


def _disk(serial: str, descriptor: int, fdset: int, *, read_only: bool) -> list[str]:
    file = {"driver": "file", "filename": f"/dev/fdset/{fdset}", "read-only": read_only}
    file |= {"locking": "off"} if read_only else {"discard": "unmap"}
    node: dict[str, Any] = {"driver": "raw", "node-name": serial, "read-only": read_only}
    node |= {"file": file} if read_only else {"file": file, "discard": "unmap"}
    return [
        *("-add-fd", f"fd={descriptor},set={fdset}"),
        *("-blockdev", json.dumps(node)),
        *("-device", f"virtio-blk-pci,drive={serial},serial={serial}"),
    ]


def _nic(name: str, mac: str, descriptor: int) -> list[str]:
    return [
        *("-netdev", f"stream,id={name},server=off,addr.type=fd,addr.str={descriptor}"),
        *("-device", f"virtio-net-pci,netdev={name},mac={mac},romfile="),
    ]


def _extras(given: Descriptors) -> list[str]:
    ports = (
        ("-device", f"pcie-root-port,id=free{n},chassis={n + 1},slot={n + 1}")
        for n in range(FREE_ROOT_PORTS)
    )
    return [
        *(word for port in ports for word in port),
        *("-device", "virtio-rng-pci", "-device", "pvpanic"),
        *("-chardev", f"socket,id=identity,fd={given.identity}", "-device", "virtio-serial-pci"),
        *("-device", f"virtserialport,chardev=identity,name={IDENTITY_PORT}"),
        *("-chardev", f"socket,id=console,fd={given.console}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={given.qmp}", "-mon", "chardev=qmp,mode=control"),
    ]


def _boot(given: Descriptors, arguments: str = KERNEL_ARGUMENTS) -> list[str]:
    kernel = ("-kernel", _path(given.kernel), "-initrd", _path(given.initrd))
    return [*kernel, "-append", arguments]


def _boot_template(given: Descriptors) -> list[str]:
    return [*_boot(given, f"{KERNEL_ARGUMENTS} {WAITS_FOR_IDENTITY}"), *_state(given)]


def _clone(given: Descriptors) -> list[str]:
    """Told over QMP where the state is, once it knows that RAM is not part of it."""
    return [*_state(given), "-incoming", "defer"]


def _restore(given: Descriptors) -> list[str]:
    """As a clone, but left stopped; the state has no machine's description before it."""
    return [*_clone(given), "-S", "-global", "migration.send-configuration=off"]


def _state(given: Descriptors) -> list[str]:
    return ["-add-fd", f"fd={given.state},set={STATE_SET}"]


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


_START = {"boot": _boot, "template": _boot_template, "clone": _clone, "restore": _restore}
_RAM_ACCESS = {
    "boot": "share=on",
    "template": "share=on",
    "clone": "share=off,readonly=on,rom=off",  # pages that it writes are its own
    "restore": "share=off,readonly=on,rom=off",
}
