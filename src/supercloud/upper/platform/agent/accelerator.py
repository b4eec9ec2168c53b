"""Whether nested VMs can use KVM here: shown by running a guest, not by the device node's presence.

The guest is a few instructions in long mode with paging on: what nested virtualization that is
broken or pretended stumbles over. It runs in a child that is killed when it hangs.
"""

import asyncio
import ctypes
import fcntl
import mmap
import os
import signal
import struct
import time

from supercloud.model.errors import SupercloudError
from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.processes import fork, run
from supercloud.upper.platform.agent.state import read_json, write_json

TIMEOUT_S = 5.0
KVM, TCG = "kvm", "tcg"
KVM_GROUP = 0x6FFF_FFFF  # may open /dev/kvm: the engines of VMs
_CREATE_VM, _VCPU_MMAP_SIZE = 0xAE01, 0xAE04
_CREATE_VCPU, _SET_MEMORY, _RUN = 0xAE41, 0x4020AE46, 0xAE80
_GET_SREGS, _SET_SREGS, _SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
_SET_TSS, _SET_CPUID2, _GET_CPUID2 = 0xAE47, 0x4008AE90, 0xC008AE05
_EXIT_IO = 2
_MEMORY_BYTES = 0x10000
_MAGIC = 0x5C
# mov cr3,rax flushes; cpuid always exits; out 0xf4,al tells
_CODE = bytes.fromhex("0f20d8 0f22d8 31c0 0fa2 b05c e6f4 f4")
_PML4, _PDPT, _PD, _ENTRY = 0x1000, 0x2000, 0x3000, 0x8000


class Accelerator:
    """``name`` is kvm or tcg once ``probe`` is done, empty before; ``reason`` says why not kvm."""

    def __init__(self) -> None:
        self.name, self.reason = "", "not probed yet"
        self._task: asyncio.Task[None] | None = None

    async def probe(self) -> str:
        """Load the module, run the guest, once."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._probe())
        await asyncio.shield(self._task)
        return self.name

    async def _probe(self) -> None:
        try:
            saved = read_json(paths.ACCELERATOR, None)
            self.reason = await self._why_not() if saved is None else saved
            if saved is None:
                self._keep()
        except (SupercloudError, OSError) as error:
            self.reason = str(error)
        self.name = TCG if self.reason else KVM

    def _keep(self) -> None:
        """For the next agent, and for who comes out of this template."""
        if not self.reason:
            os.chown("/dev/kvm", 0, KVM_GROUP)
            os.chmod("/dev/kvm", 0o660)
        write_json(paths.ACCELERATOR, self.reason)

    async def _why_not(self) -> str:
        if not os.path.exists("/dev/kvm"):
            module = _module()
            if not module:
                return "the platform's processor has neither SVM nor VMX"
            await run("modprobe", "-q", "-a", module, timeout_s=30)
        return await run_guest()


def _module() -> str:
    """The module for this processor; empty when it cannot nest."""
    with open("/proc/cpuinfo") as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    return "kvm_amd" if "svm" in flags else "kvm_intel" if "vmx" in flags else ""


async def run_guest() -> str:
    """Empty when the guest ran; else what went wrong."""
    if not os.path.exists("/dev/kvm"):
        return "the kernel offers no /dev/kvm"
    child = fork(_guest)
    limit_s = time.monotonic() + TIMEOUT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)  # noqa: ASYNC222 -- does not wait
        if done:
            break
        if time.monotonic() > limit_s:
            os.kill(child, signal.SIGKILL)
        await asyncio.sleep(0.01)
    if os.WIFSIGNALED(status):
        return f"a guest did not come back within {TIMEOUT_S:g} s"
    return "" if os.waitstatus_to_exitcode(status) == _MAGIC else "a guest did not run as it should"


def _guest() -> int:
    """Exit status: ``_MAGIC`` when the guest wrote that to its port."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    _fill(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(machine, _SET_TSS, 0x7FFB_D000)  # any room outside the memory will do
    fcntl.ioctl(machine, _SET_MEMORY, struct.pack("=IIQQQ", 0, 0, 0, _MEMORY_BYTES, address))
    vcpu = fcntl.ioctl(machine, _CREATE_VCPU, 0)
    _long_mode(kvm, vcpu)
    state = mmap.mmap(vcpu, fcntl.ioctl(kvm, _VCPU_MMAP_SIZE, 0))
    while True:
        fcntl.ioctl(vcpu, _RUN, 0)
        reason = struct.unpack_from("=I", state, 8)[0]
        if reason != _EXIT_IO:
            return 2
        offset = int(struct.unpack_from("=Q", state, 40)[0])
        return state[offset]


def _fill(memory: mmap.mmap) -> None:
    struct.pack_into("=Q", memory, _PML4, _PDPT | 3)
    struct.pack_into("=Q", memory, _PDPT, _PD | 3)
    struct.pack_into("=Q", memory, _PD, 0x83)  # one page of 2 MiB
    memory[_ENTRY : _ENTRY + len(_CODE)] = _CODE


def _long_mode(kvm: int, vcpu: int) -> None:
    """Start in 64-bit mode: the layout of struct kvm_sregs is of linux/kvm.h."""
    table = bytearray(struct.pack("=II", 256, 0) + bytes(40 * 256))
    fcntl.ioctl(kvm, _GET_CPUID2, table)
    fcntl.ioctl(vcpu, _SET_CPUID2, table)
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, _GET_SREGS, sregs)
    code = struct.pack("=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    data = struct.pack("=QIHBBBBBBBBBB", 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    sregs[0:24] = code
    for index in range(1, 6):  # ds, es, fs, gs, ss
        sregs[24 * index : 24 * index + 24] = data
    control = 24 * 8 + 16 * 2
    struct.pack_into("=QQQQQQ", sregs, control, 0x8000_0011, 0, _PML4, 0x20, 0, 0x500)
    fcntl.ioctl(vcpu, _SET_SREGS, sregs)
    registers = [0] * 18
    registers[16], registers[17] = _ENTRY, 2
    fcntl.ioctl(vcpu, _SET_REGS, struct.pack("=18Q", *registers))


if __name__ == "__main__":  # what `doctor` of a command line runs
    print(asyncio.run(run_guest()))
