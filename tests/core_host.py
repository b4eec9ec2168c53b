"""A real host for tests: keeper and core with a small manifest, domains that run what they are told.

Every domain runs ``CONSOLE``: it takes its channel ``console`` and executes the Python that comes
over it, with ``core`` (its client) in reach. The root is the test machine's own ``/``, read-only.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from supercloud.isolation import seccomp
from supercloud.lower.host.hierarchies import for_manifest, hierarchies
from supercloud.model.errors import BY_CODE

SRC = Path(__file__).parents[1] / "src"
KEEPER = SRC / "supercloud/lower/core/keeper.py"
PYTHON = "/usr/bin/python3"
MIB = 1 << 20
DEADLINE_S = 120.0  # these suites run in an emulated guest as well
_instances = itertools.count()

# A prefix for a command: it is told to stop (SIGTERM) when pytest dies
STOP_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)

CONSOLE = r"""
import sys; sys.path.insert(0, "/run/src")
import json, os, socket, time
from supercloud.lower.client import *
from supercloud.model.capability import Limits, Rights
from supercloud.model.errors import NotFound
core = Core()
while True:
    try:
        console = core.take_socket("console")
        break
    except NotFound:
        list(core.events(1.0))
space = dict(globals())
while True:
    code, fds, _, _ = socket.recv_fds(console, 1 << 17, 16)
    if not code:
        time.sleep(0.02)
        try:
            console = core.take_socket("console")
        except NotFound:
            time.sleep(0.1)
        continue
    space.update(result=None, send=[], fds=fds)
    try:
        exec(code.decode(), space)
        said = {"result": space["result"]}
    except BaseException as error:
        said = {"error": [getattr(error, "code", type(error).__name__), str(error)]}
    socket.send_fds(console, [json.dumps(said).encode()], space["send"])
"""


class RemoteError(Exception):
    """Something else than a user error was raised inside a domain."""


class Console:
    """Runs code inside a domain."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.end.settimeout(DEADLINE_S)

    def __call__(self, code: str, *descriptors: int) -> Any:
        """Execute; the value of ``result`` afterwards. User errors are raised as themselves."""
        return self.with_descriptors(code, *descriptors)[0]

    def with_descriptors(self, code: str, *descriptors: int) -> tuple[Any, list[int]]:
        self.send(code, *descriptors)
        return self.receive()

    def send(self, code: str, *descriptors: int) -> None:
        try:
            socket.send_fds(self.end, [code.encode()], list(descriptors))
        except BrokenPipeError as error:
            message = "the domain is gone"
            raise RemoteError(message) from error

    def receive(self) -> tuple[Any, list[int]]:
        said, received, _, _ = socket.recv_fds(self.end, 1 << 17, 16)
        if not said:
            message = "the domain is gone"
            raise RemoteError(message)
        answer = json.loads(said)
        if "error" in answer:
            code, message = answer["error"]
            raise BY_CODE[code](message) if code in BY_CODE else RemoteError(f"{code}: {message}")
        return answer["result"], received

    def hear(self, *wanted: str) -> list[tuple[str, str, int]]:
        """Events (what, name, first value), read until those that are ``wanted`` have come."""
        return [
            tuple(event)
            for event in self(
                f"wanted, heard, end_s = {set(wanted)!r}, [], time.monotonic() + {DEADLINE_S / 2}\n"
                "while not wanted <= {e[0] for e in heard} and time.monotonic() < end_s:\n"
                "    heard += [(Event(e.op).name, e.name, e.values[0]) for e in core.events(1)]\n"
                "result = heard"
            )
        ]

    def child(self, kind: str, name: str, **limits: int) -> "Console":
        """Make and start a domain out of this one, with a console."""
        given = {"memory_bytes": 64 * MIB, "pids": 16, **limits}
        _, (end,) = self.with_descriptors(
            f"made = core.create_domain({kind!r}, {name!r}, Limits(**{given!r}))\n"
            f"whole = core.create_channel(SELF, made.selector, 'c/{name}', 'console')\n"
            "core.start(made.selector)\n"
            f"send = [core.take(core.lookup('c/{name}').selector)]"
        )
        return Console(socket.socket(fileno=end))


def kind(**more: Any) -> dict[str, Any]:
    """A kind of the manifest that runs ``CONSOLE``."""
    return {
        "argv": [PYTHON, "-I", "-S", "-B", "-c", CONSOLE],
        "filter": "base",
        "binds": [{"source": str(SRC), "target": "/run/src"}],
        "limits": {"memory_bytes": 64 * MIB, "pids": 16},
        "peers": {"driver": True},
        **more,
    }


def driver(**more: Any) -> dict[str, Any]:
    """A kind that may create ``child``ren, and is peer to itself and them."""
    return kind(
        **{
            "limits": {"memory_bytes": 2048 * MIB, "pids": 512, "domains": 64, "disk_bytes": MIB},
            "own": {"memory_bytes": 64 * MIB, "pids": 32},
            "creates": ["child"],
            "peers": {"driver": True, "child": True},
            **more,
        }
    )


class Host:
    """Keeper, core and initial domains, in a temporary directory."""

    def __init__(self, directory: Path, kinds: dict[str, Any], domains: list[Any]) -> None:
        self.directory = directory
        self.instance = f"t{os.getpid()}-{next(_instances)}"
        self.consoles: dict[str, Console] = {}
        self._kinds, self._domains = kinds, domains
        self.keeper: subprocess.Popen[bytes] | None = None
        self.manifest = self._manifest()
        self.log = directory / "core.log"

    def _manifest(self) -> dict[str, Any]:
        for one in self._kinds.values():
            one["filter"] = seccomp.compiled(one["filter"])[0].hex()
        names = [one["name"] for one in self._domains]
        first = (
            10_000_000 + os.getpid() % 10_000 * 2000 + int(self.instance.split("-")[1]) % 8 * 250
        )
        return {
            "version": 1,
            "instance": self.instance,
            "first_uid": first,
            "uids": 100,
            "runtime": "/",
            "runtime_sha256": "",
            "groups": for_manifest(),
            "limits": {
                "memory_bytes": 1 << 40,
                "pids": 1 << 20,
                "domains": 4096,
                "disk_bytes": 1 << 40,
            },
            "kinds": self._kinds,
            "domains": [[one["name"], one["kind"]] for one in self._domains],
            "grants": [
                {"to": n, "object": f"inherited:{n}", "rights": ["USE"], "name": "console"}
                for n in names
            ],
        }

    def start(self, *, wait: bool = True) -> None:
        (self.directory / "manifest.json").write_text(json.dumps(self.manifest))
        (self.directory / "run").mkdir(exist_ok=True)
        theirs = []
        command = [
            PYTHON,
            "-I",
            "-S",
            "-c",
            STOP_WITH_PARENT,
            PYTHON,
            "-I",
            "-S",
            "-B",
            str(KEEPER),
        ]
        for option in ("run", "state"):
            command += [f"--{option}", str(self.directory / option)]
        command += ["--manifest", str(self.directory / "manifest.json")]
        for one in self._domains:
            ours, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.consoles[one["name"]] = Console(ours)
            theirs.append(end)
            command += ["--fd", f"{one['name']}={end.fileno()}"]
        with self.log.open("ab") as log:
            self.keeper = subprocess.Popen(
                command, pass_fds=[end.fileno() for end in theirs], stderr=log, stdout=log
            )
        for end in theirs:
            end.close()
        if not wait:
            return
        wait_for(lambda: (self.directory / "run/ready").exists() or self.keeper.poll() is not None)
        assert self.keeper.poll() is None, self.log.read_text()

    def stop(self) -> int:
        assert self.keeper is not None
        self.keeper.terminate()
        return self.keeper.wait(DEADLINE_S)

    @property
    def core_pid(self) -> int:
        """The core: the keeper's child that has uid 0 and is no domain."""
        assert self.keeper is not None
        return next(pid for pid in children(self.keeper.pid) if real_uid(pid) == 0)

    def groups(self) -> list[Path]:
        """Groups of this instance in every hierarchy."""
        bases = [Path(tree.root) / "supercloud" / self.instance for tree in hierarchies()]
        return [Path(d) for base in bases for d, _, _ in os.walk(base)]

    def processes(self) -> set[int]:
        """Process ids in the groups of this instance."""
        found: set[int] = set()
        for group in self.groups():
            with suppress(OSError):  # it goes while it is looked at
                found |= {int(p) for p in (group / "cgroup.procs").read_text().split()}
        return found

    def grants(self) -> list[dict[str, Any]]:
        lines = (self.directory / "state/grants.log").read_text().splitlines()
        return [json.loads(line)["r"] for line in lines]


@contextmanager
def host(
    kinds: dict[str, Any] | None = None, domains: list[dict[str, Any]] | None = None
) -> Iterator[Host]:
    """A running host; by default with one ``driver`` named ``one``. Leaves nothing behind."""
    kinds = kinds if kinds is not None else {"driver": driver(), "child": kind()}
    directory = Path(tempfile.mkdtemp(prefix="core-"))
    made = Host(
        directory, kinds, domains if domains is not None else [{"kind": "driver", "name": "one"}]
    )
    try:
        made.start()
        yield made
    except BaseException:
        print(made.log.read_text() if made.log.exists() else "no log")
        raise
    finally:
        if made.keeper is not None and made.keeper.poll() is None:
            try:
                made.stop()
            except subprocess.TimeoutExpired:
                made.keeper.kill()
        shutil.rmtree(directory)


def wait_for(condition: Any, timeout_s: float = DEADLINE_S) -> None:
    """Poll until true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"still not: {condition}"
        time.sleep(0.01)


def settled(look: Any) -> Any:
    """What is found twice, some time apart."""
    found = [look()]

    def again() -> bool:
        time.sleep(0.2)
        found.append(look())
        return found[-1] == found[-2]

    wait_for(again)
    return found[-1]


@contextmanager
def standing_still(made: Host) -> Iterator[None]:
    """The core reads nothing meanwhile: whatever is sent to it has come when it goes on."""
    core = made.core_pid
    os.kill(core, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(core, signal.SIGCONT)


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def real_uid(pid: int) -> int:
    """-1 of a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(status(pid)["Uid"].split()[0])
    return -1


def kill_core(made: Host) -> None:
    """SIGKILL the core and wait until another serves."""
    before = made.core_pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: replaced(made, before))


def replaced(made: Host, before: int) -> bool:
    try:
        return made.core_pid != before
    except StopIteration:
        return False
