"""A guest of the L1 image that runs a script of ours instead of the agent.

The script travels in a second cpio archive behind the image's own initrd: the kernel unpacks both,
so the image itself stays as it is and has no hook for such things.
"""

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from supercloud.model.emulation import EMULATED_CPU
from supercloud.upper.platform.image.tools import ToolTree

BUILD = Path(__file__).parents[2] / "build"
IMAGES = BUILD / "images"
END = re.compile(r"GUEST-END (\d+)")

# As the field notes measured: the trimmed machine that boots fastest under TCG.
MACHINE = (
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-M",
    "q35,usb=off,sata=off,smbus=off,hpet=off,vmport=off",
    "-accel",
    "tcg,thread=multi,tb-size=128",
    "-cpu",
    EMULATED_CPU,
)


@dataclass(frozen=True, slots=True)
class Guest:
    """What to boot. ``disks`` maps virtio-blk serial -> file, read-only."""

    script: str
    disks: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    memory_mib: int = 1024
    cpus: int = 1
    extra: Sequence[str] = ()
    images: Path = IMAGES


def cpio(entries: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A newc archive of ``path -> (mode, content)``."""
    out = io.BytesIO()
    for number, (path, (mode, data)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], 1):
        name = path.encode() + b"\0"
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        out.write(b"070701" + b"".join(b"%08X" % value for value in numbers) + name)
        out.write(b"\0" * (-out.tell() % 4) + data)
        out.write(b"\0" * (-out.tell() % 4))
    return out.getvalue()


def initrd(guest: Guest) -> bytes:
    """The image's initrd, and behind it ours: the same first program, another last step."""
    boot = (
        resources.files("supercloud.upper.platform.image").joinpath("files/boot-init").read_text()
    )
    last = "exec switch_root /newroot /usr/sbin/l1init"
    if last not in boot:
        raise AssertionError("the image's boot-init has changed; change this too")
    boot = boot.replace(last, "cp -a /guest /newroot/guest\nexec switch_root /newroot /guest/run")
    entries = {"guest": (0o040755, b""), "guest/run": (0o100755, guest.script.encode())}
    entries |= {f"guest/{name}": (0o100755, data) for name, data in guest.files.items()}
    entries["init"] = (0o100755, boot.encode())
    return (guest.images / "initrd").read_bytes() + cpio(entries)


def argv(guest: Guest, initrd_file: Path, tools: ToolTree) -> list[str]:
    """QEMU's command line, the serial console on stdout."""
    command = [*tools.argv("qemu-system-x86_64"), *MACHINE]
    command += ["-m", f"{guest.memory_mib}M", "-smp", str(guest.cpus), "-serial", "stdio"]
    command += ["-kernel", str(guest.images / "vmlinux"), "-initrd", str(initrd_file)]
    command += ["-append", "console=ttyS0 rdinit=/init panic=-1 quiet"]
    for serial, path in {"l1root": guest.images / "root.erofs", **guest.disks}.items():
        drive = f"driver=raw,node-name={serial},read-only=on,file.driver=file,file.filename={path}"
        command += ["-blockdev", drive, "-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
    return [*command, *guest.extra]


PRELUDE = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8
mkdir -p /dev/pts /dev/shm /mnt
mount -t devpts -o gid=0,mode=0620,ptmxmode=0666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
mount -t tmpfs -o nosuid,nodev tmpfs /tmp
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /run
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
echo "+cpuset +cpu +io +memory +pids" > /sys/fs/cgroup/cgroup.subtree_control
ip link set lo up
disk() { for d in /sys/block/vd*; do [ "$(cat $d/serial)" = "$1" ] && echo /dev/${d##*/}; done; }
end() { echo "GUEST-END $1"; sync; poweroff -f; sleep 60; }
"""


def run(guest: Guest, *, timeout_s: float = 300.0) -> tuple[int, str]:
    """Boot, run ``PRELUDE`` and the script, power off: the script's status and what it printed."""
    whole = Guest(
        script=f"{PRELUDE}(\n{guest.script}\n) 2>&1; end $?\n",
        disks=guest.disks,
        files=guest.files,
        memory_mib=guest.memory_mib,
        cpus=guest.cpus,
        extra=guest.extra,
        images=guest.images,
    )
    with tempfile.NamedTemporaryFile() as file:
        file.write(initrd(whole))
        file.flush()
        done = subprocess.run(
            argv(whole, Path(file.name), ToolTree()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    output = done.stdout.decode(errors="replace").replace("\r", "")
    ended = END.search(output)
    return (int(ended[1]) if ended else 255), output
