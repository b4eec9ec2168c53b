"""Linux: calls that Python's standard library lacks, by number or name through ctypes; memory.

``PyDLL`` keeps the interpreter's lock across a call, so that the child of :func:`clone3` starts
with a consistent interpreter. Every function raises ``OSError`` when the kernel refuses.
Numbers above 423 are the same on every architecture; the others are x86_64's.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from itertools import count

CLONE_NEWNS, CLONE_NEWNET, CLONE_PIDFD = 1 << 17, 1 << 30, 1 << 12
# mount, cgroup, uts, ipc, user, pid and net namespaces
NEW_EVERYTHING = CLONE_NEWNS | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, _MNT_DETACH = 32, 4096, 16384, 1 << 18, 2
PR_SET_CHILD_SUBREAPER = 36
_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 24, 28, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, _PR_SET_THP_DISABLE = 47, 4, 41
_SECUREBITS_LOCKED = 0x2F  # noroot, no_setuid_fixup and their locks; keep_caps locked off
_SYS_CAPSET, PIVOT_ROOT, _SYS_SECCOMP, _SYS_CLONE3 = 126, 155, 317, 435
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.PyDLL(None, use_errno=True)


def call(name: str | int, *args: int | bytes | None, what: str = "") -> int:
    """A function of libc, or a system call by its number; OSError when it returns less than 0."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in args]
    if isinstance(name, int):
        result = _libc.syscall(ctypes.c_long(name), *converted)
    else:
        result = getattr(_libc, name)(*converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what or name}: {os.strerror(ctypes.get_errno())}")
    return int(result)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """As in the manual; empty strings are NULL."""
    what, texts = f"mount {source or kind} on {target}", (source, target, kind, options)
    source_, target_, kind_, options_ = (text.encode() or None for text in texts)
    call("mount", source_, target_, kind_, flags, options_, what=what)


def bind(source: str, target: str, flags: int) -> None:
    """Show ``source`` (without what is mounted below it) at ``target`` with these flags."""
    mount(source, target, "", MS_BIND)
    mount("", target, "", MS_BIND | MS_REMOUNT | flags)


def umount(target: str) -> None:
    """Take a mount and all below it away, now or when the last user is gone."""
    call("umount2", target.encode(), _MNT_DETACH)


def clone3(flags: int, exit_signal: int) -> tuple[int, int]:
    """Fork into new namespaces: (process id, descriptor of the process), or (0, -1) in the child.

    The child must not return into the caller's code: it may only set itself up and execute.
    """
    pidfd = ctypes.c_int(-1)
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack and so on
    words = (flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, exit_signal, *[0] * 6)
    pid = call(_SYS_CLONE3, struct.pack("11Q", *words), 88)
    return pid, pidfd.value if pid else -1


def disable_huge_pages() -> None:
    """For this process, and all that it becomes and starts."""
    call("prctl", _PR_SET_THP_DISABLE, 1, 0, 0, 0)


def drop_capabilities() -> None:
    """No capability in any set, none to be had again, no privilege by execve."""
    with suppress(OSError):  # one past the last that this kernel knows
        for number in count():
            call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)
    call("prctl", _PR_SET_SECUREBITS, _SECUREBITS_LOCKED, 0, 0, 0)
    call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    call(_SYS_CAPSET, struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def install_filter(program: bytes) -> None:
    """Put this process under a seccomp filter, given as classic BPF instructions."""
    buffer = ctypes.create_string_buffer(program, len(program))
    descriptor = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    call(_SYS_SECCOMP, 1, 0, descriptor)


EXECUTE, READ_FILE, READ_DIR, ALL_BUT_EXECUTE = 1, 4, 8, (1 << 16) - 2
_LANDLOCK_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many, by ABI; later ones have 16


def landlock(paths: list[tuple[str, int]] | None, *, tcp: bool) -> None:
    """Confine to ``paths`` with their rights (None: no file rules); no TCP unless ``tcp``.

    No abstract sockets or signals to outside. What an older kernel does not know is left out.
    """
    try:
        abi = call(_SYS_LANDLOCK_CREATE, None, 0, 1)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return
        raise
    files = 0 if paths is None else (1 << _LANDLOCK_FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", files, 3 if abi >= 4 and not tcp else 0, 3 if abi >= 6 else 0)
    if not any(attributes):
        return
    ruleset = call(_SYS_LANDLOCK_CREATE, attributes, 24 if abi >= 6 else 16 if abi >= 4 else 8, 0)
    for path, rights in paths or ():
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call(_SYS_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights & files, descriptor), 0)
        os.close(descriptor)
    call(_SYS_LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def memory(size_bytes: int) -> int:
    """A memfd whose size can't change; any holder of it may write until it is sealed."""
    descriptor = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(descriptor, 0o666)  # not to be executed; only its owner, uid 0, could change that
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return descriptor


def seal(descriptor: int) -> None:
    """No more writing by anybody, if it is not so yet; OSError while it is mapped for writing."""
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    os.fchmod(descriptor, 0o444)


def close_all(descriptors: list[int], *, shut_down: bool = False) -> None:
    """Close descriptors and empty the list; a channel is ended for whoever holds an end of it."""
    while descriptors:
        if shut_down:
            with socket.socket(fileno=descriptors.pop()) as end:
                end.shutdown(socket.SHUT_RDWR)
        else:
            os.close(descriptors.pop())
