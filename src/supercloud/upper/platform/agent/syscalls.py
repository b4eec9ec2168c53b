"""Linux calls that the standard library lacks, each as one function that raises OSError."""

import ctypes
import fcntl
import os
import struct
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWNET: Final = 0x4000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 1024, 4096
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2
RESOLVE_IN_ROOT: Final = 0x10

_SYS_PIVOT = {"open_tree": 428, "move_mount": 429, "openat2": 437, "mount_setattr": 442}
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_IDMAP = 1, 2, 4, 0x10_0000
_POWER_OFF = 0x4321FEDC
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(name: str, *arguments: object) -> int:
    return _checked(int(_LIBC.syscall(_SYS_PIVOT[name], *arguments)), name)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount; see the manual page in section 2."""
    result = _LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _checked(result, f"mount {kind or source} on {target}")


def unmount(target: str) -> bool:
    """Detach the mount at ``target``; False when there is none."""
    if _LIBC.umount2(target.encode(), MNT_DETACH) == 0:
        return True
    number = ctypes.get_errno()
    if number in (22, 2):  # EINVAL: not a mount point; ENOENT
        return False
    raise OSError(number, f"unmount {target}: {os.strerror(number)}")


def mount_idmapped(
    source: str, target: str, user_namespace: int, *, read_only: bool = True
) -> None:
    """A view of the mount at ``source``, at ``target``, owners shifted as mapped there.

    ``user_namespace`` is a descriptor.
    """
    tree = _call(
        "open_tree", _AT_FDCWD, source.encode(), ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    )
    try:
        attributes = _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_NODEV
        attributes |= _MOUNT_ATTR_RDONLY if read_only else 0
        wanted = struct.pack("=QQQQ", attributes, 0, 0, user_namespace)
        _call(
            "mount_setattr", tree, b"", ctypes.c_uint(_AT_EMPTY_PATH), wanted,
            ctypes.c_size_t(len(wanted)),
        )  # fmt: skip
        flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
        _call("move_mount", tree, b"", _AT_FDCWD, target.encode(), flags)
    finally:
        os.close(tree)


def sync_file_system(place: str) -> None:
    """Return when all that was written to the file system of ``place`` is on its disk."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _checked(int(_LIBC.syncfs(descriptor)), f"sync {place}")
    finally:
        os.close(descriptor)


def freeze_file_system(descriptor: int) -> None:
    """Write all of it to its disk, and let nothing change until it is thawed; ``FIFREEZE``."""
    fcntl.ioctl(descriptor, _FIFREEZE, 0)


def thaw_file_system(descriptor: int) -> None:
    """EINVAL when it is not frozen; ``FITHAW``."""
    fcntl.ioctl(descriptor, _FITHAW, 0)


def open_in_root(root: int, path: str, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` as somebody would whose ``/`` is the directory ``root``: no link leads out."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT)
    return _call("openat2", root, path.encode(), how, ctypes.c_size_t(len(how)))


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags say for new ones."""
    _checked(_LIBC.unshare(flags), "unshare")


def set_namespace(descriptor: int, kind: int) -> None:
    """setns(2), for the calling thread."""
    _checked(_LIBC.setns(descriptor, kind), "setns")


def power_off() -> None:
    """Switch the machine off at once; sync before."""
    _checked(_LIBC.reboot(ctypes.c_int(_POWER_OFF)), "reboot")
