"""cgroups (version 2) of EEs: usage, ending all of one, removing it."""

import asyncio
import contextlib
import os

from supercloud.upper.platform.agent import paths

RESERVED_BYTES = 128 << 20
_CONTROLLERS = ("cpu", "memory", "pids")


def path_of(uid: str) -> str:
    """Where an EE's cgroup is."""
    return f"{paths.CGROUP}/{uid}"


def prepare() -> None:
    """The parent of all EEs; it leaves the platform's own programs memory to work with."""
    with contextlib.suppress(FileNotFoundError):
        if _read(f"{paths.CGROUP}/cgroup.subtree_control").split() == [*_CONTROLLERS]:
            return  # the last that is done
    os.makedirs(paths.CGROUP, exist_ok=True)
    wanted = " ".join(f"+{one}" for one in _CONTROLLERS)
    _write("/sys/fs/cgroup/cgroup.subtree_control", wanted)
    _write(f"{paths.CGROUP}/memory.max", str(max(total_memory_bytes() - RESERVED_BYTES, 1 << 26)))
    with contextlib.suppress(FileNotFoundError):
        _write(f"{paths.CGROUP}/memory.oom.group", "0")
    _write(f"{paths.CGROUP}/cgroup.subtree_control", wanted)


def total_memory_bytes() -> int:
    """Memory of the platform."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make(uid: str, *, memory_bytes: int, cpus: float, pids: int) -> str:
    """A cgroup with limits for an engine that makes none itself."""
    path = path_of(uid)
    os.makedirs(path, exist_ok=True)
    _write(f"{path}/memory.max", str(memory_bytes))
    _write(f"{path}/cpu.max", f"{max(1000, int(cpus * 100_000))} 100000")
    _write(f"{path}/pids.max", str(pids))
    return path


def enter(path: str, pid: int) -> None:
    """Move a process into a cgroup."""
    _write(f"{path}/cgroup.procs", str(pid))


async def freeze(path: str, timeout_s: float) -> None:
    """Return when nothing in a cgroup runs any more; TimeoutError, and it runs on, if not in time.

    Its processes can still be traced and ended.
    """
    _write(f"{path}/cgroup.freeze", "1")
    try:
        async with asyncio.timeout(timeout_s):
            while "frozen 1" not in _read(f"{path}/cgroup.events"):  # noqa: ASYNC110 -- a file
                await asyncio.sleep(0.002)
    except BaseException:
        _write(f"{path}/cgroup.freeze", "0")
        raise


def thaw(uid: str) -> None:
    """Let an EE's processes go on, frozen or not."""
    with contextlib.suppress(FileNotFoundError):
        _write(f"{path_of(uid)}/cgroup.freeze", "0")


async def untraced(uid: str, timeout_s: float) -> None:
    """Return when nobody traces a process of an EE (or after ``timeout_s``)."""
    with contextlib.suppress(TimeoutError, FileNotFoundError):
        async with asyncio.timeout(timeout_s):
            while any(map(_is_traced, _read(f"{path_of(uid)}/cgroup.procs").split())):  # noqa: ASYNC110 -- files
                await asyncio.sleep(0.05)


def _is_traced(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return "TracerPid:\t0\n" not in _read(f"/proc/{pid}/status")
    return False


def usage(uid: str) -> tuple[int, float]:
    """Memory in bytes and processor time in seconds; zeros when there is no such cgroup."""
    try:
        memory = int(_read(f"{path_of(uid)}/memory.current"))
        cpu = _read(f"{path_of(uid)}/cpu.stat").split()
    except OSError:  # ENODEV: it goes at this moment
        return 0, 0.0
    return memory, int(cpu[cpu.index("usage_usec") + 1]) / 1e6


def oom_kills(uid: str) -> int:
    """How many processes of the EE the kernel has ended for want of memory."""
    with contextlib.suppress(FileNotFoundError):
        words = _read(f"{path_of(uid)}/memory.events").split()
        return int(words[words.index("oom_kill") + 1])
    return 0


async def remove(uid: str) -> None:
    """Kill whatever is in the EE's cgroup, and remove it with what is below."""
    path = path_of(uid)
    if not os.path.exists(path):
        return
    _write(f"{path}/cgroup.kill", "1")
    for _ in range(200):
        try:
            for directory, _, _ in os.walk(path, topdown=False):
                os.rmdir(directory)
        except OSError:  # EBUSY until the last process is reaped
            await asyncio.sleep(0.02)
        else:
            return
    raise TimeoutError(f"{path} still has processes")


def freeze_all(on: bool) -> None:
    """Begin to stop all EEs where they are, or let them go on."""
    _write(f"{paths.CGROUP}/cgroup.freeze", str(int(on)))


def all_are_frozen() -> bool:
    """Whether all have come to a stop: no nested processor is inside its guest then."""
    return "frozen 1" in _read(f"{paths.CGROUP}/cgroup.events").splitlines()


def present() -> list[str]:
    """The uids that have a cgroup."""
    with contextlib.suppress(FileNotFoundError):
        return [entry.name for entry in os.scandir(paths.CGROUP) if entry.is_dir()]
    return []


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
