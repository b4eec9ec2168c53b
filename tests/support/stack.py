"""The whole product, for tests: real hosts, a real control plane and the real command lines.

Control plane and CLI run under an unprivileged uid. Everything lives in one directory, instances
have names of their own, and a guardian cleans up whatever happens to the test.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supercloud.isolation.kinds import SERVICES
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.wire import admin
from support.guardian import Guardian
from support.inventory import Inventory, machine, processes_of
from support.ports import free_port, host_ports

UID = 64_101
START_S, STOP_S, COMMAND_S = 60.0, 45.0, 240.0
PORTS_EACH = 64
HEADER = "apiVersion: supercloud.dev/v1\nkind: UCloud\n"


@dataclass
class Host:
    """A Lower Layer host of its own: ``supercloud-host run``."""

    name: str
    instance: str
    directory: Path
    images: Path
    ports: range
    guardian: Guardian
    region: str = "local"
    templates: str = "none"
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def run_directory(self) -> Path:
        return Path(admin.RUN) / self.instance

    def start(self) -> None:
        """Until it says that it is ready."""
        self.directory.mkdir(exist_ok=True)
        reading, writing = os.pipe()
        with (self.directory / "host.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "supercloud.cli.host", "run",
                    "--instance", self.instance, "--state", str(self.state),
                    "--images", str(self.images), "--listen", f"127.0.0.1:{self.port}",
                    "--ports", f"{self.ports.start}-{self.ports.stop - 1}",
                    "--region", self.region, "--ready-fd", str(writing),
                    "--templates", self.templates, "--dial", "any",
                ],
                pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(writing)
        self.guardian.process(self.process.pid)
        with os.fdopen(reading, "rb") as ready:
            found = select.select([ready], [], [], START_S)[0] and ready.readline()
            assert found, f"host {self.name} did not start:\n{self.logs()}"

    def command(self, *words: str, status: int = 0) -> str:
        """``supercloud-host WORDS``: what it prints."""
        argv = [sys.executable, "-m", "supercloud.cli.host", *words, "--instance", self.instance]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, (words, done.stdout, done.stderr)
        return done.stdout if status == 0 else done.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self.command(*words, "--json"))

    def stop(self) -> None:
        """``supercloud-host stop``."""
        assert self.process is not None
        self.command("stop")
        self.process.wait(STOP_S)

    def processes(self) -> list[int]:
        """The keeper and all below it, and whoever is in one of its groups."""
        assert self.process is not None
        return processes_of(self.process.pid, self.instance)

    def pid_of(self, domain: str) -> int:
        """Process 1 of a domain; LookupError."""
        wanted = f"SUPERCLOUD_DOMAIN={domain}\0".encode()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                inner = status.split("NSpid:")[1].splitlines()[0].split()
                if wanted in Path(f"/proc/{pid}/environ").read_bytes() and inner[-1] == "1":
                    return pid
        raise LookupError(domain)

    def logs(self) -> str:
        paths = [self.directory / "host.log", *sorted(self.state.glob("log/*"))]
        return "\n".join(f"== {p.name}\n{tail(p)}" for p in paths if p.is_file())


@dataclass
class Stack:
    """Hosts by name, one control plane, and the command line. See ``stack``."""

    directory: Path
    images: Path
    guardian: Guardian
    hosts: dict[str, Host] = field(default_factory=dict)
    control: subprocess.Popen[bytes] | None = None
    templates: str = "none"
    before: Inventory = field(default_factory=machine)  # as the machine was without its hosts

    # -- hosts

    def add_host(self, name: str, region: str = "local") -> Host:
        """Start another host."""
        host = Host(
            name=name,
            instance=f"s{os.getpid()}-{name}"[:24],
            directory=self.directory / name,
            images=self.images,
            ports=host_ports(len(self.hosts), PORTS_EACH),
            guardian=self.guardian,
            region=region,
            templates=self.templates,
        )
        self.hosts[name] = host
        self.guardian.directory(host.run_directory)
        host.start()
        return host

    def enrol(self, user: str, host: str, **quota: str | int) -> None:
        """Enrol a U-Cloud at a host, as ``scripts/up`` does."""
        pem = self.directory / "ca.pem"
        pem.write_text(self.cli("ca").stdout)
        wanted = {"cpus": 2, "memory": "4GiB", "disk": "32GiB", "vms": 4, **quota}
        words = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
        self.hosts[host].command("user", "add", user, "--ca", str(pem), *words)
        wait_for(lambda: self._is_whole(user, host), START_S)

    def _is_whole(self, user: str, host: str) -> bool:
        """Whether the user's domain has made those of its services, which it keeps for good."""
        rows = {row["name"]: row for row in self.hosts[host].json("domains")}
        return bool(rows[f"user:{user}"]["domains_inside"] == len(SERVICES))

    # -- the control plane

    @property
    def home(self) -> Path:
        """What belongs to the unprivileged user."""
        return self.directory / "home"

    def start_control(self) -> None:
        """Until its socket is there."""
        socket_path = self.home / "api.sock"
        argv = [sys.executable, "-m", "supercloud.control.main"]
        argv += ["--state", str(self.home / "control"), "--socket", str(socket_path)]
        with (self.home / "control.out").open("ab") as log:
            self.control = subprocess.Popen(
                self._unprivileged([*argv, "--listen", "", "--log", str(self.home / "control.log")]),
                env=self.environment, cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.guardian.process(self.control.pid)
        wait_for(lambda: self._answers() or self._control_ended(), START_S, self.logs)
        assert not self._control_ended(), self.logs()

    def stop_control(self) -> None:
        """In order."""
        assert self.control is not None
        self.control.terminate()
        assert self.control.wait(STOP_S) == 0, self.logs()

    def kill_control(self) -> None:
        """As a crash."""
        assert self.control is not None
        self.control.kill()
        self.control.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.home / "api.sock"))
            return True
        return False

    def _control_ended(self) -> bool:
        return self.control is None or self.control.poll() is not None

    # -- the command line

    @property
    def environment(self) -> dict[str, str]:
        home = str(self.home)
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "LC_ALL": "C.UTF-8",
            "TZ": "UTC", "XDG_STATE_HOME": f"{home}/state", "XDG_CACHE_HOME": f"{home}/cache",
            "SUPERCLOUD_SOCKET": f"{home}/api.sock", "SUPERCLOUD_IMAGES": str(self.images),
        }  # fmt: skip

    def _unprivileged(self, argv: list[str]) -> list[str]:
        ids = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
        return ["setpriv", *ids, "--", *argv]

    def cli(
        self, *words: str, status: int | None = 0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """``supercloud WORDS``; its exit status must be ``status`` (None: any)."""
        argv = self._unprivileged([sys.executable, "-m", "supercloud.cli.user", *words])
        try:
            done = subprocess.run(
                argv, env=self.environment, capture_output=True, text=True, check=False,
                cwd=self.home, timeout=COMMAND_S, **options,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{words}: {error.stdout!r}\n{self.logs()}") from None
        said = f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert status is None or done.returncode == status, f"{said}\n{self.logs()}"
        assert "Traceback" not in done.stderr, said
        return done

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """``supercloud WORDS``, started."""
        argv = self._unprivileged([sys.executable, "-m", "supercloud.cli.user", *words])
        child = subprocess.Popen(argv, env=self.environment, cwd=self.home, **options)
        self.guardian.process(child.pid)
        return child

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "--json").stdout)

    def manifest(self, name: str, body: str, hosts: Sequence[str] = ()) -> str:
        """Write a manifest with hosts of this stack as providers; the file's path."""
        providers = "".join(
            f"  - {{name: {host.name}, kind: lower_layer, endpoint: '127.0.0.1:{host.port}', "
            f"region: {host.region}}}\n"
            for host in self.hosts.values()
            if not hosts or host.name in hosts
        )
        path = self.home / f"{name}.yaml"
        path.write_text(f"{HEADER}name: {name}\nproviders:\n{providers}{body}")
        return str(path)

    def logs(self) -> str:
        """What everything said last, for messages of failed assertions."""
        logs = [self.home / "control.out", self.home / "control.log"]
        said = [f"== {p.name}\n{tail(p)}" for p in logs if p.exists()]
        return "\n".join([*said, *(host.logs() for host in self.hosts.values())])


@contextlib.contextmanager
def stack(
    images: Path, hosts: Sequence[str] = ("here",), *, templates: str = "none"
) -> Iterator[Stack]:
    """Hosts of these names and a control plane; nothing of it is left behind.

    ``templates`` is the hosts' option: with others than none a machine more runs beside the tests.
    """
    guardian = Guardian()
    directory = Path(tempfile.mkdtemp(prefix="supercloud-stack-"))
    guardian.directory(directory)
    directory.chmod(0o755)
    made = Stack(directory, images, guardian, templates=templates)
    try:
        _make_home(made.home)
        for name in hosts:
            made.add_host(name, region=f"region-{name}")
        made.start_control()
        yield made
    finally:
        processes = [made.control, *(host.process for host in made.hosts.values())]
        for process in processes:
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
        guardian.close()


def _make_home(home: Path) -> None:
    """The user's home, with the builder's tools in its cache (they are only linked)."""
    tools = ToolTree().root
    cache = home / "cache" / "supercloud" / "image"
    cache.mkdir(parents=True)
    for locked in tools.parent.glob("lock-instead-of-*"):
        shutil.copyfile(locked, cache / locked.name)
    subprocess.run(["cp", "-al", str(tools), str(cache / tools.name)], check=True)
    for path in (home, home / "cache", home / "cache" / "supercloud", cache):
        os.chown(path, UID, UID)


def wait_for(condition: Any, timeout_s: float, why: Any = lambda: "it did not come about") -> Any:
    """The first true value of ``condition()``; AssertionError with ``why()`` when it is late."""
    end_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end_s, why()
        time.sleep(0.05)
    return found


def cpu_of_children_s() -> float:
    """Processor time of all children of this process, and theirs, that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tail(path: Path, size_bytes: int = 3000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size_bytes))
        return file.read().decode(errors="replace")
