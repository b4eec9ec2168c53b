"""What QEMU is given, opened: capabilities of this domain's table, and what is made here for it."""

import fcntl
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from supercloud.lower.client import Core
from supercloud.lower.vmm.machine import Descriptors, Machine
from supercloud.model.errors import Invalid

# By the machine's start: what is taken from the table as it is, and what for reading only.
_TAKEN: Final = {
    "boot": ("ram", "uplink", "link"),
    "template": ("ram",),
    "clone": ("uplink", "link"),
    "restore": ("uplink", "link"),
}
_READ_ONLY: Final = {
    "boot": ("kernel", "initrd", "root", "config"),
    "template": ("kernel", "initrd", "root", "config"),
    "clone": ("ram", "state", "root", "config"),
    "restore": ("ram", "state", "root", "config"),
}
_SPOKEN: Final = ("qmp", "console", "identity")
_CABLES: Final = ("uplink", "link")


@dataclass(frozen=True, slots=True)
class Gathered:
    """``numbers`` are QEMU's; the sockets are our ends. ``state`` is a template's, ours to read.

    ``cables`` are the far ends of a template's networks: nobody is there, but the cable is in.
    """

    numbers: Descriptors
    qmp: socket.socket
    console: socket.socket
    identity: socket.socket
    cables: tuple[socket.socket, ...] = ()
    state: int = -1


def gather(core: Core, machine: Machine, sent: list[int], opened: ExitStack) -> Gathered:
    """Open all of it; QEMU's ends are closed with ``opened``. Invalid: no scratch disk was sent."""
    numbers = {name: _taken(core, name, opened) for name in _TAKEN[machine.start]}
    numbers |= {name: _read_only(core, name, opened) for name in _READ_ONLY[machine.start]}
    ours, cables, state = {}, [], -1
    for name in _SPOKEN:
        ours[name], numbers[name] = _pair(opened)
    if machine.start == "template":
        state = os.memfd_create("state", os.MFD_CLOEXEC)
        numbers["state"] = _reopened(state, os.O_WRONLY, opened)
        numbers["scratch"] = sent[0] if sent else _blank(machine.scratch_bytes, opened)
        for name in _CABLES:
            cable, numbers[name] = _pair(opened)
            cables.append(cable)
    elif len(sent) == 1:
        numbers["scratch"] = sent[0]
    else:
        raise Invalid("the scratch disk's descriptor is missing")
    return Gathered(Descriptors(**numbers), cables=tuple(cables), state=state, **ours)


def _blank(size_bytes: int, opened: ExitStack) -> int:
    """A disk of the right size that a template's guest finds and leaves alone."""
    descriptor = os.memfd_create("scratch", os.MFD_CLOEXEC)
    opened.callback(os.close, descriptor)
    os.ftruncate(descriptor, size_bytes)
    return descriptor


def _pair(opened: ExitStack) -> tuple[socket.socket, int]:
    ours, theirs = socket.socketpair()
    opened.callback(theirs.close)
    return ours, theirs.fileno()


def _taken(core: Core, name: str, opened: ExitStack) -> int:
    descriptor = core.take(core.lookup(name).selector)
    opened.callback(os.close, descriptor)
    return descriptor


def _read_only(core: Core, name: str, opened: ExitStack) -> int:
    """The same file, open for reading only: QEMU wants a disk's descriptor to say so."""
    descriptor = _taken(core, name, opened)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return descriptor
    return _reopened(descriptor, os.O_RDONLY, opened)


def _reopened(descriptor: int, access: int, opened: ExitStack) -> int:
    again = os.open(f"/proc/self/fd/{descriptor}", access | os.O_CLOEXEC)
    opened.callback(os.close, again)
    return again
