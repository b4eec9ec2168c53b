"""The control plane as a process of its own, and its API as a client sees it."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from support.control import manifest_of, write_images


class Process:
    """One control plane over a directory; it may be killed and started again."""

    def __init__(self, directory: Path, *, listen: str = "") -> None:
        self.directory, self.listen = directory, listen
        self.process: subprocess.Popen[bytes] | None = None
        if not (directory / "vm").exists():
            write_images(directory)

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "api.sock"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def argv(self) -> list[str]:
        return [
            sys.executable, "-m", "supercloud.control.main", "--state", str(self.state),
            "--cache", str(self.directory / "cache"), "--socket", str(self.socket),
            "--listen", self.listen,
        ]  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.directory / "out").open("ab") as out:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.argv()], stdout=out, stderr=out
            )
        end_s = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, (self.directory / "out").read_text()
            assert time.monotonic() < end_s
            time.sleep(0.01)

    def _answers(self) -> bool:
        import socket

        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        if self.process is None or self.process.returncode is not None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / "control.log").read_text().splitlines()]

    def pss_bytes(self) -> int:
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        line = next(line for line in text.splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) * 1024

    def client(self) -> "Client":
        return Client(aiohttp.UnixConnector(path=str(self.socket)), self.directory)


class Client:
    """The API over a connector."""

    def __init__(
        self, connector: aiohttp.BaseConnector, directory: Path, base: str = "http://x"
    ) -> None:
        self.http = aiohttp.ClientSession(connector=connector)
        self.directory, self.base = directory, base

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.http.close()

    async def ask(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        """Status and decoded JSON."""
        async with self.http.request(method, self.base + path, json=body, **more) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> Any:
        status, body = await self.ask("GET", path)
        assert status == 200, body
        return body

    async def up(self, environments: list[dict[str, Any]], **more: Any) -> Any:
        asked = manifest_of(self.directory, environments, **more)
        body = {"manifest": asked.manifest, "file": asked.file, "directory": asked.directory}
        status, answer = await self.ask("POST", "/v1/up", body)
        assert status == 200, answer
        return answer

    async def until(self, state: str | None, name: str = "test", timeout_s: float = 60.0) -> Any:
        """Until the U-Cloud is in ``state``, or (None) not there."""
        async with asyncio.timeout(timeout_s):
            while True:
                views = {view["name"]: view for view in await self.get("/v1/uclouds")}
                if (views[name]["state"] if name in views else None) == state:
                    return views.get(name)
                await asyncio.sleep(0.02)
