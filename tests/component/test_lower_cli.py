"""``supercloud-host`` as its users run it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.trust.authority import Root
from supercloud.wire import admin
from support.lower import RunningHost, images, running_host
from support.ports import free_port

pytestmark = pytest.mark.root
COMMAND = str(Path(sys.executable).parent / "supercloud-host")
NONE = f"t-none-{os.getpid()}"  # others may have one that is called `default`


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *words], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with running_host(tmp_path_factory.mktemp("cli"), "t-cli") as host:
        yield host
    shutil.rmtree(Path(admin.RUN, NONE), ignore_errors=True)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    Root.ensure(str(tmp_path))
    return tmp_path / "root.pem"


def test_users_are_added_shown_changed_and_removed(host: RunningHost, ca: Path) -> None:
    where = ("--instance", host.instance)
    quota = ("--cpus", "1.5", "--memory", "1GiB", "--disk", "2GiB", "--vms", "2")
    added = command("user", "add", "ann", *where, "--ca", str(ca), *quota, "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["quota"] == {
        "cpu_permille": 1500,
        "memory_bytes": 1 << 30,
        "disk_bytes": 2 << 30,
        "vms": 2,
    }
    shown = command("user", "list", *where)
    assert "ann" in shown.stdout
    assert "0 of 1GiB" in shown.stdout
    assert command("quota", "ann", *where, "--vms", "1").returncode == 0
    (row,) = json.loads(command("user", "list", *where, "--json").stdout)
    assert (row["quota"]["vms"], row["quota"]["memory_bytes"]) == (1, 1 << 30)
    (domain,) = json.loads(command("domains", *where, "--json").stdout)
    assert (domain["name"], domain["state"]) == ("user:ann", "running")
    assert command("user", "remove", "ann", *where).returncode == 0
    assert json.loads(command("user", "list", *where, "--json").stdout) == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("user", "remove", "nobody"), 3, "no user nobody"),
        (("user", "add", "ann", "--ca", "/nonexistent"), 3, "/nonexistent"),
        (("user", "add", "ann", "--ca", "/proc/version"), 2, "certificate"),
        (("quota", "ann"), 2, "nothing to change"),
        (("quota", "ann", "--memory", "lots"), 2, "size such as"),
        (("status", "--frobnicate"), 2, "No such option"),
    ],
)
def test_a_mistake_says_what_is_wrong(
    host: RunningHost, words: tuple[str, ...], status: int, said: str
) -> None:
    done = command(*words, "--instance", host.instance)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_json_when_json_is_asked_for(host: RunningHost) -> None:
    done = command("user", "remove", "nobody", "--instance", host.instance, "--json")
    assert json.loads(done.stderr)["error"]["code"] == "not_found"


def test_a_host_that_does_not_run_is_said_to_be_away() -> None:
    done = command("status", "--instance", "t-none")
    assert done.returncode == 10
    assert "does not answer" in done.stderr
    assert command("stop", "--instance", "t-none").returncode == 0


def test_status_and_drivers_tell_what_there_is(host: RunningHost) -> None:
    shown = command("status", "--instance", host.instance).stdout
    for said in (host.instance, "accelerator", "sha256:", "disk, uplink"):
        assert said in shown
    drivers = json.loads(command("drivers", "--instance", host.instance, "--json").stdout)
    assert [row["driver"] for row in drivers] == ["disk", "uplink"]


def test_run_and_stop_leave_nothing(tmp_path: Path) -> None:
    port = free_port()
    instance = f"t-run-{os.getpid()}"
    words = ("--instance", instance, "--state", str(tmp_path / "s"), "--images", str(images()))
    with subprocess.Popen(
        [COMMAND, "run", *words, "--listen", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        while not said.startswith("serving"):
            said = process.stdout.readline()
        assert said == f"serving {instance} on 127.0.0.1:{port}\n"
        assert Path(f"/proc/{process.pid}/comm").read_text().startswith("python")  # it became it
        done = command("stop", "--instance", instance, "--json")
        assert json.loads(done.stdout) == {"stopped": True}
        assert process.wait(60) == 0
    assert not Path(admin.RUN, instance).exists()
    groups = [d for d, _, _ in os.walk("/sys/fs/cgroup") if f"/supercloud/{instance}" in d]
    assert groups == []


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--images", "/nonexistent"), 3, "no images"),
        (("--images", "IMAGES", "--listen", "nowhere"), 2, "--listen"),
        (("--images", "IMAGES", "--listen", "127.0.0.1:99999"), 2, "--listen"),
        (("--images", "IMAGES", "--ports", "10-20"), 2, "--ports"),
        (("--images", "IMAGES", "--publish", "::1"), 2, "--publish"),
        (("--images", "IMAGES", "--region", "A B"), 2, "--region"),
        (("--images", "IMAGES", "--instance", "../x"), 2, "--instance"),
        (("--images", "IMAGES", "--listen", "192.0.2.1:7443"), 5, "cannot listen"),
    ],
)
def test_a_host_that_cannot_start_says_why(
    tmp_path: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    given = [str(images()) if word == "IMAGES" else word for word in words]
    done = command("run", "--instance", NONE, "--state", str(tmp_path / "s"), *given)
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_are_not_what_their_manifest_says_are_refused(tmp_path: Path) -> None:
    for path in images().iterdir():
        if path.is_file() and path.name != "initrd":
            os.symlink(path, tmp_path / path.name)
    (tmp_path / "initrd").write_bytes(b"evil")
    state = ("--state", str(tmp_path / "s"))
    done = command("run", "--instance", NONE, *state, "--images", str(tmp_path))
    assert done.returncode == 2
    assert "is not what its manifest says" in done.stderr
