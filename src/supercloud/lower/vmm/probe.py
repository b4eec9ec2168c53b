"""Which accelerator really works here: starts a guest under KVM and sees whether it comes up.

A device node proves nothing: some hosts' KVM opens and then refuses or hangs an ordinary kernel.
So the L1 kernel itself is booted without a disk; KVM works when that kernel gets as far as missing
its root. QEMU runs in a sandbox like that of a machine's domain, with nothing but /dev/kvm.
"""

import os
import select
import signal
import time
from dataclasses import dataclass
from typing import Final, NoReturn

from supercloud.isolation import seccomp
from supercloud.lower.core import manifest, sandbox, system
from supercloud.lower.vmm.machine import FIRMWARE, QEMU

KVM: Final = "/dev/kvm"
PATIENCE_S: Final = 4.0
REACHED: Final = b"VFS: Unable to mount root fs"
ACCELERATION: Final = ("-accel", "kvm", "-cpu", "host")
_KERNEL_DESCRIPTOR: Final = 4
_MAX_OUTPUT_BYTES: Final = 256 << 10
_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class Accelerator:
    """``name`` is kvm or tcg; ``reason`` says why not kvm (empty for kvm)."""

    name: str
    reason: str


def probe(runtime: str, runtime_sha256: str, kernel: int, uid: int, owner_uid: int) -> Accelerator:
    """Start a guest of ``kernel`` (an open memory file) under KVM. Needs uid 0; takes seconds."""
    if not os.path.exists(KVM):
        return Accelerator("tcg", f"{KVM} is not there")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _in_child((runtime, runtime_sha256), kernel, (uid, owner_uid), writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as verdict:
        said = verdict.read()
    os.waitpid(pid, 0)
    reason = said.decode("utf-8", "replace") or "the probe ended without a word"
    return Accelerator("kvm", "") if reason == "kvm" else Accelerator("tcg", reason)


def _in_child(
    sealed: tuple[str, str], kernel: int, uids: tuple[int, int], verdict: int
) -> NoReturn:
    """In a mount namespace of its own: run the guest, write ``kvm`` or why not, and end."""
    try:
        system.call("unshare", system.CLONE_NEWNS)
        system.mount("", "/", "", system.MS_REC | system.MS_PRIVATE)
        flags = system.MS_NOSUID | system.MS_NODEV
        system.mount("probe", sandbox.STAGE, "tmpfs", flags, "mode=0711,size=1m")
        os.mkdir(sandbox.ROOTS, 0o711)
        sandbox.mount_runtime(*sealed)
        os.write(verdict, _run_guest(kernel, uids).encode())
    except BaseException as error:  # noqa: BLE001 - a forked child must not unwind further
        os.write(verdict, f"the probe could not be made: {error}".encode())
    finally:
        os._exit(0)


def _run_guest(kernel: int, uids: tuple[int, int]) -> str:
    reading, writing = os.pipe()
    _, pidfd = sandbox.start(_plan(kernel, uids, writing), lambda *_: None, name="probe")
    os.close(writing)
    try:
        output, in_time = _read_until(reading, time.monotonic() + PATIENCE_S)
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    return "kvm" if REACHED in output else _why(output, in_time=in_time)


def _plan(kernel: int, uids: tuple[int, int], output: int) -> sandbox.Plan:
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    argv = _command_line()
    return sandbox.Plan(
        kind=_kind(argv),
        argv=argv,
        environment={"PATH": "/usr/bin"},
        uid=uids[0],
        owner_uid=uids[1],
        binds=(),
        descriptors=[null, kernel],
        output=output,
    )


def _command_line() -> list[str]:
    return [
        QEMU,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-L", FIRMWARE[0], "-L", FIRMWARE[1]),
        *("-M", "q35,usb=off,sata=off,smbus=off,hpet=off,vmport=off"),
        *(*ACCELERATION, "-m", "192M", "-smp", "1"),
        *("-kernel", f"/proc/self/fd/{_KERNEL_DESCRIPTOR}"),
        *("-append", "console=ttyS0 panic=-1"),
        *("-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out"),
    ]


def _kind(argv: list[str]) -> manifest.Kind:
    """The same as a machine's domain, as far as a probe needs it."""
    filter_ = seccomp.compiled("vmm")[0].hex()
    return manifest.Kind(tuple(argv), filter_, devices=(KVM,), proc=True)


def _read_until(descriptor: int, deadline_s: float) -> tuple[bytes, bool]:
    """Output up to what is hoped for, or the end; False when the time was over first."""
    output = b""
    while REACHED not in output and len(output) < _MAX_OUTPUT_BYTES:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([descriptor], [], [], left_s)[0]:
            return output, False
        more = os.read(descriptor, 1 << 16)
        if not more:
            break
        output += more
    return output, True


def _why(output: bytes, *, in_time: bool) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    last = "".join(c for c in (lines[-1] if lines else "nothing") if c.isprintable())[:_SHOWN]
    if in_time:
        return f"a guest under KVM ended before its kernel was up: {last}"
    return f"a guest under KVM was not up within {PATIENCE_S:g} s; it said: {last}"
