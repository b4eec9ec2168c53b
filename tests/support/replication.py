"""Replicas and services in processes that can be killed, and an owner that keeps a record."""

import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from supercloud.services.replication.regions import map_bytes
from supercloud.wire import portal
from support.nbd import Client

MIB = 1 << 20
REGION = 64 << 10
DEADLINE_S = 120.0
GONE = (ConnectionResetError, BrokenPipeError)


def until(so: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        if found := so():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came to be")


def spawn(module: str, descriptor: int, *arguments: str) -> subprocess.Popen[str]:
    """A module of ``support`` with ``descriptor`` as its 3."""
    code = (
        f"import os, sys, runpy; os.dup2({descriptor}, 3) if {descriptor} != 3 else 0; "
        f"sys.argv = ['x', *sys.argv[1:]]; runpy.run_module('support.{module}', run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        pass_fds=[descriptor],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


class Replica:
    """A protected device; it comes back on the same backing file after it was killed."""

    def __init__(self, place: Path, name: str, size_bytes: int) -> None:
        self.path, self.name, self.size_bytes = place / f"{name}.img", name, size_bytes
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")
        self.listener.listen(16)
        self.kept = True
        self.start()

    def start(self) -> None:
        arguments = (str(self.path), str(self.size_bytes))
        self.process = spawn("replica_process", self.listener.fileno(), *arguments)
        self._line()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the replica's process has ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._line()

    def stream(self) -> int:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(self.listener.getsockname())
        sock.setblocking(True)
        return sock.detach()

    def client(self) -> Client:
        return Client(socket.socket(fileno=self.stream()), "")

    def content(self) -> bytes:
        client = self.client()
        data = b"".join(client.read(at, MIB) for at in range(0, self.size_bytes, MIB))
        client.close()
        return data

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.kept = False

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        os.kill(self.process.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()))
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class Host:
    """Where a service runs: its process, its map, the calls to it."""

    def __init__(self, owner: "Owner") -> None:
        self.owner = owner
        self.map = os.memfd_create("map")
        os.truncate(self.map, map_bytes(owner.size_bytes))
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = spawn("replication_process", theirs.fileno())
        theirs.close()
        self._answers: queue.Queue[portal.Message | None] = queue.Queue()
        self._calling = threading.Lock()
        self._last = 0
        listen = (self.channel, self._answers)
        self._listener = threading.Thread(target=self._listen, args=listen)
        self._listener.start()

    def _listen(self, channel: socket.socket, answers: "queue.Queue[Any]") -> None:
        with contextlib.suppress(OSError):
            while (message := portal.receive(channel)) is not None:
                if "m" in message.untrusted:
                    self.owner.told.put((self, message.untrusted["m"], message.untrusted["p"]))
                else:
                    answers.put(message)
        answers.put(None)  # whoever waits is not to wait for ever

    def call(self, method: str, descriptors: list[int] | None = None, **what: Any) -> portal.Reply:
        with self._calling:
            self._last += 1
            message = {"i": self._last, "m": method, "p": {"volume": "data", **what}}
            portal.send(self.channel, message, descriptors)
            while True:
                answer = self._answers.get(timeout=DEADLINE_S)
                if answer is None:
                    self._answers.put(None)
                    raise portal.Closed("the service has ended")
                if answer.untrusted.get("i") == self._last:
                    return portal.result_of(answer)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.call("mirror.state").result
        return found

    def standing(self, name: str) -> str:
        return next(r["standing"] for r in self.state()["replicas"] if r["replica"] == name)

    def client(self) -> Client:
        """May be used once something may be answered; the handshake needs no lease."""
        return Client(socket.socket(fileno=self.call("mirror.connect").descriptors[0]), "")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._listener.join()
        self.channel.close()

    def close(self) -> None:
        if self.process is not None:
            self.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
        os.close(self.map)


class Owner:
    """Keeps the record, confirms, renews leases. ``confirms`` and ``renews`` may be held."""

    def __init__(self, place: Path, names: tuple[str, ...] = ("a", "b"), mib: int = 16) -> None:
        self.size_bytes = mib * MIB
        self.replicas = {name: Replica(place, name, self.size_bytes) for name in names}
        self.told: queue.Queue[tuple[Host, str, dict[str, Any]]] = queue.Queue()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.generation, self.in_sync = 0, set(names)
        self.turns: dict[str, int] = {}
        self.confirms, self.renews = threading.Event(), threading.Event()
        self.confirms.set(), self.renews.set()
        self.host: Host | None = None
        self.hosts: list[Host] = []
        self._over = False
        self._threads = [threading.Thread(target=t) for t in (self._handle, self._renew)]
        for thread in self._threads:
            thread.start()

    def new_host(self) -> Host:
        self.hosts.append(Host(self))
        return self.hosts[-1]

    def open(
        self, host: Host, connected: list[str], *, clean: bool = False, silence_ms: int = 60_000
    ) -> Host:
        """A new generation there; devices that are connected have ended what they had before."""
        self.generation += 1
        self.turns = dict.fromkeys(self.replicas, 0)
        wishes = [
            {
                "replica": name, "in_sync": name in self.in_sync, "kept": replica.kept,
                "connected": name in connected,
            }
            for name, replica in self.replicas.items()
        ]  # fmt: skip
        streams = [self._fresh(r).stream() for n, r in self.replicas.items() if n in connected]
        with portal.closing(streams):
            answer = host.call(
                "mirror.open", [host.map, *streams], generation=self.generation,
                size_bytes=self.size_bytes, replicas=wishes, clean=clean, silence_ms=silence_ms,
            )  # fmt: skip
        for found in answer.result["replicas"]:
            if found["standing"] == "in_sync":
                self.replicas[found["replica"]].kept = True
        self.host = host
        return host

    def _fresh(self, replica: Replica) -> Replica:
        replica.ask("again")
        return replica

    def attach(self, name: str) -> None:
        assert self.host is not None
        streams = [self._fresh(self.replicas[name]).stream()]
        with portal.closing(streams):
            what = {"generation": self.generation, "replica": name}
            self.host.call("replica.attach", streams, **what)

    def back(self, name: str) -> None:
        """A replica that was killed, until it has all that it missed."""
        self.replicas[name].start()
        self.attach(name)
        until(all_in_sync(self))

    def begun(self, **more: Any) -> Host:
        """The first generation, of all that there are."""
        return self.open(self.new_host(), [*self.replicas], clean=True, **more)

    def count(self, method: str) -> int:
        return sum(1 for name, _ in self.heard if name == method)

    def _handle(self) -> None:
        while not self._over:
            with contextlib.suppress(queue.Empty):
                host, method, what = self.told.get(timeout=0.1)
                self.confirms.wait()
                self.heard.append((method, what))
                if method in ("replica.stale", "replica.resynced"):
                    self._record(host, what, in_sync=method == "replica.resynced")

    def _record(self, host: Host, what: dict[str, Any], *, in_sync: bool) -> None:
        name, turn = what["replica"], what["turn"]
        if what["generation"] != self.generation or turn < self.turns[name]:
            return
        if turn > self.turns[name]:
            if not in_sync and self.in_sync <= {name}:
                return
            self.turns[name] = turn
            (self.in_sync.add if in_sync else self.in_sync.discard)(name)
            self.replicas[name].kept = self.replicas[name].kept or in_sync
        what = {"generation": self.generation, "replica": name, "turn": turn, "in_sync": in_sync}
        with contextlib.suppress(Exception):
            host.call("replica.confirm", **what)

    def renew(self) -> None:
        """Once; errors are the host's."""
        assert self.host is not None
        stamp = self.host.state()["stamp"]
        what = {"generation": self.generation, "stamp": stamp, "valid_ms": 30_000}
        self.host.call("lease.renew", **what)

    def _renew(self) -> None:
        while not self._over:
            self.renews.wait()
            if self.host is not None:
                with contextlib.suppress(Exception):
                    self.renew()
            time.sleep(0.2)

    def equal(self) -> None:
        """All replicas hold the same."""
        first, *others = [replica.content() for replica in self.replicas.values()]
        assert all(other == first for other in others)

    def close(self) -> None:
        self._over = True
        self.confirms.set(), self.renews.set()
        for host in self.hosts:
            host.close()
        for thread in self._threads:
            thread.join()
        for replica in self.replicas.values():
            replica.close()


class Writer:
    """Writes blocks without end from a thread; what was answered, and what may be there."""

    def __init__(self, client: Client, blocks: int, block: int = 4096) -> None:
        self.client, self.blocks, self.block = client, blocks, block
        self.answered: dict[int, int] = {}
        self.asked: tuple[int, int] = (-1, 0)  # the one that has no answer
        self.count = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def content(self, number: int) -> bytes:
        return number.to_bytes(8, "big") * (self.block // 8)

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stop:
                self.count += 1
                at = (self.count * 7919) % self.blocks
                self.asked = (at, self.count)
                self.client.write(at * self.block, self.content(self.count))
                self.answered[at] = self.count
                self.asked = (-1, 0)
                if self.count % 50 == 0:
                    self.client.flush()

    def goes_on(self, more: int = 100) -> None:
        """So many further writes are answered."""
        wanted = self.count + more
        until(lambda: self.count > wanted)

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def check(self, client: Client) -> None:
        """Everything that was answered is there, and nothing else than what was asked."""
        for at in range(self.blocks):
            found = client.read(at * self.block, self.block)
            may = {self.content(self.answered.get(at, 0))}
            if self.asked[0] == at:
                may.add(self.content(self.asked[1]))
            assert found in may, at


@contextlib.contextmanager
def dialled(host: Host, place: Path) -> Iterator[str]:
    """A URI for programs that dial; each connection is one of the mirror's."""
    path = place / "mirror.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)

        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 18):
                    target.sendall(data)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    theirs, _ = listener.accept()
                    ours = socket.socket(fileno=host.call("mirror.connect").descriptors[0])
                    for ends in ((theirs, ours), (ours, theirs)):
                        threading.Thread(target=pump, args=ends, daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()


Make = Callable[..., Owner]


def making(place: Path) -> Iterator[Make]:
    """For a fixture: makes owners, of replicas ``a`` and ``b`` if not said otherwise."""
    made: list[Owner] = []

    def make(*names: str, mib: int = 16) -> Owner:
        made.append(Owner(place, names or ("a", "b"), mib))
        return made[-1]

    yield make
    for owner in made:
        owner.close()


def answered(client: Client) -> bool:
    """Whether an answer is there, after a while in which one would have come."""
    return bool(select.select([client.sock], [], [], 0.7)[0])


def all_in_sync(owner: Owner) -> Callable[[], bool]:
    return lambda: (
        owner.in_sync == set(owner.replicas)
        and all(
            replica["standing"] == "in_sync"
            for replica in (owner.host or owner.hosts[0]).state()["replicas"]
        )
    )
