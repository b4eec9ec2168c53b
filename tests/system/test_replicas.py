"""A volume on two hosts: one is killed while an environment writes, which goes on on the other."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.slots import vm_slots
from support.stack import Host, Stack, stack, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(900)]

BODY = """\
volumes:
  - {{name: pages, size: 32MiB, replicas: 2}}
environments:
  - name: web
    kind: container
    image: oci:{examples}/web
    memory: 64MiB
    ports: [8080]
    volumes: [{{name: pages, path: /srv/pages}}]
platform: {{memory: 512MiB, scratch: 1GiB}}
"""
WRITER = "n=0; while :; do n=$((n+1)); echo $n >> /srv/pages/log && sync && echo $n || exit 1; done"
SYNCED = """\
dd if=/dev/zero of=/srv/pages/much bs=64k count=64 2>/dev/null
for n in $(seq 50); do echo $n > /srv/pages/one && sync || exit 1; done
"""
NOT_SYNCED = "dd if=/dev/urandom of=/srv/pages/much bs=4k count=1000 conv=notrunc oflag=direct"


class Kept:
    """The stack, its two hosts, and the U-Cloud ``kept``."""

    def __init__(self, made: Stack) -> None:
        self.stack = made

    def volume(self) -> dict[str, Any]:
        (row,) = self.stack.json("volumes")
        return dict(row)

    def web(self) -> dict[str, Any]:
        rows = self.stack.json("ps")
        return dict(rows[0]) if rows else {}

    def in_sync(self) -> bool:
        replicas = self.volume()["replicas"]
        return all(one["state"] == "in_sync" and one["connected"] for one in replicas)

    def sh(self, script: str, status: int | None = 0) -> str:
        done = self.stack.cli("exec", "kept/web", "--", "sh", "-c", script, status=status)
        return done.stdout


@pytest.fixture(scope="module")
def kept(product_images: Path, example_images: Path) -> Iterator[Kept]:
    with vm_slots(), stack(product_images, hosts=("east", "west")) as made:
        for host in made.hosts:
            made.enrol("kept", host, memory="1GiB", disk="4GiB")
        made.cli("up", made.manifest("kept", BODY.format(examples=example_images)))
        yield Kept(made)


def test_it_is_in_sync_on_both_hosts(kept: Kept) -> None:
    wait_for(kept.in_sync, 60, kept.stack.logs)
    volume = kept.volume()
    assert {one["host"] for one in volume["replicas"]} == {"east", "west"}
    assert [one["source"] for one in volume["replicas"]].count(True) == 1
    assert "2/2 in sync" in kept.stack.cli("volumes").stdout
    kept.sh("echo before > /srv/pages/first; sync")


def test_what_is_synced_is_flushed_and_what_is_not_is_not(kept: Kept) -> None:
    def figures() -> dict[str, int]:
        shown = kept.stack.json("volumes", "inspect", "kept/pages")["figures"]
        return {name: shown[name] for name in ("writes", "flushes")}

    # What is shown is up to some seconds old, and the kernel flushes when it likes: both are a few.
    before = figures()
    kept.sh(SYNCED)
    wait_for(lambda: figures()["flushes"] >= before["flushes"] + 50, 60, figures)
    before = figures()
    kept.sh(NOT_SYNCED)
    wait_for(lambda: figures()["writes"] >= before["writes"] + 1000, 60, figures)
    assert figures()["flushes"] < before["flushes"] + 500  # nothing is written through


def test_a_host_that_is_killed_under_load_loses_nothing_that_was_answered(kept: Kept) -> None:
    before = kept.web()["provider"]
    answered: list[int] = []
    writer = kept.stack.popen("exec", "kept/web", "--", "sh", "-c", WRITER, stdout=subprocess.PIPE)

    def listen() -> None:
        assert writer.stdout is not None
        for line in writer.stdout:
            answered.append(int(line))  # noqa: PERF401 - as they come

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    wait_for(lambda: len(answered) > 20, 120, kept.stack.logs)
    kill(kept.stack.hosts[before])
    wait_for(lambda: moved(kept, before), 240, kept.stack.logs)
    writer.kill()
    writer.wait()
    listening.join(30)
    written = [int(line) for line in kept.sh("cat /srv/pages/log").split()]
    assert written[: len(answered)] == answered
    assert kept.sh("cat /srv/pages/first").strip() == "before"
    kept.sh("echo after > /srv/pages/second; sync")
    states = {one["host"]: one["state"] for one in kept.volume()["replicas"]}
    assert states[before] == "stale"


def moved(kept: Kept, before: str) -> bool:
    web = kept.web()
    return bool(web and web["state"] == "serving" and web["provider"] != before)


def kill(host: Host) -> None:
    """As a power cut: all of it, at once."""
    pids = host.processes()
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in {*pids, *host.processes()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    assert host.process is not None
    host.process.wait()


def test_the_host_that_comes_back_gets_what_it_missed(kept: Kept) -> None:
    (lost,) = [host for host in kept.stack.hosts.values() if host.process.poll() is not None]  # type: ignore[union-attr]
    lost.start()
    wait_for(kept.in_sync, 120, kept.stack.logs)
    assert kept.web()["provider"] != lost.name
    assert kept.sh("cat /srv/pages/second").strip() == "after"
    kept.stack.cli("down", "kept", "--volumes")
