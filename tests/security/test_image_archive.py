"""A mirror between us and Debian's archive that lies: nothing of it enters an image."""

import http.server
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import Permanent, Temporary
from supercloud.upper.platform.image import lock as locks
from supercloud.upper.platform.image.archive import MIRRORS, SUITES, Archive, Dropped
from supercloud.upper.platform.image.lock import Package

Change = Callable[[str, bytes], bytes | None]


class Mirror(http.server.ThreadingHTTPServer):
    """Forwards to the real archive; ``change`` may alter an answer, or hide it (None)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.change: Change = lambda path, data: data
        self.asked: list[str] = []

    @property
    def mirrors(self) -> dict[str, str]:
        return {name: f"http://127.0.0.1:{self.server_port}/{name}" for name in MIRRORS}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name, _, rest = self.path.lstrip("/").partition("/")
        try:
            with urllib.request.urlopen(f"{MIRRORS[name]}/{rest}", timeout=60) as answer:
                data = self.server.change(self.path, answer.read())
        except urllib.error.HTTPError:
            data = None
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def small_package() -> Package:
    return min(locks.read(locks.COMMITTED).packages, key=lambda package: package.size_bytes)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_changed_package_is_refused_and_not_kept(mirror: Mirror, tmp_path: Path) -> None:
    package = small_package()
    archive = Archive(tmp_path, mirror.mirrors)
    for lie in (flip, lambda data: data[:-1], lambda data: data + b"x", lambda _: b""):
        mirror.change = lambda _, data, lie=lie: lie(data)
        with pytest.raises((Permanent, Temporary)):
            archive.fetch([package])
        assert list((tmp_path / "debs").iterdir()) == []
    mirror.change = lambda _, data: data
    assert archive.fetch([package])[package.name].stat().st_size == package.size_bytes


def test_a_package_damaged_in_the_cache_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    package = small_package()
    archive = Archive(tmp_path, mirror.mirrors)
    path = archive.fetch([package])[package.name]
    good = path.read_bytes()
    path.write_bytes(flip(good))
    archive.fetch([package])
    assert path.read_bytes() == good
    archive.fetch([package])
    assert len(mirror.asked) == 2


def test_a_package_that_is_gone_is_said_to_be(mirror: Mirror, tmp_path: Path) -> None:
    mirror.change = lambda *_: None
    package = small_package()
    with pytest.raises(Dropped, match=package.name):
        Archive(tmp_path, mirror.mirrors).fetch([package])


@pytest.mark.parametrize("lie", ["InRelease changed", "no signature", "Packages changed"])
def test_nothing_is_resolved_from_an_archive_that_is_not_signed(
    mirror: Mirror, tmp_path: Path, lie: str
) -> None:
    def change(path: str, data: bytes) -> bytes | None:
        is_release = path.endswith("InRelease")
        if lie == "InRelease changed" and is_release:
            return data.replace(b"Suite: stable", b"Suite: stabbe")
        if lie == "no signature" and (is_release or path.endswith(".gpg")):
            return None
        if lie == "Packages changed" and "/binary-amd64/" in path:
            return flip(data)
        return data

    mirror.change = change
    with pytest.raises(Temporary, match="apt-get update"):
        Archive(tmp_path, mirror.mirrors).resolve(["busybox-static"], "linux-image-cloud-amd64")


def test_an_honest_mirror_resolves_to_what_it_has(mirror: Mirror, tmp_path: Path) -> None:
    """The kernel alone of its meta package; no recommendations; the machine's own state unused."""
    lock = Archive(tmp_path, mirror.mirrors).resolve(["busybox-static"], "linux-image-cloud-amd64")
    names = [package.name for package in lock.packages]
    assert names[0] == "busybox-static"
    assert len(names) == 2
    assert names[1].startswith("linux-image-6.")
    assert {package.archive for package in lock.packages} <= {name for name, _ in SUITES}
