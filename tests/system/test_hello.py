"""The example from nothing to nothing, through the real command lines, on a real host."""

import dataclasses
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.inventory import Inventory, inventory, uids_of
from support.slots import vm_slots
from support.stack import PORTS_EACH, Stack, stack

pytestmark = [pytest.mark.vm, pytest.mark.root]

HELLO = """\
environments:
  - {{name: web, kind: container, image: 'oci:{examples}/web', cpus: 0.5, memory: 64MiB, ports: [8080]}}
  - {{name: machine, kind: vm, image: '{examples}/vm', memory: 128MiB, ports: [8080]}}
"""


@pytest.fixture(scope="module")
def hello(product_images: Path, example_images: Path) -> Iterator[Stack]:
    with vm_slots(), stack(product_images) as made:
        made.enrol("hello", "here")
        file = made.manifest("hello", HELLO.format(examples=example_images))
        t = time.monotonic()
        print(made.cli("up", file).stdout, time.monotonic() - t)
        yield made


def urls(made: Stack) -> dict[str, str]:
    return {row["name"]: row["urls"][0] for row in made.json("ps")}


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_both_environments_answer(hello: Stack) -> None:
    found = urls(hello)
    print(found)
    assert "container" in get(found["web"])
    assert "vm" in get(found["machine"])
