"""Pulling from a real registry: Debian's docker-registry on loopback."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import NoResources, NotFound, Temporary
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.oci import convert
from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image import tree as trees
from supercloud.upper.platform.image.archive import Archive
from supercloud.upper.platform.image.locking import Locking
from supercloud.upper.platform.image.progress import Progress
from supercloud.upper.platform.image.tools import ToolTree, default_cache
from support.oci import Layout, extract, file, layer, listing

TOOLS = ToolTree()
CONFIG = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
log: {{level: error}}
"""


def registry_binary(to: Path) -> Path:
    archive = Archive(default_cache())
    _, debs = Locking(archive, Progress(quiet=True)).obtain(
        lambda lock: [p for p in lock.packages if p.name == "docker-registry"]
    )
    tree = trees.from_debs(debs.values(), recipe.SKIP)
    to.write_bytes(tree["usr/bin/docker-registry"].data)
    to.chmod(0o755)
    return to


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its ``host:port``."""
    place = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (place / "config.yml").write_text(CONFIG.format(root=place / "data", port=port))
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
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, log.read_text()
            time.sleep(0.05)


def push(registry: str, place: Path, name: str, *layers: bytes) -> str:
    ref = Layout(place / f"layout-{name.replace(':', '-')}", layers).write()
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


def test_an_image_is_pulled_once_and_found_by_digest_afterwards(
    registry: str, tmp_path: Path
) -> None:
    ref = push(registry, tmp_path, "team/web:v1", layer(file("a"), file("b")), layer(file(".wh.a")))
    image = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    assert listing(extract(image.path, tmp_path / "t", TOOLS)) == {"b"}
    made = image.path.stat()
    assert convert(ref.removeprefix("docker://"), cache=tmp_path / "cache", tools=TOOLS) == image
    again = image.path.stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert len(list((tmp_path / "cache/erofs").iterdir())) == 1


def test_a_moved_tag_is_noticed(registry: str, tmp_path: Path) -> None:
    ref = push(registry, tmp_path, "moving:latest", layer(file("old")))
    old = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    push(registry, tmp_path, "moving:latest", layer(file("new")))
    new = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    assert old.digest != new.digest
    assert listing(extract(new.path, tmp_path / "t", TOOLS)) == {"new"}


def test_what_the_registry_does_not_have_is_said(registry: str, tmp_path: Path) -> None:
    push(registry, tmp_path, "there:v1", layer(file("x")))
    for name in ("there:v2", "never/pushed:latest"):
        with pytest.raises(NotFound):
            convert(f"docker://{registry}/{name}", cache=tmp_path / "cache", tools=TOOLS)


def test_an_image_over_the_limits_is_refused_before_it_is_fetched(
    registry: str, tmp_path: Path
) -> None:
    ref = push(registry, tmp_path, "big:v1", layer(file("x", os.urandom(2 << 20))))
    with pytest.raises(NoResources, match="limits"):
        convert(ref, cache=tmp_path / "cache", tools=TOOLS, limits=Limits(total_bytes=1 << 20))


def test_a_registry_that_does_not_answer_is_a_temporary_trouble(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(Temporary):
        convert(f"docker://127.0.0.1:{port}/x", cache=tmp_path / "cache", tools=TOOLS)
