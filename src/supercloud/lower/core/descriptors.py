"""What is behind the core's objects: sockets, memory, semaphores, and the runtime image."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable

from supercloud.lower.core import system
from supercloud.lower.core.manifest import Sealed
from supercloud.lower.core.measure import ZERO, hash_descriptor
from supercloud.model.capability import ObjectType
from supercloud.model.errors import Busy, Invalid

PAGE_BYTES = 4096
SOCKETS = {"seqpacket": int(socket.SOCK_SEQPACKET), "stream": int(socket.SOCK_STREAM)}
_MFD_NOEXEC_SEAL = 8
_READ_ONLY = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV


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


OPEN: dict[ObjectType, Callable[[int], list[int]]] = {
    ObjectType.PORTAL: lambda type_: [e.detach() for e in socket.socketpair(socket.AF_UNIX, type_)],
    ObjectType.MEMORY: _memory,
    ObjectType.SEMAPHORE: lambda value: [os.eventfd(value, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)],
}


def seal(descriptor: int) -> None:
    """No more writing by anybody; nothing when it is so already. Busy."""
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        except OSError as error:
            raise Busy("it is mapped for writing somewhere") from error
    os.fchmod(descriptor, 0o444)


def close_all(descriptors: list[int], *, shut_down: bool = False) -> None:
    """Close descriptors and empty the list; a channel is ended for whoever holds an end of it."""
    while descriptors:
        if shut_down:
            with socket.socket(fileno=descriptors.pop()) as end:
                end.shutdown(socket.SHUT_RDWR)
        else:
            os.close(descriptors.pop())


def mount_runtime(runtime: Sealed, target: str) -> str:
    """Mount the image by the descriptor that was hashed (or, for tests, show a directory)."""
    os.mkdir(target)
    if runtime.sha256 is None:
        system.bind(runtime.path, target, _READ_ONLY)
        return ZERO
    with open(runtime.path, "rb") as file:
        digest = hash_descriptor(file.fileno())
        if digest != runtime.sha256:
            raise Invalid(f"{runtime.path} has the hash {digest}", where="manifest.runtime")
        try:
            system.mount(f"/proc/self/fd/{file.fileno()}", target, "erofs", _READ_ONLY)
        except OSError as error:
            if error.errno not in (errno.ENOTBLK, errno.EINVAL, errno.ENOSYS):
                raise
            mount_by_loop(file.fileno(), target)
    return digest


def mount_by_loop(descriptor: int, target: str) -> None:
    """Before Linux 6.12 only devices can be mounted: a loop device, which mount(8) sets up."""
    import subprocess  # noqa: PLC0415  costs memory, seldom needed

    options = ["--no-canonicalize", "-t", "erofs", "-o", "ro,nosuid,nodev,loop"]
    command = ["mount", *options, f"/proc/self/fd/{descriptor}", target]
    subprocess.run(command, check=True, pass_fds=[descriptor])
