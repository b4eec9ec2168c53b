"""A provider's disk that is full under running platforms: who writes waits, and nothing is lost.

The host's backing files lie on a small disk of their own.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.slots import vm_slots
from support.small_disk import SmallDisk, small_disk_at
from support.stack import Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(600)]

MIB = 1 << 20
WAIT_S = 120.0
BODY = """\
environments:
  - name: web
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    volumes: [{{name: pages, path: /srv/pages}}]
volumes:
  - {{name: pages, size: 256MiB}}
platform: {{scratch: 256MiB}}
"""


class Full:
    def __init__(self, made: Stack, disk: SmallDisk, manifest: str) -> None:
        self.stack, self.disk, self.manifest = made, disk, manifest

    def sh(self, script: str) -> str:
        return self.stack.cli("exec", "stored/web", "--", "sh", "-c", script).stdout

    def writes(self) -> "subprocess.Popen[bytes]":
        """Something in the EE that writes more than there is room for, durably."""
        script = "yes supercloud | head -c 100000000 > /srv/pages/much && sync && echo written"
        words = ("exec", "stored/web", "--", "sh", "-c", script)
        return self.stack.popen(*words, stdout=subprocess.PIPE)

    def codes(self) -> list[str]:
        lines = self.stack.cli("events", "--json").stdout.splitlines()
        return [json.loads(line)["code"] for line in lines]

    def volume(self) -> dict[str, Any]:
        (row,) = self.stack.json("volumes")
        return dict(row)

    def fill(self) -> None:
        """Of the scratch disk all is there by then: else the machine stands still for that."""
        for scratch in self.disk.path.glob("*/scratch:*"):
            with scratch.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, scratch.stat().st_size)
        self.disk.fill()

    def until_full(self, count: int) -> None:
        """It was told as often."""
        told = lambda: self.codes().count("control.volume.full") == count  # noqa: E731
        wait_for(told, WAIT_S, self.stack.logs)


@pytest.fixture(scope="module")
def full(product_images: Path, example_images: Path) -> Iterator[Full]:
    with vm_slots(), stack(product_images, hosts=()) as made:
        place = made.directory / "here" / "state" / "domains" / "disk"
        place.mkdir(parents=True, mode=0o711)
        disk = small_disk_at(place, 768 * MIB, made.guardian)
        made.add_host("here")
        made.enrol("stored", "here")
        manifest = made.manifest("stored", BODY.format(examples=example_images))
        made.cli("up", manifest)
        yield Full(made, disk, manifest)


def test_a_writer_waits_and_goes_on_when_the_provider_has_made_room(full: Full) -> None:
    full.sh("echo kept > /srv/pages/kept")
    full.fill()
    writer = full.writes()
    full.until_full(1)
    wait_for(lambda: "disk is full" in full.volume()["reason"], WAIT_S)
    assert full.volume()["state"] == "attached"
    refused = full.stack.cli("volumes", "snapshot", "stored/pages", "now", status=None)
    assert refused.returncode
    assert "disk is full" in refused.stdout + refused.stderr
    assert writer.poll() is None
    full.disk.make_room()
    said, _ = writer.communicate(timeout=WAIT_S)
    assert (writer.returncode, said) == (0, b"written\n")
    wait_for(lambda: "control.volume.room" in full.codes(), WAIT_S)
    wait_for(lambda: not full.volume()["reason"], WAIT_S)
    assert "control.volume.evidence" not in full.codes()
    assert full.volume()["evidence"] == 0
    wanted = hashlib.sha256((b"supercloud\n" * 10_000_000)[:100_000_000]).hexdigest()
    full.stack.cli("down", "stored")
    full.stack.cli("up", full.manifest)
    assert full.sh("sha256sum < /srv/pages/much").split()[0] == wanted
    assert full.sh("cat /srv/pages/kept") == "kept\n"


def test_down_ends_the_waiting_and_what_was_durable_is_there_afterwards(full: Full) -> None:
    full.fill()
    writer = full.writes()
    full.until_full(2)
    full.stack.cli("down", "stored")
    writer.communicate(timeout=WAIT_S)
    assert full.volume()["state"] == "kept"
    full.disk.make_room()
    full.stack.cli("up", full.manifest)
    assert full.sh("cat /srv/pages/kept") == "kept\n"
    assert "control.volume.evidence" not in full.codes()
