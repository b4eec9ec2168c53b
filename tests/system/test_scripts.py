"""``scripts/up`` and ``scripts/down`` as they are, in places of their own."""

import contextlib
import os
import pwd
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.upper.platform.image.tools import default_cache
from support.guardian import Guardian
from support.inventory import Inventory, inventory, machine, uids_of
from support.ports import free_port
from support.slots import vm_slots
from support.stack import HEADER, cpu_of_children_s, tail, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

ROOT = Path(__file__).parents[2]
BODY = """\
name: scripted
providers:
  - {{name: here, kind: lower_layer, endpoint: '127.0.0.1:{port}'}}
environments:
  - {{name: web, kind: container, image: 'oci:{examples}/web', memory: 64MiB, ports: [8080]}}
platform: {{memory: 512MiB, scratch: 1GiB}}
"""
QUICK_S = 8.0  # of a processor


class Scripts:
    """The scripts, and the places that they are told to use. ``before`` is before the first."""

    before: Inventory

    def __init__(self, top: Path) -> None:
        self.top, self.instance = top, f"scripts-{os.getpid()}"
        self.user = f"sc-{os.getpid()}"
        self.port = free_port()
        self.places = {
            "PREFIX": "opt", "BIN": "bin", "HOST_STATE": "host", "STATE": "state", "RUN": "run",
            "EXAMPLES": "examples",
        }  # fmt: skip
        self.manifest = top / "scripted.yaml"
        body = BODY.format(port=self.port, examples=top / "examples")
        self.manifest.write_text(HEADER + body)

    @property
    def environment(self) -> dict[str, str]:
        places = {f"SUPERCLOUD_{name}": str(self.top / of) for name, of in self.places.items()}
        return {
            **os.environ, **places,
            "SUPERCLOUD_INSTANCE": self.instance, "SUPERCLOUD_USER": self.user,
            "SUPERCLOUD_HOST_LISTEN": f"127.0.0.1:{self.port}",
            "SUPERCLOUD_LISTEN": f"127.0.0.1:{free_port()}",
        }  # fmt: skip

    def run(self, name: str, *words: str, status: int = 0) -> str:
        """A script; all that it prints."""
        done = subprocess.run(
            [str(ROOT / "scripts" / name), *words], env=self.environment, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=280, cwd=self.top,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + self.logs()
        return done.stdout

    def call(self, function: str) -> None:
        """A function of ``scripts/lib.sh``."""
        words = f". {ROOT}/scripts/lib.sh; {function}"
        subprocess.run(["bash", "-c", words], env=self.environment, check=True)

    def control(self) -> str:
        """The program that the control plane is."""
        pid = (self.top / "state/state/lock").read_text().strip()
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]

    def logs(self) -> str:
        """The end of what host and control plane wrote."""
        names = [
            "state/log/control.out",
            "state/state/control.log",
            f"host/{self.instance}/host.log",
        ]
        return "".join(
            f"== {name}\n{tail(self.top / name)}\n" for name in names if (self.top / name).exists()
        )

    def cli(self, *words: str) -> str:
        environment = {**self.environment, "SUPERCLOUD_SOCKET": str(self.top / "run/api.sock")}
        argv = [str(self.top / "bin/supercloud"), *words]
        return subprocess.run(
            argv, env=environment, capture_output=True, text=True, check=True
        ).stdout

    def inventory(self) -> Inventory:
        """Of the instance, its ports and, as processes, whatever runs under the user."""
        uids, mine = uids_of(self.instance), self.uid()
        return inventory(self.instance, [*uids, *mine], range(self.port, self.port + 1))

    def left(self) -> dict[str, list[str]]:
        return self.inventory().since(self.before)

    def uid(self) -> list[int]:
        with contextlib.suppress(KeyError):
            return [pwd.getpwnam(self.user).pw_uid]
        return []


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    guardian = Guardian()
    top = Path(tempfile.mkdtemp(prefix="supercloud-scripts-"))
    guardian.directory(top)
    top.chmod(0o755)
    made = Scripts(top)
    guardian.command(
        [
            "env",
            *(f"{k}={v}" for k, v in made.environment.items()),
            str(ROOT / "scripts/down"),
            "--purge",
        ]
    )
    _warm(top / "state/cache")
    try:
        with vm_slots():
            made.before = machine()
            yield made
    finally:
        guardian.close()


def _warm(cache: Path) -> None:
    """What the builder has fetched already is not fetched again; the files are only linked."""
    cache.mkdir(parents=True)
    subprocess.run(["cp", "-al", str(default_cache().parent), str(cache)], check=True)
    for directory, _, _ in os.walk(cache):
        os.chmod(directory, 0o777)


def test_up_from_nothing_to_a_page(scripts: Scripts) -> None:
    said = scripts.run("up", "scripted.yaml")
    assert "scripted is up" in said
    url = next(word for word in said.split() if word.startswith("http://"))
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.read() == b"hello from container web\n"
    assert scripts.cli("ls", "--quiet") == "scripted\n"


def test_up_again_is_quick_and_changes_nothing(scripts: Scripts) -> None:
    before, began_s = scripts.cli("ps", "--json"), cpu_of_children_s()
    said = scripts.run("up", str(scripts.manifest))
    took_s = cpu_of_children_s() - began_s
    assert "scripted: nothing to change" in said, said
    assert scripts.cli("ps", "--json") == before
    assert took_s < QUICK_S, said


def test_an_older_control_plane_is_replaced_by_the_installed_one(scripts: Scripts) -> None:
    current, older = scripts.top / "opt/current", scripts.top / "opt/older"
    subprocess.run(["cp", "-al", str(current.resolve()), str(older)], check=True)
    wanted = os.readlink(current)
    current.unlink()
    current.symlink_to("older")
    scripts.call("start_control")
    before = scripts.control()
    assert before == str(older / "bin/python")
    serving = scripts.cli("ps", "--json")
    said = scripts.run("up", "scripted.yaml")
    assert "scripted: nothing to change" in said
    assert scripts.control() == str(scripts.top / "opt" / wanted / "bin/python")
    assert scripts.cli("ps", "--json") == serving
    assert "the host still runs an older installation" not in said
    scripts.run("up", "scripted.yaml")
    assert not older.exists()


def test_a_step_that_fails_shows_why(scripts: Scripts) -> None:
    lost = scripts.top / "lost.yaml"
    lost.write_text(scripts.manifest.read_text().replace("scripted", "other"))
    lost.chmod(0o600)
    said = scripts.run("up", "lost.yaml", status=1)
    assert "✗ make the user" in said
    assert f"cannot read {lost}" in said


def test_down_leaves_nothing_running(scripts: Scripts) -> None:
    assert scripts.inventory().processes
    said = scripts.run("down")
    assert "✗" not in said
    wait_for(lambda: not scripts.left(), 60, lambda: str(scripts.left()))
    assert not (scripts.top / "run/api.sock").exists()
    assert (scripts.top / "state/state").is_dir()


def test_down_again_is_no_error(scripts: Scripts) -> None:
    scripts.run("down")
    assert not scripts.inventory().processes


def test_purge_removes_everything(scripts: Scripts) -> None:
    scripts.run("down", "--purge")
    left = {path.name for path in scripts.top.iterdir()} - {"examples"}
    assert left == {"scripted.yaml", "lost.yaml", "bin"}
    assert not list((scripts.top / "bin").iterdir())
    assert not scripts.uid()
    assert scripts.run("down") == "nothing is installed\n"
