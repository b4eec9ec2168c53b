"""A real S3 server for tests: SeaweedFS on free loopback ports, with one bucket."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from supercloud.model.errors import SupercloudError
from supercloud.services.checkpoint.s3 import S3, Bucket
from support.ports import free_port

ACCESS_KEY, SECRET_KEY = "checkpoint-tests", "checkpoint-tests-secret"
_SERVICES = ("master", "volume", "filer", "s3", "admin")
_DEADLINE_S = 90.0


def _command(directory: Path, ports: list[int]) -> list[str]:
    numbers = iter(ports)
    pairs = [
        word
        for service in _SERVICES
        for word in (f"-{service}.port={next(numbers)}", f"-{service}.port.grpc={next(numbers)}")
    ]
    return [
        str(Path(sys.executable).with_name("weed")),
        "mini",
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory / 'data'}"),
        *("-master.volumeSizeLimitMB=64", "-master.electionTimeout=1s", "-master.telemetry=false"),
        *("-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        f"-s3.config={directory / 's3.json'}",
        f"-filer.localSocket={directory / 'filer.sock'}",
        f"-s3.localSocket={directory / 's3.sock'}",
        *pairs,
    ]


@contextlib.contextmanager
def s3_server(directory: Path, name: str = "checkpoints") -> Iterator[Bucket]:
    """The server, running, and its bucket."""
    (directory / "data").mkdir()
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin"],
    }
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [free_port() for _ in range(2 * len(_SERVICES))]
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "GOMEMLIMIT": "256MiB"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(directory, ports), cwd=directory, env=environment, stdout=log, stderr=log
        )
    bucket = Bucket(
        endpoint=f"http://127.0.0.1:{ports[2 * _SERVICES.index('s3')]}",
        name=name,
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
    )
    try:
        _make_bucket(process, bucket, directory / "log")
        yield bucket
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for port in ports:  # it leaves these, wherever it is started
            for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                left.unlink(missing_ok=True)
        shutil.rmtree(directory / "data", ignore_errors=True)


def _make_bucket(process: subprocess.Popen[bytes], bucket: Bucket, log: Path) -> None:
    """Wait until the bucket is made, and an object in it can be put and read."""
    client = S3(bucket, sleep=lambda _s: None)
    deadline_s = time.monotonic() + _DEADLINE_S
    while True:
        with contextlib.suppress(SupercloudError):  # it may be there from the try before
            client._request("PUT", "")
        try:
            client.delete("ready/0")
            client.put("ready/0", b"ready")
            if client.get("ready/0") == b"ready":
                client.delete("ready/0")
                return
        except SupercloudError:
            pass
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise AssertionError(f"no S3 server: {log.read_text()[-3000:]}")
        time.sleep(0.2)
