"""The runtime image: hashed, then mounted read-only through the descriptor that was hashed."""

import errno
import fcntl
import os
import struct

from supercloud.lower.core import system
from supercloud.lower.core.manifest import Sealed
from supercloud.lower.core.measure import hash_descriptor
from supercloud.model.errors import Invalid

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CONFIG = struct.Struct("<II48xII224x")  # descriptor, block size, info: .., flags, ..
_READ_ONLY, _AUTOCLEAR = 1, 4
_FLAGS = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV


def mount_runtime(runtime: Sealed, target: str) -> str:
    """Mount the image (or, for tests, show a directory) at ``target``; its SHA-256 or zeros."""
    os.mkdir(target)
    if not runtime.sha256:
        system.bind(runtime.path, target, _FLAGS)
        return "0" * 64
    descriptor = os.open(runtime.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        digest = hash_descriptor(descriptor)
        if digest != runtime.sha256:
            raise Invalid(f"{runtime.path} has the hash {digest}", where="manifest.runtime")
        _mount_file(descriptor, target)
    finally:
        os.close(descriptor)
    return digest


def _mount_file(descriptor: int, target: str) -> None:
    """Mount the file itself where the kernel can (Linux 6.12), a loop device of it elsewhere."""
    try:
        system.mount(f"/proc/self/fd/{descriptor}", target, "erofs", _FLAGS)
    except OSError as error:
        if error.errno not in (errno.ENOTBLK, errno.EINVAL, errno.ENOSYS):
            raise
        device = _loop_device(descriptor)
        try:
            system.mount(f"/proc/self/fd/{device}", target, "erofs", _FLAGS)
        finally:
            os.close(device)  # the mount holds it; it clears itself when unmounted


def _loop_device(descriptor: int) -> int:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                flags = _READ_ONLY | _AUTOCLEAR
                fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(descriptor, 0, 0, flags))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody was faster
                    raise
            else:
                return device
    finally:
        os.close(control)
