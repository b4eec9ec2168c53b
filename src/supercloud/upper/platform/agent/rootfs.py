"""A container's root: its image (erofs, shared) seen with its own ids, an overlay on it."""

import errno
import fcntl
import os
import struct
from contextlib import ExitStack

from supercloud.model.errors import Permanent
from supercloud.upper.platform.agent import paths, syscalls
from supercloud.upper.platform.agent.blobs import path_of

_READ_ONLY = syscalls.MS_RDONLY | syscalls.MS_NODEV
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LO_FLAGS = 1 | 4  # read-only, autoclear


def image_place(digest: str) -> str:
    """Where an image is mounted, once for all EEs that use it."""
    return f"{paths.IMAGES}/{os.path.basename(path_of(digest))}"


def mount_image(digest: str) -> str:
    """Mount the blob (which must be here) unless it is; return the place."""
    place = image_place(digest)
    if not os.path.ismount(place):
        os.makedirs(place, exist_ok=True)
        _mount_erofs(path_of(digest), place)
    return place


def _mount_erofs(blob: str, place: str) -> None:
    """File-backed where the kernel can (6.12), else by a loop device that goes with the mount."""
    try:
        try:
            syscalls.mount(blob, place, "erofs", _READ_ONLY)
        except OSError as error:
            if error.errno not in (errno.ENOTBLK, errno.EINVAL):  # the latter: a file in memory
                raise
            _mount_by_loop(blob, place)
    except OSError as error:
        raise Permanent(f"the image is no erofs file system: {error}") from error


def _mount_by_loop(blob: str, place: str) -> None:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    file = os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        loop = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # struct loop_config: fd, block size, loop_info64 with lo_flags at 52 of it, reserved
            config = bytearray(304)
            struct.pack_into("=II", config, 0, file, 0)
            struct.pack_into("=I", config, 8 + 52, _LO_FLAGS)
            fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            syscalls.mount(device, place, "erofs", _READ_ONLY)
        finally:
            os.close(loop)
    finally:
        os.close(file)
        os.close(control)


def mount_root(digest: str, place: str, layer: str, base_id: int) -> str:
    """Make ``place/rootfs``, ids shifted by ``base_id``; what is written there is in ``layer``.

    ``place/ns/user`` must be there. Returns the root's path; idempotent.
    """
    root, lower = f"{place}/rootfs", f"{place}/lower"
    if os.path.ismount(root):
        return root
    image = mount_image(digest)
    for path in (root, lower):
        os.makedirs(path, mode=0o711, exist_ok=True)
    upper, work = f"{layer}/upper", f"{layer}/work"
    for path in (upper, work):
        os.makedirs(path, exist_ok=True)
    os.chmod(upper, os.stat(image).st_mode & 0o7777)
    os.chown(upper, base_id, base_id)
    with ExitStack() as undo:
        namespace = os.open(f"{place}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, namespace)
        syscalls.mount_idmapped(image, lower, namespace)
        undo.callback(syscalls.unmount, lower)  # the overlay keeps its own reference
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        syscalls.mount("overlay", root, "overlay", syscalls.MS_NODEV, options)
    return root


def unmount_root(place: str) -> None:
    """Undo ``mount_root``, the layer excepted."""
    for name in ("rootfs", "lower"):
        syscalls.unmount(f"{place}/{name}")


def collect_images(used: list[str]) -> None:
    """Unmount images that no EE uses; their blobs can then be deleted."""
    keep = {image_place(digest) for digest in used}
    for name in os.listdir(paths.IMAGES):
        place = f"{paths.IMAGES}/{name}"
        if place not in keep:
            syscalls.unmount(place)
            os.rmdir(place)
