"""The monitor's parts against a pretended QEMU: QMP, watchdog, console."""

import contextlib
import json
import socket
import time
from collections.abc import Callable

import pytest

from supercloud.lower.vmm.console import MAX_WATCHERS, RING_BYTES, Console
from supercloud.lower.vmm.lifecycle import Lifecycle, Patience, Watchdog
from supercloud.model.errors import BadState, Busy
from supercloud.wire.qmp import Qmp
from supercloud.wire.reactor import Reactor


def run(reactor: Reactor, until: Callable[[], bool], timeout_s: float = 60) -> None:
    """Turn until something is so."""
    deadline = time.monotonic() + timeout_s

    def look() -> None:
        if until() or time.monotonic() > deadline:
            reactor.stop()
        else:
            reactor.after(0.005, look)

    reactor._stopped = False
    reactor.after(0, look)
    reactor.run()
    assert until()


class Qemu:
    """The far end of a QMP socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.data = end, b""
        end.setblocking(False)

    def say(self, message: object) -> None:
        self.end.send(json.dumps(message).encode() + b"\r\n")

    def heard(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            self.data += self.end.recv(65536)
        return [json.loads(line)["execute"] for line in self.data.splitlines()]


@pytest.fixture
def qemu() -> tuple[Reactor, Qemu, Qmp, list[tuple[str, object]]]:
    reactor, events = Reactor(), []
    ours, theirs = socket.socketpair()
    qmp = Qmp(reactor, ours, lambda n, d: events.append((n, d)), lambda: events.append(("END", {})))
    return reactor, Qemu(theirs), qmp, events


def test_greeting_commands_events_and_the_end(qemu: tuple) -> None:  # type: ignore[type-arg]
    reactor, far, qmp, events = qemu
    far.say({"QMP": {}})
    run(reactor, lambda: far.heard() == ["qmp_capabilities"])
    far.say({"return": {}, "id": 1})
    run(reactor, lambda: ("GREETING", {}) in events)
    answers: list[object] = []
    qmp.command("query-status", answered=answers.append)
    far.end.send(b'{"event": "RESET", "data"')  # in two pieces
    far.end.send(b': {"guest": true}}\nnot json\n[]\n{"return": {"status": "running"}, "id": 2}\n')
    run(reactor, lambda: bool(answers))
    assert ("RESET", {"guest": True}) in events
    far.end.close()
    run(reactor, lambda: ("END", {}) in events)
    qmp.command("quit")  # nobody is there: no exception


def test_silence_is_wedged_then_killed_and_an_answer_heals(qemu: tuple) -> None:  # type: ignore[type-arg]
    reactor, far, qmp, _ = qemu
    states: list[str] = []
    killed: list[float] = []
    life = Lifecycle(lambda state, _reason: states.append(state))
    life.go("starting")
    life.go("running")

    def watched(wedged_s: float) -> Watchdog:
        patience = Patience(ask_every_s=0.02, silence_s=0.1, wedged_s=wedged_s)
        return Watchdog(reactor, qmp, life, lambda: killed.append(time.monotonic()), patience)

    watchdog = watched(60)
    run(reactor, lambda: life.state == "wedged")
    count = len(far.heard())
    far.say({"return": {}, "id": count})
    run(reactor, lambda: states.count("running") == 2)
    assert not killed
    watchdog.stop()
    watched(0.3)
    run(reactor, lambda: bool(killed))
    assert states == ["starting", "running", "wedged", "running", "wedged"]


def test_states_go_by_the_table() -> None:
    life = Lifecycle(lambda *_: None)
    with pytest.raises(BadState):
        life.go("running")
    life.go("starting")
    life.go("failed", "why")
    with pytest.raises(BadState):
        life.go("stopped")
    assert (life.state, life.reason) == ("failed", "why")


def console() -> tuple[Reactor, Console, socket.socket]:
    reactor = Reactor()
    ours, guest = socket.socketpair()
    return reactor, Console(reactor, ours), guest


def test_a_watcher_sees_the_last_of_it_then_what_comes_and_may_type() -> None:
    reactor, shown, guest = console()
    guest.send(b"boot\n")
    run(reactor, lambda: bool(shown._ring))
    watcher = shown.attach()
    watcher.setblocking(False)
    assert watcher.recv(100) == b"boot\n"
    guest.send(b"login: ")
    watcher.send(b"root\n")
    typed = b""

    def arrived() -> bool:
        nonlocal typed
        guest.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            typed += guest.recv(100)
        return typed == b"root\n"

    run(reactor, arrived)
    assert watcher.recv(100) == b"login: "


def test_the_ring_is_bounded_and_a_slow_watcher_holds_up_nobody() -> None:
    reactor, shown, guest = console()
    shown.attach()  # never reads
    quick = shown.attach()
    guest.setblocking(False)
    sent = 0
    read = 0

    def flood() -> bool:
        nonlocal sent, read
        quick.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sent += guest.send(b"x" * 4096)
        with contextlib.suppress(BlockingIOError):
            read += len(quick.recv(1 << 20))
        return sent > 2 << 20

    run(reactor, flood)
    assert len(shown._ring) <= RING_BYTES
    assert read > 1 << 20


def test_watchers_are_limited_and_the_ring_outlives_the_machine() -> None:
    reactor, shown, guest = console()
    guest.send(b"last words")
    run(reactor, lambda: bool(shown._ring))
    kept = [shown.attach() for _ in range(MAX_WATCHERS)]
    with pytest.raises(Busy):
        shown.attach()
    guest.close()
    run(reactor, lambda: shown._sock.fileno() < 0)
    assert kept[0].recv(100) == b"last words"
    assert kept[0].recv(100) == b""
    late = shown.attach()
    assert late.recv(100) == b"last words"
    assert late.recv(100) == b""
