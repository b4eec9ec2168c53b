"""A killed or replaced core loses nothing; a stopped host leaves nothing."""

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import core_host
from core_host import (
    KEEPER,
    SRC,
    Console,
    RemoteError,
    driver,
    host,
    kill_core,
    kind,
    replaced,
    settled,
    status,
    wait_for,
)
from supercloud.lower.core.measure import hash_tree, read_chain
from supercloud.model.errors import Exists, Invalid, NotFound

pytestmark = pytest.mark.root
KINDS = ("driver", "child", "phoenix")


def kinds() -> dict[str, dict[str, object]]:
    return {
        "driver": driver(creates=["child", "phoenix"], peers=dict.fromkeys(KINDS, True)),
        "child": kind(),
        "phoenix": kind(restart=True),
    }


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def table(console: Console) -> list[list[object]]:
    return console("result = [list(e) for e in core.entries()]")


def test_domains_and_tables_survive_the_core(tmp_path):
    with host(kinds()) as made:
        one = made.consoles["one"]
        child = one.child("child", "kid")
        one("m = core.create_memory(4096, 'page')\nfd = core.take(m)\nos.pwrite(fd, b'kept', 0)")
        one("core.delegate(m, core.lookup('kid').selector, Rights.WRITE, 'page')")
        before = table(one), table(child), made.processes()
        kill_core(made)
        assert (table(one), table(child), made.processes()) == before
        assert (
            child(
                "f = core.take(core.lookup('page').selector)\nresult = os.pread(f, 4, 0).decode()"
            )
            == "kept"
        )
        assert [event for event, _, _ in one.hear("RESTARTED")] == ["RESTARTED"]
        one("core.destroy(core.lookup('kid').selector)")
        with pytest.raises(RemoteError):
            child("result = 0")


def test_a_call_that_the_core_died_under_is_done_once():
    with host(kinds()) as made:
        one = made.consoles["one"]
        os.kill(made.core_pid, signal.SIGSTOP)
        one.send("result = core.create_domain('child', 'once').selector")
        time.sleep(0.1)  # the request lies in the socket
        kill_core(made)
        selector, _ = one.receive()
        assert one("result = core.lookup('once').selector") == selector
        assert [r["name"] for r in made.grants() if r["op"] == "domain"].count("once") == 1


def test_a_request_sent_twice_is_answered_twice_and_done_once():
    with host(kinds()) as made:
        one = made.consoles["one"]
        code = (
            "from supercloud.lower.client import pack_request, Op\n"
            "core._sequence += 1\n"
            "f = pack_request(Op.CREATE_SEMAPHORE, core._sequence, (0,), 's')\n"
            "core._send(f); core._send(f)\n"
            "a, b = core._receive(), core._receive()\n"
            "result = a == b and a.status == 0"
        )
        assert one(code) is True
        assert [r["op"] for r in made.grants()].count("semaphore") == 1


def test_a_start_that_failed_is_not_taken_for_done_when_it_is_sent_again():
    table = kinds()
    table["driver"]["creates"] = ["child", "phoenix", "doomed"]
    table["doomed"] = kind(argv=["/no/such/program"], peers={})
    with host(table) as made:
        one = made.consoles["one"]
        one(
            "from supercloud.lower.client import pack_request, Op\n"
            "d = core.create_domain('doomed', 'd').selector\n"
            "core._sequence += 1\n"
            "f = pack_request(Op.START, core._sequence, (d,))"
        )
        again = "core._send(f); a = core._receive(); result = a.status, a.payload.decode()"
        first = one(again)
        assert first[0]
        assert one(again) == first
        kill_core(made)
        one.hear("RESTARTED")
        assert one(again) == first


def test_a_seal_that_the_core_died_under_is_done_by_the_next():
    with host(kinds()) as made:
        one = made.consoles["one"]
        one.send("m = core.create_memory(1 << 30, 'large'); result = core.seal(m).hex()")
        wait_for(lambda: "memory" in [r["op"] for r in made.grants()])
        kill_core(made)
        digest, _ = one.receive()
        assert one("result = core.seal(m).hex()") == digest
        assert [r["op"] for r in made.grants()].count("seal") == 1


def test_deaths_while_the_core_is_away_are_noticed():
    with host(kinds()) as made:
        one = made.consoles["one"]
        child, phoenix = one.child("child", "kid"), one.child("phoenix", "bird")
        before = made.core_pid
        os.kill(before, signal.SIGSTOP)
        child.send("os._exit(3)")
        phoenix.send("os._exit(3)")
        time.sleep(0.3)
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: replaced(made, before))
        wait_for(lambda: "kid" not in one("result = [e.name for e in core.entries()]"))
        wait_for(lambda: one("result = core.state(core.lookup('bird').selector).starts") == 2)


def test_adopted_domains_that_die_later_are_noticed_too():
    with host(kinds()) as made:
        one = made.consoles["one"]
        child = one.child("child", "kid")
        kill_core(made)
        one.hear("RESTARTED")
        child.send("os._exit(3)")
        assert ("DIED", "kid", 3 << 8) in one.hear("DIED")


def test_nothing_leaks_over_many_cores():
    with host(kinds()) as made:
        one = made.consoles["one"]
        one.child("child", "kid")
        kill_core(made)
        one("core.ping()")
        keeper, core = settled(lambda: (descriptors(made.keeper.pid), descriptors(made.core_pid)))
        groups = made.groups()
        for _ in range(5):
            one("core.create_semaphore('s')")
            kill_core(made)
            one("core.destroy(core.lookup('s').selector)")
        wait_for(lambda: descriptors(made.core_pid) == core)
        wait_for(lambda: descriptors(made.keeper.pid) == keeper)
        assert made.groups() == groups
        kids = [p for p in made.processes() if status(p)["State"].startswith("Z")]
        assert not kids


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_keep_tables_processes_and_groups_in_step(seed):
    chance = random.Random(seed)
    with host(kinds()) as made:
        one = made.consoles["one"]
        for round_ in range(6):
            name = f"d{round_}"
            one.send(
                f"d = core.create_domain('phoenix', {name!r}).selector\n"
                f"core.create_channel(SELF, d, 'c{round_}', 'console')\ncore.start(d)\n"
                f"core.create_memory(4096, 'm{round_}')\n"
                + ("core.destroy(d)" if chance.random() < 0.5 else "")
            )
            time.sleep(chance.random() * 0.03)
            kill_core(made)
            with suppress(NotFound, Exists):  # it saw an object that the dead core had ended
                one.receive()
        in_tables = {e[5] for e in table(one) if e[1] == 1 and e[5] != "self"}
        wait_for(
            lambda: (
                in_tables | {"one"}
                == {g.name.rpartition(".")[0] for g in made.groups() if "." in g.name}
            )
        )
        wait_for(lambda: len(made.processes()) == len(in_tables) + 1)


def test_a_planned_replacement_is_quick_and_loses_nothing():
    with host(kinds()) as made:
        one = made.consoles["one"]
        one.child("child", "kid")
        before, had = made.core_pid, table(one)
        made.keeper.send_signal(signal.SIGHUP)
        wait_for(lambda: replaced(made, before))
        assert table(one) == had


def test_a_planned_replacement_brings_new_code(tmp_path, monkeypatch):
    package = tmp_path / "supercloud"
    shutil.copytree(SRC / "supercloud", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(core_host, "KEEPER", package / KEEPER.relative_to(SRC / "supercloud"))
    with host(kinds()) as made:
        one = made.consoles["one"]
        child, before, had = one.child("child", "kid"), made.core_pid, table(one)
        with (package / "lower/core/core.py").open("a") as file:
            file.write('os.write(2, b"of another version")\n')
        made.keeper.send_signal(signal.SIGHUP)
        wait_for(lambda: replaced(made, before))
        assert table(one) == had
        assert child("result = 1") == 1
        assert "of another version" in made.log.read_text()
        events = read_chain(str(made.directory / "state/measurements.log"))
        codes = [event["digest"] for event in events if event["event"] == "code"]
        assert len(codes) == 2
        assert codes[0] != codes[1] == hash_tree(str(package))


def test_stopping_leaves_no_process_group_or_mount():
    mounts = Path("/proc/self/mountinfo").read_text()
    with host(kinds()) as made:
        one = made.consoles["one"]
        for number in range(3):
            one.child("child", f"kid{number}")
        processes = {*made.processes(), made.core_pid, made.keeper.pid}
        assert len(processes) == 6
        assert made.stop() == 0
        assert not made.groups()
        assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]
        assert not (made.directory / "run/ready").exists()
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_leftovers_of_a_killed_keeper_are_swept_by_the_next():
    with host(kinds()) as made:
        made.consoles["one"].child("child", "kid")
        left = made.processes()
        core = made.core_pid
        made.keeper.kill()
        made.keeper.wait()
        wait_for(lambda: not os.path.exists(f"/proc/{core}"))
        (made.directory / "run/ready").unlink()
        made.start()
        assert not left & made.processes()
        assert made.consoles["one"]("result = len(core.entries())") == 3


def test_the_grant_log_is_a_chain():
    with host(kinds()) as made:
        made.consoles["one"].child("child", "kid")
        path = made.directory / "state/grants.log"
        assert next(r["op"] for r in read_chain(str(path))) == "boot"
        lines = path.read_text().splitlines()
        lines[2] = lines[2].replace('"slot":', '"slot": ')
        forged = made.directory / "forged.log"
        forged.write_text("\n".join([*lines[:1], *lines[2:]]) + "\n")
        with pytest.raises(Invalid, match="chain"):
            list(read_chain(str(forged)))


def test_a_core_that_cannot_boot_gives_up_with_the_reason(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 2}')
    command = [
        "/usr/bin/python3",
        "-I",
        "-S",
        "-B",
        str(KEEPER),
    ]
    for option in ("run", "state"):
        command += [f"--{option}", str(tmp_path)]
    done = subprocess.run(
        [*command, "--manifest", str(tmp_path / "manifest.json")],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 78
    assert b"manifest: field" in done.stderr


def test_a_core_killed_while_it_stops_is_replaced_by_one_that_stops():
    with host(kinds()) as made:
        one = made.consoles["one"]
        for number in range(3):
            one.child("child", f"kid{number}")
        processes, core = made.processes(), made.core_pid
        os.kill(core, signal.SIGSTOP)
        made.keeper.terminate()
        time.sleep(0.2)
        os.kill(core, signal.SIGKILL)
        assert made.keeper.wait(60) == 0
        assert not made.groups()
        assert not [pid for pid in processes if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_a_host_told_to_stop_while_it_boots_stops(delay_s):
    with host(kinds()) as made:
        made.stop()
        made.start(wait=False)
        time.sleep(delay_s)
        assert made.stop() in (0, -signal.SIGTERM)  # before the keeper minds signals, it just ends
        assert not made.groups()
        assert not made.processes()


def test_more_descriptors_than_select_could_bear():
    table = kinds()
    table["driver"]["objects"] = 4096
    with host(table) as made:
        one = made.consoles["one"]
        one("for i in range(1200): core.create_semaphore(f's{i}')")
        one.child("child", "kid")
        kill_core(made)
        child = one.child("child", "late")
        assert child("result = core.entries()[0].name") == "self"
        assert one("result = len(core.entries())") > 1200
