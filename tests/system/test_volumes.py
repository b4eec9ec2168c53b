"""Volumes from a manifest to files and disks in EEs: a real host, platform, services and agent.

The tests share one host and go on from each other, in the order of the file.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.console import typed
from support.search import shown
from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

SECRET = "what-nobody-else-may-read-" * 40
NAME = "a-file-that-nobody-else-may-name"
PAGE = f"/srv/pages/{NAME}"
RECORD = "nor-what-a-machine-has-written"
BODY = """\
environments:
  - name: web
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    ports: [8080]
    env: {{GREETING: {greeting}}}
    volumes: [{{name: pages, path: /srv/pages}}]
  - name: machine
    kind: vm
    image: '{examples}/vm'
    memory: 128MiB
    ports: [8080]
    volumes: [{{name: records}}]
{more}
volumes:
  - {{name: pages, size: {pages}}}
  - {{name: records, size: {records}, format: raw}}
"""
SECOND = """\
  - name: second
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    volumes: [{{name: copy, path: /srv/pages}}]
"""
COPIED = """\
  - {{name: copy, size: {pages}, clone: {{of: pages, snapshot: before}}}}
  - {{name: safe, size: {pages}, backup: {{of: pages}}}}
"""


class Stored:
    """The stack, its one host, and the U-Cloud ``stored``."""

    def __init__(self, made: Stack, examples: Path) -> None:
        self.stack, self.examples = made, examples
        self.host: Host = made.hosts["here"]
        self.pages, self.records, self.copies = "64MiB", "32MiB", False

    def up(self, *options: str, greeting: str = "hello", status: int | None = 0) -> str:
        body = BODY + (COPIED if self.copies else "")
        body = body.format(
            examples=self.examples,
            greeting=greeting,
            pages=self.pages,
            records=self.records,
            more=SECOND.format(examples=self.examples) if self.copies else "",
        )
        manifest = self.stack.manifest("stored", body)
        return self.stack.cli("up", manifest, *options, status=status).stdout

    def volumes(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.stack.json("volumes")}

    def sh(self, script: str) -> str:
        return self.stack.cli("exec", "stored/web", "--", "sh", "-c", script).stdout

    def record(self, moment: str, before: str = "true") -> str:
        """What the VM's disk begins with, as its shell reads it; after something else, if need be."""
        drop = "sync; echo 3 > /proc/sys/vm/drop_caches"
        line = f"{before}; {drop}; echo {moment}=$(head -c {len(RECORD)} /dev/vda)=$((1 + 1))"
        said = typed(self.stack, "stored/machine", line, f"{moment}=[^=$]*=2")
        return said.split("=")[1]

    def linked(self) -> bool:
        return self.stack.cli("exec", "stored/web", "--", "true", status=None).returncode == 0

    def shown(self) -> dict[bytes, list[str]]:
        """What its provider finds of what was written: on disks, in its store and its logs."""
        return shown(self.host.directory, [w.encode() for w in (SECRET[:40], NAME, RECORD)])

    def backings(self) -> list[Path]:
        return sorted(self.host.state.glob("domains/disk/*/volume:*"))


@pytest.fixture(scope="module")
def stored(product_images: Path, example_images: Path) -> Iterator[Stored]:
    with vm_slots(), stack(product_images) as made:
        made.enrol("stored", "here")
        shaped = Stored(made, example_images)
        shaped.up()
        yield shaped


def test_a_container_has_a_file_system_and_a_vm_a_disk(stored: Stored) -> None:
    assert "/srv/pages" in stored.sh("grep /srv/pages /proc/self/mountinfo")
    stored.sh(f"echo {SECRET} > {PAGE}; sync")
    rows = stored.volumes()
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(
        ("pages", "records"), "attached"
    )
    assert {row["mode"] for row in rows.values()} == {"vhost-user-blk"}
    assert stored.record("written", f"echo {RECORD} > /dev/vda") == RECORD


def test_inspect_says_how_it_is_joined_and_how_old_its_seal_is(stored: Stored) -> None:
    shown = stored.stack.cli("inspect", "stored/web").stdout
    assert "vhost-user-blk" in shown
    assert "pages" in shown


def test_what_was_written_outlives_the_environment(stored: Stored) -> None:
    stored.up(greeting="other")
    assert stored.sh(f"cat {PAGE}").strip() == SECRET


def test_the_providers_disk_has_none_of_it(stored: Stored) -> None:
    stored.sh("sync")
    assert len(stored.backings()) == 2
    assert stored.shown() == {}
    known = shown(stored.host.directory, [b"stored", b"volume:pages"])
    assert any("log" in name for name in known[b"stored"]), "logs are searched, too"
    assert any("domains/disk" in name for name in known[b"volume:pages"])


def test_a_snapshot_is_gone_back_to_while_nothing_uses_it(stored: Stored) -> None:
    stored.stack.cli("volumes", "snapshot", "stored/pages", "before")
    stored.sh(f"echo changed > {PAGE}; sync")
    assert "before" in stored.volumes()["pages"]["snapshots"]


def test_volumes_stay_while_the_users_domain_is_restarted(stored: Stored) -> None:
    os.kill(stored.host.pid_of("user:stored"), signal.SIGKILL)
    wait_for(stored.linked, 60)
    assert stored.volumes()["pages"]["state"] == "attached"
    assert stored.sh(f"cat {PAGE}").strip() == "changed"


def test_down_keeps_the_data_and_up_finds_it(stored: Stored) -> None:
    stored.stack.cli("down", "stored")
    rows = stored.volumes()
    assert {row["state"] for row in rows.values()} == {"kept"}
    stored.stack.cli("volumes", "revert", "stored/pages", "before")
    stored.up()
    assert stored.sh(f"cat {PAGE}").strip() == SECRET
    assert stored.record("kept") == RECORD


def test_it_grows_while_it_is_used_and_a_raw_one_once_it_is_not(stored: Stored) -> None:
    def used_since() -> float:
        (row,) = [r for r in stored.stack.json("ps") if r["name"] == "web"]
        return float(row["started_s"])

    def kib() -> int:
        return int(stored.sh("df -k /srv/pages | tail -n 1 | awk '{print $2}'"))

    since = used_since()
    stored.pages, stored.records = "128MiB", "48MiB"
    stored.up()
    wait_for(lambda: kib() > 90 << 10, 60, stored.stack.logs)
    stored.sh("head -c 80000000 /dev/zero > /srv/pages/more; sync; rm /srv/pages/more")
    assert stored.sh(f"cat {PAGE}").strip() == SECRET
    assert used_since() == since
    wait_for(lambda: "raw, and in use" in stored.volumes()["records"]["reason"], 60)
    stored.stack.cli("down", "stored")
    stored.up()
    wait_for(lambda: stored.volumes()["records"]["reason"] == "", 60)
    sizes = {
        path.name.split(":")[1].split(".")[0]: path.stat().st_size for path in stored.backings()
    }
    assert sizes["records"] > 48 << 20
    assert stored.record("grown") == RECORD
    assert stored.sh(f"cat {PAGE}").strip() == SECRET


def test_a_clone_and_a_backup_are_made_while_their_source_is_used(stored: Stored) -> None:
    stored.sh(f"echo newer > {PAGE}; sync")
    stored.copies = True
    stored.up()

    def second(script: str) -> str:
        return stored.stack.cli("exec", "stored/second", "--", "sh", "-c", script).stdout.strip()

    assert second(f"cat {PAGE}") == SECRET  # as it was, when the volume was smaller
    kib = "df -k /srv/pages | tail -n 1 | awk '{print $2}'"
    wait_for(lambda: int(second(kib)) > 90 << 10, 60, stored.stack.logs)  # it grows in use
    stored.sh(f"echo newest > {PAGE}; sync")
    done = stored.stack.cli("volumes", "backup", "stored/safe").stdout
    assert "has all that pages has" in done
    wait_for(lambda: stored.volumes()["safe"]["state"] == "kept", 60)
    assert stored.volumes()["pages"]["state"] == "attached"
    assert len(stored.backings()) == 4
    assert stored.shown() == {}, "nor in snapshots, clones and backups"
    stored.sh(f"echo {SECRET} > {PAGE}; sync")
    stored.copies = False
    stored.up()
    for name in ("copy", "safe"):
        stored.stack.cli("volumes", "delete", f"stored/{name}")


def test_a_disk_put_back_to_an_older_state_is_refused_until_its_user_accepts(
    stored: Stored, tmp_path: Path
) -> None:
    stored.stack.cli("down", "stored")
    (pages, _) = stored.backings()
    old = tmp_path / "old"
    old.write_bytes(pages.read_bytes())
    stored.up()
    stored.sh(f"echo newer > {PAGE}; sync")
    stored.stack.cli("down", "stored")
    pages.write_bytes(old.read_bytes())
    stored.up("--no-wait")
    wait_for(lambda: stored.volumes()["pages"]["state"] == "failed", 90, stored.stack.logs)
    row = stored.volumes()["pages"]
    assert "rolled back" in row["reason"]
    refused = stored.stack.cli("volumes", "accept", "stored/pages", status=None)
    assert refused.returncode != 0
    (root,) = re.findall(r"--root ([0-9a-f]+)", refused.stderr)
    stored.stack.cli("volumes", "accept", "stored/pages", "--root", root)
    stored.up()
    assert stored.sh(f"cat {PAGE}").strip() == SECRET


def test_down_with_volumes_leaves_nothing(stored: Stored) -> None:
    stored.stack.cli("down", "stored", "--volumes")
    assert stored.backings() == []
    assert stored.volumes() == {}
