"""The protection service over a channel, as the user's domain calls it."""

import importlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supercloud.control.seals import WINDOW_S
from supercloud.lower.service import SERVICES
from supercloud.model.errors import BadState, Denied, Exists, Invalid, NotFound, SupercloudError
from supercloud.services.protection.engine import backing_bytes
from supercloud.services.protection.service import SEAL_EVERY_S, make
from supercloud.wire import portal, reactor
from supercloud.wire.portal import Portal, Request
from supercloud.wire.reactor import Reactor
from support.commandline import wait_for
from support.protected_nbd import FLUSH, READ, WRITE, Client
from support.protection import BLOCK, KEY

SIZE = 8 << 20


class Caller:
    """A service in a thread of its own, a channel to it, and what it told."""

    def __init__(self, place: Path) -> None:
        self.place, self.told = place, []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.portal, self._reactor = Portal(ours, "protection"), Reactor()
        self.service = make(self._reactor, lambda method, p: self.told.append((method, dict(p))))
        self.heard = threading.Event()
        self._socket = theirs

        def serve() -> None:
            message = portal.receive(theirs)
            if message is None:
                self._reactor.stop()
            else:
                portal.answer(theirs, "user", message, self.service.handlers())

        self._reactor.watch(theirs, serve)
        self._thread = threading.Thread(target=self._reactor.run)
        self._thread.start()

    def call(self, method: str, descriptors: list[int] | None = None, **parameters: Any) -> Any:
        return self.portal.call(method, {"device": "data", **parameters}, descriptors)

    def files(self, key: bytes = KEY, size: int = SIZE) -> list[int]:
        backing = os.open(self.place / "backing", os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(backing, backing_bytes(size))
        memory = os.memfd_create("key")
        os.write(memory, key)
        return [backing, memory]

    def with_files(self, method: str, key: bytes = KEY, **parameters: Any) -> Any:
        files = self.files(key)
        with portal.closing(files):
            return self.call(method, files, **parameters)

    def opened(self) -> dict[str, Any]:
        seal = self.with_files("device.create", size_bytes=SIZE)
        kept = self.with_files("device.prepare", **seal)
        return self.call("device.open", epoch=kept["epoch"])

    def connected(self) -> int:
        return self.portal.call_for_descriptors("device.connect", {"device": "data"}).descriptors[0]

    def client(self) -> Client:
        client = Client.__new__(Client)
        client.sock, client._cookie = socket.socket(fileno=self.connected()), 0
        return client.go()

    def wait_for(self, method: str) -> dict[str, Any]:
        for _ in range(600):
            for told, parameters in list(self.told):
                if told == method:
                    return parameters
            threading.Event().wait(0.1)
        raise AssertionError(f"{method} was never told")

    def close(self) -> None:
        self.portal.close()
        self._thread.join()
        self.service.close()
        self._socket.close()


class Stepped(Caller):
    """The service on a clock that stands still but for ``on``, and called without a channel."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.told, self.now_s = place, [], 1000.0
        monkeypatch.setattr(reactor, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self._loop = Reactor()
        self.service = make(self._loop, lambda _, p: self.told.append((self.now_s, dict(p))))

    def on(self, by_s: float) -> None:
        self.now_s += by_s
        self._loop._run_timers()

    def call(self, method: str, descriptors: list[int] | None = None, **parameters: Any) -> Any:
        request = Request("user", method, {"device": "data", **parameters}, descriptors or [])
        return self.service.handlers()[method](request)

    def connected(self) -> int:
        return int(self.call("device.connect").descriptors[0])

    def close(self) -> None:
        self.service.close()


@pytest.fixture
def stepped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stepped]:
    made = Stepped(tmp_path, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    made = Caller(tmp_path)
    yield made
    made.close()


def seal_of(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: answer[name] for name in ("epoch", "sequence", "root")}


def test_the_life_of_a_device(caller: Caller) -> None:
    created = caller.with_files("device.create", size_bytes=SIZE)
    prepared = caller.with_files("device.prepare", **created)
    assert prepared == {**created, "epoch": created["epoch"] + 1}
    opened = caller.call("device.open", epoch=prepared["epoch"])
    assert (opened["epoch"], opened["size_bytes"], opened["read_only"]) == (2, SIZE, False)
    client = caller.client()
    assert client.call(WRITE, 0, data=b"a" * BLOCK)[0] == 0
    flushed = caller.call("device.flush")
    assert flushed["sequence"] > opened["sequence"]
    wait_for(lambda: caller.call("device.state")["writes"], 60)  # counted once it is answered
    state = caller.call("device.state")
    assert (state["writes"], state["write_bytes"], state["phase"]) == (1, BLOCK, "open")
    assert caller.call("device.list") == {"data": "open"}
    closed = caller.call("device.close")
    assert closed["sequence"] > flushed["sequence"]
    client.close()
    kept = caller.with_files("device.prepare", **closed)
    caller.call("device.open", epoch=kept["epoch"])
    assert caller.client().call(READ, 0, BLOCK)[1] == b"a" * BLOCK


def test_a_changed_seal_is_told_without_being_asked_for(caller: Caller) -> None:
    opened = caller.opened()
    client = caller.client()
    assert client.call(WRITE, 0, data=b"a" * BLOCK)[0] == 0  # never flushed by the client
    told = caller.wait_for("device.seal")
    assert told["device"] == "data"
    assert told["sequence"] > opened["sequence"]
    client.close()


def test_under_writes_without_end_seals_are_told_again_and_again_within_the_window(
    stepped: Stepped,
) -> None:
    before, durable = stepped.opened()["sequence"], []
    client, step_s, steps_each = stepped.client(), 0.25, int(WINDOW_S / 0.25)
    for number in range(5 * steps_each):
        assert client.call(WRITE, 0, data=number.to_bytes(8, "big") * (BLOCK // 8))[0] == 0
        assert client.call(FLUSH)[0] == 0
        shown = stepped.call("device.state")["sequence"]
        assert shown > before, "who asks hears of what was told to nobody"
        before = shown
        durable.append((stepped.now_s, shown))
        stepped.on(step_s)
    for at_s, sequence in durable[: 4 * steps_each]:
        heard_s = [when_s for when_s, seal in stepped.told if seal["sequence"] >= sequence]
        assert heard_s, "it was never told"
        assert heard_s[0] - at_s <= SEAL_EVERY_S <= WINDOW_S
    client.close()


def test_evidence_is_told(caller: Caller) -> None:
    caller.opened()
    client = caller.client()
    assert client.call(WRITE, 0, data=b"a" * BLOCK)[0] == 0
    caller.call("device.flush")
    raw = bytearray((caller.place / "backing").read_bytes())
    for at in range(2050 * BLOCK, len(raw), BLOCK):
        raw[at] ^= 1
    (caller.place / "backing").write_bytes(raw)
    assert client.call(READ, 0, BLOCK)[0] == 5
    told = caller.wait_for("device.evidence")
    assert (told["device"], told["kind"], told["index"]) == ("data", "block", 0)
    assert caller.call("device.state")["evidence"] == 1
    client.close()


def test_a_rollback_is_refused_with_its_evidence(caller: Caller) -> None:
    caller.opened()
    old = (caller.place / "backing").read_bytes()
    client = caller.client()
    assert client.call(WRITE, 0, data=b"a" * BLOCK)[0] == 0
    closed = caller.call("device.close")
    (caller.place / "backing").write_bytes(old)
    with pytest.raises(Denied) as refused:
        caller.with_files("device.prepare", **closed)
    assert refused.value.details["evidence"] == "rolled_back"
    assert 0 < refused.value.details["found"]["sequence"] < closed["sequence"]
    assert caller.call("device.list") == {}
    client.close()


def test_an_epoch_is_opened_once(caller: Caller) -> None:
    seal = caller.with_files("device.create", size_bytes=SIZE)
    kept = caller.with_files("device.prepare", **seal)
    with pytest.raises(Invalid):
        caller.call("device.open", epoch=seal["epoch"])
    opened = caller.call("device.open", epoch=kept["epoch"])
    assert caller.call("device.open", epoch=kept["epoch"]) == opened  # asked again
    with pytest.raises(BadState):
        caller.call("device.open", epoch=kept["epoch"] + 1)
    with pytest.raises(BadState):
        caller.with_files("device.prepare", **kept)
    with pytest.raises(Exists):
        caller.with_files("device.create", size_bytes=SIZE)


def test_it_grows(caller: Caller) -> None:
    caller.opened()
    with pytest.raises(SupercloudError):
        caller.call("device.grow", size_bytes=2 * SIZE)
    os.truncate(caller.place / "backing", backing_bytes(2 * SIZE))
    caller.call("device.grow", size_bytes=2 * SIZE)
    assert caller.call("device.state")["blocks"] == 2 * SIZE // BLOCK


def test_the_key_may_come_by_pipe(caller: Caller) -> None:
    backing, memory = caller.files()
    reading, writing = os.pipe()
    os.write(writing, KEY)
    with portal.closing([backing, memory, reading, writing]):
        caller.call("device.create", [backing, reading], size_bytes=SIZE)


@pytest.mark.parametrize(
    "spoil",
    [
        "no files",
        "one file",
        "short key",
        "long key",
        "empty pipe",
        "read only",
        "a socket",
        "small",
    ],
)
def test_descriptors_that_will_not_do_are_refused(caller: Caller, spoil: str) -> None:
    key = {"short key": KEY[:-1], "long key": KEY + b"x"}.get(spoil, KEY)
    files = caller.files(key)
    given = list(files)
    reading, writing = os.pipe()
    read_only = os.open(caller.place / "backing", os.O_RDONLY)
    if spoil == "no files":
        given = []
    elif spoil == "one file":
        given = files[:1]
    elif spoil == "empty pipe":
        given = [files[0], reading]
    elif spoil == "read only":
        given = [read_only, files[1]]
    elif spoil == "a socket":
        given = [caller.portal._socket.fileno(), files[1]]
    elif spoil == "small":
        os.truncate(files[0], backing_bytes(SIZE) - 1)
    with portal.closing([*files, reading, writing, read_only]):
        with pytest.raises(SupercloudError):
            caller.call("device.create", given, size_bytes=SIZE)
    assert caller.call("device.list") == {}


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("device.create", {"size_bytes": 4097}),
        ("device.create", {"size_bytes": 1 << 60}),
        ("device.create", {"device": "../x", "size_bytes": SIZE}),
        ("device.prepare", {}),
        ("device.prepare", {"epoch": 1, "sequence": 1, "root": "zz"}),
        ("device.prepare", {"epoch": 1, "sequence": 1, "root": ""}),
        ("device.prepare", {"epoch": 0, "sequence": 1, "root": "0" * 64}),
        ("device.prepare", {"epoch": 1 << 40, "sequence": 1, "root": "0" * 64}),
        ("device.prepare", {"epoch": 1, "sequence": 1, "root": "0" * 64, "cache_bytes": 1 << 50}),
    ],
)
def test_parameters_out_of_bounds_are_refused(caller: Caller, method: str, parameters: Any) -> None:
    with pytest.raises(Invalid):
        caller.with_files(method, **parameters)


@pytest.mark.parametrize("method", ["open", "connect", "flush", "grow", "state", "close"])
def test_what_was_not_prepared_is_not_there(caller: Caller, method: str) -> None:
    with pytest.raises(NotFound):
        caller.call(f"device.{method}", epoch=2, size_bytes=SIZE)


@pytest.mark.parametrize("name", SERVICES)
def test_what_the_launcher_can_start_is_there(name: str) -> None:
    service = importlib.import_module(SERVICES[name]).make(Reactor(), lambda *_: None)
    assert all(callable(handler) for handler in service.handlers().values())
    service.close()
