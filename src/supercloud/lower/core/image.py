"""The runtime image: hashed, then mounted read-only through the descriptor that was hashed."""

import errno
import fcntl
import os
import struct

from supercloud.lower.core import system
from supercloud.lower.core.manifest import Sealed
from supercloud.lower.core.measure import ZERO, hash_descriptor
from supercloud.model.errors import Invalid

_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LOOP_CONFIG = struct.Struct("<II48xII240x")  # descriptor, block size, info: .., flags, ..
_READ_ONLY, _AUTOCLEAR = 1, 4
_FLAGS = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV


def mount_runtime(runtime: Sealed, target: str) -> str:
    """Mount the image (or, for tests, show a directory) at ``target``; its SHA-256 or zeros."""
    os.mkdir(target)
    if runtime.sha256 is None:
        system.bind(runtime.path, target, _FLAGS)
        return ZERO
    descriptor = os.open(runtime.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        digest = hash_descriptor(descriptor)
        if digest != runtime.sha256:
            raise Invalid(f"{runtime.path} has the hash {digest}", where="manifest.runtime")
        try:
            system.mount(f"/proc/self/fd/{descriptor}", target, "erofs", _FLAGS)
        except OSError as error:
            if error.errno not in (errno.ENOTBLK, errno.EINVAL, errno.ENOSYS):
                raise
            mount_by_loop(descriptor, target)  # Linux before 6.12 mounts block devices only
    finally:
        os.close(descriptor)
    return digest


def mount_by_loop(descriptor: int, target: str) -> None:
    """Mount the file through a loop device, which goes when it is unmounted."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    device = -1
    try:
        while device < 0:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            config = _LOOP_CONFIG.pack(descriptor, 0, 0, _READ_ONLY | _AUTOCLEAR)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                os.close(device)  # somebody was faster
                device = -1
        system.mount(f"/proc/self/fd/{device}", target, "erofs", _FLAGS)
    finally:
        os.close(control)
        if device >= 0:
            os.close(device)
