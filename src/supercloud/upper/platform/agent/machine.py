"""Nested VMs, by QEMU: an unprivileged process that is given descriptors and no path."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

from supercloud.model.errors import BadState, Invalid, Permanent, SupercloudError
from supercloud.upper.platform.agent import (
    cgroups,
    credentials,
    frozen_machine,
    hardware,
    spare_machine,
)
from supercloud.upper.platform.agent.accelerator import KVM_GROUP
from supercloud.upper.platform.agent.blobs import path_of
from supercloud.upper.platform.agent.console import Console
from supercloud.upper.platform.agent.container import remove_places
from supercloud.upper.platform.agent.engine import NotRestored, Places, Services, not_restored
from supercloud.upper.platform.agent.firewall import VM_UIDS
from supercloud.upper.platform.agent.guestport import DEVICES, GuestPort
from supercloud.upper.platform.agent.logs import Log
from supercloud.upper.platform.agent.namespaces import IDS_PER_ENVIRONMENT
from supercloud.upper.platform.agent.processes import Watched, run
from supercloud.upper.platform.agent.qcow2 import check_qcow2
from supercloud.upper.platform.agent.qmp import Qmp, shout
from supercloud.upper.platform.agent.rootfs import mount_image
from supercloud.upper.platform.agent.state import write_private
from supercloud.upper.platform.agent.volumes import Claim
from supercloud.wire.checkpoints import CheckpointTake, CheckpointTaken
from supercloud.wire.messages import EnvironmentSpec, VolumeUsage

ENGINE_BYTES = 192 << 20  # QEMU's own memory beside the guest's, with its translation cache
MAX_PIDS = 256
CONSOLE_TIMEOUT_S = 30.0
WAITING_TIMEOUT_S = 60.0
FIRST_VOLUME_FDSET = 3  # after an image's two
# What a kernel need not try in a virtual machine: a fifth of its boot under nested emulation.
# The image's own arguments come after these, and win.
QUICK_BOOT = (
    "tsc=reliable no_timer_check noreplace-smp cryptomgr.notests rcupdate.rcu_expedited=1 "
    "i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1 pci=lastbus=0"
)
log = logging.getLogger("supercloud.agent.machine")


class Machine:
    """An EE of kind vm."""

    def __init__(self, spec: EnvironmentSpec, services: Services, base_id: int) -> None:
        self.spec, self._services = spec, services
        self.uid = VM_UIDS[0] + base_id // IDS_PER_ENVIRONMENT
        self.places = Places(spec.uid)
        self.log: Log | None = None
        self.console: Console | None = None
        self.started_from = ""
        self._keeping: asyncio.Task[None] | None = None
        self._has_ended = False  # who did once does again, and is kept; a first start is quick
        self._port = GuestPort(f"{self.places.run}/identity")
        self._qmp: Qmp | None = None
        self._shut_down = False
        self._jobs: dict[str, asyncio.Future[dict[str, Any]]] = {}

    @property
    def name(self) -> str:
        """The engine with the accelerator that it really uses."""
        return f"qemu/{self._services.accelerator.name}"

    @property
    def _ram_bytes(self) -> int:
        return hardware.memory_mib(self.spec) << 20

    @property
    def disk(self) -> str:
        """The writable disk, over the image's."""
        return f"{self.places.layer}/disk.qcow2"

    @property
    def has_disk(self) -> bool:
        """Whether it has one of its own."""
        return "disk" in self.spec.image.blobs

    @property
    def image_path(self) -> str:
        """What its disk lies over."""
        return path_of(self.spec.image.blobs["disk"].digest)

    @property
    def qmp(self) -> Qmp:
        """Its control socket; BadState when it does not run."""
        if self._qmp is None:
            raise BadState(f"{self.spec.name} does not run")
        return self._qmp

    @staticmethod
    def check_disk(untrusted_head: bytes) -> None:
        """Invalid for a disk that names other files; its image's path is not looked at."""
        at = struct.pack(">QI", 0, 0)
        check_qcow2(untrusted_head[:8] + at + untrusted_head[20:])

    async def checkpoint(self, wanted: CheckpointTake, process: Watched) -> CheckpointTaken:
        """Take one while it runs."""
        if self._keeping:
            await asyncio.wait({self._keeping})
        return await frozen_machine.take(self, wanted, self._services, process)

    def refusal(self) -> str:
        """Why it cannot be checkpointed; empty if it can."""
        return ""

    def job_ended(self, job: str) -> Awaitable[dict[str, Any]]:
        """The event of the end of one of QEMU's jobs; asked for before it can have ended."""
        return self._jobs.setdefault(job, asyncio.get_running_loop().create_future())

    async def prepare(self) -> None:
        """Image here, writable disk made over it."""
        blobs, kind = self.spec.image.blobs, self.spec.image.format
        needed = {"kernel": {"kernel", "root"}, "qcow2": {"disk"}, "raw": {"disk"}}.get(kind, set())
        if not needed & blobs.keys():
            raise Invalid(f"a VM cannot run from a {kind} image of {', '.join(blobs) or 'nothing'}")
        await self._services.scratch.ready()
        found = await asyncio.gather(*(self._services.blobs.get(blob) for blob in blobs.values()))
        self.places.make()
        if "disk" in blobs and not os.path.exists(self.disk):
            await self._make_disk(dict(zip(blobs, found, strict=True))["disk"])
        await self._services.accelerator.probe()
        await self.resume()

    async def _make_disk(self, image: str) -> None:
        kind = self.spec.image.format
        with open(image, "rb") as file:
            size = check_qcow2(file.read(512)) if kind == "qcow2" else os.stat(image).st_size
        part = f"{self.disk}.part"
        # -u: the size is known, so nobody has to open the image, which is not ours to trust
        await run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", kind,
                  "-b", image, part, str(size))  # fmt: skip
        os.rename(part, self.disk)

    async def attach(self, waiting: Callable[[str], None]) -> None:
        """Its volumes are there, and nobody's but its."""
        if len({hardware.serial(mount.volume) for mount in self.spec.volumes}) < len(
            self.spec.volumes
        ):
            raise Invalid(f"two volumes begin with the same {hardware.SERIAL_BYTES} bytes",
                          hint="a VM knows them by these: name them otherwise")  # fmt: skip
        await self._services.volumes.claim(self, self.places.run, waiting)
        await self._services.volumes.settled(self.spec.uid)

    async def lost(self) -> None:
        """Absent when a volume goes; the guest is told when one grows."""
        await self._services.volumes.lost(self.spec.uid, self._grown)

    async def _grown(self, claim: Claim, size_bytes: int) -> None:
        if self._qmp:
            node = {"node-name": hardware.node(claim)}
            await self._qmp.call("block_resize", **node, size=size_bytes)

    async def returned(self) -> None:
        """When all its volumes can be had."""
        await self._services.volumes.returned(self)

    def usage(self) -> list[VolumeUsage]:
        """What is on its disks is the guest's."""
        return []

    async def resume(self) -> None:
        """Open log, console and, if QEMU runs, its control socket."""
        woken = os.path.exists(self._waiting)
        if woken:
            await self._wake()
        if self.log is None:
            self.log = Log(self.places.log)
        if self.console is None:
            self.console = Console(f"{self.places.run}/serial", self.log)
        with contextlib.suppress(SupercloudError):
            if self._qmp is None:
                await self._connect()
                if not woken:
                    await frozen_machine.recover(self.qmp)
            if self.spec.image.identity and not self._port.is_open:
                self._port.tell()  # it may not have heard the agent before us

    def tell(self) -> None:
        """The time, and a seed, once more: it stood still, or was restored with its platform."""
        if self.spec.image.identity and self._qmp:
            self._port.tell()

    # -- out of a template

    @property
    def _waiting(self) -> str:
        """There while it is stopped and waits for an identity."""
        return f"{self.places.run}/waiting"

    async def start_ahead(self, timeout_s: float) -> Watched:
        """Start it, and stop it where it waits for an identity; Temporary when it does not."""
        if "disk" in self.spec.image.blobs or not self.spec.image.identity:
            raise Invalid("it has a disk, or cannot be told who it is")
        self.places.make_run()
        await self._services.accelerator.probe()
        process = await self._spawn()
        await self._port.until_waiting(timeout_s)
        if self._qmp:
            await self._qmp.call("stop")
            self._qmp.close()
            self._qmp = None
        write_private(self._waiting, "")
        return process

    async def _wake(self) -> None:
        """It goes on as itself, at once; then there is time for its log, which is on scratch."""
        self._port.tell()
        self.started_from = "memory"
        await shout(f"{self.places.run}/qmp", "cont")
        os.unlink(self._waiting)
        await self._services.scratch.ready()
        self.places.make()

    async def _connect(self) -> None:
        if self._qmp:
            self._qmp.close()
        self._qmp = Qmp(self._event)
        await self._qmp.connect(f"{self.places.run}/qmp")

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._shut_down = bool(data.get("guest"))
        elif name == "BLOCK_JOB_COMPLETED" and (job := self._jobs.pop(str(data["device"]), None)):
            job.set_result(data)

    async def start(self) -> Watched:
        """Spawn QEMU; running when its control socket answers."""
        source = self._source()
        with ExitStack() as undo:
            ram = -1
            if self.spec.checkpoints or source != "boot":  # else as QEMU has it: quicker to boot
                ram = frozen_machine.make_ram(self._ram_bytes)
                undo.callback(os.close, ram)
            process = await self._spawn(source, ram)
            self.started_from = source
            if self._has_ended and source == "boot" and spare_machine.is_possible(self.spec):
                self._keeping = asyncio.ensure_future(self._keep_spare(process.pid))
            elif self.spec.image.identity:
                self._port.tell()
        return process

    def _source(self) -> str:
        """What it starts from: a checkpoint that it is to go on from, memory, or its image."""
        if frozen_machine.is_due(self):
            return "checkpoint"
        if not spare_machine.is_possible(self.spec):
            return "boot"
        return "memory" if self._services.spares.has(spare_machine.key_of(self)) else "boot"

    async def _keep_spare(self, pid: int) -> None:
        """For the next start, where it waits; then it is told, whatever came of that."""
        try:
            await self._port.until_waiting(WAITING_TIMEOUT_S)
            size_bytes = self._ram_bytes
            is_kept = await spare_machine.keep(self, self._services.spares, pid, size_bytes)
            log.info("%s %s for its next start", self.spec.name, "kept" if is_kept else "not kept")
        except (SupercloudError, OSError) as error:
            log.info("%s is not kept for its next start: %s", self.spec.name, error)
        finally:
            with contextlib.suppress(SupercloudError):
                self._port.tell()

    async def _spawn(self, source: str = "boot", ram: int = -1) -> Watched:
        await self._clear()
        launched_s = time.monotonic()
        self._shut_down = False
        with ExitStack() as undo:
            own: tuple[list[str], list[int]] = [], []
            if ram >= 0:  # first, as a checkpoint puts the disk in place
                own = await self._own_ram(undo, source, ram)
            arguments, descriptors = self._arguments(undo)
            error_file = undo.enter_context(open(f"{self.places.run}/qemu.log", "wb"))
            process = subprocess.Popen(  # noqa: ASYNC220 -- vfork and exec, a millisecond
                [*arguments, *own[0]],
                stdin=subprocess.DEVNULL, stdout=error_file, stderr=error_file,
                pass_fds=[*descriptors, *own[1]],
                user=self.uid, group=self.uid, extra_groups=[KVM_GROUP],
                start_new_session=True, cwd="/", env={"PATH": "/usr/bin"},
            )  # fmt: skip
            watched = Watched(process.pid, launched_s)
            process.returncode = 0  # Watched reaps it, the subprocess module must not
            cgroups.enter(self._group(), process.pid)
            try:
                await self._connect()
                if source != "boot":
                    await self._go_on(source)
            except BaseException as error:
                if source == "memory":  # it may be its fault: the next start is by its image
                    self._services.spares.drop(spare_machine.key_of(self))
                watched.send(signal.SIGKILL)
                await watched.ended_within(5.0)
                watched.close()
                if isinstance(error, SupercloudError):
                    lost = source == "checkpoint" and isinstance(error, Permanent)
                    failure = NotRestored if lost else Permanent
                    raise failure(self._complaint() or str(error)) from error
                raise
        return watched

    async def _go_on(self, source: str) -> None:
        """From the state that it has been given; nothing that it says is lost."""
        if self.console:
            async with asyncio.timeout(CONSOLE_TIMEOUT_S):
                await self.console.connected()
        await frozen_machine.load(self.qmp)
        if source == "checkpoint":
            frozen_machine.done(self)

    async def _own_ram(self, undo: ExitStack, source: str, ram: int) -> tuple[list[str], list[int]]:
        """QEMU's arguments for RAM in a memory file, filled if it is to go on from something."""
        arguments = frozen_machine.ram_arguments(ram, self._ram_bytes)
        if source == "boot":
            return arguments, [ram]
        self._group()
        if source == "memory":
            state = await spare_machine.fill(self, self._services.spares, ram)
        else:
            with not_restored():
                state = await frozen_machine.fetch(self, self._services.ucloud, ram)
        undo.callback(os.close, state)
        return [*arguments, *frozen_machine.incoming_arguments(state)], [ram, state]

    def _group(self) -> str:
        spec = self.spec
        return cgroups.make(
            spec.uid, memory_bytes=spec.memory_bytes + ENGINE_BYTES, cpus=spec.cpus,
            pids=MAX_PIDS,
        )  # fmt: skip

    def _complaint(self) -> str:
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"{self.places.run}/qemu.log", errors="replace") as file,
        ):
            return file.read()[-500:].strip()
        return ""

    def _arguments(self, undo: ExitStack) -> tuple[list[str], list[int]]:
        """QEMU's command line, and the descriptors that it refers to."""
        spec, descriptors = self.spec, list[int]()

        def give(descriptor: int) -> int:
            undo.callback(os.close, descriptor)
            descriptors.append(descriptor)
            return descriptor

        arguments = [*hardware.base(spec, self._services.accelerator.name)]
        sockets = ("qmp", "serial", *(["identity"] if spec.image.identity else []))
        for name in sockets:
            number = give(_listen(f"{self.places.run}/{name}"))
            arguments += ["-chardev", f"socket,id={name},fd={number},server=on,wait=off"]
        arguments += ["-mon", "chardev=qmp,mode=control", "-serial", "chardev:serial"]
        arguments += DEVICES if spec.image.identity else ()
        arguments += credentials.arguments(spec, give)
        arguments += self._boot(give)
        for index, claim in enumerate(self._services.volumes.of(spec.uid)):
            arguments += hardware.volume(claim, give, FIRST_VOLUME_FDSET + index)
        for index, nic in enumerate(spec.nics):
            tap = give(self._services.networks.open_tap(spec.uid, index, nic))
            arguments += ["-netdev", f"tap,id=net{index},fd={tap}", "-device",
                          f"virtio-net-pci,netdev=net{index},mac={nic.mac},romfile="]  # fmt: skip
        return arguments, descriptors

    def _kernel_files(self) -> dict[str, str]:
        """Kernel and initrd: blobs of their own, or files of one erofs image."""
        blobs = self.spec.image.blobs
        if "root" not in blobs:
            return {role: path_of(blob.digest) for role, blob in blobs.items()}
        place = mount_image(blobs["root"].digest)
        found = {role: f"{place}/{role}" for role in ("kernel", "initrd")}
        return {role: path for role, path in found.items() if os.path.isfile(path)}

    def _boot(self, give: Callable[[int], int]) -> list[str]:
        def opened(path: str, flags: int = os.O_RDONLY) -> int:
            return give(os.open(path, flags | os.O_CLOEXEC))

        blobs, arguments = self.spec.image.blobs, []
        if self.spec.image.format == "kernel":
            for role, path in self._kernel_files().items():
                arguments += [f"-{role}", f"/proc/self/fd/{opened(path)}"]
            append = self.spec.image.append or "console=ttyS0 quiet"
            return [*arguments, "-append", f"{QUICK_BOOT} {append}"]
        image, kind = opened(path_of(blobs["disk"].digest)), self.spec.image.format
        disk = opened(self.disk, os.O_RDWR)
        return [
            "-add-fd", f"fd={image},set=1", "-add-fd", f"fd={disk},set=2",
            "-blockdev", "driver=file,node-name=image-file,filename=/dev/fdset/1,read-only=on",
            "-blockdev", f"driver={kind},node-name=image,file=image-file,read-only=on",
            "-blockdev", "driver=file,node-name=disk-file,filename=/dev/fdset/2,discard=unmap",
            "-blockdev", "driver=qcow2,node-name=disk,file=disk-file,backing=image,discard=unmap",
            "-device", "virtio-blk-pci,drive=disk,serial=root",
        ]  # fmt: skip

    async def stop(self, process: Watched, grace_s: float) -> None:
        """The power button, then the plug."""
        with contextlib.suppress(SupercloudError):
            if self._qmp:
                await self._qmp.call("system_powerdown")
                if await process.ended_within(grace_s):
                    return
                await self._qmp.call("quit")
                if await process.ended_within(2.0):
                    return
        process.send(signal.SIGKILL)

    async def ended(self) -> None:
        """Close what led to QEMU, remove its cgroup, give back its volumes."""
        self._has_ended = True
        await self._clear()
        await self._services.volumes.release(self.spec.uid, self.places.run)

    async def _clear(self) -> None:
        if self._keeping:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None
        self._port.close()
        if self._qmp:
            self._qmp.close()
            self._qmp = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._waiting)
        await cgroups.remove(self.spec.uid)

    async def destroy(self) -> None:
        """Everything."""
        await self.ended()
        if self.console:
            self.console.close()
            self.console = None
        if self.log:
            self.log.close()
            self.log = None
        await asyncio.to_thread(remove_places, self.places)


def _listen(path: str) -> int:
    """A listening unix socket at ``path``; its descriptor, to be closed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(4)
    return listener.detach()
