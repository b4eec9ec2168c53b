"""What domains can do with the core and each other: real keeper, namespaces, groups, processes."""

import hashlib
import os
import socket
import time

import pytest

from core_host import (
    MIB,
    Console,
    Host,
    RemoteError,
    driver,
    host,
    kind,
    standing_still,
    status,
    wait_for,
)
from supercloud.model.errors import (
    BadState,
    Busy,
    Denied,
    Exists,
    Invalid,
    NoResources,
    NotFound,
)

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared():
    kinds = {
        "driver": driver(creates=["child", "numbered", "phoenix", "wired", "doomed"]),
        "child": kind(),
        "phoenix": kind(restart=True, state=True),
        "numbered": kind(
            argv=["/usr/bin/python3", "-I", "-S", "-c", "print('got {0} {1}')"],
            numbers=[[1, 9], [10, 99]],
        ),
        "wired": kind(
            argv=["/usr/bin/python3", "-I", "-S", "-c", "import os; os.write(4, b'by number')"],
            speaks=False,
            descriptors=["wire"],
        ),
        "doomed": kind(argv=["/no/such/program"]),
    }
    names = ("driver", "child", "phoenix", "numbered", "wired", "doomed")
    kinds["driver"]["peers"] = dict.fromkeys(names, True)
    with host(kinds) as made:
        yield made


@pytest.fixture
def one(shared: Host) -> Console:
    console = shared.consoles["one"]
    yield console
    console(
        "list(core.events())\n"
        "for e in core.entries():\n"
        "    if e.selector > 2 and e.rights & Rights.CONTROL and e.type != 2:\n"
        "        try: core.destroy(e.selector, purge=e.name.startswith('p'))\n"
        "        except NotFound: pass"
    )


def pid_of(made: Host, name: str) -> int:
    group = next(g for g in made.groups() if g.name.startswith(f"{name}."))
    return int((group / "cgroup.procs").read_text().split()[0])


def test_a_domain_finds_itself_and_its_scheduling_context(one):
    assert one("result = [(e.selector, e.name) for e in core.entries()]")[:3] == [
        [0, "self"],
        [1, "sched"],
        [2, "console"],
    ]


def test_a_child_has_its_own_uid_owner_and_table(shared, one):
    child = one.child("child", "kid")
    assert child("result = [e.name for e in core.entries()]") == ["self", "sched", "console"]
    pid = pid_of(shared, "kid")
    uid = int(status(pid)["Uid"].split()[0])
    assert uid == child("result = os.getuid()") != one("result = os.getuid()")
    assert status(pid)["CapEff"] == status(pid)["CapBnd"] == "0" * 16
    assert status(pid)["NoNewPrivs"] == "1"


def test_destroying_a_domain_leaves_nothing_of_it(shared, one):
    one.child("child", "gone")
    pid = pid_of(shared, "gone")
    one("core.destroy(core.lookup('gone').selector)")
    assert not os.path.exists(f"/proc/{pid}")
    assert not [g for g in shared.groups() if g.name.startswith("gone.")]
    for name in ("gone", "sched:gone", "c/gone"):
        with pytest.raises(NotFound):
            one(f"core.lookup({name!r})")


def test_a_name_is_taken_once_and_a_kind_may_be_forbidden(one):
    one("core.create_domain('child', 'twice')")
    with pytest.raises(Exists):
        one("core.create_domain('child', 'twice')")
    with pytest.raises(Denied):
        one("core.create_domain('driver', 'upstart')")
    with pytest.raises(Invalid):
        one("core.create_domain('child', 'no/slash')")


def test_children_fit_in_what_is_left_and_refusal_has_no_effect(shared, one):
    one.child("child", "big", memory_bytes=1500 * MIB, pids=100)
    before = len(shared.groups())
    for limits in ("memory_bytes=600<<20, pids=1", "memory_bytes=1<<20, pids=400"):
        with pytest.raises(NoResources):
            one(f"core.create_domain('child', 'more', Limits({limits}))")
    with pytest.raises(NoResources):
        one(
            "core.create_domain('child', 'more', Limits(memory_bytes=1<<20, pids=1, disk_bytes=1<<30))"
        )
    assert len(shared.groups()) == before
    assert one("result = core.usage().booked_memory_bytes") == 1564 * MIB
    one("core.destroy(core.lookup('big').selector)")
    assert one("result = core.usage().booked_memory_bytes") == 64 * MIB


def test_limits_can_be_moved_within_the_parents(one):
    one.child("child", "elastic")
    one(
        "core.set_limits(core.lookup('sched:elastic').selector, Limits(memory_bytes=1<<30, pids=20))"
    )
    limits = one("result = core.limits(core.lookup('sched:elastic').selector)")
    assert limits == [100, 0, 1 << 30, 20, 0, 0]
    with pytest.raises(NoResources):
        one(
            "core.set_limits(core.lookup('sched:elastic').selector, Limits(memory_bytes=1<<40, pids=20))"
        )
    with pytest.raises(Denied):
        one("core.set_limits(SCHEDULING, Limits(memory_bytes=1<<40, pids=20))")


def test_memory_limits_are_enforced_by_the_kernel(one):
    hog = one.child("child", "hog", memory_bytes=48 * MIB)
    with pytest.raises((RemoteError, ConnectionError)):
        hog("x = bytearray(200 << 20)")
    assert ("DIED", "hog") in [e[:2] for e in one.hear("DIED")]


def test_usage_shows_what_a_domain_took(one):
    child = one.child("child", "busy", memory_bytes=128 * MIB)
    child("keep = bytearray(30 << 20)\nfor _ in range(10**6): pass")
    memory, cpu_us, pids = one(
        "u = core.usage(core.lookup('sched:busy').selector)\nresult = u.memory_bytes, u.cpu_us, u.pids"
    )
    assert memory > 30 * MIB
    assert cpu_us > 10_000
    assert pids == 1


def test_disk_is_booked_and_released_by_who_booked_it(one):
    child = one.child("child", "kid", disk_bytes=1000)
    assert one("result = core.charge(core.lookup('sched:kid').selector, 600)") == 600
    with pytest.raises(NoResources):
        one("core.charge(core.lookup('sched:kid').selector, 500)")
    with pytest.raises(Invalid):  # its own context, but not its booking
        child("core.charge(SCHEDULING, -600)")
    assert one("result = core.charge(core.lookup('sched:kid').selector, -600)") == 0


def test_memory_is_shared_sealed_and_measured(shared, one):
    one.child("child", "reader")
    digest = one(
        "m = core.create_memory(4096, 'page')\nfd = core.take(m)\nos.write(fd, b'hello'.ljust(4096))\n"
        "result = core.seal(m).hex()\ncore.delegate(m, core.lookup('reader').selector, Rights.READ, 'in')"
    )
    child = Console(_steal(one, "reader"))
    assert (
        child("fd = core.take(core.lookup('in').selector); result = os.pread(fd, 5, 0).decode()")
        == "hello"
    )
    with pytest.raises(RemoteError, match="PermissionError"):
        child("os.pwrite(fd, b'x', 0)")
    with pytest.raises(RemoteError, match="PermissionError"):
        one("os.pwrite(fd, b'x', 0)")
    assert digest in (shared.directory / "state/measurements.log").read_text()


def test_a_large_memory_is_hashed_while_others_are_answered_and_may_go_meanwhile(shared, one):
    size = 64 << 20  # many pieces
    one(
        f"big = core.create_memory({size}, 'big')\nfd = core.take(big)\nos.pwrite(fd, b'x', {size - 1})"
    )
    seal = "core._send(client.pack_request(frames.Op.SEAL, 77, (big,)))"
    imports = "from supercloud.lower import client\nfrom supercloud.wire import frames\n"
    answered = one(
        f"{imports}{seal}\ncore.ping()\nearly = core.usage().booked_memory_bytes\n"
        f"result = [early > 0, core.seal(big).hex()]"
    )
    expected = hashlib.sha256(bytes(size - 1) + b"x").hexdigest()
    assert answered == [True, expected]
    log = (shared.directory / "state/measurements.log").read_text()
    assert log.count(expected) == 1
    one(f"gone = core.create_memory({size}, 'gone')")
    one(f"{imports}{seal.replace('big', 'gone')}\ncore.destroy(gone)\ncore.ping()")
    assert one("result = len(core.seal(big))") == 32  # the core goes on


def test_many_seals_at_once_hold_up_nobody_more_than_one_does(shared, one):
    """Each turn of the core's loop hashes one piece, however many wait, and answers the others."""
    many, pieces = 20, 4  # of 4 MiB in each memory
    one(f"bigs = [core.create_memory({pieces * (4 << 20)}, f'big{{n}}') for n in range({many})]")
    with standing_still(shared):
        one(
            "from supercloud.lower.client import pack_request, Op\n"
            "for n, big in enumerate(bigs): core._send(pack_request(Op.SEAL, 100 + n, (big,)))\n"
            f"for n in range({many}): core._send(pack_request(Op.PING, 200 + n, ()))"
        )
    answered = one(f"result = [core._receive().sequence for _ in range({2 * many})]")
    assert sorted(answered) == [*range(100, 100 + many), *range(200, 200 + many)]
    sealed_before = [n for n in answered[: answered.index(199 + many)] if n < 200]
    # a request is read in each turn: with more pieces in one turn it would be nearly all of them
    assert len(sealed_before) <= 2 * many // pieces


def _steal(console: Console, name: str) -> socket.socket:
    _, (end,) = console.with_descriptors(f"send = [core.take(core.lookup('c/{name}').selector)]")
    return socket.socket(fileno=end)


def test_memory_that_may_change_is_not_given_for_reading(one):
    child = one.child("child", "reader")
    one(
        "m = core.create_memory(4096, 'page')\ncore.delegate(m, core.lookup('reader').selector, Rights.READ, 'in')"
    )
    with pytest.raises(Denied):
        child("core.take(core.lookup('in').selector)")


def test_memory_mapped_for_writing_is_not_sealed(one):
    one(
        "import mmap\nm = core.create_memory(4096, 'page')\nfd = core.take(m)\nmap = mmap.mmap(fd, 4096)"
    )
    with pytest.raises(Busy):
        one("core.seal(m)")
    one("map.close(); os.close(fd); core.seal(m)")


def begin_seal(made: Host, child: Console, then: str) -> None:
    """Of what is large, and another call behind it, before the core sees either."""
    child("m = core.create_memory(1 << 30, 'large')")
    with standing_still(made):
        child(
            "from supercloud.lower.client import pack_request, Op\n"
            f"for f in pack_request(Op.SEAL, 98, (m,)), pack_request({then}): core._send(f)"
        )


def test_a_large_seal_lets_other_calls_through(shared, one):
    child = one.child("child", "kid", memory_bytes=1200 * MIB)
    begin_seal(shared, child, "Op.PING, 99, ()")
    assert child("result = core._receive().sequence") == 99
    said = child("a = core._receive(); result = a.sequence, a.status, len(a.payload)")
    assert said == [98, 0, 32]
    assert child("result = core.seal(m) == a.payload") is True


def test_memory_that_is_destroyed_while_it_is_sealed_answers_so(shared, one):
    child = one.child("child", "kid", memory_bytes=1200 * MIB)
    begin_seal(shared, child, "Op.DESTROY, 99, (m, 0)")
    assert child("a = core._receive(); result = a.sequence, a.status") == [99, 0]
    said = child("a = core._receive(); result = a.sequence, a.status")
    assert said == [98, 2]  # not found
    assert child("core.ping(); result = 1") == 1


def test_memory_is_booked_on_the_context_it_is_for(one):
    one.child("child", "vm", memory_bytes=64 * MIB)
    with pytest.raises(NoResources):
        one("core.create_memory(65 << 20, 'ram', core.lookup('sched:vm').selector)")
    one("core.create_memory(64 << 20, 'ram', core.lookup('sched:vm').selector)")
    one("core.destroy(core.lookup('vm').selector)")
    with pytest.raises(NotFound):  # it ended with the context that paid for it
        one("core.lookup('ram')")


def test_a_semaphore_counts_across_domains(one):
    child = one.child("child", "waiter")
    one(
        "s = core.create_semaphore('sem', 0)\ncore.delegate(s, core.lookup('waiter').selector, Rights.USE, 'sem')"
    )
    child.send("fd = core.take(core.lookup('sem').selector)\nresult = os.eventfd_read(fd)")
    one("fd = core.take(s)\nos.eventfd_write(fd, 1)")
    assert child.receive()[0] == 1


def test_delegation_never_widens_and_needs_grant(one):
    child = one.child("child", "kid")
    one(
        "s = core.create_semaphore('sem')\nd = core.lookup('kid').selector\ncore.delegate(s, d, Rights.USE, 'mine')"
    )
    with pytest.raises(Denied):  # no GRANT
        child("core.delegate(core.lookup('mine').selector, SELF, Rights.USE, 'again')")
    one("core.delegate(s, d, Rights.USE | Rights.GRANT, 'wide')")
    with pytest.raises(Denied):
        child(
            "core.delegate(core.lookup('wide').selector, SELF, Rights.USE | Rights.CONTROL, 'more')"
        )
    assert ("ARRIVED", "wide") in [e[:2] for e in child.hear("ARRIVED")]


def test_revoked_memory_kills_who_took_it_and_spares_who_did_not(one):
    taker, other = one.child("child", "taker"), one.child("child", "other")
    one(
        "m = core.create_memory(4096, 'page')\n"
        "for n in ('taker', 'other'): core.delegate(m, core.lookup(n).selector, Rights.WRITE, 'page')"
    )
    taker("fd = core.take(core.lookup('page').selector)")
    assert one("result = core.revoke(m)") == 2
    assert ("DIED", "taker") in [e[:2] for e in one.hear("DIED")]
    with pytest.raises(NotFound):
        other("core.lookup('page')")
    assert ("REVOKED", "page") in [e[:2] for e in other.hear("REVOKED")]


def test_revoking_a_domain_capability_only_forgets_it(one):
    child = one.child("child", "kid")
    one(
        "core.delegate(SELF, core.lookup('kid').selector, Rights.CONNECT, 'parent')\nresult = core.revoke(SELF)"
    )
    with pytest.raises(NotFound):
        child("core.lookup('parent')")
    assert child("result = 1") == 1


def test_destroying_a_channel_shuts_it_down_for_both(one):
    child = one.child("child", "kid")
    child("a = console")
    _, (end,) = one.with_descriptors("send = [core.take(core.lookup('c/kid').selector)]")
    with socket.socket(fileno=end) as ours:
        ours.settimeout(60)
        one("core.destroy(whole.selector)")
        assert ours.recv(10) == b""
        with pytest.raises(BrokenPipeError):
            ours.send(b"x")


def test_kinds_that_are_no_peers_get_no_channel(one):
    for name in ("left", "right"):
        one(f"core.create_domain('child', {name!r})")
    with pytest.raises(Denied):
        one(
            "core.create_channel(core.lookup('left').selector, core.lookup('right').selector, 'x', 'y')"
        )


def test_names_of_a_channel_are_checked_in_the_tables_that_get_them(one):
    for name in ("left", "right"):
        one.child("child", name)
    one("core.create_semaphore('wire')")  # in its maker's table only
    code = "core.create_channel(SELF, core.lookup({!r}).selector, {!r}, {!r})"
    one(code.format("left", "to-left", "wire"))
    with pytest.raises(Exists):
        one(code.format("left", "again", "wire"))
    with pytest.raises(Exists):
        one(code.format("right", "to-left", "other"))


def test_a_channel_finds_room_for_both_its_entries_or_is_refused(one):
    one.child("child", "kid")
    one("s = core.create_semaphore('s')\nn = 4095 - len(core.entries())")
    one("for i in range(n): core.delegate(s, SELF, Rights.USE, f'n{i}')")
    with pytest.raises(NoResources):
        one("core.create_channel(SELF, core.lookup('kid').selector, 'x', 'y')")
    assert one("core.revoke(s); result = len(core.entries())") < 20


def test_numbers_fill_the_argv_within_their_ranges(shared, one):
    one("d = core.create_domain('numbered', 'n').selector")
    for numbers in ("0, 10", "1, 100", "1, 10, 5"):
        with pytest.raises(Invalid):
            one(f"core.start(d, {numbers})")
    one("core.start(d, 7, 42)")
    log = shared.directory / "state/log/n.log"
    wait_for(lambda: log.read_text() == "got 7 42\n")


def test_descriptors_of_a_kind_are_there_at_the_start(one):
    _, (end,) = one.with_descriptors(
        "d = core.create_domain('wired', 'w').selector\n"
        "core.create_channel(SELF, d, 'ch', 'wire', socket.SOCK_STREAM)\n"
        "send = [core.take(core.lookup('ch').selector)]\ncore.start(d)"
    )
    with socket.socket(fileno=end) as ours:
        ours.settimeout(60)
        assert ours.recv(100) == b"by number"
        assert ours.recv(100) == b""  # shut down with the domain


def test_a_missing_descriptor_refuses_the_start(one):
    with pytest.raises(NotFound):
        one("core.start(core.create_domain('wired', 'w').selector)")


def test_a_program_that_is_not_there_is_a_refusal_and_may_be_tried_again(one):
    with pytest.raises(BadState, match="execute"):
        one("d = core.create_domain('doomed', 'd').selector\ncore.start(d)")
    assert one("result = core.state(d).state") == 1
    with pytest.raises(BadState, match="execute"):
        one("core.start(d)")


def test_a_domain_starts_once(one):
    one.child("child", "kid")
    with pytest.raises(BadState):
        one("core.start(core.lookup('kid').selector)")


def test_the_death_of_a_child_is_told_and_cleans_up(shared, one):
    child = one.child("child", "kid")
    child.send("os._exit(7)")
    assert ("DIED", "kid") in [e[:2] for e in one.hear("DIED")]
    assert one("result = [e.name for e in core.entries()]") == ["self", "sched", "console"]
    wait_for(lambda: not [g for g in shared.groups() if g.name.startswith("kid.")])


def test_a_restarted_domain_keeps_its_table_and_gets_fresh_channels(one):
    phoenix = one.child("phoenix", "p1")
    phoenix("open('/run/state/kept', 'w').write('ashes')")
    phoenix.send("os._exit(1)")
    with pytest.raises(RemoteError):
        phoenix.receive()
    assert ("RENEWED", "c/p1") in [e[:2] for e in one.hear("RENEWED")]
    again = Console(_steal(one, "p1"))
    assert again("result = [e.name for e in core.entries()]") == ["self", "sched", "console"]
    assert again("result = open('/run/state/kept').read()") == "ashes"
    assert one("result = core.state(core.lookup('p1').selector).starts") == 2


def test_a_private_directory_stays_for_its_name_until_purged(shared, one):
    one.child("phoenix", "p2")("open('/run/state/kept', 'w').write('x')")
    one("core.destroy(core.lookup('p2').selector)")
    assert one.child("phoenix", "p2")("result = os.listdir('/run/state')") == ["kept"]
    one("core.destroy(core.lookup('p2').selector, purge=True)")
    assert not (shared.directory / "state/domains/p2").exists()


def test_children_of_a_dead_context_end_with_it(shared):
    kinds = {
        "driver": driver(creates=["user"], peers={"user": True}),
        "user": driver(peers={"driver": True, "child": True}),
        "child": kind(peers={"user": True}),
    }
    with host(kinds) as made:
        one = made.consoles["one"]
        user = one.child("user", "u", memory_bytes=512 * MIB, pids=100, domains=4)
        user.child("child", "grandchild")
        with pytest.raises(NoResources):
            user("core.create_domain('child', 'big', Limits(memory_bytes=512<<20, pids=1))")
        pid = pid_of(made, "grandchild")
        nested = next(g for g in made.groups() if g.name.startswith("grandchild."))
        assert nested.parent.name.startswith("u.")
        one("core.destroy(core.lookup('u').selector)")
        assert not os.path.exists(f"/proc/{pid}")
        assert not [g for g in made.groups() if g.name.startswith(("u.", "grandchild."))]


def test_a_table_is_listed_in_pages(one):
    one("d = [core.create_semaphore(f's{i}') for i in range(60)]")
    names = one("result = [e.name for e in core.entries()]")
    assert names[-60:] == [f"s{i}" for i in range(60)]
    with pytest.raises(NoResources):  # its kind may make 64 objects
        one("[core.create_semaphore(f't{i}') for i in range(60)]")


def test_logs_of_domains_are_bounded(shared, one):
    child = one.child("child", "chatter")
    child("for _ in range(3000): os.write(1, b'x' * 1023 + b'\\n')")
    log = shared.directory / "state/log/chatter.log"
    wait_for(lambda: log.stat().st_size < MIB)
    assert (shared.directory / "state/log/chatter.log.1").stat().st_size == 256 << 10
    child("os.write(1, b'later')")
    assert log.read_bytes().endswith(b"later")


def test_every_grant_is_logged_before_it_is_answered(shared, one):
    started_ms = time.time() * 1000 - 1
    one("core.create_domain('child', 'logged')")
    record = next(r for r in reversed(shared.grants()) if r["op"] == "domain")
    assert record["name"] == "logged"
    assert started_ms <= record["t"] <= time.time() * 1000
