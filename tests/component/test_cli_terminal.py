"""exec and console on a real terminal, driven through a real pty; and on pipes."""

import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import aiohttp
import pytest

from supercloud.cli.terminal import _Session
from support.commandline import CommandLine, control_plane, dying_with_us, wait_for
from support.terminal import Terminal

SERVER = Path(__file__).parents[1] / "support" / "terminal_server.py"


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("terminal"))
    # -P: a module beside it has the name of one of the standard library.
    process = subprocess.Popen(dying_with_us([sys.executable, "-P", str(SERVER), str(line.socket)]))
    wait_for(line.socket.exists, 60)
    yield line
    process.kill()
    process.wait()


def test_a_shell_on_a_terminal(line):
    """Its size, a new size, Ctrl-C to the program and not to us, and its exit status."""
    with Terminal(line, "exec", "-it", "-e", "PS1=ready> ", "hello/web", "sh") as terminal:
        terminal.expect(rb"ready> ")
        terminal.type(b"stty size; tty\n")
        terminal.expect(rb"\r\n30 100\r\n/dev/pts/")
        terminal.resize(41, 123)
        terminal.expect(rb"ready> ")
        terminal.type(b"until stty size | grep '41 123'; do sleep 0.1; done\n")
        terminal.expect(rb"\r\n41 123\r\n")
        terminal.type(b"sh -c 'echo on-$((1+1)); exec sleep 1000'\n")
        terminal.expect(rb"on-2")
        terminal.type(b"\x03")
        terminal.expect(rb"ready> ")
        terminal.type(b"exit 7\n")
        assert terminal.ended() == 7


def test_ctrl_d_and_job_control(line):
    with Terminal(line, "exec", "-it", "-e", "PS1=ready> ", "web", "sh", "-m") as terminal:
        terminal.expect(rb"ready> ")
        terminal.type(b"sh -c 'echo on-$((1+1)); exec sleep 1000'\n")
        terminal.expect(rb"on-2")
        terminal.type(b"\x1a")
        terminal.expect(rb"Stopped|suspended")
        terminal.type(b"kill %1; wait; exec sh -c 'echo on-$((1+2)); cat; exit 3'\n")
        terminal.expect(rb"on-3")
        terminal.type(b"typed\n\x04")
        terminal.expect(rb"typed\r\ntyped\r\n")
        assert terminal.ended() == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_killed_command_leaves_the_terminal_as_it_was(line, number):
    with Terminal(line, "exec", "-it", "-e", "PS1=ready> ", "web", "sh") as terminal:
        terminal.expect(rb"ready> ")
        assert termios.tcgetattr(terminal.slave) != terminal.before
        terminal.process.send_signal(number)
        assert terminal.ended() == 128 + number


def test_pipes_carry_bytes_and_the_end_of_input(line):
    data = bytes(range(256)) * 4096
    done = subprocess.run(
        line.argv("exec", "-i", "web", "sh", "-c", "cat; echo complaint >&2; exit 5"),
        env=line.environment, input=data, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == data
    assert done.stderr == b"complaint\n"
    assert done.returncode == 5


def test_input_from_a_file_and_from_nothing(line, tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"from a file\n")
    with path.open() as file:
        assert line.run("exec", "-i", "web", "cat", stdin=file).stdout == "from a file\n"
    assert line.run("exec", "-i", "web", "cat", stdin=subprocess.DEVNULL).stdout == ""
    done = line.run("exec", "web", "--", "sh", "-c", "cat; echo end", stdin=subprocess.DEVNULL)
    assert done.stdout == "end\n"


def test_an_interrupt_reaches_a_program_on_pipes_and_the_second_leaves_it(line):
    process = line.popen(
        "exec", "web", "sh", "-c", "trap 'echo caught' INT; echo ready; while :; do sleep 0.1; done",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"caught\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_a_program_killed_by_a_signal(line):
    assert line.run("exec", "web", "sh", "-c", "kill -KILL $$", status=137).stderr == ""


async def test_the_end_of_input_is_too_late_for_a_program_that_has_ended():
    """Its exit status has come already, and is not lost because nobody hears us any more."""

    class Ended:
        async def send_str(self, text):
            if "eof" in text:
                raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

        async def __aiter__(self):
            yield aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, '{"exit_status": 137}', None)

    assert await _Session({}, reads=False, raw=False).run(Ended()) == 137


def test_a_slow_client_still_learns_the_exit_status(line):
    """The program is dead, and its status said, long before the client is done with its part."""
    slow = (
        "import sys, time; from supercloud.cli import terminal; from supercloud.cli.user import main\n"
        "handle = terminal._Session._handle_signals\n"
        "terminal._Session._handle_signals = lambda *a: (time.sleep(0.7), handle(*a))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ("exec", "web", "sh", "-c", "kill -KILL $$")
    done = subprocess.run(
        [sys.executable, "-c", slow, *words],
        env=line.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (137, "")


def test_a_reader_that_goes_away(line):
    process = line.popen("exec", "web", "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_what_exec_refuses(line):
    assert "a program to run is missing" in line.run("exec", "web", status=2).stderr
    refused = line.run("exec", "-it", "web", "sh", status=2, stdin=subprocess.DEVNULL).stderr
    assert "-t needs a terminal" in refused
    assert "NAME=VALUE" in line.run("exec", "-e", "A", "web", "sh", status=2).stderr
    refused = line.run("exec", "machine", "sh", status=9).stderr
    assert "error: a vm has no exec" in refused
    assert "connection was lost" in line.run("exec", "hello/cut", "sh", status=11).stderr


def test_a_console_is_left_by_its_escape(line):
    with Terminal(line, "console", "machine") as terminal:
        terminal.expect(rb"Ctrl-\] leaves it.\s+machine login: ")
        terminal.type(b"a")
        terminal.expect(rb"\[a\]")
        terminal.type(b"\x03")
        terminal.expect(rb"\[\x03\]")
        terminal.type(b"b\x1dc")
        assert terminal.ended() == 0


def test_a_console_is_watched_without_a_terminal(line):
    process = line.popen(
        "console",
        "machine",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(15) == b"machine login: "
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_progress_on_a_terminal_has_bars(tmp_path):
    """With the real control plane: what is being done, and for how long."""
    line = CommandLine(tmp_path, {"TERM": "xterm"})
    file = line.manifest(start_ms=700)
    with control_plane(line), Terminal(line, "up", file) as terminal:
        terminal.expect(rb"environment/web: [^\r]*\d\.\d s")
        terminal.expect(rb"hello is up \(")
        terminal.expect(rb"supercloud down hello")
        assert terminal.ended() == 0


def test_an_error_on_a_terminal_is_coloured(tmp_path):
    with Terminal(CommandLine(tmp_path), "ps") as terminal:
        terminal.expect(rb"^\x1b\[1;31merror:\x1b\[0m the control plane is not running")
        assert terminal.ended() == 11


def test_progress_of_many_fits_on_a_screen(tmp_path):
    line = CommandLine(tmp_path, {"TERM": "xterm"})
    file = line.manifest(start_ms=500, replicas=10, memory="16MiB")
    with control_plane(line), Terminal(line, "up", file) as terminal:
        terminal.expect(rb"\d+ of \d\d steps so far")
        terminal.expect(rb"hello is up \(")
        assert terminal.ended() == 0


def test_ctrl_c_during_up_is_clean_and_the_work_goes_on(tmp_path):
    line = CommandLine(tmp_path, {"TERM": "xterm"})
    file = line.manifest(start_ms=20_000)
    with control_plane(line):
        with Terminal(line, "up", file) as terminal:
            terminal.expect(rb"environment/web: ")
            terminal.type(b"\x03")
            assert terminal.process.wait(60) == 130
            assert b"Traceback" not in terminal.seen
        wait_for(lambda: {row["state"] for row in line.json("ps")} == {"serving"}, 120)


def test_completion_in_a_real_shell(tmp_path):
    """bash offers commands, options, environments."""
    line = CommandLine(tmp_path)
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "supercloud").symlink_to(Path(sys.executable).with_name("supercloud"))
    line.extra["PATH"] = f"{bin_directory}:{os.environ['PATH']}"

    def completed(*words: str) -> list[str]:
        script = (
            'eval "$(supercloud completion bash)"; COMP_WORDS=(supercloud "$@");'
            "COMP_CWORD=$#; _supercloud; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words],
            env=line.environment, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        return done.stdout.split()

    with control_plane(line):
        line.run("up", line.manifest())
        assert completed("p") == ["plan", "ps"]
        assert completed("logs", "--f") == ["--follow"]
        assert completed("logs", "w") == ["web"]
        assert completed("logs", "-f", "hello/") == ["hello/other", "hello/web"]
        assert completed("logs", "--tail", "") == []
        assert completed("ps", "-u", "") == ["hello"]
        assert completed("down", "h") == ["hello"]
        assert completed("completion", "") == ["bash", "zsh", "fish"]
        assert completed("up", "he") == []
    assert completed("logs", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(tmp_path, shell):
    assert "supercloud _complete --" in CommandLine(tmp_path).run("completion", shell).stdout
