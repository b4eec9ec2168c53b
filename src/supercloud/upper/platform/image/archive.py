"""Debian's archive: resolve by apt with a state of its own, fetch, verify.

apt checks the signature of the Release files with the archive's keyring and vouches for the
SHA-256 of each package; we then hold every file to that hash. The dpkg status is empty, so the
answer does not depend on the machine. Nothing here needs privilege.
"""

import hashlib
import os
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from supercloud.model.errors import NotFound, Permanent, Temporary
from supercloud.upper.platform.image.lock import Lock, Package
from supercloud.upper.platform.image.scratch import used

RELEASE = "trixie"
ARCHITECTURE = "amd64"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRRORS: Mapping[str, str] = {
    "debian": "http://deb.debian.org/debian",
    "debian-security": "http://deb.debian.org/debian-security",
}
SUITES = (
    ("debian", RELEASE),
    ("debian", f"{RELEASE}-updates"),
    ("debian-security", f"{RELEASE}-security"),
)
_LINE = re.compile(r"'([^']+)' (\S+)_(\S+)_(\S+)\.deb (\d+) SHA256:([0-9a-f]{64})")
_PARALLEL = 8
_ATTEMPTS = 4
_CHUNK_BYTES = 1 << 18


class Dropped(NotFound):
    """The archive no longer has a version that the lock names."""


def _mirrors() -> dict[str, str]:
    """The mirrors, each replaceable by the environment (``SUPERCLOUD_MIRROR_DEBIAN``, ...)."""
    return {
        name: os.environ.get(f"SUPERCLOUD_MIRROR_{name.upper().replace('-', '_')}", url).rstrip("/")
        for name, url in MIRRORS.items()
    }


@dataclass
class Archive:
    """The archive as seen through ``cache``: apt's state and the packages fetched so far."""

    cache: Path
    mirrors: Mapping[str, str] = field(default_factory=_mirrors)

    def resolve(self, wanted: Sequence[str], kernel_meta: str) -> Lock:
        """Everything that ``wanted`` needs, without recommendations, and a kernel.

        Of ``kernel_meta`` only the kernel package behind it is taken: the dependencies serve
        maintainer scripts.
        """
        self._write_apt_state()
        self._apt("update", "--error-on=any", "-qq")
        lines = self._uris("install", *wanted) + self._uris("download", self._kernel(kernel_meta))
        packages = tuple(sorted(self._package(line) for line in lines))
        return Lock(RELEASE, ARCHITECTURE, (*sorted(wanted), kernel_meta), packages)

    def fetch(self, packages: Iterable[Package]) -> dict[str, Path]:
        """Package name -> verified file. Raises ``Dropped``, ``Temporary``."""
        wanted = list(packages)
        (self.cache / "debs").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            return dict(zip((p.name for p in wanted), pool.map(self._fetch, wanted), strict=True))

    def _fetch(self, package: Package) -> Path:
        path = self.cache / "debs" / f"{package.sha256}.deb"
        if path.exists() and _matches(path, package):
            return used(path)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self._download(package, partial)
            if not _matches(partial, package):
                raise Permanent(f"{package.name} {package.version}: wrong content from the mirror")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _download(self, package: Package, path: Path) -> None:
        url = f"{self.mirrors[package.archive]}/{package.path}"
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return _copy(url, path, package.size_bytes)
            except urllib.error.HTTPError as error:
                if error.code in {404, 410}:
                    raise Dropped(f"{package.name} {package.version} is gone from {url}") from error
                _give_up_at(attempt, url, error)
            except OSError as error:
                _give_up_at(attempt, url, error)
            time.sleep(0.5 * attempt)
        raise AssertionError("unreachable")

    # apt

    @property
    def _state(self) -> Path:
        return self.cache / "apt"

    def _write_apt_state(self) -> None:
        for name in ("lists/partial", "archives/partial", "parts", "preferences.d"):
            (self._state / name).mkdir(parents=True, exist_ok=True)
        (self._state / "status").write_text("")
        (self._state / "sources.list").write_text(
            "".join(
                f"deb [signed-by={KEYRING} arch={ARCHITECTURE}] {self.mirrors[name]} {suite} main\n"
                for name, suite in SUITES
            )
        )
        (self._state / "apt.conf").write_text(_APT_CONF.format(state=self._state))

    def _apt(self, *arguments: str) -> str:
        environment = os.environ | {"APT_CONFIG": str(self._state / "apt.conf"), "LC_ALL": "C"}
        done = subprocess.run(
            ["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            message = f"apt-get {' '.join(arguments[:2])}: {done.stderr.strip()[-2000:]}"
            raise Temporary(message, delay_s=5.0)
        return done.stdout

    def _uris(self, command: str, *names: str) -> list[str]:
        return self._apt("-qq", "-y", "--print-uris", command, *names).splitlines()

    def _kernel(self, meta: str) -> str:
        found = re.findall(
            rf"(linux-image-[0-9]\S*-cloud-{ARCHITECTURE})_", "\n".join(self._uris("install", meta))
        )
        if not found:
            raise Permanent(f"{meta} names no kernel package")
        return urllib.parse.unquote(str(found[0]))

    def _package(self, line: str) -> Package:
        match = _LINE.match(line)
        if not match:
            raise Permanent(f"apt-get printed something unexpected: {line[:200]!r}")
        url, name, version, _, size, sha256 = match.groups()
        for archive, base in self.mirrors.items():
            if url.startswith(base + "/"):
                path = url[len(base) + 1 :]
                version = urllib.parse.unquote(version)
                return Package(name, version, archive, path, sha256, int(size))
        raise Permanent(f"{url} is on none of the mirrors")


_APT_CONF = """\
Dir "{state}";
Dir::State "{state}";
Dir::State::lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::Etc "{state}";
Dir::Etc::sourcelist "{state}/sources.list";
Dir::Etc::sourceparts "{state}/parts";
Dir::Etc::parts "{state}/parts";
Dir::Etc::preferencesparts "{state}/preferences.d";
Dir::Cache "{state}";
Dir::Cache::archives "{state}/archives";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "0";
APT::Sandbox::User "";
APT::Get::AllowUnauthenticated "0";
Acquire::AllowInsecureRepositories "0";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Retries "3";
"""


def _matches(path: Path, package: Package) -> bool:
    if path.stat().st_size != package.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def _copy(url: str, path: Path, size_bytes: int) -> None:
    """Fetch at most one byte more than expected: the hash check then refuses it."""
    request = urllib.request.Request(url, headers={"User-Agent": "supercloud"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer, path.open("wb") as file:  # noqa: S310
        left = size_bytes + 1
        while left and (chunk := answer.read(min(_CHUNK_BYTES, left))):
            file.write(chunk)
            left -= len(chunk)


def _give_up_at(attempt: int, url: str, error: OSError) -> None:
    if attempt == _ATTEMPTS:
        raise Temporary(f"{url}: {error}", delay_s=10.0) from error
