"""A volume plugged into a running guest, by both ways, and out again."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supercloud.lower.vmm.disks import Disks
from supercloud.lower.vmm.machine import FREE_ROOT_PORTS
from supercloud.model.errors import BadState, NotFound
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.wire.portal import Reply, Request
from supercloud.wire.qmp import Qmp
from support import guest
from support.block import Bench, confined_by
from support.nbd import MIB
from support.slots import vm_slots
from support.small_disk import SmallDevice, small_disk

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(600)]

SECTOR = 512
MEMORY_MIB = 512
TEXT = b"supercloud\n"
# The guest knows its disks by size: each volume of the test has its own.
SCRIPT = """
disk_of() { for d in /sys/block/vd*; do
    [ "$(cat $d/size 2>/dev/null)" = "$1" ] && echo /dev/${d##*/}; done; }
appears() { until [ -n "$(disk_of $1)" ]; do sleep 0.1; done; }
for first in 65536 131072 163840 98304; do
    appears $first
    disk=$(disk_of $first)
    yes supercloud | head -c 1048576 | dd of=$disk bs=65536 seek=16 conv=fsync 2>/dev/null
    echo "GUEST-WROTE $first"
    size=$first
    while [ -e $disk ]; do
        now=$(cat /sys/block/${disk##*/}/size 2>/dev/null)
        if [ "${now:-$size}" -gt $size ]; then
            size=$now
            yes supercloud | dd of=$disk bs=512 count=64 seek=$((now - 64)) conv=fsync 2>/dev/null
            echo "GUEST-GREW $now"
        fi
        sleep 0.1
    done
    echo "GUEST-WITHOUT $first"
done
"""


class Machine:
    """A guest of ours with shared RAM and free root ports, and what its monitor does for disks."""

    def __init__(self, bench: Bench, place: Path) -> None:
        self.bench, self.told = bench, list[dict[str, Any]]()
        ours, theirs = socket.socketpair()
        wish = guest.Guest(
            script=f"{guest.PRELUDE}(\n{SCRIPT}\n) 2>&1; end $?\n",
            memory_mib=MEMORY_MIB,
            extra=self._extra(theirs.fileno()),
        )
        initrd = place / "initrd"
        initrd.write_bytes(guest.initrd(wish))
        self.console = place / "console"
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                [*confined_by("vmm"), *guest.argv(wish, initrd, ToolTree())],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self.qmp = Qmp(bench.reactor, ours, self._event, lambda: None)
        tell = lambda _method, status: self.told.append(dict(status))  # noqa: E731
        self.disks = Disks(bench.reactor, self.qmp, tell, ram_shared=True)
        self._greeted = False
        bench.until(lambda: self._greeted)

    @staticmethod
    def _extra(monitor: int) -> list[str]:
        ports = (
            ("-device", f"pcie-root-port,id=free{n},chassis={n + 1},slot={n + 1}")
            for n in range(FREE_ROOT_PORTS)
        )
        return [
            *("-object", f"memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on"),
            *("-machine", "memory-backend=ram"),
            *(word for port in ports for word in port),
            *("-chardev", f"socket,id=qmp,fd={monitor}", "-mon", "chardev=qmp,mode=control"),
        ]

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self._greeted = self._greeted or name == "GREETING"
        self.disks.on_qmp(name, data)

    def says(self, line: str) -> None:
        self.bench.until(lambda: line.encode() in self.console.read_bytes())

    def attach(self, volume: str, mode: str, slot: int = 0) -> dict[str, Any]:
        reply = self.bench.call(
            "volume.attach", volume=volume, machine="m", mode=mode, ram_shared=True
        )
        assert isinstance(reply, Reply)
        wish = {"volume": volume, "mode": mode, "export": reply.result["export"], "slot": slot}
        request = Request("test", "machine.attach", wish, reply.descriptors)
        try:
            return self.disks.attach(request)
        finally:
            for descriptor in request.descriptors:
                os.close(descriptor)

    def grow(self, volume: str, size_bytes: int) -> None:
        """As a user's domain has a disk by NBD grown."""
        self.disks.hold(Request("test", "machine.hold", {"volume": volume}))
        self.bench.call("volume.detach", volume=volume)
        self.bench.call("volume.grow", volume=volume, size_bytes=size_bytes)
        self.renew(volume)

    def renew(self, volume: str) -> None:
        mode = {"mode": "nbd", "ram_shared": False}
        reply = self.bench.call("volume.attach", volume=volume, machine="m", **mode)
        wish = {"volume": volume, "export": volume, "size_bytes": reply.result["size_bytes"]}
        request = Request("test", "machine.renew", wish, reply.descriptors)
        try:
            self.disks.renew(request)
        finally:
            for descriptor in request.descriptors:
                os.close(descriptor)

    def detach(self, volume: str) -> dict[str, Any]:
        """Ask until the guest has let go: early in its boot it does not listen."""
        for _ in range(20):
            self.disks.detach(Request("test", "machine.detach", {"volume": volume}))
            end_s = time.monotonic() + 10
            self.bench.until(lambda end_s=end_s: bool(self.told) or time.monotonic() > end_s)
            if self.told:
                break
        with contextlib.suppress(NotFound):  # its daemon was killed
            self.bench.call("volume.detach", volume=volume)
        return self.told.pop()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.qmp.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with vm_slots(), tempfile.TemporaryDirectory() as place:
        bench = Bench(tmp_path)
        try:
            made = Machine(bench, Path(place))
            try:
                yield made
            finally:
                made.close()
        finally:
            bench.close()


def holds_what_the_guest_wrote(bench: Bench, volume: str, end: int = 0) -> bool:
    """``end``: the sector at which it ends since it has grown."""
    wanted = (TEXT * (MIB // len(TEXT) + 1))[:MIB]
    last = bench.read(volume, (end - 64) * SECTOR, 64 * SECTOR) if end else wanted[: 64 * SECTOR]
    return bench.read(volume, MIB, MIB) == wanted and last == wanted[: 64 * SECTOR]


def test_a_volume_is_plugged_written_grown_and_pulled_out_by_both_ways(machine: Machine) -> None:
    bench = machine.bench
    bench.create("shared", 65536 * SECTOR)
    bench.create("private", 131072 * SECTOR)

    assert machine.attach("shared", "vhost-user-blk")["slot"] == 1
    machine.says("GUEST-WROTE 65536")
    bench.call("volume.grow", volume="shared", size_bytes=98304 * SECTOR)
    machine.says("GUEST-GREW 98304")  # at once, while it is attached
    assert machine.detach("shared") == {
        "volume": "shared",
        "slot": 1,
        "mode": "vhost-user-blk",
        "state": "detached",
    }
    machine.says("GUEST-WITHOUT 65536")
    assert holds_what_the_guest_wrote(bench, "shared", end=98304)

    assert machine.attach("private", "nbd", slot=FREE_ROOT_PORTS)["slot"] == FREE_ROOT_PORTS
    machine.says("GUEST-WROTE 131072")
    machine.grow("private", 147456 * SECTOR)
    machine.says("GUEST-GREW 147456")
    machine.grow("private", 147456 * SECTOR)  # done already is done
    with pytest.raises(BadState):
        machine.attach("shared", "vhost-user-blk", slot=FREE_ROOT_PORTS)
    with pytest.raises(BadState, match="not held"):
        machine.renew("private")
    machine.detach("private")
    machine.says("GUEST-WITHOUT 131072")
    assert holds_what_the_guest_wrote(bench, "private", end=147456)
    with pytest.raises(NotFound):
        machine.disks.detach(Request("test", "machine.detach", {"volume": "private"}))

    # the third one's device has no room at first: who writes waits, then goes on
    with small_disk(16 * MIB) as disk:
        device = SmallDevice(disk, 163840 * SECTOR)
        bench.devices["crowded"] = device
        bench.create("crowded", 163840 * SECTOR, format="raw")
        disk.fill()
        machine.attach("crowded", "nbd")
        bench.until(lambda: device.is_full)
        assert not machine.told
        disk.make_room()
        machine.says("GUEST-WROTE 163840")
        machine.detach("crowded")
        machine.says("GUEST-WITHOUT 163840")
        assert holds_what_the_guest_wrote(bench, "crowded")
        bench.call("volume.close", volume="crowded")
        bench.devices.pop("crowded").close()

    # a storage daemon is killed under the guest, which lets go of what is dead
    machine.attach("shared", "vhost-user-blk")
    machine.says("GUEST-WROTE 98304")
    bench.kill("shared")
    machine.detach("shared")
    bench.open("shared")
    assert holds_what_the_guest_wrote(bench, "shared")
    machine.says("GUEST-END 0")
