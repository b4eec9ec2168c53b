"""Programs that are run to their end, and processes that are watched by pidfd."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Collection, Mapping
from typing import Any

from supercloud.model.errors import Permanent, Temporary
from supercloud.upper.platform.agent.init import EXITS

MAX_COMPLAINT = 500
EXIT_RECORD_WAIT_S = 2.0


async def run(
    *argv: str,
    given: bytes | None = None,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    accept: Collection[int] = (0,),
    **options: Any,
) -> bytes:
    """Standard output of a program; Permanent with the end of its complaint if it fails.

    It has not when its exit status is one to ``accept``.

    ``options`` go to the spawn. The program is killed on time-out and cancellation.
    """
    options = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE} | options
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE,
        env=env,
        **options,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(given), timeout_s)
    except TimeoutError:
        raise Temporary(f"{argv[0]} did not end in {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode not in accept:
        complaint = (err or out or b"").decode("utf-8", "replace").strip()[-MAX_COMPLAINT:]
        raise Permanent(f"{argv[0]} failed with {process.returncode}: {complaint}")
    return out or b""


def fork(body: Callable[[], int], keep: Collection[int] = ()) -> int:
    """The pid of a child that does ``body``, whose return is its exit status; 1 when it raises.

    Of our descriptors it has ``keep`` and the first three. Copies of others would outlive what we
    do with ours: a disk that a thread of ours has just closed would still be in use.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        first = 3
        for descriptor in sorted(keep):
            os.closerange(first, descriptor)
            first = descriptor + 1
        os.closerange(first, 1 << 30)
        code = body()
    finally:
        os._exit(code)


async def load_modules(*names: str) -> None:
    """One modprobe for all that are not there: the kernel would run one for each."""
    missing = [name for name in names if not os.path.exists(f"/sys/module/{name}")]
    if missing:
        await run("modprobe", "-q", "-a", *missing)


def set_oom_score(pid: int, score: int) -> None:
    """How readily the kernel ends a process for want of memory; it has the agent's at first."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write(str(score))


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid it names it for ever.

    0 when there is no such process (a zombie counts as gone).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if fields[0] in b"ZX" else int(fields[19])


def handles(pid: int, number: int) -> bool:
    """Whether a process catches or blocks a signal; False when it has gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = dict(line.partition(":\t")[::2] for line in file.read().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return False
    masks = int(lines["SigCgt"], 16) | int(lines["SigBlk"], 16)
    return bool(masks >> (number - 1) & 1)


class Watched:
    """A process that need not be our child. ``close`` must be called.

    ``launched_s`` is a monotonic time before its start. One that has been reaped already is fine:
    ``wait`` returns at once.
    """

    def __init__(self, pid: int, launched_s: float) -> None:
        self.pid, self.launched_s = pid, launched_s
        self.start_ticks = start_ticks(pid)
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1

    def send(self, number: int) -> None:
        """Send a signal; no error when it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Exit status as a shell gives it (128 + signal); None when nobody saw it."""
        if self._pidfd >= 0:
            await self._ended()
        return await self._status()

    async def ended_within(self, timeout_s: float) -> bool:
        """Whether it ended in that time."""
        if self._pidfd < 0:
            return True
        try:
            await asyncio.wait_for(self._ended(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def _ended(self) -> None:
        """Each waiter has a copy of the descriptor: a loop has one reader per descriptor."""
        loop = asyncio.get_running_loop()
        ended, copy = asyncio.Event(), os.dup(self._pidfd)
        loop.add_reader(copy, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(copy)
            os.close(copy)

    async def _status(self) -> int | None:
        for _ in range(int(EXIT_RECORD_WAIT_S / 0.02)):
            with contextlib.suppress(ChildProcessError):
                done, status = os.waitpid(self.pid, os.WNOHANG)  # noqa: ASYNC222 -- does not wait
                if done:
                    return shell_status(os.waitstatus_to_exitcode(status))
            if (recorded := recorded_exit(self.pid, self.launched_s)) is not None:
                return recorded
            await asyncio.sleep(0.02)
        return None

    def close(self) -> None:
        """Give the descriptor back; a child of ours that has ended is reaped."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def shell_status(code: int) -> int:
    """``-9`` (Python's way to say killed by 9) as 137."""
    return code if code >= 0 else 128 - code


def recorded_exit(pid: int, since_s: float) -> int | None:
    """What process 1 saw of an orphan's end after ``since_s`` (monotonic)."""
    try:
        with open(f"{EXITS}/{pid}") as file:
            code, when_s = file.read().split()
    except FileNotFoundError:
        return None
    return shell_status(int(code)) if float(when_s) >= since_s else None


def adopt(pid: int, ticks: int, launched_s: float) -> Watched | None:
    """The process, if it is still the one that started then."""
    if not pid or not ticks or start_ticks(pid) != ticks:
        return None
    watched = Watched(pid, launched_s)
    if watched.start_ticks == ticks:
        return watched
    watched.close()
    return None
