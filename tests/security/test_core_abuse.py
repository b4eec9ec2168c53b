"""A domain that breaks the core's protocol hurts nobody but itself."""

import os
import signal
import time
from contextlib import suppress

import pytest

from core_host import (
    Console,
    Host,
    RemoteError,
    driver,
    host,
    kill_core,
    kind,
    settled,
    wait_for,
)
from supercloud.model.errors import Invalid, NotFound

pytestmark = pytest.mark.root
GARBAGE = (
    "b''",
    "b'x'",
    "os.urandom(200)",
    "os.urandom(199)",
    "bytes(200)",
    "b'\\x01' * 200",
    "bytes(60000)",
)


@pytest.fixture
def pair():
    with host({"driver": driver(), "child": kind()}) as made:
        one = made.consoles["one"]
        yield made, one, one.child("child", "bad")


def alive(one: Console) -> bool:
    return "bad" in one("result = [e.name for e in core.entries()]")


def core_descriptors(made: Host) -> int:
    return len(os.listdir(f"/proc/{made.core_pid}/fd"))


def test_garbage_is_refused_and_its_sender_given_up(pair):
    _made, one, bad = pair
    for garbage in GARBAGE:
        bad.send(f"for i in range(40): core._socket.send({garbage})")
        wait_for(lambda: not alive(one))
        assert one("core.ping(); result = 1") == 1, garbage
        bad = one.child("child", "bad")


def test_a_little_garbage_is_answered(pair):
    _, _, bad = pair
    code = "core._socket.send(b'x'); a = core._receive(); result = [a.op, a.status, a.sequence]"
    assert bad(code) == [0, 1, 0]
    assert bad("core.ping(); result = 1") == 1


def test_calls_that_do_not_exist_are_refused(pair):
    _, _, bad = pair
    for op in (0, 19, 77, 200, 255):
        with pytest.raises(Invalid):
            bad(f"core._call({op})")


def test_wrong_selectors_and_arguments_are_refused(pair):
    _made, one, bad = pair
    for call in ("core.take(99)", "core.start(-1)", "core.revoke(1 << 40)", "core.usage(12)"):
        with pytest.raises(NotFound):
            bad(call)
    for call in (
        "core.take(0)",
        "core.usage(0)",
        "core._call(Op.PING, 1)",
        "core.start(1)",
        "core.seal(1)",
    ):
        with pytest.raises(Invalid):
            bad(f"from supercloud.wire.frames import Op\n{call}")
    assert alive(one)


def test_descriptors_nobody_asked_for_never_reach_the_core(pair):
    made, one, bad = pair
    before = settled(lambda: core_descriptors(made))
    bad(
        "from supercloud.lower.client import pack_request\nfrom supercloud.wire.frames import Op\n"
        "f = pack_request(Op.PING, 7, ())\n"
        "null = os.open('/dev/null', 0)\n"
        "for _ in range(10): socket.send_fds(core._socket, [f], [null] * 5)\n"
        "answers = [core._receive().status for _ in range(10)]\nresult = answers"
    )
    wait_for(lambda: core_descriptors(made) == before)
    bad.send("for _ in range(10): socket.send_fds(core._socket, [f], [null] * 5)")
    wait_for(lambda: not alive(one))
    wait_for(lambda: core_descriptors(made) < before)


def test_who_does_not_read_its_answers_is_given_up_and_holds_nobody_up(pair):
    made, one, bad = pair
    before = core_descriptors(made)
    bad.send(
        "from supercloud.lower.client import pack_request\nfrom supercloud.wire.frames import Op\n"
        "f = pack_request(Op.LIST, 7, ())\n"
        "while True: core._socket.send(f)"
    )
    wait_for(lambda: one("core.ping()") or not alive(one))
    wait_for(lambda: core_descriptors(made) < before)
    assert "does not read its answers" in made.log.read_text()


def test_unread_events_leave_room_for_answers(pair):
    _made, one, bad = pair
    one(
        "s = core.create_semaphore('s')\nd = core.lookup('bad').selector\n"
        "for i in range(1500): core.delegate(s, d, Rights.USE, f'n{i}')"
    )
    assert bad("result = len(core.entries())") == 1503
    assert alive(one)


def test_unread_events_do_not_hide_that_the_core_was_replaced(pair):
    made, one, bad = pair
    one(
        "s = core.create_semaphore('s')\nd = core.lookup('bad').selector\n"
        "for i in range(1500): core.delegate(s, d, Rights.USE, f'n{i}')"
    )
    os.kill(made.core_pid, signal.SIGSTOP)
    bad.send("result = core.create_semaphore('late')")
    time.sleep(0.1)  # the request lies in the socket
    kill_core(made)
    assert bad.receive()[0] == bad("result = core.lookup('late').selector")


def test_events_to_who_does_not_read_are_dropped_and_said_to_be(pair):
    _made, one, bad = pair
    bad("pass")  # it has started: as it does, it reads, and would be told in the middle of it
    one(
        "s = core.create_semaphore('s')\nd = core.lookup('bad').selector\n"
        "for i in range(1500): core.delegate(s, d, Rights.USE, f'n{i}')"
    )
    # the core sends on as fast as it is read: a reader that is quicker finds the socket empty in between
    names = bad(
        "result = []\nend = time.monotonic() + 60\n"
        "while 'OVERFLOW' not in result and time.monotonic() < end:\n"
        "    result += [Event(e.op).name for e in core.events(1)]"
    )
    assert names[-1] == "OVERFLOW"
    assert len(names) < 1500
    assert len(bad("result = [e.name for e in core.entries()]")) == 1503


def test_a_table_is_never_overfilled(pair):
    _made, one, _bad = pair
    with pytest.raises(Exception, match="table is full"):
        one(
            "s = core.create_semaphore('s')\nd = core.lookup('bad').selector\n"
            "for i in range(5000): core.delegate(s, d, Rights.USE, '' or f'n{i}')"
        )


def test_a_chain_of_delegations_to_oneself_does_not_break_the_core(pair):
    made, one, bad = pair
    before = made.core_pid
    code = (
        "first = last = core.create_semaphore('s')\n"
        "for i in range(3000): last = core.delegate(last, SELF, Rights.USE | Rights.GRANT, f'n{i}')\n"
        "result = core.revoke(first)"
    )
    assert bad(code) == 3000
    kill_core(made)  # the next one reads all of it again
    assert bad("core.destroy(first); result = len(core.entries())") == 3
    assert alive(one)
    assert made.core_pid != before


def test_a_domain_may_close_its_socket_and_live_on(pair):
    _made, one, bad = pair
    bad("core.close()")
    one("core.delegate(SELF, core.lookup('bad').selector, Rights.CONNECT, 'x')")
    assert bad("result = 1") == 1
    assert alive(one)


def test_a_domain_may_die_at_any_moment(pair):
    _made, one, bad = pair
    moments = (
        "os._exit(0)",
        "from supercloud.lower.client import pack_request\ncore._send(pack_request(3, 1, ())); os._exit(0)",
        "core._socket.setblocking(False)\nwhile True:\n    try: core._socket.send(bytes(200))\n    except OSError: os._exit(0)",
    )
    for code in moments:
        bad.send(code)
        wait_for(lambda: not alive(one))
        bad = one.child("child", "bad")
        assert bad("result = 1") == 1, code


def test_random_frames_never_break_the_core(pair):
    made, one, _ = pair
    for seed in range(8):
        name = f"f{seed}"
        fuzz = one.child("child", name)
        fuzz.send(
            f"import random, struct\nr = random.Random({seed})\n"
            "core._socket.setblocking(False)\n"
            "for _ in range(3000):\n"
            "    args = [r.choice((0, 1, 2, 3, -1, 4096, 1 << 62, r.getrandbits(63))) for _ in range(8)]\n"
            "    names = [r.choice((b'', b'a', b'child', b'x' * 64, b'\\xff')) for _ in range(2)]\n"
            "    f = struct.pack('<BBHI8q64s64s', 1, r.randrange(20), 0, r.randrange(1, 9), *args, *names)\n"
            "    try:\n"
            "        core._socket.send(f)\n"
            "        core._socket.recv(5000)\n"
            "    except BlockingIOError: time.sleep(0.001)\n"
        )
        with suppress(RemoteError):
            fuzz.receive()
    assert one("core.ping(); result = 1") == 1
    assert "core.bug" not in made.log.read_text()
