"""The control plane killed at real moments of a real ``up`` and ``down``, and a whole host killed.

One U-Cloud with one container; the tests go on from each other, in the order of the file.
"""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.inventory import Inventory, inventory, uids_of
from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

BODY = """\
environments:
  - {{name: web, kind: container, image: 'oci:{examples}/web', memory: 64MiB, ports: [8080]}}
platform: {{memory: 512MiB, scratch: 1GiB}}
"""
CONVERGES_S = 120.0
View = dict[str, Any]


class Crashing:
    """A stack and the manifest of the U-Cloud ``crash``."""

    def __init__(self, made: Stack, examples: Path) -> None:
        self.stack, self.host = made, made.hosts["here"]
        self.file = made.manifest("crash", BODY.format(examples=examples))
        self.before = self.inventory()

    def inventory(self) -> Inventory:
        host: Host = self.host
        return inventory(host.instance, uids_of(host.instance), host.ports)

    def view(self) -> View | None:
        """The U-Cloud, or None when there is none."""
        views = self.stack.json("ls")
        return views[0] if views else None

    def kill_control_when(self, moment: Callable[[View], bool]) -> None:
        """Wait for the moment, kill, start again."""
        wait_for(lambda: (view := self.view()) and moment(view), CONVERGES_S, self.stack.logs)
        self.stack.kill_control()
        self.stack.start_control()

    def serves(self) -> bool:
        view = self.view()
        return view is not None and view["state"] == "ready"

    def disks_made(self) -> int:
        log = (self.host.state / "log/disk.log").read_text()
        return len(re.findall(r"disk \S+ of crash: \d+ bytes", log))

    def in_use(self) -> dict[str, int]:
        (user,) = self.host.json("user", "list")
        return {key: user["used"][key] for key in ("vms", "memory_bytes", "disk_bytes")}


@pytest.fixture(scope="module")
def crashing(product_images: Path, example_images: Path) -> Iterator[Crashing]:
    with vm_slots(), stack(product_images) as made:
        made.enrol("crash", "here")
        yield Crashing(made, example_images)


def platform_is(*states: str) -> Callable[[View], bool]:
    return lambda view: bool({item["state"] for item in view["platforms"]} & {*states})


def environment_is(*states: str) -> Callable[[View], bool]:
    return lambda view: bool({item["state"] for item in view["environments"]} & {*states})


def test_up_converges_over_kills_of_the_control_plane(crashing: Crashing) -> None:
    crashing.stack.cli("up", "--no-wait", crashing.file)
    crashing.kill_control_when(lambda _: True)  # nothing but the wish is stored
    crashing.kill_control_when(platform_is("creating", "booting"))
    crashing.kill_control_when(platform_is("booting", "ready"))
    crashing.kill_control_when(platform_is("ready"))
    crashing.kill_control_when(environment_is("starting", "running", "serving"))
    wait_for(crashing.serves, CONVERGES_S, crashing.stack.logs)
    crashing.stack.cli("exec", "crash/web", "--", "true")


def test_nothing_was_made_twice(crashing: Crashing) -> None:
    assert crashing.disks_made() == 1
    assert crashing.in_use()["vms"] == 1
    events = crashing.stack.cli("events", "--ucloud", "crash").stdout
    assert "platform.failed" not in events
    assert events.count("agent.environment.starting") == 1


def test_up_again_while_the_control_plane_is_killed_is_borne_by_the_command(
    crashing: Crashing,
) -> None:
    changed = Path(crashing.file)
    changed.write_text(changed.read_text().replace("ports: [8080]", "ports: [8080], replicas: 2"))
    going = crashing.stack.popen("up", crashing.file)
    crashing.kill_control_when(lambda view: len(view["environments"]) == 2)
    assert going.wait(CONVERGES_S) == 0
    assert crashing.serves()


def test_a_killed_host_starts_again_and_the_control_plane_makes_its_platform_anew(
    crashing: Crashing,
) -> None:
    host = crashing.host
    assert host.process is not None
    os.kill(host.process.pid, signal.SIGKILL)
    host.process.wait()
    host.start()
    wait_for(lambda: not crashing.serves(), CONVERGES_S, crashing.stack.logs)
    wait_for(crashing.serves, CONVERGES_S, crashing.stack.logs)
    crashing.stack.cli("exec", "crash/web", "--", "true")
    assert crashing.disks_made() == 2, crashing.stack.cli("events").stdout + crashing.stack.logs()
    assert crashing.in_use()["vms"] == 1


def test_down_converges_over_kills_and_leaves_nothing(crashing: Crashing) -> None:
    crashing.stack.cli("down", "crash", "--no-wait")
    crashing.kill_control_when(lambda _: True)
    crashing.stack.kill_control()
    crashing.stack.start_control()
    wait_for(lambda: crashing.view() is None, CONVERGES_S, crashing.stack.logs)
    assert crashing.in_use() == {"vms": 0, "memory_bytes": 0, "disk_bytes": 0}
    wait_for(lambda: not crashing.inventory().since(crashing.before), 60, lambda: left(crashing))


def left(crashing: Crashing) -> str:
    return str(crashing.inventory().since(crashing.before))
