"""The command line as its user has it: a process of its own against a real control plane."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supercloud.upper.platform.image.tools import default_cache

# A work tree that is not the installed one runs its own.
SOURCES = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
MANIFEST = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: {name}
providers:
  - name: cloud
    kind: fake
    options: {{hosts: 2, start_ms: {start_ms}}}
environments:
  - name: web
    kind: vm
    image: disk.raw
    memory: {memory}
    ports: [8080]
    replicas: {replicas}
  - name: other
    kind: vm
    image: disk.raw
"""


def dying_with_us(argv: list[str]) -> list[str]:
    """``argv``, killed when this process ends, however it does."""
    return ["setpriv", "--pdeathsig", "KILL", *argv]


@dataclass
class CommandLine:
    """``supercloud`` in a directory of its own; ``run`` one command."""

    directory: Path
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The tools of the image builder are this machine's, not unpacked anew for each test."""
        tools = default_cache()
        tools.mkdir(parents=True, exist_ok=True)
        own = self.directory / "cache" / "supercloud"
        own.mkdir(parents=True)
        (own / "image").symlink_to(tools)
        owner = self.directory.stat()
        for made in (own, own.parent):
            os.chown(made, owner.st_uid, owner.st_gid)

    @property
    def socket(self) -> Path:
        return self.directory / "api.sock"

    @property
    def environment(self) -> dict[str, str]:
        home = str(self.directory)
        return {
            "PATH": os.environ["PATH"], "HOME": home, "LC_ALL": "C.UTF-8", "TZ": "UTC",
            "XDG_STATE_HOME": f"{home}/state", "XDG_CACHE_HOME": f"{home}/cache",
            "SUPERCLOUD_SOCKET": str(self.socket), **SOURCES, **self.extra,
        }  # fmt: skip

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "supercloud.cli.user", *words]

    def run(
        self, *words: str, status: int | None = 0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run it; its exit status must be ``status`` (None: any)."""
        done = subprocess.run(
            self.argv(*words), env=self.environment, capture_output=True, text=True,
            timeout=120, check=False, cwd=self.directory, **options,
        )  # fmt: skip
        assert status is None or done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json").stdout)

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.argv(*words), env=self.environment, cwd=self.directory, **options
        )

    def manifest(self, name: str = "hello", **fields: Any) -> str:
        """Write a manifest for the fake provider, and its image; the file's name."""
        (self.directory / "disk.raw").write_bytes(b"\0" * 4096)
        wanted = {"memory": "128MiB", "replicas": 1, "start_ms": 0, **fields}
        file = f"{name}.yaml"
        (self.directory / file).write_text(MANIFEST.format(name=name, **wanted))
        return file


@contextlib.contextmanager
def control_plane(line: CommandLine) -> Iterator[subprocess.Popen[bytes]]:
    """A real control plane behind ``line``, without a TCP port."""
    argv = [sys.executable, "-m", "supercloud.control.main", "--socket", str(line.socket)]
    argv += ["--state", str(line.directory / "control"), "--listen", "", "--log", "-"]
    with (line.directory / "control.log").open("ab") as log:
        process = subprocess.Popen(
            dying_with_us(argv), env=line.environment, stdout=log, stderr=log, cwd="/"
        )
    try:
        wait_for(lambda: line.socket.exists() or process.poll() is not None, 30)
        assert process.poll() is None, (line.directory / "control.log").read_text()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Any, timeout_s: float) -> None:
    """Until ``condition()`` is true."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)
