"""QEMU's arguments for a nested VM, as far as they go by what it is and nothing else."""

import math
import os
from collections.abc import Callable

from supercloud.model.emulation import EMULATED_CPU
from supercloud.upper.platform.agent.accelerator import KVM
from supercloud.upper.platform.agent.volumes import Claim
from supercloud.wire.messages import EnvironmentSpec

SERIAL_BYTES = 20
TRANSLATION_CACHE_MIB = 64
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def serial(volume: str) -> str:
    """How a guest knows a volume: all of the name that a virtio disk's serial takes."""
    return volume.encode()[:SERIAL_BYTES].decode("utf-8", "ignore")


def node(claim: Claim) -> str:
    """QEMU's name for it, which has at most 31 bytes."""
    return f"volume-{serial(claim.volume)}"


def volume(claim: Claim, give: Callable[[int], int], fdset: int) -> list[str]:
    """A disk of the platform as one of the machine, past the platform's cache."""
    # alone with it if it may write: the kernel then lets nobody mount it meanwhile
    access = os.O_RDONLY if claim.read_only else os.O_RDWR | os.O_EXCL
    disk = give(os.open(claim.disk.device, access | os.O_DIRECT | os.O_CLOEXEC))
    name, read_only = node(claim), "on" if claim.read_only else "off"
    driver = f"driver=host_device,node-name={name},filename=/dev/fdset/{fdset}"
    return [
        "-add-fd", f"fd={disk},set={fdset}",
        "-blockdev", f"{driver},read-only={read_only},cache.direct=on,discard=unmap",
        "-device", f"virtio-blk-pci,drive={name},serial={serial(claim.volume)}",
    ]  # fmt: skip


def memory_mib(spec: EnvironmentSpec) -> int:
    """Of the guest."""
    return max(spec.memory_bytes // (1 << 20), 16)


def base(spec: EnvironmentSpec, accelerator: str) -> list[str]:
    """The machine without its disks and networks."""
    if accelerator == KVM:
        engine = ["-accel", "kvm", "-cpu", "host"]
    else:
        engine = ["-accel", f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"]
        engine += ["-cpu", EMULATED_CPU]
    return [
        "qemu-system-x86_64", "-name", spec.name, "-nodefaults", "-no-user-config",
        "-display", "none", "-L", "/usr/share/qemu", "-L", "/usr/share/seabios",
        "-machine", "pc,usb=off,hpet=off,vmport=off", *engine,
        "-smp", str(max(1, math.ceil(spec.cpus))), "-m", f"{memory_mib(spec)}M",
        # out of the kernel's generator: QEMU's own would be the same in all clones of a template
        "-object", "rng-random,id=random,filename=/dev/urandom",
        # asked once: an interrupt line does, and a guest of ours has less to set up
        "-device", "virtio-rng-pci,rng=random,vectors=0", "-sandbox", _SANDBOX,
    ]  # fmt: skip
