"""Checkpoints of a platform: how long it stands still, and time and size against libvirt's.

The platform has 512 MiB and started from memory, on a host of ours; what it has written since
its base is printed beside each pause. libvirt's managed save is of the same L1 image under the same
emulation with as much memory; the machine stands still for all of that time, and is started from it
again between the rounds. libvirtd runs in namespaces of its own, with nothing of this machine's.
Ours is measured from the call until all of it is stored durably, compressed, encrypted, in the user's
object store over TLS; libvirt's until its plain file is written, which nobody has flushed. So the
two are not alike, and only the pause has a limit. ``--boot``: of a platform that was booted, whose
memory is copied while it runs, the pauses alone. Run as root; ``--no-libvirt`` where it is not installed (Debian's libvirt-daemon,
libvirt-daemon-driver-qemu, libvirt-clients, qemu-system-x86).
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from ab import Side, arguments, run

from supercloud.control import bootdata
from supercloud.providers.lower_layer.rendezvous import Rendezvous
from support.checkpoints import Checkpointing
from support.link import Link
from support.lower import ControlPlane, images, running_host
from support.slots import vm_slots

PAUSE_AT_MOST_MS = 50.0
DIRTY_BYTES = 8 << 20
MIB, GIB = 1 << 20, 1 << 30
SHAPE = {"memory_bytes": 512 * MIB, "scratch_bytes": GIB, "cpus": 1}
NAME = "p1"

CONFIGURATION = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
"""
DOMAIN = """
<domain type='qemu'>
  <name>bench</name>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{images}/vmlinuz</kernel>
    <initrd>{images}/initrd</initrd>
    <cmdline>console=ttyS0 panic=-1 quiet</cmdline>
  </os>
  <cpu mode='maximum'/>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{images}/root.erofs'/>
      <target dev='vda' bus='virtio'/><readonly/><serial>l1root</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{work}/config'/>
      <target dev='vdb' bus='virtio'/><serial>config</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{work}/scratch'/>
      <target dev='vdc' bus='virtio'/><serial>scratch</serial>
    </disk>
    <serial type='file'><source path='{work}/console'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""
# In mount, network and process namespaces of its own: every place that libvirtd writes to is private,
# and its users are known there only. What it saves goes to the disk that ours goes to.
SCRIPT = """
set -e
for place in /run /etc/libvirt /var/log/libvirt /var/cache/libvirt; do
  mkdir -p $place
  mount -t tmpfs private $place
done
mkdir -p /var/lib/libvirt {work}/lib
mount --bind {work}/lib /var/lib/libvirt
for file in passwd group; do
  cp /etc/$file /run/$file
done
echo libvirt-qemu:x:64055:64055::/:/bin/false >> /run/passwd
echo libvirt-qemu:x:64055: >> /run/group
for file in passwd group; do
  mount --bind /run/$file /etc/$file
done
cp {work}/qemu.conf /etc/libvirt/qemu.conf
ip link set lo up
/usr/sbin/libvirtd
"""


class Libvirt:
    """A libvirtd in mount and network namespaces of its own, with one machine."""

    def __init__(self, work: Path) -> None:
        self.work, self.sizes = work, list[int]()
        self.daemon: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator["Libvirt"]:
        for name, size in (("config", MIB), ("scratch", GIB)):
            with (self.work / name).open("wb") as file:
                file.truncate(size)
        (self.work / "qemu.conf").write_text(CONFIGURATION)
        (self.work / "bench.xml").write_text(DOMAIN.format(images=images(), work=self.work))
        script = SCRIPT.format(work=self.work)
        argv = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (self.work / "libvirtd.log").open("wb") as log:
            self.daemon = subprocess.Popen(
                [*argv, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._until(lambda: self._virsh("version", check=False).returncode == 0)
            self._virsh("define", f"{self.work}/bench.xml")
            self._virsh("start", "bench")
            self._until(lambda: b"l1init: up" in self._console())
            time.sleep(8)  # as long as the platform has
            yield self
        finally:
            self.daemon.kill()  # and with the first process of its namespace all others
            self.daemon.wait()

    def save(self) -> float:
        os.sync()
        started = time.perf_counter()
        self._virsh("managedsave", "bench")
        took = time.perf_counter() - started
        path = "/var/lib/libvirt/qemu/save/bench.save"
        self.sizes.append(int(self._inside("stat", "-c", "%s", path).stdout))
        self._virsh("start", "bench")
        time.sleep(1)
        return took

    def _console(self) -> bytes:
        path = self.work / "console"
        return path.read_bytes() if path.exists() else b""

    def _virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return self._inside("virsh", "-c", "qemu:///system", *words, check=check)

    def _inside(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        assert self.daemon is not None
        children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children")
        first = (children.read_text().split() or [str(self.daemon.pid)])[0]
        enter = ["nsenter", "-t", first, "--mount", "--net", "--pid"]
        return subprocess.run([*enter, *argv], check=check, capture_output=True, timeout=120)

    @staticmethod
    def _until(true: Any, timeout_s: float = 90) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline_s, "libvirt did not come up"
            time.sleep(0.2)


class Ours:
    """A platform on a host of ours, out of a template or booted, with a store."""

    def __init__(self, plane: ControlPlane, *, is_booted: bool = False) -> None:
        self.is_booted = is_booted
        self.plane, self.checkpoints = plane, Checkpointing(plane, capacity_bytes=6 * GIB)
        self.pauses: list[dict[str, Any]] = []
        self.sizes: dict[str, list[int]] = {"full": [], "incremental": []}

    async def prepare(self) -> None:
        await self.checkpoints.prepare()
        shape = {"image": await self.plane.image(), **SHAPE}
        while (
            not self.is_booted
            and (found := await self.plane.call("template.prepare", shape))["state"] != "ready"
        ):
            assert found["state"] == "making", found
            await asyncio.sleep(0.3)
        link = Link(self.plane.directory, self.plane.user)
        endpoints, token = ["169.254.77.1:7444"], link.owner.expect(NAME)
        ca_pem = self.plane.ca_pem
        data = bootdata.user_data(self.plane.user, NAME, token, ca_pem, endpoints)
        config = bootdata.config_iso(self.plane.user, NAME, data)
        parking = asyncio.ensure_future(Rendezvous(self.plane.dialer, link.hub.serve_relayed).run())
        made = await self.plane.create(NAME, config=config, **SHAPE)
        assert made["started_from"] == ("boot" if self.is_booted else "memory"), made
        while NAME not in link.hub.sessions:  # noqa: ASYNC110 -- a process of another's
            await asyncio.sleep(0.1)
        await asyncio.sleep(8)
        parking.cancel()
        await self.checkpoints.take(NAME)

    async def full(self) -> float:
        self.checkpoints.heads.pop(NAME, None)
        return await self._take("full")

    async def incremental(self) -> float:
        return await self._take("incremental")

    async def _take(self, kind: str) -> float:
        os.sync()
        started = time.perf_counter()
        taken = await self.checkpoints.take(NAME)
        took = time.perf_counter() - started
        assert taken["base"] == (kind == "full" or self.is_booted), taken
        self.sizes[kind].append(taken["new_bytes"])
        self.pauses.append(taken)
        return took

    async def pause(self) -> float:
        await self.incremental()
        return float(self.pauses[-1]["pause_ms"])


def show_pauses(pauses: list[dict[str, Any]]) -> int:
    """The pauses of increments; 0 when their median is what it may be."""
    over = [taken for taken in pauses if not taken["base"]] or pauses
    dirty = statistics.median(int(taken["details"]["captured_bytes"]) for taken in over)
    pause = statistics.median(taken["pause_ms"] for taken in over)
    quiet = statistics.median(float(taken["details"]["quiet_ms"]) for taken in over)
    worst = max(taken["pause_ms"] for taken in over)
    print(f"a platform of 512 MiB, {dirty / MIB:.1f} MiB captured, {len(over)} times: "
          f"it stood still for {pause:.1f} ms (at most {PAUSE_AT_MOST_MS:g}; worst {worst:.1f}), "
          f"what runs inside it for {quiet:.1f} ms")  # fmt: skip
    assert dirty >= DIRTY_BYTES, "less than the figure is about"
    return int(pause > PAUSE_AT_MOST_MS)


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--no-libvirt", action="store_true")
    parser.add_argument("--boot", action="store_true")
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = arguments(rounds=8)
    with (
        vm_slots(),
        tempfile.TemporaryDirectory(prefix="checkpoint-") as name,
        running_host(Path(name), "bench-checkpoint") as host,
        asyncio.Runner() as runner,
        contextlib.ExitStack() as stack,
    ):
        print(f"load {os.getloadavg()[0]:.1f}")
        plane = ControlPlane(Path(name), host, "demo")
        plane.enrol(cpu_permille=2000, memory_bytes=3 * GIB, disk_bytes=16 * GIB, vms=2)
        ours = Ours(plane, is_booted=own.boot)
        runner.run(ours.prepare())
        if own.boot:
            for _ in range(max(12, options.rounds)):
                runner.run(ours.pause())
            return show_pauses(ours.pauses)
        sides = [
            Side("ours, the whole", lambda: runner.run(ours.full())),
            Side("ours, what is dirty", lambda: runner.run(ours.incremental())),
        ]
        libvirt = None
        if not own.no_libvirt:
            assert shutil.which("virsh"), "libvirt is not installed"
            work = Path(name) / "libvirt"
            work.mkdir()
            libvirt = stack.enter_context(Libvirt(work).running())
            sides.insert(0, Side("libvirt's managed save", libvirt.save))
        status = run(
            "a checkpoint of a platform of 512 MiB, until it is stored", "s", sides, options
        )
        for kind, sizes in ours.sizes.items():
            print(f"ours, {kind}: grew the store by {statistics.median(sizes) / MIB:.1f} MiB")
        if libvirt is not None:
            print(f"libvirt's file: {statistics.median(libvirt.sizes) / MIB:.1f} MiB; its machine "
                  f"stood still for {sides[0].median * 1000:.0f} ms, and was ended")  # fmt: skip
        for _ in range(max(0, 12 - options.rounds)):
            runner.run(ours.pause())
        return max(status, show_pauses(ours.pauses))


if __name__ == "__main__":
    sys.exit(main())
