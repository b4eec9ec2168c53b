"""The descriptors behind portals, memory objects and semaphores."""

import fcntl
import os
import socket
from collections.abc import Callable

from supercloud.model.capability import ObjectType

PAGE_BYTES = 4096
SOCKETS = {"seqpacket": int(socket.SOCK_SEQPACKET), "stream": int(socket.SOCK_STREAM)}
_MFD_NOEXEC_SEAL = 8


def _portal(type_: int) -> list[int]:
    return [end.detach() for end in socket.socketpair(socket.AF_UNIX, type_)]


def _memory(size_bytes: int) -> list[int]:
    """A memfd whose size can't change; any holder of it may write until it is sealed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("memory", flags | _MFD_NOEXEC_SEAL)
    except OSError:  # Linux < 6.3
        descriptor = os.memfd_create("memory", flags)
    os.fchmod(descriptor, 0o666)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return [descriptor]


def _semaphore(value: int) -> list[int]:
    return [os.eventfd(value, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)]


OPEN: dict[ObjectType, Callable[[int], list[int]]] = {
    ObjectType.PORTAL: _portal,
    ObjectType.MEMORY: _memory,
    ObjectType.SEMAPHORE: _semaphore,
}


def seal(descriptor: int) -> None:
    """No more writing by anybody; OSError while it is mapped for writing."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    os.fchmod(descriptor, 0o444)


def shut_down(descriptors: list[int]) -> None:
    """End a channel for whoever holds an end of it."""
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as end:
            end.shutdown(socket.SHUT_RDWR)
