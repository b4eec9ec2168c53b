"""One process in namespaces of its own, under everything that Linux has to confine it.

The core lays out the domain's root in its own private mount namespace (:func:`stage`), clones
with the owner uid in effect (a user namespace made by uid 0 could be read by any uid-0 process),
maps one uid, and the child shuts itself in step by step (:func:`_confine`) and executes. The
program is process 1 of its process namespace: when it dies the kernel kills all the others.
"""

import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NoReturn

from supercloud.lower.core import system
from supercloud.lower.core.manifest import Bind
from supercloud.model.errors import BadState

STAGE = "/mnt"
"""Covered by a tmpfs in the core's private mount namespace; roots are laid out below."""
RUNTIME = f"{STAGE}/runtime"
ROOTS = f"{STAGE}/roots"
STATE_TARGET = "/run/state"
_PLAIN_DEVICES = ("null", "zero", "full", "random", "urandom")
_SAFE = system.MS_NOSUID | system.MS_NODEV
_START_TIMEOUT_S = 20.0
_FIRST_SPARE = 512  # descriptors are gathered above this before they get their final numbers
_NO_DESCRIPTOR = 1 << 30
_GO = b"g"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that :func:`start` needs; ``descriptors`` become 3, 4, ... and ``output`` 1 and 2."""

    argv: list[str]
    environment: dict[str, str]
    uid: int
    owner_uid: int
    filter: bytes
    own_network: bool
    join_network: int | None
    tcp: bool
    nests: bool
    proc: bool
    tmp_bytes: int
    nofile: int
    binds: tuple[Bind, ...]
    devices: tuple[str, ...]
    descriptors: list[int]
    output: int


@dataclass(frozen=True, slots=True)
class Started:
    """A process in its sandbox."""

    pid: int
    pidfd: int


def start(plan: Plan, before_go: Callable[[Started], None], *, stage_name: str) -> Started:
    """Run a program in a sandbox; returns when it has been executed.

    ``before_go`` is called with the child held at the gate (put it into its groups, note its
    descriptor); if the caller dies before it returns, the child ends. BadState says which step
    failed; the child is gone then.
    """
    with ExitStack() as cleanup:
        root = stage(plan, stage_name)
        cleanup.callback(unstage, root)
        go_read, go_write = os.pipe()
        error_read, error_write = os.pipe()
        for descriptor in (go_read, error_read):
            cleanup.callback(os.close, descriptor)
        child_ends = ExitStack()
        child_ends.callback(os.close, error_write)
        opened = ExitStack()
        opened.callback(os.close, go_write)
        with opened, child_ends:
            pid, pidfd = _clone(plan)
            if pid == 0:
                _child(plan, root, go_read, error_write)
            started = Started(pid, pidfd)
            try:
                _map_ids(pid, plan.uid)
                before_go(started)
                os.write(go_write, _GO)
            except BaseException:
                _discard(started)
                raise
        _await_execution(started, error_read)
        return started


def stage(plan: Plan, name: str) -> str:
    """Lay out a domain's root: the runtime image, read-only, and what is its own."""
    root = f"{ROOTS}/{name}"
    os.mkdir(root)
    try:
        system.bind(RUNTIME, root, system.MS_RDONLY | _SAFE)
        private = f"size={plan.tmp_bytes},mode=0700,uid={plan.uid},gid={plan.uid}"
        for target in ("/tmp", "/run"):  # noqa: S108  mount points inside the new root
            system.mount("tmpfs", root + target, "tmpfs", _SAFE | system.MS_NOEXEC, private)
        _stage_devices(plan, root + "/dev")
        for bind in plan.binds:
            _stage_bind(root, bind)
    except BaseException:
        unstage(root)
        raise
    return root


def unstage(root: str) -> None:
    """Take away what :func:`stage` laid out; the domain keeps its copy."""
    if os.path.ismount(root):
        system.umount(root)
    os.rmdir(root)


def _stage_devices(plan: Plan, directory: str) -> None:
    flags = system.MS_NOSUID | system.MS_NOEXEC
    system.mount("tmpfs", directory, "tmpfs", flags, "size=64k,mode=0755")
    for name in _PLAIN_DEVICES:
        _make_node(f"/dev/{name}", f"{directory}/{name}", 0o666, 0)
    for path in plan.devices:
        target = directory + path.removeprefix("/dev")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _make_node(path, target, 0o600, plan.uid)
    system.mount("", directory, "", system.MS_REMOUNT | flags | system.MS_RDONLY)


def _make_node(source: str, target: str, mode: int, uid: int) -> None:
    """A device node of our own like ``source``, so that its owner and mode are the domain's."""
    found = os.stat(source)
    if not stat.S_ISCHR(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise BadState(f"{source} is not a device")
    os.mknod(target, stat.S_IFMT(found.st_mode) | mode, found.st_rdev)
    os.chmod(target, mode)
    os.chown(target, uid, uid)


def _stage_bind(root: str, bind: Bind) -> None:
    target = root + bind.target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(bind.source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC, 0o644))
    system.bind(bind.source, target, _SAFE | (0 if bind.writable else system.MS_RDONLY))


def _clone(plan: Plan) -> tuple[int, int]:
    flags = system.NEW_EVERYTHING
    if not plan.own_network:
        flags &= ~system.CLONE_NEWNET
    with ExitStack() as undo:
        if plan.join_network is not None:
            home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, home)
            system.setns(plan.join_network, system.CLONE_NEWNET)
            undo.callback(system.setns, home, system.CLONE_NEWNET)
        os.setresuid(-1, plan.owner_uid, -1)
        try:
            pid, pidfd = system.clone3(flags, signal.SIGCHLD)
        except BaseException:
            os.setresuid(-1, 0, -1)
            raise
        if pid == 0:
            undo.pop_all()
            return 0, -1
        os.setresuid(-1, 0, -1)
    return pid, pidfd


def _map_ids(pid: int, uid: int) -> None:
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
            file.write(f"{uid} {uid} 1\n")


def _await_execution(started: Started, error_read: int) -> None:
    """Wait until the error pipe closes by execution; what it says is why it failed."""
    said = b""
    if select.select([error_read], [], [], _START_TIMEOUT_S)[0]:
        said = os.read(error_read, 4096)
        if not said:
            return
    _discard(started)
    raise BadState(f"could not start: {said.decode() or 'timed out'}")


def _discard(started: Started) -> None:
    signal.pidfd_send_signal(started.pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, started.pidfd, os.WEXITED)
    os.close(started.pidfd)


def _child(plan: Plan, root: str, go_read: int, error_write: int) -> NoReturn:
    """The child's whole life up to execution; never returns into the core's code."""
    step = "descriptors"
    error = error_write
    try:
        error = _gather(plan, go_read, error_write)
        for step, action in _confine(plan, root):  # noqa: B007  said when it fails
            action()
        step = f"execute {plan.argv[0]}"
        os.execve(plan.argv[0], plan.argv, plan.environment)  # noqa: S606
    except BaseException as failure:  # noqa: BLE001  it must not unwind into the core
        os.write(error, f"{step}: {failure}"[:1000].encode())
    finally:
        os._exit(127)


def _gather(plan: Plan, go_read: int, error_write: int) -> int:
    """Give descriptors their final numbers, close all others, wait for the word to go on."""
    spare = [
        fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE)
        for descriptor in (plan.output, go_read, error_write, *plan.descriptors)
    ]
    output, go, error, *rest = spare  # ascending
    null = os.open("/dev/null", os.O_RDWR)
    for number, descriptor in enumerate([null, output, output, *rest]):
        os.dup2(descriptor, number, inheritable=True)
    os.closerange(3 + len(rest), go)
    os.closerange(error + 1, _NO_DESCRIPTOR)
    if os.read(go, 1) != _GO:
        os._exit(126)
    os.close(go)
    return error


def _confine(plan: Plan, root: str) -> list[tuple[str, Callable[[], None]]]:
    """The steps in their order; each needs what the ones before it left."""
    return [
        ("identity", lambda: _become(plan.uid)),
        ("root", lambda: _enter(root, proc=plan.proc)),
        ("loopback", _loopback_up if plan.own_network else lambda: None),
        ("limits", lambda: _limit(plan.nofile)),
        ("capabilities", system.drop_capabilities),
        ("landlock", lambda: system.landlock(_file_rules(plan), tcp=plan.tcp)),
        ("filter", lambda: system.install_filter(plan.filter)),
    ]


def _become(uid: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.umask(0o077)


def _enter(root: str, *, proc: bool) -> None:
    system.mount(root, root, "", system.MS_BIND | system.MS_REC)
    os.chdir(root)
    if proc:
        flags = _SAFE | system.MS_NOEXEC
        system.mount("proc", "proc", "proc", flags, "hidepid=invisible,subset=pid")
    system.pivot_to_here()


def _loopback_up() -> None:
    siocsifflags, iff_up = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))


def _limit(nofile: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _file_rules(plan: Plan) -> list[tuple[str, int]] | None:
    """What Landlock lets it do with files; a program that nests mounts must do without."""
    if plan.nests:
        return None
    read = system.READ_FILE | system.READ_DIR
    rules = [("/", system.EXECUTE | read)]
    rules += [(path, system.ALL_BUT_EXECUTE) for path in ("/dev", "/tmp", "/run")]  # noqa: S108
    return rules
