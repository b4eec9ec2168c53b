"""A really running Lower Layer host for tests, and a control plane's client of it."""

import asyncio
import base64
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeVar

from supercloud.lower.host import __path__ as host_path
from supercloud.providers.base import MemoryPins
from supercloud.providers.lower_layer.dial import Connection, Dialer, Target
from supercloud.trust.authority import Authority, Root
from supercloud.wire import admin
from supercloud.wire.codec import encode
from supercloud.wire.host import PlatformSpec
from support.ports import free_port

START = Path(next(iter(host_path))) / "__main__.py"
READY_TIMEOUT_S = 60


def images() -> Path:
    """The images to run: ``SUPERCLOUD_IMAGES``, else the build directory."""
    return Path(os.environ.get("SUPERCLOUD_IMAGES", "build/images")).absolute()


Host = TypeVar("Host", bound="RunningHost")


class RunningHost:
    """``supercloud-host run`` of an instance with a state directory of its own."""

    def __init__(self, directory: Path, instance: str) -> None:
        self.directory = directory
        self.instance = f"{instance}-{os.getpid()}"  # several runs of the tests may go on
        self.state = directory / "state"
        self.port = free_port()
        self.program = str(START)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        reading, writing = os.pipe()
        with open(self.directory / "host.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-I", "-S", "-B", self.program,
                    "--instance", self.instance, "--state", str(self.state),
                    "--listen", f"127.0.0.1:{self.port}", "--images", str(images()),
                    "--ready-fd", str(writing), "--templates", "asked", "--dial", "any", *more,
                ],
                pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            if not select.select([ready], [], [], READY_TIMEOUT_S)[0] or not ready.readline():
                self.stop()
                raise AssertionError(f"host did not start:\n{self.logs()}")

    def stop(self, timeout_s: float = 40) -> int:
        """SIGTERM, and its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def admin(self, method: str, **parameters: Any) -> Any:
        return admin.call(self.instance, method, parameters)

    def logs(self) -> str:
        paths = [self.directory / "host.log", *sorted(self.state.glob("log/*"))]
        return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in paths if p.exists())

    def pid_of(self, domain: str) -> int:
        """The process 1 of a domain, by its environment."""
        wanted = f"SUPERCLOUD_DOMAIN={domain}\0".encode()
        for pid in pids_of_session(self.pid):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                inner = status.split("NSpid:")[1].splitlines()[0].split()
                if wanted in Path(f"/proc/{pid}/environ").read_bytes() and inner[-1] == "1":
                    return pid
        raise LookupError(domain)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        found = []
        for task in os.listdir(f"/proc/{pid}/task"):
            found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        return [int(child) for child in found]
    return []


def pids_of_session(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for child in found:
        found += children(child)
    return found


@contextlib.contextmanager
def running_host(directory: Path, instance: str, *more: str) -> Iterator[RunningHost]:
    with running(RunningHost(directory, instance), *more) as host:
        yield host


@contextlib.contextmanager
def running(host: Host, *more: str) -> Iterator[Host]:
    """Start, and stop whatever comes; state and images are removed."""
    try:
        host.start(*more)
        yield host
    except BaseException:
        print(host.logs())
        raise
    finally:
        if host.process is not None and host.process.poll() is None:
            host.stop()
        shutil.rmtree(f"{admin.RUN}/{host.instance}", ignore_errors=True)
        shutil.rmtree(host.state / "images", ignore_errors=True)
    shutil.rmtree(host.state)


class ControlPlane:
    """Certificates of one U-Cloud and connections to its domain on a host."""

    def __init__(self, directory: Path, host: RunningHost, user: str) -> None:
        self.directory, self.host, self.user = directory / f"trust-{user}", host, user
        self.authority = Authority.ensure(str(self.directory), user)
        self.ca_pem = (self.directory / "root.pem").read_text()
        target = Target(name=host.instance, address="127.0.0.1", port=host.port, user=user)
        self.dialer = Dialer(target, self.authority, str(self.directory), MemoryPins())

    def enrol(self, **quota: int) -> Any:
        return self.host.admin("user.add", user=self.user, ca_pem=self.ca_pem, quota=quota)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        connection = await patient(self.dialer.connect)
        try:
            yield connection
        finally:
            await connection.close()

    async def call(self, method: str, parameters: Any = None, *, timeout_s: float = 60) -> Any:
        async with self.connected() as connection:
            return await connection.peer.call(method, parameters, timeout_s=timeout_s)

    async def image(self) -> str:
        return str((await self.call("host.info"))["images"][0])

    async def create(self, name: str, **more: Any) -> Any:
        config = base64.b64encode(more.pop("config", b"")).decode()
        fields = {"memory_bytes": 512 << 20, "scratch_bytes": 1 << 30, "ports": 4, **more}
        fields.setdefault("image", await self.image())
        spec = PlatformSpec(name=name, config_base64=config, **fields)
        return await self.call("platform.create", encode(spec), timeout_s=120)

    async def state(self, name: str) -> str:
        listed = (await self.call("platform.list"))["platforms"]
        return next((str(p["state"]) for p in listed if p["name"] == name), "absent")

    async def wait_for(self, name: str, state: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while (found := await self.state(name)) != state:
            assert time.monotonic() < deadline, f"{name} is {found}, not {state}"
            await asyncio.sleep(0.2)


async def patient(action: Any, timeout_s: float = 15) -> Any:
    """Repeat what fails for a passing reason."""
    from supercloud.model.errors import Temporary

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await action()
        except Temporary:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


def root_of(directory: Path) -> Root:
    return Root.ensure(str(directory))
