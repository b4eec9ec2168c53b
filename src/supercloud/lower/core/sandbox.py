"""One process in namespaces of its own, under everything that Linux has to confine it.

The core lays out the domain's root in its own private mount namespace (:func:`_stage`), clones
with the owner uid in effect (a user namespace made by uid 0 could be read by any uid-0 process),
maps one uid, and the child shuts itself in step by step (:func:`_steps`) and executes. The
program is process 1 of its process namespace: when it dies the kernel kills all the others.
"""

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

from supercloud.lower.core import system
from supercloud.lower.core.manifest import Bind, Kind
from supercloud.lower.core.measure import ZERO, hash_file
from supercloud.model.refusals import BadState, Invalid

STAGE = "/mnt"  # covered by a tmpfs in the keeper's private mount namespace
RUNTIME, ROOTS, STATE_TARGET = f"{STAGE}/runtime", f"{STAGE}/roots", "/run/state"
_PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SAFE = system.MS_NOSUID | system.MS_NODEV
_START_TIMEOUT_S = 20.0
_FIRST_SPARE = 512  # descriptors are gathered above this before they get their final numbers
_GO = b"g"


class Plan(NamedTuple):
    """All that :func:`start` needs; ``descriptors`` become 3, 4, ... and ``output`` 1 and 2."""

    kind: Kind
    argv: list[str]
    environment: dict[str, str]
    uid: int
    owner_uid: int
    binds: tuple[Bind, ...]
    descriptors: list[int]
    output: int


def start(plan: Plan, admit: Callable[[int, int], None], *, name: str) -> tuple[int, int]:
    """Run a program in a sandbox; (process id, its descriptor) when it has been executed.

    ``admit`` is called with the child held at the gate (put it into its groups, note its
    descriptor); if the caller dies before it returns, the child ends. BadState says which step
    failed; the child is gone then.
    """
    root, (gate, childs) = f"{ROOTS}/{name}", socket.socketpair()
    with gate, childs, ExitStack() as cleanup:
        os.mkdir(root)
        cleanup.callback(unstage, root)
        _stage(plan, root)
        pid, pidfd = _clone(plan)
        if pid == 0:
            _child(plan, root, childs.fileno())
        try:
            for ids in ("uid_map", "gid_map"):
                with open(f"/proc/{pid}/{ids}", "w", encoding="ascii") as file:
                    file.write(f"{plan.uid} {plan.uid} 1\n")
            admit(pid, pidfd)
            gate.send(_GO)
            childs.close()
            gate.settimeout(_START_TIMEOUT_S)
            if said := gate.recv(4096):  # else it was closed by execution
                raise BadState(said.decode())
        except BaseException:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            raise
        return pid, pidfd


def mount_runtime(path: str, sha256: str) -> str:
    """Mount the image by the descriptor that was hashed (or, for tests, show a directory)."""
    os.mkdir(RUNTIME)
    if not sha256:
        system.bind(path, RUNTIME, system.MS_RDONLY | _SAFE)
        return ZERO
    with open(path, "rb") as file:
        image = f"/proc/self/fd/{file.fileno()}"
        digest = hash_file(image)
        if digest != sha256:
            raise Invalid(f"{path} has the hash {digest}", where="manifest.runtime")
        try:
            system.mount(image, RUNTIME, "erofs", system.MS_RDONLY | _SAFE)
        except OSError as error:
            if error.errno not in (errno.ENOTBLK, errno.EINVAL, errno.ENOSYS):
                raise
            os.set_inheritable(file.fileno(), True)  # before Linux 6.12: by a loop device
            words = ["mount", "-c", "-t", "erofs", "-o", "ro,nosuid,nodev,loop", image, RUNTIME]
            if os.spawnvp(os.P_WAIT, "mount", words):  # noqa: S606  no shell is the point
                raise
    return digest


def unstage(root: str) -> None:
    """Take away what was laid out; the domain keeps its copy."""
    if os.path.ismount(root):
        system.umount(root)
    os.rmdir(root)


def _stage(plan: Plan, root: str) -> None:
    """Lay out a domain's root: the runtime image, read-only, and what is its own."""
    system.bind(RUNTIME, root, system.MS_RDONLY | _SAFE)
    private = f"size={plan.kind.tmp_bytes},mode=0700,uid={plan.uid},gid={plan.uid}"
    for target in ("/tmp", "/run"):  # noqa: S108  mount points inside the new root
        system.mount("tmpfs", root + target, "tmpfs", _SAFE | system.MS_NOEXEC, private)
    flags = system.MS_NOSUID | system.MS_NOEXEC
    system.mount("tmpfs", f"{root}/dev", "tmpfs", flags, "size=64k,mode=0755")
    for path in _PLAIN_DEVICES + plan.kind.devices:  # nodes of our own, with its owner and mode
        found, plain = os.stat(path), path in _PLAIN_DEVICES
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.mknod(root + path, stat.S_IFMT(found.st_mode), found.st_rdev)
        os.chown(root + path, 0 if plain else plan.uid, 0)
        os.chmod(root + path, 0o666 if plain else 0o600)
    system.mount("", f"{root}/dev", "", system.MS_REMOUNT | flags | system.MS_RDONLY)
    for bind in plan.binds:
        target = root + bind.target
        if os.path.isdir(bind.source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_CLOEXEC, 0o644))
        system.bind(bind.source, target, _SAFE | (0 if bind.writable else system.MS_RDONLY))


def _clone(plan: Plan) -> tuple[int, int]:
    shared, pid = system.CLONE_NEWNET if plan.kind.network == "host" else 0, -1
    os.setresuid(-1, plan.owner_uid, -1)
    try:
        pid, pidfd = system.clone3(system.NEW_EVERYTHING & ~shared, signal.SIGCHLD)
    finally:
        if pid:  # not in the child
            os.setresuid(-1, 0, -1)
    return pid, pidfd


def _child(plan: Plan, root: str, gate: int) -> NoReturn:
    """The child's whole life up to execution; never returns into the core's code."""
    step = "descriptors"
    try:
        gate = _gather(plan, gate)
        for step, action in _steps(plan, root):  # noqa: B007  said when it fails
            action()
        step = f"execute {plan.argv[0]}"
        os.execve(plan.argv[0], plan.argv, plan.environment)  # noqa: S606
    except BaseException as failure:  # noqa: BLE001  it must not unwind into the core
        os.write(gate, f"{step}: {failure}"[:1000].encode())
    finally:
        os._exit(127)


def _gather(plan: Plan, gate: int) -> int:
    """Give descriptors their final numbers, close all others, wait for the word to go on."""
    wanted = (plan.output, gate, *plan.descriptors)
    output, gate, *rest = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE) for fd in wanted]
    null = os.open("/dev/null", os.O_RDWR)
    for number, descriptor in enumerate([null, output, output, *rest]):
        os.dup2(descriptor, number, inheritable=True)
    os.closerange(3 + len(rest), gate)
    os.closerange(gate + 1, 1 << 30)
    if os.read(gate, 1) != _GO:
        os._exit(126)
    return gate


def _steps(plan: Plan, root: str) -> list[tuple[str, Callable[[], None]]]:
    """The steps in their order; each needs what the ones before it left."""
    kind, read = plan.kind, system.READ_FILE | system.READ_DIR
    own = [(path, system.ALL_BUT_EXECUTE) for path in ("/dev", "/tmp", "/run")]  # noqa: S108
    files = None if kind.nests else [("/", system.EXECUTE | read), *own]
    return [
        ("identity", lambda: _become(plan.uid, kind.nofile)),
        ("memory", lambda: None if kind.huge_pages else system.disable_huge_pages()),
        ("root", lambda: _enter(root, proc=kind.proc)),
        ("loopback", lambda: _loopback_up() if kind.network == "own" else None),
        ("capabilities", system.drop_capabilities),
        ("landlock", lambda: system.landlock(files, tcp=kind.tcp)),
        ("filter", lambda: system.install_filter(bytes.fromhex(kind.filter))),
    ]


def _become(uid: int, nofile: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    for limit, most in ((resource.RLIMIT_NOFILE, nofile), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
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
    system.call(system.PIVOT_ROOT, b".", b".")
    system.umount(".")
    os.chdir("/")


def _loopback_up() -> None:
    siocsifflags, iff_up = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))
