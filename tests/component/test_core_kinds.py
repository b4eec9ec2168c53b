"""What the fields of a kind do to its domains: networks, devices, binds, nesting, environment."""

import hashlib
import json
import os
import socket
import stat

import pytest

from core_host import MIB, Host, driver, host, kind, real_uid
from supercloud.lower.core.measure import hash_tree, read_chain

pytestmark = pytest.mark.root
NAMES = ("child", "talker", "hosted", "nester", "equipped")
NEST = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
open("/tmp/outer", "w").write("x")
assert libc.unshare(0x10000000 | 0x20000) == 0, os.strerror(ctypes.get_errno())
before = os.listdir("/tmp")
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(b"t", b"/tmp", b"tmpfs", 0, None) == 0, os.strerror(ctypes.get_errno())
result = [before, os.listdir("/tmp")]
"""


@pytest.fixture(scope="module")
def made():
    kinds = {
        "driver": driver(creates=list(NAMES), tcp=True),
        "child": kind(),
        "talker": kind(tcp=True),
        "hosted": kind(network="host", tcp=True),
        "nester": kind(nests=True, filter="passt"),
        "equipped": kind(
            devices=["/dev/tty"],
            environment={"COLOUR": "green"},
            nofile=99,
            tmp_bytes=2 * MIB,
            proc=True,
        ),
    }
    kinds["driver"]["peers"] = dict.fromkeys(NAMES, True)
    with host(kinds) as running:
        yield running


@pytest.fixture
def one(made: Host):
    console = made.consoles["one"]
    yield console
    console(
        "for e in core.entries():\n"
        "    if e.type == 1 and e.selector: core.destroy(e.selector)\n"
        "list(core.events())"
    )


SERVE = "server = socket.create_server(('127.0.0.1', 0)); result = server.getsockname()[1]"
REACH = "socket.create_connection(('127.0.0.1', {}), 5).close(); result = 'reached'"


def test_an_own_network_is_a_loopback_and_nothing_else(one):
    port = one(SERVE)
    talker = one.child("talker", "t")
    with pytest.raises(Exception, match="ConnectionRefused"):
        talker(REACH.format(port))
    with pytest.raises(Exception, match="unreachable"):
        talker("socket.create_connection(('198.51.100.1', 80), 5)")
    own = talker(SERVE)
    assert talker(REACH.format(own)) == "reached"


def test_the_hosts_network_is_the_hosts(one):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert one.child("hosted", "h")(REACH.format(server.getsockname()[1])) == "reached"


def test_every_domain_but_those_has_a_network_namespace_of_its_own(made, one):
    for name in ("child", "talker", "hosted"):
        one.child(name, name)
    spaces = {}
    for pid in made.processes():
        spaces.setdefault(os.readlink(f"/proc/{pid}/ns/net"), set()).add(pid)
    assert sorted(map(len, spaces.values())) == [1, 1, 1, 1]
    assert len(spaces[os.readlink("/proc/self/ns/net")]) == 1
    for which in ("mnt", "pid", "ipc", "uts", "cgroup", "user"):
        assert len({os.readlink(f"/proc/{pid}/ns/{which}") for pid in made.processes()}) == 4


def test_a_program_may_nest_where_its_kind_says_so_and_gains_nothing(made, one):
    nester = one.child("nester", "n")
    assert nester(NEST) == [["outer"], []]
    nest = next(p for p in made.processes() if os.readlink(f"/proc/{p}/root") == "/" and _nests(p))
    assert real_uid(nest) != 0
    with pytest.raises(Exception, match="OSError"):
        nester("open('/usr/x', 'w')")


def _nests(pid: int) -> bool:
    with open(f"/proc/{pid}/cgroup") as file:
        return "/n." in file.read()


def test_devices_environment_and_limits_are_as_the_kind_says(one):
    child = one.child("equipped", "e")
    mode, uid = child("s = os.stat('/dev/tty'); result = s.st_mode, s.st_uid")
    assert (stat.S_ISCHR(mode), stat.S_IMODE(mode)) == (True, 0o600)
    assert uid == child("result = os.getuid()")
    names = ("COLOUR", "SUPERCLOUD_DOMAIN", "SUPERCLOUD_KIND")
    assert child(f"result = [os.environ[n] for n in {names}]") == ["green", "e", "equipped"]
    limit = "import resource; result = resource.getrlimit(resource.RLIMIT_NOFILE)"
    assert child(limit) == [99, 99]
    assert child("s = os.statvfs('/tmp'); result = s.f_blocks * s.f_frsize") == 2 * MIB
    assert child("result = sorted(os.listdir('/dev'))")[-2:] == ["urandom", "zero"]


def test_descriptors_of_the_core_do_not_leak_into_a_domain(one):
    child = one.child("equipped", "e")
    found = child("result = [int(n) for n in os.listdir('/proc/self/fd')]")
    assert set(found) <= {0, 1, 2, 3, 4, 5}


def test_the_measurement_log_replays_to_its_register(made, one):
    one("m = core.create_memory(4096, 'boot'); core.seal(m)")
    register = "0" * 64
    events = list(read_chain(str(made.directory / "state/measurements.log")))
    for number, event in enumerate(events):
        assert event["index"] == number
        register = hashlib.sha256(bytes.fromhex(register + event["digest"])).hexdigest()
        assert event["register"] == register
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["runtime", "manifest", "code"]
    assert kinds.count("filter") == 6
    assert events[-1] == {**events[-1], "event": "memory", "subject": "one/boot"}
    manifest = json.dumps(made.manifest).encode()
    assert events[1]["digest"] == hashlib.sha256(manifest).hexdigest()


def test_the_measured_code_changes_with_any_file(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.py").write_text("y = 2")
    before = hash_tree(str(tmp_path))
    (tmp_path / "notes.txt").write_text("not code")
    assert hash_tree(str(tmp_path)) == before
    (tmp_path / "sub/b.py").rename(tmp_path / "b.py")
    moved = hash_tree(str(tmp_path))
    (tmp_path / "b.py").write_text("y = 3")
    assert len({before, moved, hash_tree(str(tmp_path))}) == 3
