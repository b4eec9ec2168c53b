"""A real registry to pull from: Debian's docker-registry on loopback."""

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.locking import Locking
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.tools import ToolTree, default_cache
from support.oci import Layout

TOOLS = ToolTree()
CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
log: {{level: error}}
"""
CLOSED = "auth: {{htpasswd: {{realm: ours, path: {path}}}}}\n"


def registry_binary(to: Path) -> Path:
    archive = Archive(default_cache())
    _, debs = Locking(archive, Progress(quiet=True)).obtain(
        lambda lock: [p for p in lock.packages if p.name == "docker-registry"]
    )
    tree = trees.from_debs(debs.values(), recipe.SKIP)
    to.write_bytes(tree["usr/bin/docker-registry"].data)
    to.chmod(0o755)
    return to


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def serving(place: Path, *, closed: bool = False) -> Iterator[str]:
    """Its ``host:port``, while it runs in ``place``; a closed one wants a password."""
    port = free_port()
    more = CLOSED.format(path=place / "htpasswd") if closed else ""
    (place / "config.yml").write_text(CONFIG.format(root=place / "data", port=port) + more)
    loader = TOOLS.argv("zstd")[:-1]  # a glibc as new as the registry's
    command = [*loader, registry_binary(place / "docker-registry"), "serve", place / "config.yml"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/", process, place / "log")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:  # it answers, and wants a password
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)


def push(registry: str, place: Path, name: str, *layers: bytes) -> str:
    ref = Layout(place / f"layout-{name.replace(':', '-').replace('/', '-')}", layers).write()
    TOOLS.run(
        "skopeo",
        "--insecure-policy",
        f"--tmpdir={place}",
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        ref,
        f"docker://{registry}/{name}",
    )
    return f"docker://{registry}/{name}"
