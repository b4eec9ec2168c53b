"""One U-Cloud over two hosts of two providers: where its environments run."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chain import chain, number
from support.console import typed
from support.inventory import inventory, uids_of
from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root]

BODY = """\
environments:
  - {{name: web, kind: container, image: 'oci:{examples}/web', memory: 32MiB, ports: [8080],
     replicas: 2, placement: {{spread: provider}}}}
  - {{name: western, kind: container, image: 'oci:{examples}/web', memory: 32MiB, ports: [8080],
     placement: {{region: region-west}}}}
  - {{name: eastern, kind: container, image: 'oci:{examples}/web', memory: 32MiB, ports: [8080],
     placement: {{provider: east}}}}
  - {{name: away, kind: container, image: 'oci:{examples}/web', memory: 32MiB,
     placement: {{anti_affinity: [eastern]}}}}
  - {{name: mover, kind: container, image: 'oci:{examples}/web', memory: 32MiB, ports: [8080],
     command: [/bin/sh, -c, "{chain}"], checkpoint: {{keep: 2}}}}
  - {{name: machine, kind: vm, image: '{examples}/vm', memory: 128MiB, ports: [8080],
     checkpoint: {{keep: 1}}}}
platform: {{memory: 768MiB, scratch: 1GiB}}
"""


def body(examples: Path) -> str:
    return BODY.format(examples=examples, chain=chain())


@pytest.fixture(scope="module")
def wide(product_images: Path, example_images: Path) -> Iterator[Stack]:
    with vm_slots(2), stack(product_images, hosts=("east", "west")) as made:
        for host in made.hosts:
            made.enrol("wide", host, memory="1GiB")
        made.cli("up", made.manifest("wide", body(example_images)))
        yield made


def rows(made: Stack) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in made.json("ps")}


def test_replicas_that_are_to_be_spread_are_at_both_providers(wide: Stack) -> None:
    assert {rows(wide)[name]["provider"] for name in ("web", "web-2")} == {"east", "west"}


def test_wishes_about_region_provider_and_company_are_met(wide: Stack) -> None:
    found = rows(wide)
    assert found["western"]["provider"] == "west"
    assert found["eastern"]["provider"] == "east"
    assert found["away"]["provider"] == "west"


def test_everything_serves_on_the_ports_of_its_own_host(wide: Stack) -> None:
    for row in rows(wide).values():
        assert row["state"] == ("serving" if row["urls"] else "running"), row
        host = wide.hosts[row["provider"]]
        assert all(int(url.rpartition(":")[2]) in host.ports for url in row["urls"])
        if row["kind"] == "container":
            said = wide.cli("exec", f"wide/{row['name']}", "--", "hostname").stdout
            assert said.strip() == row["name"]


def test_each_host_has_one_platform_and_books_it(wide: Stack) -> None:
    for host in wide.hosts.values():
        (user,) = host.json("user", "list")
        assert user["used"]["vms"] == 1
        assert user["used"]["memory_bytes"] >= 512 << 20


def test_a_container_goes_on_at_the_other_provider_under_its_address(wide: Stack) -> None:
    """Out of a checkpoint in the object store of one host, read by a platform of the other."""
    before, other = elsewhere(wide, "mover")
    wide.cli("exec", "wide/mover", "--", "sh", "-c", "echo kept > /tmp/mine")
    wait_for(lambda: number(wide, "wide/mover") > 50, 120)  # further than one that began anew
    kept = number(wide, "wide/mover")
    wide.cli("checkpoint", "wide/mover")
    wide.cli("exec", "wide/mover", "--", "sh", "-c", "echo changed > /tmp/mine")
    wide.cli("restore", "wide/mover", "--to", other)
    assert wide.cli("exec", "wide/mover", "--", "cat", "/tmp/mine").stdout == "kept\n"
    assert wide.cli("exec", "wide/mover", "--", "hostname").stdout == "mover\n"
    now = number(wide, "wide/mover")
    assert now >= kept, "out of its memory"
    wait_for(lambda: number(wide, "wide/mover") > now, 60)  # it goes on, link by link
    serves_at(wide, "mover", other, before["address"])
    wide.cli("checkpoint", "wide/mover")  # now into the store of the other host
    assert len(wide.json("checkpoints", "wide/mover")["checkpoints"]) == 2


def test_a_machine_goes_on_at_the_other_provider_with_its_memory(wide: Stack) -> None:
    def has(moment: str, value: str, before: str = "true") -> None:
        line = f"{before}; echo {moment}-$MEM-$(cat /tmp/f)-$((1 + 1))"
        typed(wide, "wide/machine", line, f"{moment}-{value}-{value}-2")

    before, other = elsewhere(wide, "machine")
    has("first", "one", "MEM=one; echo one > /tmp/f")
    wide.cli("checkpoint", "wide/machine")
    has("then", "two", "MEM=two; echo two > /tmp/f")
    wide.cli("restore", "wide/machine", "--to", other)
    has("now", "one")
    serves_at(wide, "machine", other, before["address"])


def elsewhere(wide: Stack, name: str) -> tuple[dict[str, Any], str]:
    """Its row, and the provider where it is not."""
    row = rows(wide)[name]
    return row, {"east": "west", "west": "east"}[row["provider"]]


def serves_at(wide: Stack, name: str, provider: str, address: str) -> None:
    """Under its address to the others, and to the world at a port of its new host."""
    wait_for(lambda: rows(wide)[name]["state"] == "serving", 120, wide.logs)
    row = rows(wide)[name]
    assert (row["provider"], row["address"]) == (provider, address)
    with urllib.request.urlopen(row["urls"][0], timeout=120) as answer:
        assert name in answer.read().decode()


def test_a_wish_that_cannot_be_met_is_refused_and_changes_nothing(
    wide: Stack, example_images: Path
) -> None:
    before = rows(wide)
    more = body(example_images).replace("replicas: 2", "replicas: 3")
    said = wide.cli("up", wide.manifest("wide", more), status=8).stderr
    assert "web" in said
    assert rows(wide) == before


def test_down_leaves_nothing_on_either_host(wide: Stack) -> None:
    wide.cli("down", "wide", "--checkpoints")
    for host in wide.hosts.values():
        (user,) = host.json("user", "list")
        assert not any(user["used"][name] for name in ("memory_bytes", "disk_bytes", "vms"))
        host.stop()
        wait_for(lambda h=host: not left(wide, h), 60, lambda h=host: str(left(wide, h)))


def left(made: Stack, host: Host) -> dict[str, list[str]]:
    return inventory(host.instance, uids_of(host.instance), host.ports).since(made.before)
