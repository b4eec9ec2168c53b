"""The agent's end of a saver: a process for one checkpoint or restore, see ``saver.requests``."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeVar

from supercloud.model.errors import Permanent, Temporary, from_wire
from supercloud.upper.platform.agent import cgroups, paths
from supercloud.upper.platform.agent.processes import set_oom_score
from supercloud.upper.platform.agent.state import remove_tree
from supercloud.upper.platform.saver.requests import KINDS, MAX_LINE_BYTES
from supercloud.wire.codec import decode, encode

MODULE = "supercloud.upper.platform.saver"
OOM_SCORE = 500  # rather a checkpoint less than an environment
PAUSE_TIMEOUT_S = 60.0  # longer than that an environment does not stand still for a checkpoint
ANSWER_TIMEOUT_S = 6 * 3600.0  # a whole disk over a slow link; progress is the store's to time out

T = TypeVar("T")


class Saver:
    """A running one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, kind: str, value: Any, answer: type[T], timeout_s: float) -> T:
        """Say something and have the answer; the saver's error is raised as it was there."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise Permanent("a saver without pipes")
        line = json.dumps({kind: {} if value is None else encode(value)})
        stdin.write(line.encode() + b"\n")
        try:
            async with asyncio.timeout(timeout_s):
                untrusted = await stdout.readline()
        except TimeoutError:
            raise Temporary(f"the checkpoint's process did not answer {kind}") from None
        if not untrusted.endswith(b"\n"):
            raise Temporary("the checkpoint's process has gone", delay_s=5.0)
        [(name, found)] = json.loads(untrusted).items()
        if name == "failed":
            raise from_wire(found)
        told = decode(KINDS[name], found, name) if name in KINDS else found
        if not isinstance(told, answer):
            raise Permanent(f"the checkpoint's process answered {name!r:.40} to {kind}")
        return told


@contextlib.asynccontextmanager
async def saver(
    uid: str = "", inherited: Sequence[int] = (), log_path: str = "/dev/null"
) -> AsyncIterator[Saver]:
    """Started with these descriptors, and gone at the end. ``uid``: whose memory it fills."""
    with open(log_path, "wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-B", "/opt/supercloud/main.py", MODULE,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            pass_fds=list(inherited), limit=MAX_LINE_BYTES, cwd="/",
        )  # fmt: skip
    try:
        set_oom_score(process.pid, OOM_SCORE)
        if uid:
            cgroups.enter(cgroups.path_of(uid), process.pid)
        yield Saver(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.contextmanager
def workplace(uid: str) -> Any:
    """A directory on scratch for one checkpoint of an EE, empty; gone afterwards."""
    place = f"{paths.CHECKPOINTS}/{uid}"
    remove_tree(place)
    os.makedirs(place, mode=0o700)
    try:
        yield place
    finally:
        remove_tree(place)


def sweep() -> None:
    """Remove what an agent that was killed has left."""
    if os.path.exists(paths.SCRATCH):
        return  # a clone's disk, which has nothing on it, and no key yet
    if os.path.exists(paths.CHECKPOINTS):
        remove_tree(paths.CHECKPOINTS)
