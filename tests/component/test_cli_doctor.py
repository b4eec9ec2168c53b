"""``doctor`` looks at this very machine: what is hidden from it lacks, with its fix, and no more."""

import asyncio
import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from supercloud.cli import doctor
from supercloud.model.errors import STATUS
from supercloud.upper.platform.agent.accelerator import run_guest
from support.commandline import CommandLine, control_plane

UNSUPPORTED = STATUS["unsupported"][1]
UNSHARE, IOCTL, LANDLOCK, SETGROUPS = 272, 16, 444, 116
KVM_RUN = 0xAE80
ERRNO, ALLOW = 0x0005_0000, 0x7FFF_0000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
FIRST_ARGUMENT = {IOCTL: 24}  # offset of the argument that tells which ioctl it is
TIMED = "state on disk"
MEMORY = "MemTotal: 8388608 kB\nMemAvailable: 2048 kB\n"
SMALL = "MemTotal: 3145728 kB\nMemAvailable: 2097152 kB\n"


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("doctor"))
    with control_plane(line):
        yield line


@pytest.fixture(scope="module")
def plain(line):
    """The checks of the machine as it is, by name."""
    return examined(line)


def examined(line, *, before=(), preexec=None):
    """What ``doctor`` finds when it is run by the command ``before``; the exit status fits."""
    done = subprocess.run(
        [*before, *line.argv("doctor", "--json")], env=line.environment, cwd=line.directory,
        capture_output=True, text=True, timeout=120, check=False, preexec_fn=preexec,
    )  # fmt: skip
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    wrong = [check for check in checks.values() if not check["ok"]]
    assert done.returncode == (UNSUPPORTED if wrong else 0), done.stderr
    assert all(check["fix"] for check in wrong)
    return checks


def lacking(checks):
    """But how long a change takes: that is another at each look, as the disk has other work."""
    return {name for name, check in checks.items() if not check["ok"]} - {TIMED}


def hiding(*commands):
    """A private mount namespace after ``commands``, as a prefix; nothing of it is seen outside."""
    return ["unshare", "-m", "--propagation", "private", "sh", "-c",
            " && ".join([*commands, 'exec "$@"']), "sh"]  # fmt: skip


def covered(path, tmp_path, content=""):
    """The command that puts something else in a file's place."""
    stand_in = tmp_path / os.path.basename(path)
    stand_in.write_text(content)
    return f"mount --bind {stand_in} {path}"


def refusing(call, argument=None):
    """A preexec function: from then on the kernel knows that system call no more (ENOSYS)."""
    steps = [(LOAD, 0, 0, 0), (EQUAL, 0, 1 if argument is None else 3, call)]
    if argument is not None:
        steps += [(LOAD, 0, 0, FIRST_ARGUMENT[call]), (EQUAL, 0, 1, argument)]
    steps += [(RETURN, 0, 0, ERRNO | 38), (RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)

    def filtered():
        libc = ctypes.CDLL(None, use_errno=True)
        instructions = ctypes.create_string_buffer(code)
        program = struct.pack("=HxxxxxxQ", len(steps), ctypes.addressof(instructions))
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
        assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()

    return filtered


def test_it_says_what_the_machine_has(plain):
    release = os.uname().release
    assert plain["kernel"]["found"] == f"Linux {release}"
    hierarchies = Path("/proc/self/cgroup").read_text().splitlines()
    v1 = {name for row in hierarchies for name in row.split(":")[1].split(",")}
    for name in re.findall(r"(\w+) v1", plain["cgroups"]["found"]):
        assert name in v1
    for name in re.findall(r"(\w+) v2", plain["cgroups"]["found"]):
        assert name not in v1
    total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1])
    size, unit = re.match(r"([0-9.]+)([MG])iB of ", plain["memory"]["found"]).groups()
    assert 0 < float(size) * {"M": 1 << 10, "G": 1 << 20}[unit] <= total
    assert f"{os.cpu_count()} processors" in plain["memory"]["found"]
    assert plain["control plane"]["ok"]


def test_the_table_has_the_same_lines_and_a_fix_in_each_that_lacks(line, plain):
    done = line.run("doctor", status=None)
    shown = done.stdout.splitlines()
    assert done.returncode == (UNSUPPORTED if "LACKS" in done.stdout else 0)
    rows = {name: row for name in plain for row in shown if re.match(rf"(ok|LACKS) +{name} ", row)}
    assert rows.keys() == plain.keys() - {name for name in plain if "/" in name}
    for name in rows.keys() - {TIMED}:
        row = rows[name]
        assert row.startswith("ok" if plain[name]["ok"] else "LACKS")
        assert plain[name]["ok"] or plain[name]["fix"] in row


def test_without_a_control_plane_it_says_how_to_start_one(tmp_path):
    line = CommandLine(tmp_path)
    shown = line.run("doctor", status=UNSUPPORTED).stdout
    assert re.search(r"^LACKS +control plane .*supercloud up FILE starts it", shown, re.MULTILINE)


@pytest.mark.root
@pytest.mark.parametrize(
    ("path", "content", "name", "found", "fix"),
    [
        ("/proc/filesystems", "nodev\ttmpfs\n", "file systems", "without overlay", "modprobe overlay"),
        ("/proc/sys/kernel/seccomp/actions_avail", "", "seccomp", "not there", "SECCOMP_FILTER"),
        ("/proc/meminfo", MEMORY, "memory", "2MiB of 8GiB available", "free some"),
        ("/proc/meminfo", SMALL, "memory", "2GiB of 3GiB available", "wants a machine of 3584MiB"),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_offer(line, plain, tmp_path, path, content, name, found, fix):
    checks = examined(line, before=hiding(covered(path, tmp_path, content)))
    assert lacking(checks) == lacking(plain) | {name}
    assert found in checks[name]["found"]
    assert fix in checks[name]["fix"]


@pytest.mark.root
def test_controllers_that_are_not_mounted(line, plain):
    checks = examined(line, before=hiding("umount -l /sys/fs/cgroup"))
    assert lacking(checks) == lacking(plain) | {"cgroups"}
    assert checks["cgroups"]["found"] == "none"
    assert checks["cgroups"]["fix"] == "mount the controllers cpu, memory, pids"


@pytest.mark.root
def test_a_disk_without_room(line, plain):
    checks = examined(line, before=hiding("mount -t tmpfs -o size=1M none /var"))
    assert "disk" in lacking(checks)
    assert lacking(checks) <= lacking(plain) | {"disk"}
    assert checks["disk"]["found"] == "1MiB free under /var"


def test_an_old_kernel(line, plain):
    checks = examined(line, before=["setarch", "--uname-2.6"])
    assert lacking(checks) == lacking(plain) | {"kernel"}
    assert "Linux 2.6." in checks["kernel"]["found"]


@pytest.mark.parametrize(
    ("call", "name", "fix"),
    [(UNSHARE, "user namespaces", "user.max_user_namespaces"), (LANDLOCK, "Landlock", "landlock")],
)
def test_what_the_kernel_refuses_when_it_is_tried(line, plain, call, name, fix):
    checks = examined(line, preexec=refusing(call))
    assert lacking(checks) == lacking(plain) | {name}
    assert checks[name]["found"] == "Function not implemented"
    assert fix in checks[name]["fix"]


def test_a_probe_that_cannot_be_made_says_so(line, plain):
    """As in a container without setgroups."""
    checks = examined(line, preexec=refusing(SETGROUPS))
    before = lacking(plain)
    assert lacking(checks) == (before | {"user namespaces"} if os.geteuid() == 0 else before)
    assert os.geteuid() != 0 or checks["user namespaces"]["found"] == "could not be tried"


@pytest.mark.root
def test_the_accelerator_is_tried_by_a_guest(line, plain):
    """And said to be what was tried; a machine without one lacks nothing, it is only slower."""
    reason = asyncio.run(run_guest()) if os.path.exists("/dev/kvm") else "no such device"
    found = plain["accelerator"]["found"]
    assert ("a tiny guest ran" in found) is (reason == "")
    assert ("translated" in found) is (reason != "")
    assert reason or "an ordinary kernel was not tried" in found


def seeming(place, *commands):
    """A private /dev, made at ``place``: of few devices, and a ``kvm`` that is none."""
    return hiding(
        f"mount -t tmpfs none {place}", f"cd {place}", "touch null urandom kvm nothing",
        "mount --bind /dev/null null", "mount --bind /dev/urandom urandom",
        *commands, "mount --rbind . /dev", 'cd "$OLDPWD"',
    )  # fmt: skip


@pytest.mark.root
def test_an_accelerator_that_only_seems_to_be_there(line, plain, tmp_path):
    checks = examined(line, before=seeming(tmp_path, "mount --bind /dev/null kvm"))
    assert "/dev/kvm opens, but a guest did not run" in checks["accelerator"]["found"]
    assert "translated (TCG)" in checks["accelerator"]["found"]
    assert lacking(checks) == lacking(plain)
    read_only = ("mount --bind nothing kvm", "mount -o remount,bind,ro kvm")
    checks = examined(line, before=seeming(tmp_path, *read_only))
    assert checks["accelerator"]["found"].startswith("/dev/kvm: Read-only file system; virtual")


@pytest.mark.root
def test_an_accelerator_that_runs_nothing(line, plain):
    there = os.path.exists("/dev/kvm")
    checks = examined(line, preexec=refusing(IOCTL, KVM_RUN))
    said = " opens, but a guest did not run" if there else ": No such file or directory"
    assert f"/dev/kvm{said}" in checks["accelerator"]["found"]
    assert lacking(checks) == lacking(plain)


V2 = "30 24 0:26 / {v2} rw - cgroup2 cgroup2 rw\n"
V1 = "31 30 0:30 / {{v1}}/{0} rw - cgroup cgroup rw,{0}\n"
LAYOUTS = {
    "unified": (V2, "cpu v2, memory v2, pids v2", True),
    "legacy": (
        V1.format("cpu,cpuacct") + V1.format("memory") + V1.format("pids"),
        "cpu v1, memory v1, pids v1",
        True,
    ),
    "hybrid": (V1.format("cpu") + V2, "cpu v1, memory v2, pids v2", True),
    "without pids": (V1.format("cpu") + V1.format("memory"), "cpu v1, memory v1", False),
}


@pytest.mark.root
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_control_groups(line, tmp_path, layout):
    mounts, found, ok = LAYOUTS[layout]
    v2 = tmp_path / "unified"
    v2.mkdir()
    there = [name for name in doctor.CONTROLLERS if f"{name} v2" in found]
    (v2 / "cgroup.controllers").write_text("cpuset io " + " ".join(there))
    own = covered("/proc/$$/mountinfo", tmp_path, mounts.format(v1=tmp_path, v2=v2))
    cgroups = examined(line, before=hiding(own))["cgroups"]
    assert (cgroups["found"], cgroups["ok"]) == (found, ok)
    assert ok or cgroups["fix"] == "mount the controllers pids"


def test_the_probe_of_the_accelerator_is_a_program():
    """What ``doctor`` runs: it says nothing of a guest that ran, and why of one that did not."""
    done = subprocess.run(
        [sys.executable, "-m", doctor.GUEST],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.strip() == asyncio.run(run_guest())
