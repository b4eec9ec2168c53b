"""Process 1 of a platform: restarts the agent, reaps orphans, keeps their exit statuses.

EEs are started by the agent but do not go with it: when it dies they become children of process 1,
which writes what ``waitpid`` says of each orphan to ``EXITS/<pid>`` for the agent to read. It holds
no other state and imports next to nothing, for when process 1 dies the platform does.
"""

import os
import sys
import time

EXITS = "/run/supercloud/exits"
KEPT_EXITS = 1024
RESTART_DELAY_S = (0.1, 5.0)
STEADY_S = 30.0


def main() -> None:
    """Supervise when process 1, else run the agent; does not return."""
    if os.getpid() != 1:
        _agent()
    os.makedirs(EXITS, mode=0o700, exist_ok=True)
    delay_s, recorded = RESTART_DELAY_S[0], [""] * KEPT_EXITS
    while True:
        started_s = time.monotonic()
        agent = os.fork()
        if not agent:
            _agent()
        status = _reap_until(agent, recorded)
        steady = time.monotonic() - started_s > STEADY_S
        delay_s = RESTART_DELAY_S[0] if steady else min(delay_s * 2, RESTART_DELAY_S[1])
        print(f"agent ended with wait status {status}; again in {delay_s:.1f} s", flush=True)
        time.sleep(delay_s)


def _agent() -> None:
    from supercloud.upper.platform.agent.app import run  # noqa: PLC0415 -- not in process 1

    sys.exit(run())


def _reap_until(agent: int, recorded: list[str]) -> int:
    """Reap every child; return the agent's wait status when it was that one's turn."""
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return 0
        if pid == agent:
            return status
        _record(pid, status, recorded)


def _record(pid: int, status: int, recorded: list[str]) -> None:
    """Atomic, and bounded: the oldest record goes."""
    path = f"{EXITS}/{pid}"
    with open(f"{path}.part", "w") as file:
        file.write(f"{os.waitstatus_to_exitcode(status)} {time.monotonic():.6f}")
    os.rename(f"{path}.part", path)
    recorded.append(path)
    oldest = recorded.pop(0)
    if oldest and oldest not in recorded and os.path.exists(oldest):
        os.unlink(oldest)
