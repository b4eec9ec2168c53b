"""The example from nothing to nothing: real command lines, a real host, crashes in between.

The tests share one platform and go on from each other, in the order of the file.
"""

import contextlib
import os
import re
import select
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

from support.inventory import Inventory, inventory, status, uids_of
from support.slots import vm_slots
from support.stack import UID, Host, Stack, cpu_of_children_s, stack, wait_for
from support.terminal import Terminal

pytestmark = [pytest.mark.vm, pytest.mark.root]

HELLO = """\
environments:
  - name: web
    kind: container
    image: oci:{examples}/web
    cpus: 0.5
    memory: 64MiB
    ports: [8080]
    replicas: {replicas}
    env: {{GREETING: {greeting}}}
"""
MACHINE = """\
  - {{name: machine, kind: vm, image: '{examples}/vm', memory: 128MiB, ports: [8080]}}
"""
BACK_S = 60.0


class Hello:
    """The stack, its one host, and the manifest of ``hello`` in different shapes."""

    def __init__(self, made: Stack, examples: Path) -> None:
        self.stack, self.examples = made, examples
        self.host: Host = made.hosts["here"]
        self.before = self.inventory()

    def inventory(self) -> Inventory:
        host = self.host
        return inventory(host.instance, uids_of(host.instance), host.ports)

    def manifest(self, *, replicas: int = 1, greeting: str = "hello", machine: bool = True) -> str:
        body = HELLO + (MACHINE if machine else "")
        fields = {"replicas": replicas, "greeting": greeting, "examples": self.examples}
        return self.stack.manifest("hello", body.format(**fields))

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.stack.json("ps")}

    def urls(self) -> dict[str, str]:
        return {name: row["urls"][0] for name, row in self.rows().items()}

    def serving(self) -> bool:
        return {row["state"] for row in self.rows().values()} == {"serving"}

    def linked(self) -> bool:
        """Whether the control plane reaches the agent."""
        done = self.stack.cli("exec", "hello/web", "--", "true", status=None)
        return done.returncode == 0


@pytest.fixture(scope="module")
def hello(product_images: Path, example_images: Path) -> Iterator[Hello]:
    with vm_slots(), stack(product_images) as made:
        made.enrol("hello", "here")
        shaped = Hello(made, example_images)
        made.cli("up", shaped.manifest())
        yield shaped


def get(url: str) -> str:
    """The page, or why there is none."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return f"failed: {error}"


# -- everything works


def test_both_environments_answer_at_the_urls_that_ps_prints(hello: Hello) -> None:
    urls = hello.urls()
    assert get(urls["web"]) == "hello from container web\n"
    assert get(urls["machine"]) == "hello from vm machine\n"
    printed = hello.stack.cli("ps").stdout
    assert all(url in printed for url in urls.values())


def test_ps_says_what_runs_where(hello: Hello) -> None:
    web, machine = (hello.rows()[name] for name in ("web", "machine"))
    assert (web["kind"], machine["kind"]) == ("container", "vm")
    assert web["provider"] == machine["provider"] == "here"
    assert web["platform"] == machine["platform"]
    assert web["state"] == machine["state"] == "serving"
    assert web["restarts"] == machine["restarts"] == 0


def test_inspect_shows_the_engine_and_what_was_asked_for(hello: Hello) -> None:
    shown = hello.stack.json("inspect", "hello/web")
    assert shown["spec"]["memory_bytes"] == 64 << 20
    assert shown["engine"]
    assert shown["memory_used_bytes"] > 0  # as it is now, not as it was when something changed
    before_s = shown["cpu_used_s"]
    hello.stack.cli("exec", "hello/web", "--", "/bin/sh", "-c", "for n in 1 2 3 4 5; do ls /; done")
    assert hello.stack.json("inspect", "hello/web")["cpu_used_s"] > before_s
    machine = hello.stack.json("inspect", "hello/machine")
    assert re.search("kvm|tcg", machine["engine"]), machine


def test_logs_of_the_container(hello: Hello) -> None:
    assert "serving on port 8080 as web" in hello.stack.cli("logs", "hello/web").stdout


def test_exec_gives_output_input_and_exit_status(hello: Hello) -> None:
    cli = hello.stack.cli
    assert cli("exec", "hello/web", "--", "hostname").stdout == "web\n"
    cli("exec", "hello/web", "--", "sh", "-c", "exit 7", status=7)
    echoed = cli("exec", "-i", "hello/web", "--", "cat", input="over there")
    assert echoed.stdout == "over there"
    assert cli("exec", "hello/web", "--", "sh", "-c", "echo $GREETING").stdout == "hello\n"


def test_exec_on_a_terminal_is_a_real_one(hello: Hello) -> None:
    """Its size, a new size, Ctrl-C to the program and not to the shell, and its exit status."""
    words = ("exec", "-it", "-e", "PS1=ready> ", "hello/web", "--", "sh")
    with Terminal(hello.stack, *words) as terminal:
        terminal.expect(rb"ready> ", 120)
        terminal.type(b"busybox stty size; busybox tty\n")
        terminal.expect(rb"\r\n30 100\r\n/dev/pts/")
        terminal.expect(rb"ready> ")
        terminal.resize(41, 123)
        terminal.type(b"until busybox stty size | busybox grep '41 123'; do sleep 0.1; done\n")
        terminal.expect(rb"\r\n41 123\r\n")
        terminal.expect(rb"ready> ")
        terminal.type(b"sh -c 'echo on-$((1+1)); exec sleep 1000'\n")
        terminal.expect(rb"on-2")
        terminal.type(b"\x03")
        terminal.expect(rb"ready> ")
        assert "sleep 1000" not in hello.stack.cli("exec", "hello/web", "--", "ps").stdout
        terminal.type(b"exit 7\n")
        assert terminal.ended() == 7


def test_console_is_the_vms_serial_console(hello: Hello) -> None:
    typing = hello.stack.popen("console", "hello/machine", stdin=PIPE, stdout=PIPE)
    assert typing.stdin is not None
    assert typing.stdout is not None
    try:
        typing.stdin.write(b"echo the sum is $((40 + 2))\n")
        typing.stdin.flush()
        said = b""
        while b"the sum is 42" not in said:
            assert select.select([typing.stdout], [], [], 120)[0], said
            assert (data := os.read(typing.stdout.fileno(), 4096)), said
            said += data
        typing.stdin.write(b"\x1d")
        typing.stdin.flush()
        assert typing.wait(60) == 0
    finally:
        typing.kill()
        typing.wait()


def test_events_tell_what_happened(hello: Hello) -> None:
    done = hello.stack.cli("events", "--ucloud", "hello").stdout
    assert "platform.ready" in done


def test_a_second_up_changes_nothing_and_takes_less_than_a_second_of_a_processor(
    hello: Hello,
) -> None:
    before, file, began_s = hello.rows(), hello.manifest(), cpu_of_children_s()
    assert "nothing to change" in hello.stack.cli("up", file).stdout
    assert cpu_of_children_s() - began_s < 1.0
    assert hello.rows() == before


# -- who has which privilege


def test_only_keeper_and_core_are_root_and_nothing_else_has_capabilities(hello: Hello) -> None:
    host = hello.host
    initial = os.readlink("/proc/self/ns/user")
    pids = host.processes()
    domains = [pid for pid in pids if status(pid)["Uid"].split() != ["0"] * 4]
    roots = set(pids) - set(domains)
    assert roots == {host.process.pid, core_pid(host)}
    assert len(domains) > 10
    uids = uids_of(host.instance)
    for pid in domains:
        fields = status(pid)
        who = f"{pid} {fields['Name']}"
        assert {int(uid) for uid in fields["Uid"].split()} <= set(uids), who
        assert int(fields["CapEff"], 16) == 0, who
        assert int(fields["CapPrm"], 16) == 0, who
        assert fields["NoNewPrivs"] == "1", who
        assert fields["Seccomp"] == "2", who
        assert os.readlink(f"/proc/{pid}/ns/user") != initial, who


def test_every_domain_has_a_uid_of_its_own(hello: Hello) -> None:
    domains: dict[str, set[str]] = {}
    for pid in hello.host.processes():
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        name = [line for line in environment if line.startswith("SUPERCLOUD_DOMAIN=")]
        if name:
            domains.setdefault(name[0], set()).add(status(pid)["Uid"])
    assert len(domains) >= 8, domains
    uids = [uid for found in domains.values() for uid in found]
    assert len(uids) == len(set(uids)), domains


def test_control_plane_and_command_line_are_unprivileged(hello: Hello) -> None:
    watching = hello.stack.popen("events", "--follow", stdout=DEVNULL)
    try:
        assert hello.stack.control is not None
        for pid in (hello.stack.control.pid, watching.pid):
            wait_for(lambda pid=pid: "setpriv" not in status(pid)["Name"], 60)
            fields = status(pid)
            assert fields["Uid"].split() == [str(UID)] * 4
            assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    finally:
        watching.kill()
        watching.wait()


# -- what goes on when something is away


def test_environments_serve_on_while_the_control_plane_is_away(hello: Hello) -> None:
    urls = hello.urls()
    hello.stack.stop_control()
    try:
        hello.stack.cli("ps", status=11)
        assert get(urls["web"]) == "hello from container web\n"
        assert get(urls["machine"]) == "hello from vm machine\n"
    finally:
        hello.stack.start_control()
    wait_for(hello.serving, BACK_S, hello.stack.logs)
    wait_for(hello.linked, BACK_S, hello.stack.logs)
    assert hello.urls() == urls


def test_environments_serve_on_when_the_core_is_killed(hello: Hello) -> None:
    urls, before, starts = hello.urls(), core_pid(hello.host), domain_starts(hello.host)
    os.kill(before, signal.SIGKILL)
    assert get(urls["web"]) == "hello from container web\n"
    wait_for(lambda: core_pid(hello.host) not in (0, before), 60, hello.stack.logs)
    assert get(urls["machine"]) == "hello from vm machine\n"
    assert hello.host.json("status")["instance"] == hello.host.instance
    assert hello.linked()
    test_console_is_the_vms_serial_console(hello)
    assert domain_starts(hello.host) == starts


def test_a_killed_user_domain_comes_back_and_adopts_its_machines(hello: Hello) -> None:
    urls, machine = hello.urls(), hello.host.pid_of(machine_domain(hello.host))
    os.kill(hello.host.pid_of("user:hello"), signal.SIGKILL)
    assert get(urls["web"]) == "hello from container web\n"
    wait_for(hello.linked, BACK_S, hello.stack.logs)
    wait_for(hello.serving, BACK_S, hello.stack.logs)
    assert hello.host.pid_of(machine_domain(hello.host)) == machine
    assert get(urls["machine"]) == "hello from vm machine\n"
    test_console_is_the_vms_serial_console(hello)


# -- changes


def test_a_changed_manifest_is_rolled_out(hello: Hello) -> None:
    machine = hello.rows()["machine"]
    done = hello.stack.cli("up", hello.manifest(replicas=2, greeting="good day"))
    assert "environment/web-2" in done.stdout
    rows = hello.rows()
    assert sorted(rows) == ["machine", "web", "web-2"]
    assert get(rows["web-2"]["urls"][0]) == "hello from container web-2\n"
    assert get(rows["web"]["urls"][0]) == "hello from container web\n"
    said = hello.stack.cli("exec", "hello/web", "--", "sh", "-c", "echo $GREETING")
    assert said.stdout == "good day\n"
    assert rows["machine"] == machine, "what was not changed is left alone"


def test_what_is_no_more_in_the_manifest_goes_away(hello: Hello) -> None:
    gone = [hello.rows()[name]["urls"][0] for name in ("web-2", "machine")]
    hello.stack.cli("up", hello.manifest(machine=False))
    assert sorted(hello.rows()) == ["web"]
    assert all(get(url).startswith("failed: ") for url in gone)


def test_a_platform_whose_machine_dies_is_made_anew(hello: Hello) -> None:
    lost = hello.rows()["web"]["platform"]
    os.kill(hello.host.pid_of(machine_domain(hello.host)), signal.SIGKILL)
    wait_for(lambda: not hello.serving(), BACK_S, hello.stack.logs)
    wait_for(hello.serving, 2 * BACK_S, hello.stack.logs)
    web = hello.rows()["web"]
    assert web["platform"] == lost
    assert get(web["urls"][0]) == "hello from container web\n"
    assert len(machine_domains(hello.host)) == 1
    assert "platform.failed" in hello.stack.cli("events", "--ucloud", "hello").stdout


# -- the end


def test_down_leaves_nothing_of_the_u_cloud(hello: Hello) -> None:
    (url,) = hello.urls().values()
    assert hello.inventory().since(hello.before), "there is something to leave behind"
    hello.stack.cli("down", "hello")
    assert hello.stack.json("ps") == []
    assert hello.stack.cli("ls", "--quiet").stdout == ""
    wait_for(lambda: not left(hello, hello.before), 60, lambda: str(left(hello, hello.before)))
    assert get(url).startswith("failed: ")
    (user,) = hello.host.json("user", "list")
    assert {key: user["used"][key] for key in ("memory_bytes", "disk_bytes", "vms")} == {
        "memory_bytes": 0, "disk_bytes": 0, "vms": 0,
    }  # fmt: skip


def test_a_stopped_host_leaves_nothing(hello: Hello) -> None:
    nothing = hello.stack.before
    hello.host.stop()
    wait_for(lambda: not left(hello, nothing), 60, lambda: str(left(hello, nothing)))
    assert not list((hello.host.state).glob("**/*.raw"))


def left(hello: Hello, before: Inventory) -> dict[str, list[str]]:
    return hello.inventory().since(before)


def core_pid(host: Host) -> int:
    """The keeper's child with uid 0; 0 while there is none."""
    assert host.process is not None
    children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text()
    for pid in map(int, children.split()):
        with contextlib.suppress(OSError):  # it has just ended
            if status(pid)["Uid"].split()[0] == "0":
                return pid
    return 0


def domain_starts(host: Host) -> dict[str, int]:
    """How often each user's domain was started."""
    return {row["name"]: row["starts"] for row in host.json("domains")}


def machine_domains(host: Host) -> set[str]:
    """Names of the domains with virtual machines."""
    found = set()
    for pid in host.processes():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
            found |= set(re.findall(r"SUPERCLOUD_DOMAIN=(vmm:[^\0]+)", environment))
    return found


def machine_domain(host: Host) -> str:
    (name,) = machine_domains(host)
    return name
