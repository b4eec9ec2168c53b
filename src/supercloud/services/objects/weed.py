"""weed (SeaweedFS) as one process: where its files are, how it is told, when it is ready.

Everything but the volumes is in memory: ``run`` is a directory on a tmpfs that holds sockets,
configuration and keys. On the provider's directory are volumes, whose chunks weed encrypts, and
while it runs its raft state, which has no names. Ports are on loopback of the domain's own network
namespace. Flags and file names are those of SeaweedFS 4.48.
"""

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from supercloud.services.objects.sigv4 import Credentials

VOLUME_MIB: Final = 256
ROOT: Final = "supercloud-root"
LIFECYCLE_CURSORS: Final = b"/etc/s3/lifecycle/daily-cursors"
"""How far weed has read its own log for objects that are due. What it had not written of that log
when it was killed is in none of its reads again, so it begins anew with each start: five minutes
later it looks at every object that there is, and then once a day at the log."""
_MEMORY_MIB: Final = 200  # what Go's collector aims at; the domain's limit is higher
_COLLECTION: Final = "o"  # one for all buckets: a collection's name is in the names of its files
_TOKEN_S: Final = 60
_FILER_S: Final = 2.0
# what weed makes in its data directory and reads from there at start: it is told, not found
_IN_MEMORY: Final = {
    "worker": "worker",
    "mini.options": "mini.options",
    ".mini_kek_passphrase": "passphrase",
}
_NOT_THE_DISKS: Final = (*_IN_MEMORY, ".mini_sse_kek", "admin")
_MASTER_TOML: Final = """[master.maintenance]
scripts = ""
sleep_minutes = 17
[master.volume_growth]
copy_1 = 1
"""


@dataclass(frozen=True)
class Ports:
    """On loopback; weed's gRPC ports are 10000 above the first four."""

    master: int = 9333
    volume: int = 9340
    filer: int = 8888
    s3: int = 8333
    admin: int = 23646

    @classmethod
    def shifted(cls, by: int) -> "Ports":
        """The same, elsewhere: where a network namespace is shared."""
        default = cls()
        names = ("master", "volume", "filer", "s3", "admin")
        return cls(**{name: getattr(default, name) + by for name in names})


@dataclass(frozen=True)
class Weed:
    """One weed. ``data`` and ``run`` are directories, ``secret`` is 32 bytes, its alone."""

    program: str
    data: str
    run: str
    secret: bytes
    volumes: int
    durable: bool = True
    ports: Ports = field(default_factory=Ports)

    @property
    def store_socket(self) -> str:
        """Where it expects its metadata store."""
        return f"{self.run}/store.sock"

    @property
    def root(self) -> Credentials:
        """The service's own credentials; they never leave it."""
        return credentials(self.secret, ROOT)

    def prepare(self, identities: Sequence[Mapping[str, Any]]) -> None:
        """Write what it reads at start; take away what it must not find."""
        # Its master is the only one and learns of the volumes from their server. One that goes on
        # from an earlier raft state may have nobody write for 5 or 15 s, as for an election.
        for name in (*_NOT_THE_DISKS, f"m{self.ports.master}"):
            path = f"{self.data}/{name}"
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        for name in ("worker", "admin"):
            os.makedirs(f"{self.run}/{name}", mode=0o700, exist_ok=True)
        for name, target in _IN_MEMORY.items():
            os.symlink(f"{self.run}/{target}", f"{self.data}/{name}")
        _write(f"{self.run}/passphrase", self._key("passphrase"))
        _write(
            f"{self.run}/filer.toml", f'[redis2]\nenabled = true\naddress = "{self.store_socket}"\n'
        )
        _write(f"{self.run}/master.toml", _MASTER_TOML)
        _write(f"{self.run}/security.toml", self._security())
        self.write_identities(identities)

    def write_identities(self, identities: Sequence[Mapping[str, Any]]) -> None:
        """Who may do what; read at start and at SIGHUP."""
        root = identity(ROOT, self.root, ["Admin"])
        _write(f"{self.run}/s3.json", json.dumps({"identities": [root, *identities]}))

    def argv(self) -> list[str]:
        """The command; no secret is in it."""
        run, ports = self.run, self.ports
        flags = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self.data,
            "admin.dataDir": f"{run}/admin",
            "admin.ui": "false",
            "admin.port": ports.admin,
            "filer.collection": _COLLECTION,
            "filer.encryptVolumeData": "true",
            "filer.localSocket": f"{run}/filer.sock",
            "filer.port": ports.filer,
            "filer.saveToFilerLimit": 0,
            "master.electionTimeout": "1s",
            "master.port": ports.master,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": VOLUME_MIB,
            "s3.allowDeleteBucketNotEmpty": "false",
            "s3.autoCreateBucket": "false",
            "s3.config": f"{run}/s3.json",
            "s3.encryptVolumeData": "true",
            "s3.iam": "false",
            "s3.localSocket": f"{run}/s3.sock",
            "s3.port": ports.s3,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "volume.max": self.volumes,
            "volume.port": ports.volume,
            "webdav": "false",
        }
        given = [f"-{name}={value}" for name, value in flags.items()]
        return [self.program, f"-config_dir={run}", "-logtostderr", "mini", *given]

    def environment(self) -> dict[str, str]:
        """Nothing secret either."""
        return {"PATH": "/usr/bin", "HOME": self.run, "GOMEMLIMIT": f"{_MEMORY_MIB}MiB"}

    def configure(self) -> bool:
        """Make writes under all buckets durable, in one collection; False when it is not up yet."""
        rule = {"locationPrefix": "/", "collection": _COLLECTION, "volumeGrowthCount": 1}
        locations = [{**rule, "fsync": self.durable}]
        body = json.dumps({"version": 1, "locations": locations}).encode()
        try:
            return self._filer("PUT", "/etc/seaweedfs/filer.conf", body) == http.client.CREATED
        except (OSError, http.client.HTTPException):
            return False

    def _filer(self, method: str, path: str, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports.filer, timeout=_FILER_S)
        try:
            token = _token(self._key("filer"))
            connection.request(method, path, body, {"Authorization": f"BEARER {token}"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    def _security(self) -> str:
        signing = f'[jwt.filer_signing]\nkey = "{self._key("filer")}"\n'
        return signing + f'[s3.sse]\nkek = "{self._key("sse")}"\n'

    def _key(self, name: str) -> str:
        return hmac.digest(self.secret, f"weed {name}".encode(), "sha256").hex()


def credentials(secret: bytes, name: str) -> Credentials:
    """The credentials of a name: they follow from the secret, so nobody need keep them."""
    made = hmac.digest(secret, f"credentials {name}".encode(), hashlib.sha512)
    access = base64.b32encode(made[:10]).decode()
    return Credentials(f"SC{access}", base64.urlsafe_b64encode(made[10:40]).decode())


def identity(name: str, theirs: Credentials, actions: Sequence[str]) -> dict[str, Any]:
    """A row of weed's list of identities."""
    keys = [{"accessKey": theirs.access_key, "secretKey": theirs.secret_key}]
    return {"name": name, "credentials": keys, "actions": [*actions]}


RELOAD: Final = signal.SIGHUP


def _token(key: str) -> str:
    """A JSON web token (RFC 7519) for the filer's HTTP port."""
    claims = {"exp": int(time.time()) + _TOKEN_S}
    parts = [_text64(json.dumps(p).encode()) for p in ({"alg": "HS256", "typ": "JWT"}, claims)]
    signed = ".".join(parts)
    return f"{signed}.{_text64(hmac.digest(key.encode(), signed.encode(), 'sha256'))}"


def _text64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _write(path: str, text: str) -> None:
    file = os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(file, "w", encoding="utf-8") as writing:
        writing.write(text)
    os.replace(f"{path}.part", path)
