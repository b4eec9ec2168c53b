"""``supercloud ps`` of 500 environments against ``docker ps -a`` of 500 containers; at most 0.7x.

Both are cold processes against a warm server with everything in it. The environments are the fake
provider's. Docker is Debian's (docker.io), its daemon in namespaces of its own; its containers are
created, not started, which lists faster than running ones.
"""

import contextlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import ab

from support.commandline import CommandLine, control_plane, dying_with_us, wait_for

COUNT = 500
DOCKER = "/usr/bin/docker"
SUPERCLOUD = str(Path(sys.executable).with_name("supercloud"))


class Unix(http.client.HTTPConnection):
    def __init__(self, path: Path):
        super().__init__("localhost", timeout=60)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.path)


@contextlib.contextmanager
def docker(directory: Path) -> Iterator[list[str]]:
    """A daemon with ``COUNT`` containers; the command that lists them."""
    script = str(ROOT / "bench/direct/dockerd.sh")
    own = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    sock = directory / "docker.sock"
    with (directory / "log").open("wb") as log:
        argv = dying_with_us([*own, script, str(directory)])
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_for(lambda: sock.exists() or process.poll() is not None, 60)
        if process.poll() is not None:
            raise SystemExit((directory / "log").read_text())
        fill(Unix(sock))
        yield [DOCKER, "-H", f"unix://{sock}", "ps", "-a"]
    finally:
        process.kill()
        process.wait()


def fill(connection: Unix) -> None:
    image = io.BytesIO()
    with tarfile.open(fileobj=image, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("program"))
    ask(connection, "/images/create?fromSrc=-&repo=bench&tag=1", image.getvalue())
    body = {"Image": "bench:1", "Cmd": ["/program"], "HostConfig": {"NetworkMode": "none"}}
    for number in range(COUNT):
        ask(connection, f"/containers/create?name=web-{number}", json.dumps(body).encode())


def ask(connection: Unix, path: str, body: bytes) -> None:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status >= 300:
        raise SystemExit(f"docker: {answer.status} {text!r}")


@contextlib.contextmanager
def supercloud(directory: Path) -> Iterator[CommandLine]:
    """A control plane with ``COUNT`` environments that serve."""
    line = CommandLine(directory)
    file = directory / line.manifest(replicas=COUNT - 1, memory="16MiB")
    text = file.read_text().replace("hosts: 2", "hosts: 20")
    file.write_text(text + "platform: {memory: 4GiB, ports: 128}\n")
    with control_plane(line):
        line.run("up", file.name)
        yield line


def listing(argv: list[str], environment: dict[str, str]) -> ab.Measure:
    """The seconds that a process takes which prints ``COUNT`` rows and a header."""

    def measure() -> float:
        started = time.perf_counter()
        done = subprocess.run(argv, env=environment, capture_output=True, check=True)
        took_s = time.perf_counter() - started
        rows = done.stdout.count(b"\n") - 1
        assert rows == COUNT, f"{argv[0]} printed {rows} rows"
        return took_s * 1000

    return measure


def main() -> int:
    options = ab.arguments(rounds=20)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-ps-")))
        for name in ("docker", "supercloud"):
            (place / name).mkdir()
        theirs = stack.enter_context(docker(place / "docker"))
        ours = stack.enter_context(supercloud(place / "supercloud"))
        python = listing([sys.executable, "-c", "print('\\n' * 500)"], ours.environment)
        sides = [
            ab.Side("docker ps -a", listing(theirs, {"PATH": os.environ["PATH"]})),
            ab.Side("supercloud ps", listing([SUPERCLOUD, "ps"], ours.environment), at_most=0.7),
            ab.Side("python, printing as many lines", python),
        ]
        return ab.run(f"list {COUNT} environments", "ms", sides, options)


if __name__ == "__main__":
    if os.geteuid() != 0 or not os.access("/usr/sbin/dockerd", os.X_OK):
        sys.exit("bench/ps.py needs uid 0, and apt-get install --no-install-recommends docker.io")
    sys.exit(main())
