"""Checkpoints from a manifest: a container and a nested VM go back to what they were, by the CLI.

A real host, platform, agent and object store. The container's program has a hash chain in its
memory, writes each link to its layer, and adds its number to a list on a volume; the VM's shell
counts in a variable, in a file and on the disk of a volume. Their platform goes back with both. The
tests share one host and go on from each other, in this order.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.wire.checkpoints import BUCKET
from support.chain import chain, number
from support.console import typed
from support.search import shown
from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

PATTERN = "a-word-that-nobody-else-may-read"
MINE = "a-file-that-nobody-else-may-name"
READ_DISK = (
    "sync; echo 3 > /proc/sys/vm/drop_caches; echo is-$MEM-$(cat /tmp/f)-$(head -c 3 /dev/vda)"
)
BODY = """\
platform: {{memory: 1GiB, checkpoint: {{keep: 1}}}}
volumes: [{{name: links, size: 64MiB}}, {{name: blocks, size: 16MiB}}]
environments:
  - name: chain
    kind: container
    image: oci:{examples}/web
    command: [/bin/sh, -c, "WORD={word}; {chain}"]
    memory: 64MiB
    ports: [8080]
    volumes: [{{name: links, path: /links}}]
    checkpoint: {{keep: 2}}
  - name: machine
    kind: vm
    image: {examples}/vm
    memory: 128MiB
    ports: [8080]
    volumes: [{{name: blocks}}]
    checkpoint: {{keep: 1}}
"""


LAG_S = 10.0


class Kept:
    """The stack, its one host, and the U-Cloud ``kept``."""

    def __init__(self, made: Stack, examples: Path) -> None:
        self.stack, self.examples = made, examples
        self.host: Host = made.hosts["here"]

    def up(self) -> str:
        body = BODY.format(examples=self.examples, chain=chain("/links/all"), word=PATTERN)
        return self.stack.cli("up", self.stack.manifest("kept", body)).stdout

    def number(self) -> int:
        """How far the chain is, its link being the right one."""
        return number(self.stack, "kept/chain")

    def listed(self) -> int:
        """The last number on the volume; none is missing before it, and none there twice."""
        words = self.stack.cli("exec", "kept/chain", "--", "cat", "/links/all").stdout.split()
        assert words == [str(n) for n in range(1, len(words) + 1)], "memory and volume differ"
        return len(words)

    def snapshots(self, volume: str) -> list[str]:
        """What its snapshots are for."""
        view = self.stack.json("volumes", "inspect", f"kept/{volume}")
        assert sorted(view["purposes"]) == sorted(view["snapshots"])
        return sorted(view["purposes"].values())

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in self.stack.json("ps")}

    def of(self, name: str) -> dict[str, Any]:
        return dict(self.stack.json("checkpoints", f"kept/{name}"))

    def shell(self, line: str, until: str) -> str:
        """Type a line at the VM's console; what it says, to the match of ``until``."""
        return typed(self.stack, "kept/machine", line, until)

    def runs(self, line: str) -> None:
        """Have the VM's shell run a line to its end."""
        self.shell(f"{line}; echo done-$((1 + 1))", r"done-2")

    def has_the_time(self) -> bool:
        """Whether the VM's clock is not behind; it would be for as long as its checkpoint is old."""
        before_s = time.time()
        said = self.shell("echo at-$(date +%s)-", r"at-[0-9]+-")
        return int(said.split("-")[1]) > before_s - LAG_S / 2


@pytest.fixture(scope="module")
def kept(product_images: Path, example_images: Path) -> Iterator[Kept]:
    with vm_slots(), stack(product_images) as made:
        made.enrol("kept", "here")
        shaped = Kept(made, example_images)
        shaped.up()
        yield shaped


def test_a_container_goes_back_to_a_checkpoint_under_its_address(kept: Kept) -> None:
    before = kept.rows()["chain"]
    first = f"echo first > /tmp/{MINE}; echo {PATTERN} > /links/{MINE}; sync"
    kept.stack.cli("exec", "kept/chain", "--", "sh", "-c", first)
    said = kept.stack.cli("checkpoint", "kept/chain").stdout
    assert re.search(r"checkpoint 1, stood still for \d+ ms", said)
    at = kept.number()
    wait_for(lambda: kept.number() > at + 20, 60)
    later = f"echo second > /tmp/{MINE}; touch /tmp/new /links/new; sync"
    kept.stack.cli("exec", "kept/chain", "--", "sh", "-c", later)
    done = kept.stack.cli("restore", "kept/chain").stdout
    assert "is back at checkpoint 1" in done
    assert "its volumes (links): what was written to them since is lost" in done
    on_volume = kept.stack.cli("exec", "kept/chain", "--", "ls", "/links").stdout
    assert "new" not in on_volume, "the volume went back, too"
    assert kept.stack.cli("exec", "kept/chain", "--", "ls", "/tmp").stdout.split() == [
        MINE, "chain", "www",
    ]  # fmt: skip
    assert kept.stack.cli("exec", "kept/chain", "--", "cat", f"/tmp/{MINE}").stdout == "first\n"
    now, listed = kept.number(), kept.listed()
    wait_for(lambda: kept.number() > now, 60)  # it goes on, link by link
    wait_for(lambda: kept.listed() > listed, 60)
    after = kept.rows()["chain"]
    assert (after["address"], after["urls"]) == (before["address"], before["urls"])


def test_only_so_many_are_kept_and_an_older_one_can_be_chosen(kept: Kept) -> None:
    for _ in range(2):
        kept.stack.cli("checkpoint", "kept/chain")
    found = [item["number"] for item in kept.of("chain")["checkpoints"]]
    assert sorted(found) == [2, 3]
    wanted = ["checkpoint 2 of chain", "checkpoint 3 of chain"]
    wait_for(lambda: kept.snapshots("links") == wanted, 60)
    kept.stack.cli("exec", "kept/chain", "--", "sh", "-c", "touch /tmp/later")
    kept.stack.cli("restore", "kept/chain", "--checkpoint", "2")
    assert "later" not in kept.stack.cli("exec", "kept/chain", "--", "ls", "/tmp").stdout
    assert kept.listed()
    assert kept.snapshots("links") == wanted, "the later one stays"
    refused = kept.stack.cli("restore", "kept/chain", "--checkpoint", "1", status=None)
    assert refused.returncode != 0
    assert "1" in refused.stderr


def test_a_nested_machine_goes_back_with_its_memory(kept: Kept) -> None:
    kept.runs("MEM=kept-in-memory; echo one > /tmp/f; echo one > /dev/vda")
    kept.shell(READ_DISK, r"is-kept-in-memory-one-one")
    said = kept.stack.cli("checkpoint", "kept/machine").stdout
    assert "stood still for" in said
    kept.runs("MEM=changed; echo two > /tmp/f; echo two > /dev/vda")
    kept.shell(READ_DISK, r"is-changed-two-two")
    (one,) = kept.of("machine")["checkpoints"]
    wait_for(lambda: time.time() - one["taken_s"] > LAG_S, 2 * LAG_S)
    kept.stack.cli("restore", "kept/machine")
    kept.shell(READ_DISK, r"is-kept-in-memory-one-one")
    wait_for(kept.has_the_time, 60)
    wait_for(lambda: kept.rows()["machine"]["state"] == "serving", 60)
    assert one["memory_bytes"] > 0


def test_a_platform_goes_back_with_all_its_volumes_and_what_runs_in_it(kept: Kept) -> None:
    kept.runs("MEM=kept-in-memory; echo one > /tmp/f; echo one > /dev/vda")
    kept.shell(READ_DISK, r"is-kept-in-memory-one-one")
    before = kept.rows()
    platform = before["chain"]["platform"]
    said = kept.stack.cli("checkpoint", f"kept/{platform}").stdout
    assert "stood still for" in said
    listed = kept.listed()
    (one,) = kept.of(platform)["checkpoints"]
    assert set(one["snapshots"]) == {"links", "blocks"}
    wanted = f"checkpoint {one['number']} of {platform}"
    assert wanted in kept.snapshots("links")
    assert wanted in kept.snapshots("blocks")
    kept.runs("MEM=changed; echo two > /tmp/f; echo two > /dev/vda")
    kept.shell(READ_DISK, r"is-changed-two-two")
    kept.stack.cli("exec", "kept/chain", "--", "sh", "-c", "touch /links/later /tmp/later; sync")
    wait_for(lambda: kept.listed() > listed + 10, 120)
    done = kept.stack.cli("restore", f"kept/{platform}").stdout
    assert "its volumes (blocks, links): what was written to them since is lost" in done
    wait_for(lambda: kept.rows()["chain"]["state"] == "serving", 60)
    assert "later" not in kept.stack.cli("exec", "kept/chain", "--", "ls", "/links", "/tmp").stdout
    kept.shell(READ_DISK, r"is-kept-in-memory-one-one")
    now, listed = kept.number(), kept.listed()
    wait_for(lambda: kept.number() > now, 60)
    wait_for(lambda: kept.listed() > listed, 60)
    after = kept.rows()
    places = [{n: row["address"] for n, row in rows.items()} for rows in (before, after)]
    assert places[0] == places[1]


def test_the_provider_has_neither_what_was_in_memory_nor_names(kept: Kept) -> None:
    words = [PATTERN.encode(), MINE.encode(), b"kept-in-memory"]
    assert shown(kept.host.directory, words) == {}
    known = shown(kept.host.directory, [b"kept", b"volume:links"])
    assert any("log" in name for name in known[b"kept"]), "logs are searched, too"
    assert any("domains/disk" in name for name in known[b"volume:links"])
    store = kept.host.state / "domains" / "objects:kept"
    stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert stored > 1 << 20, "checkpoints are in what was searched"
    assert shown(store, [BUCKET.encode()]) == {}


def test_what_is_down_keeps_its_checkpoints_and_comes_back_from_one(kept: Kept) -> None:
    kept.stack.cli("exec", "kept/chain", "--", "sh", "-c", f"echo third > /tmp/{MINE}")
    kept.stack.cli("checkpoint", "kept/chain")
    number = kept.of("chain")["checkpoints"][0]["number"]
    said = kept.stack.cli("down", "kept").stdout
    assert "chain" in said
    kept.up()
    assert kept.stack.cli("exec", "kept/chain", "--", "ls", "/tmp").stdout.split() == [
        "chain", "www",
    ]  # fmt: skip
    kept.stack.cli("restore", "kept/chain", "--checkpoint", str(number))
    assert kept.stack.cli("exec", "kept/chain", "--", "cat", f"/tmp/{MINE}").stdout == "third\n"
    kept.stack.cli("down", "kept")
    kept.stack.cli("checkpoints", "delete", "kept/machine")
    left = [(row["of"], row["name"]) for row in kept.stack.json("checkpoints")]
    assert left[0] == ("environment", "chain")
    assert [of for of, _ in left[1:]] == ["platform"]
    kept.stack.cli("down", "kept", "--checkpoints")
    assert kept.stack.json("checkpoints") == []
