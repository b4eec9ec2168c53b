"""Attacks from inside a domain: each must fail, with an error or by the death of who tries.

The attacks run in a forked child of a domain, so that a kill by the filter is seen as a signal.
The victim is another domain of the same host, and the host itself.
"""

import fcntl
import os
import socket
import subprocess

import pytest

from core_host import PYTHON, SRC, children, driver, host, kind, real_uid, status

pytestmark = pytest.mark.root

# Runs one attack in a child: "held: ..." when it was stopped, "BROKEN" when it came through
TRY = r"""
import ctypes, errno, fcntl, signal, struct, termios
libc = ctypes.CDLL(None, use_errno=True)
def sc(number, *args):
    r = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if r < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return r
def attempt(attack):
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            attack()
            os.write(w, b"BROKEN")
        except OSError as error:
            os.write(w, f"held: {errno.errorcode.get(error.errno, error)}".encode())
        except BaseException as error:
            os.write(w, f"held: {error!r}".encode())
        os._exit(0)
    os.close(w)
    said = os.read(r, 1000).decode()
    os.close(r)
    status = os.waitpid(pid, 0)[1]
    if said or not status:
        return said or "BROKEN"
    how = os.waitstatus_to_exitcode(status)
    return f"held: {signal.Signals(-how).name if how < 0 else how}"
"""

SYSCALLS = {
    "ptrace": "sc(101, 16, VICTIM, 0, 0)",
    "ptrace traceme": "sc(101, 0, 0, 0, 0)",
    "process_vm_readv": "sc(310, VICTIM, 0, 0, 0, 0, 0)",
    "process_vm_writev": "sc(311, VICTIM, 0, 0, 0, 0, 0)",
    "kcmp": "sc(312, 1, 1, 0, 0, 0)",
    "pidfd_getfd": "sc(438, os.pidfd_open(1), 0, 0)",
    "mount": "sc(165, b'x', b'/tmp', b'tmpfs', 0, 0)",
    "umount": "sc(166, b'/tmp', 0)",
    "pivot_root": "sc(155, b'/tmp', b'/tmp')",
    "chroot": "sc(161, b'/tmp')",
    "open_tree": "sc(428, -100, b'/', 1)",
    "move_mount": "sc(429, -1, b'', -1, b'', 0)",
    "fsopen": "sc(430, b'tmpfs', 0)",
    "mount_setattr": "sc(442, -100, b'/', 0, 0, 0)",
    "unshare user": "sc(272, 0x10000000)",
    "unshare mount": "sc(272, 0x20000)",
    "unshare net": "sc(272, 0x40000000)",
    "setns": "sc(308, 3, 0)",
    "clone into a user namespace": "sc(56, 0x10000011, 0, 0, 0, 0)",
    "clone into a network namespace": "sc(56, 0x40000011, 0, 0, 0, 0)",
    "clone3": "sc(435, 0, 0)",
    "keyctl": "sc(250, 0, -3, 0)",
    "add_key": "sc(248, b'user', b'k', b'v', 1, -3)",
    "request_key": "sc(249, b'user', b'k', 0, -3)",
    "bpf": "sc(321, 0, 0, 0)",
    "perf_event_open": "sc(298, 0, 0, -1, -1, 0)",
    "io_uring_setup": "sc(425, 8, bytes(200))",
    "userfaultfd": "sc(323, 0)",
    "memfd_secret": "sc(447, 0)",
    "kexec_load": "sc(246, 0, 0, 0, 0)",
    "finit_module": "sc(313, 0, b'', 0)",
    "reboot": "sc(169, 0xfee1dead, 672274793, 0, 0)",
    "swapon": "sc(167, b'/tmp/x', 0)",
    "settimeofday": "sc(164, 0, 0)",
    "clock_settime": "sc(227, 0, bytes(16))",
    "iopl": "sc(172, 3)",
    "ioperm": "sc(173, 0x80, 1, 1)",
    "syslog": "sc(103, 3, bytes(100), 100)",
    "quotactl": "sc(179, 0, 0, 0, 0)",
    "acct": "sc(163, 0)",
    "open_by_handle_at": "sc(304, 3, 0, 0)",
    "name_to_handle_at": "sc(303, -100, b'/', 0, 0, 0)",
    "fanotify_init": "sc(300, 0, 0)",
    "sethostname": "sc(170, b'x', 1)",
    "mknod": "sc(133, b'/tmp/sda', 0o60600, 0x800)",
    "setuid 0": "os.setuid(0)",
    "setgroups": "os.setgroups([0])",
    "capset": "sc(126, struct.pack('Ii', 0x20080522, 0), struct.pack('6I', *[0xffffffff] * 6))",
    "modify_ldt": "sc(154, 0, 0, 0)",
    "x32 getpid": "sc(0x40000000 | 39)",
    "seccomp away": "sc(317, 2, 0, bytes(8))",
    "more landlock": "sc(444, 0, 0, 0)",
}

ACTIONS = {
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "vsock": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "kernel crypto socket": "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "the network": "socket.create_connection(('198.51.100.1', 80), 2)",
    "TCP on its own loopback": "socket.create_server(('127.0.0.1', 0))",
    "an abstract socket of the host": "socket.socket(socket.AF_UNIX).connect('\\0ATTACKED')",
    "a socket file of the host": "socket.socket(socket.AF_UNIX).connect('DIRECTORY/host.sock')",
    "the state of the host": "os.listdir('DIRECTORY/state')",
    "the log of grants": "open('DIRECTORY/state/grants.log')",
    "another domain's private directory": "os.listdir('DIRECTORY/state/domains/victim')",
    "the shadow file": "open('/etc/shadow')",
    "writing to the runtime image": "open('/usr/bin/new', 'w')",
    "writing to its program": "open(sys.executable, 'r+')",
    "writing into /dev": "open('/dev/new', 'w')",
    "a disk by its device": "open('/dev/vda', 'rb')",
    "the memory device": "open('/dev/mem', 'rb')",
    "KVM, which its kind lacks": "open('/dev/kvm', 'rb')",
    "the kernel log": "open('/dev/kmsg', 'rb')",
    "sysctl": "open('/proc/sys/kernel/core_pattern', 'w')",
    "sysrq": "open('/proc/sysrq-trigger', 'w')",
    "groups of the host": "open('/sys/fs/cgroup/memory/memory.limit_in_bytes', 'w')",
    "memory of the victim": "open(f'/proc/{VICTIM}/mem', 'rb').read(1)",
    "environment of the core": "open(f'/proc/{CORE}/environ', 'rb').read()",
    "signal to the victim": "os.kill(VICTIM, 9)",
    "signal to the core": "os.kill(CORE, 9)",
    "signal to everybody": "os.kill(-1, 0)",
    "a program of its own": "open('/tmp/x','w').write('#!/bin/sh'); os.chmod('/tmp/x',0o700); os.execv('/tmp/x',['x'])",
    "a set-uid program": "os.execv('/usr/bin/su', ['su', '-c', 'id'])",
    "more descriptors": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (10000, 10000))",
    "a core dump": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))",
    "characters into a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "characters, with high bits set": "sc(16, 0, 0x100005412, b'x')",
    "a writable sealed file": "f = os.memfd_create('x', 2); os.write(f, b'a'); fcntl.fcntl(f, 1033, 8); os.write(f, b'b')",
    "filling /run": "open('/run/x', 'wb').write(bytes(64 << 20))",
    "filling /dev/shm": "open('/dev/shm/x', 'wb').write(b'x')",
}


@pytest.fixture(scope="module")
def arena():
    kinds = {
        "driver": driver(
            creates=["child", "keeper"],
            peers=dict.fromkeys(("child", "keeper", "driver"), True),
        ),
        "child": kind(proc=True),
        "keeper": kind(state=True),
    }
    with host(kinds) as made:
        one = made.consoles["one"]
        victim = one.child("keeper", "victim")
        attacker = one.child("child", "attacker", pids=32)
        victim_pid = next(
            p for p in made.processes() if real_uid(p) == victim("result = os.getuid()")
        )
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind(f"\0{made.instance}")
        abstract.listen()
        named = socket.socket(socket.AF_UNIX)
        named.bind(str(made.directory / "host.sock"))
        named.listen()
        made.directory.chmod(0o755)
        attacker(f"{TRY}\nVICTIM, CORE = {victim_pid}, {made.core_pid}")
        yield made, attacker
        abstract.close()
        named.close()


@pytest.mark.parametrize("attack", SYSCALLS)
def test_system_calls_out_of_the_box_are_refused(arena, attack):
    _made, attacker = arena
    assert attacker(f"result = attempt(lambda: {SYSCALLS[attack]})").startswith("held")


@pytest.mark.parametrize("attack", ACTIONS)
def test_ways_out_of_the_box_are_closed(arena, attack):
    made, attacker = arena
    code = (
        ACTIONS[attack].replace("DIRECTORY", str(made.directory)).replace("ATTACKED", made.instance)
    )
    said = attacker(f"def attack():\n    {code}\nresult = attempt(attack)")
    assert said.startswith("held"), said


def test_the_attempts_show_what_works(arena):
    """The counterpart: what is allowed does come through, so that 'held' means something."""
    _, attacker = arena
    for allowed in (
        "os.listdir('/usr')",
        "open('/tmp/y', 'w').write('x')",
        "sc(39)",
        "os.memfd_create('x')",
    ):
        assert attacker(f"result = attempt(lambda: {allowed})") == "BROKEN"


def test_it_sees_only_its_own_processes_network_and_files(arena):
    _, attacker = arena
    assert attacker("result = [p for p in os.listdir('/proc') if p.isdigit()]") == ["1"]
    assert attacker("result = os.getpid()") == 1
    assert set(attacker("result = os.listdir('/run')")) <= {"src", "x"}  # x: an attack's file
    assert attacker("result = sorted(os.listdir('/dev'))") == [
        "full",
        "null",
        "random",
        "urandom",
        "zero",
    ]


def test_a_fork_bomb_stays_within_its_limit(arena):
    _made, attacker = arena
    code = (
        "kids = []\n"
        "try:\n"
        "    while True:\n"
        "        pid = os.fork()\n"
        "        if pid == 0:\n"
        "            time.sleep(30); os._exit(0)\n"
        "        kids.append(pid)\n"
        "except BlockingIOError: pass\n"
        "result = len(kids)\n"
        "for k in kids: os.kill(k, 9); os.waitpid(k, 0)"
    )
    assert attacker(code) == 31


def test_a_memory_hog_dies_alone(arena):
    made, attacker = arena
    code = (
        "def attack():\n    x = [bytearray(1 << 20) for _ in range(500)]\nresult = attempt(attack)"
    )
    assert "SIGKILL" in attacker(code)
    assert made.consoles["one"]("core.ping(); result = 1") == 1


def test_only_keeper_and_core_are_root_and_nothing_has_capabilities(arena):
    made, _ = arena
    owners = set()
    for pid in made.processes():
        found = status(pid)
        owners.add(found["Uid"])
        assert "0" not in found["Uid"].split() + found["Gid"].split()
        for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[which], 16) == 0
        assert found["Groups"] == ""
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert len(owners) == len(made.processes())
    assert children(made.keeper.pid) == [made.core_pid]


def test_user_namespaces_belong_to_owners_of_their_own(arena):
    made, _ = arena
    first = made.manifest["first_uid"]
    for pid in made.processes():
        descriptor = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
        get_owner_uid = 0xB704
        uid = int.from_bytes(fcntl.ioctl(descriptor, get_owner_uid, bytes(4)), "little")
        os.close(descriptor)
        assert uid == real_uid(pid) + 100
        assert first + 100 <= uid < first + 200


def test_a_deprivileged_root_process_cannot_read_a_domain(arena):
    """Host uid 0 without capabilities (an admin console gone wrong) gets nothing either."""
    made, _ = arena
    pid = next(iter(made.processes()))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from supercloud.lower.core import system\n"
        "system.drop_capabilities()\nopen(f'/proc/{sys.argv[2]}/environ').read()"
    )
    command = [PYTHON, "-I", "-S", "-B", "-c", code, str(SRC), str(pid)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"PermissionError" in done.stderr
