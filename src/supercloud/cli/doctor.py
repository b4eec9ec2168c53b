"""``doctor``: what this machine can do, what the control plane finds, and how to mend what lacks.

The checks of this machine are those of a Lower Layer host and of a user's side. The accelerator is
tried as a platform tries its own: a guest of a few instructions. /dev/kvm may run that and still
not an ordinary kernel, which only a host has and tries.
"""

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

from supercloud.cli import client
from supercloud.cli.failure import Unavailable
from supercloud.cli.table import table
from supercloud.model.errors import STATUS
from supercloud.model.sizes import format_size
from supercloud.wire.api import Check
from supercloud.wire.codec import decode, encode

MIB, GIB = 1 << 20, 1 << 30
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 7 * GIB // 2, 9 * GIB
"""Of a machine that has room for one user with the least quota (``supercloud-host user add``)."""
CLONE_NEWUSER = 0x10000000
SYS_LANDLOCK_CREATE_RULESET = 444
LANDLOCK_VERSION = 1
KERNEL_MIN = (5, 14)  # cgroup.kill and clone3 into cgroups, with Landlock (5.13)
CONTROLLERS = ("cpu", "memory", "pids")
GUEST = "supercloud.upper.platform.agent.accelerator"
"""The program that runs the guest: what it needs is no business of this process."""
GUEST_TIMEOUT_S = 20.0
RAN = "a tiny guest ran on /dev/kvm; an ordinary kernel was not tried: supercloud-host status"
SLOWER = "virtual machines run translated (TCG), slower"
NOT_TRIED = 255


def run(arguments: argparse.Namespace) -> int:
    """Print all checks; 0 when all is well, else the status of "unsupported"."""
    checks = [*(check() for check in LOCAL), *_control_plane()]
    if arguments.json:
        print(json.dumps([encode(check) for check in checks], indent=2))
    else:
        rows = [("ok" if c.ok else "LACKS", c.name, c.found, "" if c.ok else c.fix) for c in checks]
        print(table(("", "WHAT", "FOUND", "WHAT TO DO"), rows))
    return 0 if all(check.ok for check in checks) else STATUS["unsupported"][1]


def _control_plane() -> list[Check]:
    try:
        untrusted = client.get(client.path("doctor"))
    except Unavailable as error:
        return [Check(name="control plane", ok=False, found=str(error), fix=error.hint)]
    running = Check(name="control plane", ok=True, found=f"answers on {client.socket_path()}")
    return [running, *(decode(Check, item, "doctor", ignore_unknown=True) for item in untrusted)]


def _kernel() -> Check:
    release = os.uname().release
    digits = [part for part in release.replace("-", ".").split(".") if part.isdecimal()]
    there = tuple(int(part) for part in digits[:2])
    wanted = ".".join(map(str, KERNEL_MIN))
    return Check(
        name="kernel",
        ok=there >= KERNEL_MIN,
        found=f"Linux {release}",
        fix=f"use Linux {wanted} or newer: Debian 12 has 6.1",
    )


def _user_namespaces() -> Check:
    """Whether an unprivileged process gets one, by making one."""
    reason = _in_child(_unshare_user)
    return Check(
        name="user namespaces",
        ok=not reason,
        found=reason or "work",
        fix="sysctl -w user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1",
    )


def _unshare_user() -> int:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if libc.unshare(CLONE_NEWUSER) == 0 else ctypes.get_errno()


def _in_child(function: Callable[[], int]) -> str:
    """Run where it changes nothing of ours; the text of the error number that it returns."""
    child = os.fork()
    if child == 0:
        status = NOT_TRIED
        try:
            status = function()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == NOT_TRIED:
        return "could not be tried"
    return os.strerror(status) if status > 0 else "the probe was killed" if status else ""


def _seccomp() -> Check:
    actions = _read("/proc/sys/kernel/seccomp/actions_avail")
    return Check(
        name="seccomp",
        ok="kill_process" in actions.split(),
        found="filters work" if actions else "not there",
        fix="use a kernel with CONFIG_SECCOMP_FILTER",
    )


def _landlock() -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    return Check(
        name="Landlock",
        ok=version > 0,
        found=f"ABI {version}" if version > 0 else os.strerror(ctypes.get_errno()),
        fix="boot with lsm=landlock,... and a kernel that has CONFIG_SECURITY_LANDLOCK",
    )


def _cgroups() -> Check:
    found: dict[str, str] = {}
    for line in _read("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ")[:3]
        mount = fields.split(" ")[4]
        if kind == "cgroup2":
            there = _read(os.path.join(mount, "cgroup.controllers")).split()
            found.update({name: "v2" for name in there if name in CONTROLLERS})
        elif kind == "cgroup":
            found.update({name: "v1" for name in options.split(",") if name in CONTROLLERS})
    lacking = [name for name in CONTROLLERS if name not in found]
    text = ", ".join(f"{name} {found[name]}" for name in CONTROLLERS if name in found)
    return Check(
        name="cgroups",
        ok=not lacking,
        found=text or "none",
        fix=f"mount the controllers {', '.join(lacking)}",
    )


def _file_systems() -> Check:
    there = {line.split()[-1] for line in _read("/proc/filesystems").splitlines() if line}
    lacking = [name for name in ("overlay", "tmpfs") if name not in there]
    return Check(
        name="file systems",
        ok=not lacking,
        found="overlay, tmpfs" if not lacking else f"without {', '.join(lacking)}",
        fix=f"modprobe {' '.join(lacking)}",
    )


def _kvm() -> Check:
    """No KVM is no defect: QEMU translates then, which is slower."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        found = f"/dev/kvm: {error.strerror}; {SLOWER}"
    else:
        reason = _run_guest()
        found = f"/dev/kvm opens, but {reason}; {SLOWER}" if reason else RAN
    return Check(name="accelerator", ok=True, found=found)


def _run_guest() -> str:
    """Empty when it ran, else what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", GUEST],
            capture_output=True, text=True, timeout=GUEST_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"its probe was not done within {GUEST_TIMEOUT_S:g} s"
    return done.stdout.strip() if done.returncode == 0 else "its probe failed"


def _memory() -> Check:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    there = {fields[0]: int(fields[1]) << 10 for fields in lines if len(fields) > 1}
    total, available = (there.get(f"Mem{of}:", 0) // MIB * MIB for of in ("Total", "Available"))
    return Check(
        name="memory",
        ok=available >= 2 * GIB and total >= LEAST_MEMORY_BYTES,
        found=f"{format_size(available)} of {format_size(total)} available, "
        f"{os.cpu_count()} processors",
        fix="a platform takes 1GiB, the rest about as much: free some; the least quota of a user "
        f"wants a machine of {format_size(LEAST_MEMORY_BYTES)}",
    )


def _disk() -> Check:
    disk = shutil.disk_usage("/var")
    return Check(
        name="disk",
        ok=disk.free >= 4 * GIB and disk.total >= LEAST_DISK_BYTES,
        found=f"{format_size(disk.free // MIB * MIB)} free under /var",
        fix="images and a scratch disk take about 4GiB: free some; the least quota of a user wants "
        f"a file system of {format_size(LEAST_DISK_BYTES)}",
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


LOCAL: tuple[Callable[[], Check], ...] = (
    _kernel,
    _user_namespaces,
    _seccomp,
    _landlock,
    _cgroups,
    _file_systems,
    _kvm,
    _memory,
    _disk,
)
