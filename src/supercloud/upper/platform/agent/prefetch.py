"""Asks the kernel to read what engines run from, before they are started.

A program that is mapped from a cold disk is read by one small request per fault, each of which
its thread waits for; read-ahead of the whole file is a few large ones that nobody waits for. QEMU
is no such case: of its 80 MB with libraries it touches an eighth, and an emulated platform was
half a second sooner there without.
"""

import contextlib
import os

_LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_CONTAINER_LIBRARIES = (
    "libseccomp.so.2", "libcap.so.2", "libyajl.so.2", "libsystemd.so.0", "libnftables.so.1",
    "libmnl.so.0", "libnftnl.so.11", "libxtables.so.12", "libgmp.so.10", "libext2fs.so.2",
    "libblkid.so.1", "libdbus-1.so.3", "libnetfilter_conntrack.so.3",
)  # fmt: skip
CONTAINERS = (
    *(f"{_LIBRARIES}/{name}" for name in _CONTAINER_LIBRARIES),
    "/usr/bin/crun", "/usr/sbin/nft", "/usr/sbin/mke2fs", "/usr/sbin/dnsmasq",
)  # fmt: skip
ENROLMENT = (
    "/usr/bin/openssl", f"{_LIBRARIES}/libcrypto.so.3", f"{_LIBRARIES}/libssl.so.3",
    "/usr/bin/busybox",
)  # fmt: skip


def prefetch(*files: str) -> int:
    """Begin reading the files that are there; how many that were."""
    found = 0
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                found += 1
            finally:
                os.close(descriptor)
    return found


def read_tree(place: str, limit_bytes: int) -> None:
    """Read the files below ``place`` into the page cache, until so many bytes have been read."""
    for directory, _, names in os.walk(place):
        for name in sorted(names):
            path = f"{directory}/{name}"
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            with contextlib.suppress(OSError), open(path, "rb") as file:
                while limit_bytes > 0 and (data := file.read(1 << 18)):
                    limit_bytes -= len(data)
