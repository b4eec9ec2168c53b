"""An encrypted view of a disk, by device-mapper's own ioctls (linux/dm-ioctl.h).

No other program sees the key: it goes from ``getrandom`` straight into the kernel's table.
"""

import fcntl
import os
import struct

SECTOR_BYTES = 512
KEY_BYTES = 64  # AES-256 in XTS takes two keys
_CONTROL = "/dev/mapper/control"
_HEAD = struct.Struct("=3I2IIiIIIQ128s129s7s")
_TARGET = struct.Struct("=QQiI16s")
_BUFFER_BYTES = 4096
_CREATE, _REMOVE, _SUSPEND, _TABLE_LOAD, _MESSAGE = 3, 4, 6, 9, 14
_SECURE_DATA = 1 << 15  # the kernel wipes its copy of the buffer
_STOP = 1 << 1  # of _SUSPEND; without it that means resume
_BLKGETSIZE64 = 0x8008_1272


def _ioctl(
    control: int, command: int, name: str, given: bytes = b"", targets: int = 0, flags: int = 0
) -> int:
    """One device-mapper call; the device number of ``name``."""
    flags |= _SECURE_DATA
    head = _HEAD.pack(4, 0, 0, _BUFFER_BYTES, _HEAD.size, targets, 0, flags, 0, 0, 0,
                      name.encode(), b"", b"")  # fmt: skip
    buffer = bytearray(_BUFFER_BYTES)
    buffer[: len(head) + len(given)] = head + given
    request = 3 << 30 | _HEAD.size << 16 | 0xFD << 8 | command
    fcntl.ioctl(control, request, buffer)  # in place
    return int(_HEAD.unpack_from(buffer)[10])


def size_bytes(device: str) -> int:
    """How big a block device is."""
    with open(device, "rb") as file:
        answer = fcntl.ioctl(file, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("=Q", answer)[0])


def crypt(name: str, device: str, size: int) -> str:
    """Map the first ``size`` bytes of ``device`` as ``/dev/dm-N``, under a fresh random key.

    Returns that path.

    ``no_read_workqueue`` and its sibling save a hop to another thread per request.
    """
    sectors = size // SECTOR_BYTES
    key = os.urandom(KEY_BYTES).hex()
    options = "3 allow_discards no_read_workqueue no_write_workqueue"
    text = f"aes-xts-plain64 {key} 0 {device} 0 {options}\0".encode()
    text += bytes(-len(text) % 8)
    table = _TARGET.pack(0, sectors, 0, _TARGET.size + len(text), b"crypt") + text
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        number = _ioctl(control, _CREATE, name)
        _ioctl(control, _TABLE_LOAD, name, table, 1)
        _ioctl(control, _SUSPEND, name)
    finally:
        os.close(control)
    return f"/dev/dm-{os.minor(number)}"


def forget_key(name: str) -> None:
    """Have the kernel overwrite the key of a mapping; who uses it waits until it has one again.

    What a file system on it has not written yet is written first.
    """
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        _ioctl(control, _SUSPEND, name, flags=_STOP)
        _tell(control, name, "key wipe")
    finally:
        os.close(control)


def new_key(name: str) -> None:
    """A fresh random key for a mapping, which goes on if it stood still."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        _ioctl(control, _SUSPEND, name, flags=_STOP)
        _tell(control, name, f"key set {os.urandom(KEY_BYTES).hex()}")
        _ioctl(control, _SUSPEND, name)
    finally:
        os.close(control)


def _tell(control: int, name: str, message: str) -> None:
    """Something to the only target of a mapping."""
    _ioctl(control, _MESSAGE, name, struct.pack("=Q", 0) + message.encode() + b"\0")


def remove(name: str) -> None:
    """Take a mapping that nobody uses away, its key with it."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        _ioctl(control, _REMOVE, name)
    finally:
        os.close(control)


def find(name: str) -> str:
    """The path of a mapping that is there already, or an empty text."""
    for entry in os.listdir("/sys/block"):
        if entry.startswith("dm-"):
            with open(f"/sys/block/{entry}/dm/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{entry}"
    return ""
