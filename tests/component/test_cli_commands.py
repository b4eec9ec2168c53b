"""Every command against a real control plane with the fake provider."""

import json
import os
import re
import signal
import socket
import subprocess
import threading

import pytest

from supercloud import __version__
from supercloud.cli.commands import COMMANDS
from supercloud.model.errors import STATUS
from support.commandline import CommandLine, control_plane, wait_for

OVERLAP = "networks: [{name: a, range: 10.1.0.0/16}, {name: b, range: 10.1.2.0/24}]\n"


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    with control_plane(line):
        yield line


@pytest.fixture(scope="module")
def line(plane):
    """A control plane with the U-Cloud ``hello`` up."""
    plane.run("up", plane.manifest("hello", replicas=2))
    return plane


def test_up_shows_what_is_done_and_how_long_it_took(plane):
    done = plane.run("up", plane.manifest("shown"))
    assert "+ environment/web" in done.stdout
    assert re.search(r"^ok platform/\S+: .* \([0-9.]+ s\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^shown is up \([0-9.]+ s\)$", done.stdout, re.MULTILINE)
    assert re.search(
        r"^web +vm +serving +cloud/cloud-\d +10\.\S+ +http://", done.stdout, re.MULTILINE
    )
    assert "  curl http://" in done.stdout
    assert "  supercloud console shown/" in done.stdout
    plane.run("down", "shown")


def test_up_twice_changes_nothing(line):
    before = line.json("ps"), line.json("inspect", "hello")
    done = line.run("up", "hello.yaml")
    assert "hello: nothing to change" in done.stdout
    assert "ok platform" not in done.stdout
    assert (line.json("ps"), line.json("inspect", "hello")) == before


def test_up_of_a_changed_manifest_says_what_changes(plane):
    plane.run("up", plane.manifest("changed"))
    file = plane.manifest("changed", memory="256MiB")
    planned = plane.run("plan", file).stdout
    assert re.search(r"^~ environment/web .*128MiB -> 256MiB", planned, re.MULTILINE)
    plane.run("up", file)
    assert plane.run("plan", file).stdout.startswith("changed: nothing to change")
    inspected = plane.json("inspect", "changed/web")
    assert inspected["spec"]["memory_bytes"] == 256 << 20
    plane.run("down", "changed")


def test_plan_changes_nothing(plane):
    assert "+ environment/web" in plane.run("plan", plane.manifest("planned")).stdout
    assert "planned" not in plane.run("ps").stdout
    assert plane.json("plan", "planned.yaml")["changes"]


def test_up_without_waiting_returns_at_once(plane):
    file = plane.manifest("slow", start_ms=600_000)  # longer than a command may run
    done = plane.run("up", "--no-wait", file)
    assert "slow is being worked on" in done.stdout
    assert plane.json("inspect", "slow")["state"] == "applying"
    late = plane.run("up", "--timeout", "0.2", file, status=STATUS["temporary"][1])
    assert re.search(
        r"slow is not done after 0.2 s \(.* is \w+.*still being worked on", late.stderr
    )
    plane.run("down", "slow")


def test_down_leaves_nothing_and_may_be_given_the_manifest(plane):
    file = plane.manifest("brief")
    plane.run("up", file)
    assert re.search(r"brief is gone \([0-9.]+ s\)", plane.run("down", file).stdout)
    assert "brief" not in plane.run("ps").stdout
    plane.run("down", "brief", status=STATUS["not_found"][1])


def test_ps_has_a_row_for_each_environment(line):
    lines = line.run("ps", "--ucloud", "hello").stdout.splitlines()
    assert lines[0].split() == [
        "NAME", "KIND", "STATE", "PROVIDER/HOST", "ADDRESS", "URL", "RESTARTS", "AGE",
    ]  # fmt: skip
    assert sorted(row.split()[0] for row in lines[1:]) == ["other", "web", "web-2"]
    rows = line.json("ps", "-u", "hello")
    assert {row["state"] for row in rows} == {"serving"}


def test_ps_names_the_ucloud_when_there_are_several(line):
    line.run("up", line.manifest("second"))
    assert re.search(r"^second/web ", line.run("ps").stdout, re.MULTILINE)
    ambiguous = line.run("inspect", "web", status=STATUS["not_found"][1]).stderr
    assert "hello/web, second/web" in ambiguous
    line.run("down", "second")


def test_ls_lists_uclouds_and_their_names_alone_for_scripts(line):
    header, *rows = line.run("ls").stdout.splitlines()
    assert header.split() == ["NAME", "STATE", "PLATFORMS", "ENVIRONMENTS", "SERVING"]
    assert any(re.fullmatch(r"hello +ready +[12] +3 +3", row) for row in rows)
    assert "hello" in line.run("ls", "--quiet").stdout.split()
    assert "hello" in {view["name"] for view in line.json("ls")}


def test_inspect_shows_an_environment_and_a_ucloud(line):
    shown = line.run("inspect", "hello/web").stdout
    assert "state: serving" in shown
    assert "memory_bytes: 128MiB" in shown
    assert re.search(r"created_s: 20\d\d-", shown)
    assert line.json("inspect", "web-2")["environment"] == "web"
    view = line.json("inspect", "hello")
    assert view["state"] == "ready"
    assert len(view["environments"]) == 3


def test_logs(line):
    assert line.run("logs", "hello/web").stdout.startswith("web: starting\n")
    assert line.run("logs", "--tail", "1", "hello/web").stdout.count("\n") == 1
    assert json.loads(line.run("logs", "--tail=1", "--json", "hello/web").stdout)["line"]


@pytest.mark.parametrize("words", [["logs", "-f", "hello/web"], ["events", "-f"]])
def test_what_is_followed_ends_cleanly_by_an_interrupt(line, words):
    process = line.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_exec_through_the_control_plane(line):
    """The fake provider's agents speak the real protocol, and pretend a few programs."""
    assert line.run("exec", "hello/web", "echo", "a b").stdout == "a b\n"
    assert line.run("exec", "hello/web", "stderr", "oh").stderr == "oh"
    line.run("exec", "hello/web", "exit", "7", status=7)
    data = "0123456789abcdef" * 65536
    assert line.run("exec", "-i", "hello/web", "cat", input=data).stdout == data


def test_console_through_the_control_plane(line):
    process = line.popen("console", "hello/web", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.read(11) == b"web login: "
    process.stdin.write(b"typed")
    process.stdin.flush()
    assert process.stdout.read(5) == b"typed"
    process.stdin.write(b"\x1d")
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_events_tell_what_happened(line):
    lines = line.run("events", "-u", "hello").stdout.splitlines()
    assert all(
        re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  (!+ )?[a-z_.]+  hello/", one) for one in lines
    )
    events = [json.loads(one) for one in line.run("events", "--json").stdout.splitlines()]
    last = events[-1]["id"]
    assert line.run("events", "--since", last).stdout == ""
    line.run("up", line.manifest("eventful"))
    line.run("down", "eventful")
    assert "eventful/" in line.run("events", "--since", last).stdout


def test_a_reader_that_goes_away_is_no_error(line):
    process = line.popen("events", "-f", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    line.run("up", line.manifest("piped"))
    line.run("down", "piped")
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_bad_manifest_names_file_line_and_field_and_changes_nothing(line):
    before = line.json("inspect", "hello")
    file = line.directory / "bad.yaml"
    file.write_text((line.directory / "hello.yaml").read_text().replace("kind: vm", "kind: vmm", 1))
    done = line.run("up", "bad.yaml", status=2)
    assert re.search(
        r"error: bad.yaml:\d+:11 environments\[0\].kind: found 'vmm', allowed is one of container, vm",
        done.stderr,
    )
    assert "did you mean 'vm'?" in done.stderr
    assert line.json("inspect", "hello") == before
    error = json.loads(line.run("up", "--json", "bad.yaml", status=2).stderr)["error"]
    assert error["code"] == "invalid"
    assert error["details"]["errors"][0]["where"].startswith("bad.yaml:")


@pytest.mark.parametrize(
    ("old", "new", "status", "message"),
    [
        ("name: other", "name: web", 2, "twice"),
        ("disk.raw", "nowhere.raw", 2, "there is no"),
        ("memory: 128MiB", "memory: 2TiB", 2, "at most"),
        ("environments:", OVERLAP + "environments:", 2, "overlaps"),
        ("environments:", "x: &x [1]\nenvironments:", 2, "unknown field 'x'"),
        ("environments:", "survive: []\nenvironments:", 9, "not supported yet"),
    ],
)  # fmt: skip
def test_other_bad_manifests(line, old, new, status, message):
    text = (line.directory / "hello.yaml").read_text()
    assert old in text
    (line.directory / "bad.yaml").write_text(text.replace(old, new))
    assert message in line.run("up", "bad.yaml", status=status).stderr


def test_more_memory_than_any_host_has(line):
    text = (line.directory / "hello.yaml").read_text()
    (line.directory / "huge.yaml").write_text(text + "platform:\n  memory: 4TiB\n")
    done = line.run("up", "huge.yaml", status=2)
    assert re.match(
        r"error: huge.yaml:\d+:11 platform.memory: found 4TiB, allowed is at most 64GiB",
        done.stderr,
    )


def test_more_than_is_left_is_told_at_its_place(line):
    file = line.manifest("crowd", replicas=100)
    error = line.run("up", file, status=STATUS["no_resources"][1]).stderr
    assert re.match(r"error: crowd.yaml:9:5 environments\[0\]: no host can take", error)


def test_a_file_of_1_tb_is_not_read(line):
    path = line.directory / "large.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # nobody has the memory, nor the time, to read it
    done = line.run("up", "large.yaml", status=2)
    assert f"found {1 << 40} bytes, allowed are at most 1048576" in done.stderr


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_a_manifest_that_cannot_be_read(line, name):
    assert f"error: {name}: cannot be read" in line.run("up", name, status=2).stderr


def test_what_is_not_there_is_said_to_be_not_there(line):
    error = line.run("inspect", "nobody", status=STATUS["not_found"][1]).stderr
    assert "no environment 'nobody'" in error
    assert "there are " in error
    line.run("logs", "hello/nobody", status=STATUS["not_found"][1])
    line.run("exec", "hello/nobody", "true", status=STATUS["not_found"][1])


def test_names_that_are_no_names_reach_nothing(line):
    for name in ("../../version", "hello/..", "a/b/c", "%2e%2e", "x" * 5000, "\x1b[31m", "ü"):
        done = line.run("inspect", name, status=None)
        assert done.returncode in (2, STATUS["not_found"][1]), (name, done)
        assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "words", [[], ["pss"], ["ps", "--what"], ["up", "a", "b"], ["logs"], ["up", "--timeout", "x"]]
)
def test_wrong_words_end_with_2_and_say_where_help_is(line, words):
    error = line.run(*words, status=2).stderr
    assert error.startswith("error: ")
    assert "  what to do: " in error


def test_a_command_that_is_nearly_one(line):
    assert "did you mean 'supercloud inspect'?" in line.run("inpsect", "web", status=2).stderr


def test_help_is_there_for_every_command(line):
    shown = line.run("-h").stdout
    for name in ("plan", "up", "down", "ps", "inspect", "logs", "exec", "console", "events", "doctor",
                 "version", "completion", "ca"):  # fmt: skip
        assert f"    {name}" in shown
        assert "--json" in line.run(name, "-h").stdout


@pytest.mark.parametrize("name", ["volumes", "buckets", "checkpoints"])
def test_help_tells_what_every_action_does(line, name):
    shown = line.run(name, "-h").stdout.splitlines()
    (begin,) = (n for n, text in enumerate(shown) if text.startswith("what may follow"))
    forms = COMMANDS[name].forms
    assert len(shown[begin + 1 :]) == len(forms) > 2
    for text, (form, doc) in zip(shown[begin + 1 :], forms.items(), strict=True):
        assert text.strip().startswith(form or "(nothing)")
        assert text.endswith(doc)
        assert len(text) <= 100


def test_versions(line):
    answer = line.json("version")
    assert answer["version"] == __version__
    assert answer["control_plane"]["version"] == __version__
    assert __version__ in line.run("--version").stdout


def test_the_certificate_authority_is_printed(line):
    assert line.run("ca").stdout.startswith("-----BEGIN CERTIFICATE-----\n")


def test_without_a_control_plane_it_says_so(tmp_path):
    line = CommandLine(tmp_path)
    error = line.run("ps", status=STATUS["unavailable"][1]).stderr
    assert "the control plane is not running" in error
    assert "supercloud up" in error
    assert json.loads(line.run("ps", "--json", status=11).stderr)["error"]["code"] == "unavailable"
    assert line.json("version")["control_plane"] is None


@pytest.mark.root
def test_a_socket_that_is_somebody_elses(open_place):
    line = CommandLine(open_place)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(line.socket))
        listener.listen()
        line.socket.chmod(0o600)
        error = line.run("ps", status=11, user=65534, group=65534, extra_groups=[]).stderr
    assert "you may not use the control plane" in error


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", 11),
        (b"garbage\r\n\r\n", 11),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[", 11),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[[[", 70),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull", 70),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", 70),
        (
            b'HTTP/1.1 409 X\r\nContent-Length: 43\r\n\r\n{"error": {"code": "busy", "message": "m"}}',
            5,
        ),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, 11),
    ],
)
def test_a_control_plane_that_answers_nonsense(tmp_path, answer, status):
    """No traceback reaches the user; a bug is logged under the id that is shown."""
    line = CommandLine(tmp_path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(line.socket))
    listener.listen()

    def serve():
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        connection.sendall(answer)
        connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    error = line.run("ps", status=status).stderr
    assert error.startswith("error: ")
    if found := re.search(r"internal error (\w+)\n.*see (\S+)", error):
        assert f"bug {found[1]}" in open(found[2]).read()  # noqa: SIM115
        assert os.stat(found[2]).st_mode & 0o777 == 0o600
    thread.join(5)
    listener.close()


def test_up_bears_a_control_plane_that_is_killed_and_comes_back(tmp_path):
    line = CommandLine(tmp_path)
    file = line.manifest(start_ms=1500)
    with control_plane(line) as process:
        up = line.popen("up", file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert up.stdout.readline().startswith(b"+ ")
        process.kill()
        process.wait()
    with control_plane(line):
        out, errors = up.communicate(timeout=60)
        assert up.returncode == 0, (out, errors)
        assert b"hello is up" in out


@pytest.mark.root
def test_two_commands_at_once_start_one_control_plane(open_place):
    """As an ordinary user, for it never runs as root."""
    home = open_place / "home"
    home.mkdir()
    os.chown(home, 65534, 65534)
    line = CommandLine(home, {"SUPERCLOUD_LISTEN": ""})
    refused = line.run("ca", status=11).stderr
    assert "never runs as root" in refused
    who = {"user": 65534, "group": 65534, "extra_groups": []}
    both = [line.popen("ca", stdout=subprocess.PIPE, **who) for _ in range(2)]
    try:
        for process in both:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert out.startswith(b"-----BEGIN CERTIFICATE-----")
        pid = line.json("version")["control_plane"]["pid"]
        assert os.stat(f"/proc/{pid}").st_uid == 65534
        assert os.getsid(pid) == pid
    finally:
        found = json.loads(line.run("version", "--json").stdout)["control_plane"]
        if found:
            os.kill(found["pid"], signal.SIGTERM)
            wait_for(lambda: not line.socket.exists(), 60)
