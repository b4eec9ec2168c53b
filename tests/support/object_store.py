"""The object service in a process and a network namespace of its own, and S3 clients for it.

The service is served over one SEQPACKET socket, as its launcher does on a host. Clients reach it
only by ``objects.connect``: a relay of ours joins accepted TCP connections to those.
"""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supercloud.wire.portal import Portal

SRC = Path(__file__).parents[2] / "src"
WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
KEY = bytes(range(32))
MIB = 1 << 20

SERVER = r"""
import ctypes, fcntl, logging, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 9)  # it ends with the test
assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())  # a network of its own
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    fcntl.ioctl(probe, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS: up
from supercloud.services.objects.service import ObjectService, Place
from supercloud.services.objects.weed import Ports
from supercloud.wire import portal
from supercloud.wire.reactor import Reactor
logging.basicConfig(level=logging.INFO)
channel = socket.socket(fileno=int(sys.argv[1]))
reactor = Reactor()
def tell(method, parameters):
    portal.send(channel, {"m": method, "p": dict(parameters)})
# its sockets in /tmp are named by port, and here /tmp is shared
place = Place(sys.argv[2], sys.argv[3], Ports.shifted(int(sys.argv[4])))
service = ObjectService(reactor, tell, place)
def serve():
    message = portal.receive(channel)
    if message is None:
        reactor.stop()
    else:
        portal.answer(channel, "test", message, service.handlers())
reactor.watch(channel, serve)
reactor.run()
service.close()
"""


def memory(data: bytes) -> int:
    """A descriptor of a memory file."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, data)
    return descriptor


class ObjectStore:
    """One running service. ``data`` is what the provider has, ``run`` what is in memory."""

    def __init__(self, data: Path, run: Path, identity: Path) -> None:
        self.data, self.run, self.identity = data, run, identity
        self.log = data.parent / "service.log"
        self.shift = random.randrange(1, 30_000)
        self._lock = threading.Lock()
        self._relays: list[socket.socket] = []

    def launch(self) -> None:
        """Run the process; nothing is started in it yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.run.mkdir(mode=0o700, exist_ok=True)
        with theirs, self.log.open("ab") as log:
            arguments = [str(theirs.fileno()), WEED, str(self.run), str(self.shift)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, *arguments],
                pass_fds=[theirs.fileno()],
                env={"PYTHONPATH": str(SRC), "PATH": "/usr/bin"},
                stdout=log,
                stderr=log,
            )
        self.portal = Portal(ours, "objects")

    def start(self, *, key: bytes = KEY, ready: bool = True, **more: Any) -> dict[str, Any]:
        """``objects.start``, and wait until it is ready."""
        fds = [memory(key), memory(self.identity.read_bytes())]
        parameters = {"directory": str(self.data), "capacity_bytes": 1024 * MIB, **more}
        try:
            state = self.call("objects.start", parameters, fds)
        finally:
            for descriptor in fds:
                os.close(descriptor)
        return self.wait("ready") if ready else state

    def call(self, method: str, parameters: Any = None, fds: Any = None) -> Any:
        with self._lock:
            return self.portal.call(method, parameters, fds, timeout_s=60)

    def wait(self, wanted: str) -> dict[str, Any]:
        deadline_s = time.monotonic() + 120
        while (state := self.call("objects.state"))["state"] != wanted:
            assert time.monotonic() < deadline_s, state
            time.sleep(0.05)
        return state

    def connect(self) -> socket.socket:
        with self._lock:
            reply = self.portal.call_for_descriptors("objects.connect")
        return socket.socket(fileno=reply.descriptors[0])

    def credentials(self, name: str, buckets: dict[str, str], **more: Any) -> dict[str, str]:
        with self._lock:
            reply = self.portal.call_for_descriptors(
                "objects.credentials", {"name": name, "buckets": buckets, **more}, timeout_s=60
            )
        with open(reply.descriptors[0], "rb") as file:
            file.seek(0)
            secret: dict[str, str] = json.load(file)
        assert reply.result == {"access_key": secret["access_key"]}
        return secret

    def endpoint(self) -> str:
        """An https URL on loopback of the test's namespace, relayed into the store."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._relays.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return f"https://127.0.0.1:{listener.getsockname()[1]}"

    def client(self, secret: dict[str, str], attempts: int = 2) -> Any:
        """A boto3 client."""
        return client_of(self.endpoint(), secret, str(self.identity), attempts)

    def kill(self) -> None:
        """As a machine that dies: both at once, nothing is told."""
        weed = self.call("objects.state")["pid"]
        ended = os.pidfd_open(weed) if weed else -1
        os.kill(self.process.pid, signal.SIGSTOP)  # so that it starts no other
        if weed:
            os.kill(weed, signal.SIGKILL)
        self.end()
        if weed:  # until its last thread has let go; whoever inherited it may reap it late
            assert select.select([ended], [], [], 60)[0]
            os.close(ended)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.portal.close()
        shutil.rmtree(self.run, ignore_errors=True)  # it was in memory

    def stop(self) -> None:
        """In order."""
        self.portal.close()
        self.process.wait(timeout=60)

    def close(self) -> None:
        for listener in self._relays:
            listener.close()
        if self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.kill()
        self.end()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                outside, _ = listener.accept()
                outside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    inside = self.connect()
                except Exception:
                    outside.close()
                    continue
                for pair in ((outside, inside), (inside, outside)):
                    threading.Thread(target=_copy, args=pair, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def make_identity(place: Path) -> Path:
    """A key and its certificate for loopback, PEM, in one file."""
    path = place / "identity.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-keyout", "-", "-days", "2", "-subj", "/CN=objects"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        capture_output=True,
        check=True,
    )
    path.write_bytes(made.stdout)
    return path


@contextlib.contextmanager
def object_store(place: Path, **start: Any) -> Iterator[ObjectStore]:
    """A running store below ``place``."""
    data = place / "data"
    data.mkdir(exist_ok=True)
    store = ObjectStore(data, place / "run", make_identity(place))
    store.launch()
    try:
        store.start(**start)
        yield store
    finally:
        store.close()


@contextlib.contextmanager
def plain_weed(place: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """``weed mini`` as it comes, without anything of ours: (endpoint, root's credentials).

    Its ports are none that connections are made from, nor those of hosts.
    """
    from supercloud.services.objects.weed import Ports

    (place / "data").mkdir(parents=True)
    secret = {"access_key": "plain", "secret_key": "plainplainplain", "region": "us-east-1"}
    keys = [{"accessKey": "plain", "secretKey": secret["secret_key"]}]
    identities = [{"name": "plain", "credentials": keys, "actions": ["Admin"]}]
    (place / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = Ports.shifted(random.randrange(-4000, 300))
    flags = [f"-{name}.port={getattr(ports, name)}" for name in vars(ports)]
    flags += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={place}/data", "-webdav=false"]
    flags += [f"-s3.config={place}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    flags += ["-volume.max=12", "-master.volumeSizeLimitMB=256", "-master.electionTimeout=1s"]
    flags += ["-master.telemetry=false", "-admin.ui=false", f"-filer.localSocket={place}/f.sock"]
    flags += [f"-s3.localSocket={place}/s.sock"]
    environment = {"HOME": str(place), "PATH": "/usr/bin", "WEED_S3_SSE_KEK_PASSPHRASE": "x" * 32}
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [WEED, "-logtostderr", "mini", *flags], env=environment, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{ports.s3}", secret
    finally:
        process.kill()
        process.wait()


def client_of(
    endpoint: str, secret: dict[str, str], verify: str | bool = True, attempts: int = 2
) -> Any:
    """A boto3 client."""
    import boto3
    from botocore.config import Config

    retries = {"total_max_attempts": attempts}
    options = {"retries": retries, "read_timeout": 120, "max_pool_connections": 16}
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=secret["access_key"],
        aws_secret_access_key=secret["secret_key"],
        region_name=secret["region"],
        verify=verify,
        config=Config(s3={"addressing_style": "path"}, **options),
    )


def eventually(action: Any) -> Any:
    """The action's result, once it does not fail."""
    deadline_s = time.monotonic() + 120
    while True:
        try:
            return action()
        except Exception:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)
