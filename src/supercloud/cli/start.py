"""Starting the control plane when it is not running."""

import fcntl
import os
import socket
import subprocess
import sys
import time

from supercloud.cli.failure import Unavailable

WAIT_S = 30.0
POLL_S = 0.02


def ensure_running(path: str) -> None:
    """Return when something listens on ``path``, having started the control plane if need be.

    Two commands at once start one: the second waits for the first at a lock.
    """
    if _listens(path):
        return
    if os.geteuid() == 0:
        raise Unavailable(
            f"the control plane is not running (nothing listens on {path}), and never runs as root",
            hint="start it with scripts/up, or run supercloud as an ordinary user",
        )
    with open(_lock(path), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _listens(path):
            _start(path)


def _lock(path: str) -> str:
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        if os.access(directory, os.W_OK):
            return path + ".lock"
    except OSError:
        pass
    raise Unavailable(
        f"the control plane is not running, and may not be started at {path}",
        hint="set XDG_RUNTIME_DIR or SUPERCLOUD_SOCKET to a place of your own, or see scripts/up",
    )


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except PermissionError:
            raise Unavailable(
                f"you may not use the control plane at {path}",
                hint="run as its user, or set SUPERCLOUD_SOCKET to your own",
            ) from None
    return True


def _start(path: str) -> None:
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    state = os.path.join(home, "supercloud")
    os.makedirs(state, mode=0o700, exist_ok=True)
    log_path = os.path.join(state, "control.out")
    argv = [sys.executable, "-m", "supercloud.control.main"]
    argv += ["--socket", path]
    if "SUPERCLOUD_LISTEN" in os.environ:
        argv += ["--listen", os.environ["SUPERCLOUD_LISTEN"]]
    with open(log_path, "ab", opener=_private) as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    end_s = time.monotonic() + WAIT_S
    while not _listens(path):
        if process.poll() is not None or time.monotonic() > end_s:
            what = "ended at once" if process.returncode is not None else "did not come up"
            last = _last_line(log_path)
            raise Unavailable(f"the control plane {what}: {last}", hint=f"see {log_path}")
        time.sleep(POLL_S)
    process.returncode = 0  # it outlives us: no warning that we leave it


def _last_line(path: str) -> str:
    with open(path, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
