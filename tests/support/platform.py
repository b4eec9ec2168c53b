"""A real platform: the L1 image under QEMU, its agent linked to a real hub on loopback.

Beside the agent runs a root shell on the second serial port, for looking inside and for breaking
things; it comes with a second cpio archive behind the initrd, so the image is the shipped one.
"""

import asyncio
import contextlib
import hashlib
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from supercloud.control import bootdata
from supercloud.model.emulation import EMULATED_CPU
from supercloud.upper.environments.oci import convert
from supercloud.upper.environments.packing import pack
from supercloud.upper.platform.agent.qmp import Qmp
from supercloud.upper.platform.image.build import build
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.upper.platform.link.session import AgentSession
from supercloud.wire.messages import (
    Apply,
    Blob,
    EnvironmentSpec,
    EnvironmentStatus,
    Exec,
    ImageRef,
    Nic,
    PortMap,
    Process,
)
from supercloud.wire.peer import ConnectionLost
from supercloud.wire.places import VOLUME_SLOTS
from support.guest import BUILD, IMAGES, MACHINE, cpio
from support.link import Link
from support.ports import free_port
from support.slots import vm_slots

FIRST_PORT = 30080
PORTS = 4
# Writes "disk boots" to the first serial port, then waits for ever: the start of a raw disk.
BOOT_SECTOR = (
    bytes.fromhex("31c08ed8be157cbaf803ac84c07403eeebf8f4ebfd") + b"disk boots\r\n\0"
).ljust(510, b"\0") + b"\x55\xaa"
_LINK_NETWORK = "net=169.254.77.0/24,host=169.254.77.1,dns=169.254.77.3,dhcpstart=169.254.77.4"
_KERNEL_ARGUMENTS = (  # as the VMM has them
    "console=ttyS0 rdinit=/init panic=-1 quiet tsc=reliable no_timer_check noreplace-smp "
    "cryptomgr.notests rcupdate.rcu_expedited=1 i8042.noaux=1 i8042.nopnp=1"
)
_SHELL = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin HOME=/root PS1=
setsid sh -c "stty -echo -onlcr; cat | sh" < /dev/ttyS1 > /dev/ttyS1 2>&1 &
exec /usr/sbin/l1init
"""


def _root_ports() -> list[str]:
    """Free ones, as a host's machines have them."""
    numbers = range(1, VOLUME_SLOTS + 1)
    return [
        word for n in numbers
        for word in ("-device", f"pcie-root-port,id=free{n},chassis={n},slot={n}")
    ]  # fmt: skip


@dataclass
class Platform:
    """A booted platform. ``ports`` maps the platform's published ports to ours on 127.0.0.1."""

    directory: Path
    link: Link
    images: Path = IMAGES
    memory_mib: int = 1024
    cpu: str = EMULATED_CPU
    name: str = "p1"
    ports: dict[int, int] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    generation: int = 0
    examples: Path = BUILD / "examples"
    shell_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    shell_streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    # -- the machine

    def _initrd(self) -> Path:
        boot = resources.files("supercloud.upper.platform.image").joinpath("files/boot-init")
        text, last = boot.read_text(), "exec switch_root /newroot /usr/sbin/l1init"
        assert last in text
        text = text.replace(
            last, "cp -a /guest /newroot/guest\nexec switch_root /newroot /guest/run"
        )
        entries = {
            "guest": (0o040755, b""),
            "guest/run": (0o100755, _SHELL.encode()),
            "init": (0o100755, text.encode()),
        }
        path = self.directory / "initrd"
        path.write_bytes((self.images / "initrd").read_bytes() + cpio(entries))
        return path

    def _disks(self) -> list[str]:
        token = self.link.owner.expect(self.name)
        user = bootdata.user_data(
            self.link.ucloud, self.name, token, self.link.authority.root_pem,
            [f"169.254.77.1:{self.link.port}"],
        )  # fmt: skip
        config, scratch = self.directory / "config.iso", self.directory / "scratch"
        config.write_bytes(bootdata.config_iso(self.link.ucloud, self.name, user))
        with scratch.open("wb") as file:
            file.truncate(4 << 30)
        arguments = []
        for serial, path, more in (
            ("l1root", self.images / "root.erofs", ",read-only=on"),
            ("config", config, ",read-only=on"),
            ("scratch", scratch, ",discard=unmap"),
        ):
            file_node = f"driver=file,filename={path}"
            drive = f"driver=raw,node-name={serial}{more},file." + file_node.replace(",", ",file.")
            arguments += ["-blockdev", drive, "-device",
                          f"virtio-blk-pci,drive={serial},serial={serial}"]  # fmt: skip
        return arguments

    def argv(self) -> list[str]:
        self.ports = {FIRST_PORT + n: free_port() for n in range(PORTS)}
        forwards = "".join(
            f",hostfwd=tcp:127.0.0.1:{ours}-:{theirs}" for theirs, ours in self.ports.items()
        )
        return [
            *ToolTree().argv("qemu-system-x86_64"), *MACHINE, "-cpu", self.cpu,
            "-m", f"{self.memory_mib}M", "-smp", "1",
            "-kernel", str(self.images / "vmlinux"), "-initrd", str(self._initrd()),
            "-append", _KERNEL_ARGUMENTS,
            "-serial", f"file:{self.directory}/console",
            "-serial", f"unix:{self.directory}/shell,server=on,wait=off",
            *self._disks(),
            "-netdev", f"user,id=up{forwards}",
            "-device", "virtio-net-pci,netdev=up,mac=02:5c:00:00:00:01,romfile=",
            "-netdev", f"user,id=link,{_LINK_NETWORK}",
            "-device", "virtio-net-pci,netdev=link,mac=02:5c:77:00:00:01,romfile=",
            "-device", "virtio-rng-pci", *_root_ports(),
            "-qmp", f"unix:{self.directory}/qmp,server=on,wait=off",
        ]  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Platform"]:
        log = (self.directory / "qemu.log").open("wb")
        self.process = await asyncio.create_subprocess_exec(
            *self.argv(), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield self
        finally:
            log.close()
            if self.shell_streams is not None:
                self.shell_streams[1].close()
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()

    @property
    def console(self) -> str:
        return (self.directory / "console").read_text(errors="replace")

    async def session(self, timeout_s: float = 120) -> AgentSession:
        """The agent's session, when it has said hello."""
        async with asyncio.timeout(timeout_s):
            while self.name not in self.link.hub.sessions:
                assert self.process is not None
                assert self.process.returncode is None, self.console[-3000:]
                await asyncio.sleep(0.02)
        return self.link.hub.sessions[self.name]

    async def shell(self, command: str, timeout_s: float = 60) -> str:
        """What a command prints in the platform, run as its root."""
        mark = secrets.token_hex(8)
        async with self.shell_lock, asyncio.timeout(timeout_s):
            if self.shell_streams is None:
                path = f"{self.directory}/shell"
                self.shell_streams = await asyncio.open_unix_connection(path, limit=1 << 20)
            reader, writer = self.shell_streams
            writer.write(f"({command}) 2>&1; echo; echo {mark}\n".encode())
            reading = asyncio.ensure_future(reader.readuntil(mark.encode()))
            while not (await asyncio.wait({reading}, timeout=0.1))[0]:
                writer.write(b"\n")  # the emulated port sometimes keeps what came last to itself
            out = reading.result().decode(errors="replace")
        return out.rpartition(mark)[0].replace("\r", "").strip("\n")

    async def agent_pid(self) -> int:
        """The child of process 1 that is no orphan of somebody else."""
        loop = "for p in $(cat /proc/1/task/1/children); do echo $p $(cat /proc/$p/comm); done"
        found = [line.split() for line in (await self.shell(loop)).splitlines()]
        # of a child that has just ended cat says something else than a name
        return next(int(words[0]) for words in found if words[1:] == ["python3.13"])

    # -- its slots

    @contextlib.asynccontextmanager
    async def monitor(self) -> AsyncIterator[tuple[Qmp, asyncio.Queue[str]]]:
        """QEMU's monitor, and the devices that have gone since."""
        gone: asyncio.Queue[str] = asyncio.Queue()

        def event(name: str, data: dict[str, Any]) -> None:
            if name == "DEVICE_DELETED" and "device" in data:
                gone.put_nowait(data["device"])

        qmp = Qmp(event)
        await qmp.connect(f"{self.directory}/qmp")
        try:
            yield qmp, gone
        finally:
            qmp.close()

    async def plug(self, file: Path, slot: int, *, read_only: bool = False) -> None:
        """A disk into a free root port, with a serial that says nothing, as vhost-user-blk has."""
        name, given = f"disk{slot}", {"read-only": read_only, "discard": "unmap"}
        node = {"driver": "file", "filename": str(file), **given}
        async with self.monitor() as (qmp, _):
            await qmp.call("blockdev-add", **{"driver": "raw", "node-name": name, "file": node}
                           | given)  # fmt: skip
            await qmp.call("device_add", driver="virtio-blk-pci", drive=name, id=name,
                           bus=f"free{slot}", serial="vhost-user-blk")  # fmt: skip

    async def unplug(self, slot: int, timeout_s: float = 60) -> None:
        """Take it out; returns when the platform has let go."""
        name = f"disk{slot}"
        async with self.monitor() as (qmp, gone), asyncio.timeout(timeout_s):
            await qmp.call("device_del", id=name)
            while await gone.get() != name:
                pass
            await qmp.call("blockdev-del", **{"node-name": name})

    async def resize(self, slot: int, size_bytes: int) -> None:
        """Grow a disk that is plugged in."""
        async with self.monitor() as (qmp, _):
            await qmp.call("block_resize", **{"node-name": f"disk{slot}"}, size=size_bytes)

    # -- what it runs

    async def apply(self, *specs: EnvironmentSpec) -> None:
        self.generation += 1
        names = {s.name: [s.nics[0].address.partition("/")[0]] for s in specs if s.nics}
        wish = Apply(generation=self.generation, environments=list(specs), names=names)
        await self.asked(lambda session: session.apply(wish))

    async def status(self, name: str) -> EnvironmentStatus | None:
        report = await self.asked(lambda session: session.list())
        return next((e for e in report.environments if e.name == name), None)

    async def asked(self, what: Callable[[AgentSession], Awaitable[Any]]) -> Any:
        """The agent's answer; asked again, as its control plane does, when the link was lost."""
        while True:
            try:
                return await what(await self.session())
            except ConnectionLost:
                await asyncio.sleep(0.05)

    async def until(
        self, name: str, *states: str, timeout_s: float = 60, **fields: object
    ) -> EnvironmentStatus | None:
        """When the EE is in one of the states (``gone``: not there any more)."""
        found: EnvironmentStatus | None = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = await self.status(name)
                    state = found.state if found else "gone"
                    if state in states and all(
                        getattr(found, key) == value for key, value in fields.items()
                    ):
                        return found
                    await asyncio.sleep(0.2)  # each look costs the emulated processor a few ms
        except TimeoutError:
            raise AssertionError(
                f"{name} is {found}, not {states}\n{self.console[-3000:]}"
            ) from None

    async def http(self, host_port: int, timeout_s: float = 60) -> bytes:
        """What a GET of / at a published port answers."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[host_port])
            writer.write(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
            answer = await reader.read()
            writer.close()
        return answer

    async def execute(
        self, name: str, *argv: str, given: bytes = b"", **more: object
    ) -> tuple[int, bytes]:
        """Exit status and standard output (with a terminal: all output)."""
        session, out = await self.session(), b""
        async with session.exec(Exec(name=name, argv=list(argv), **more)) as stream:  # type: ignore[arg-type]
            if given:
                await stream.write(given)
            stream.signal(eof=True)
            async for chunk in stream.chunks():
                out += chunk
        return stream.trailer["exit_status"], out


def blob(owner_paths: dict[str, Path], path: Path) -> Blob:
    """A file that the hub serves from now on."""
    with path.open("rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    owner_paths[digest] = path
    return Blob(digest=digest, size_bytes=path.stat().st_size)


def examples(directory: Path) -> Path:
    """The example images; built (a second) where nobody has."""
    place = BUILD / "examples"
    if (place / "vm" / "kernel").exists() and (place / "web" / "index.json").exists():
        return place
    script = Path(__file__).parents[2] / "examples" / "images" / "build.py"
    subprocess.run([sys.executable, str(script), "--out", str(directory)], check=True)
    return directory


def nic(number: int, network: str = "default", third: int = 0) -> Nic:
    return Nic(
        network=network, address=f"10.64.{third}.{number}/24", gateway=f"10.64.{third}.1",
        mac=f"02:5e:0a:40:{third:02x}:{number:02x}",
    )  # fmt: skip


def web(platform: Platform, **changes: object) -> EnvironmentSpec:
    """The example container."""
    made = convert(
        f"oci:{platform.examples}/web", cache=platform.directory.parent / "erofs", tools=ToolTree()
    )
    config = made.config
    process = Process(
        argv=[*config.entrypoint, *config.cmd],
        env=dict(line.partition("=")[::2] for line in config.env),
        workdir=config.workdir, user=config.user,
    )  # fmt: skip
    root = blob(platform.link.owner.paths, made.path)
    values: dict[str, object] = {
        "name": "web", "uid": "web-1", "kind": "container", "cpus": 0.5,
        "memory_bytes": 64 << 20, "nics": [nic(10)],
        "image": ImageRef(format="erofs", blobs={"root": root}, process=process),
        "ports": [PortMap(port=8080, host_port=FIRST_PORT)],
    }  # fmt: skip
    return EnvironmentSpec(**{**values, **changes})  # type: ignore[arg-type]


def machine(platform: Platform, *, packed: bool = True, **changes: object) -> EnvironmentSpec:
    """The example VM; ``packed`` as the control plane hands it out."""
    paths = platform.link.owner.paths
    files = {role: platform.examples / "vm" / role for role in ("kernel", "initrd")}
    if packed:
        out = platform.directory / "vm.erofs"
        if not out.exists():
            pack(files, out, ToolTree())
        blobs = {"root": blob(paths, out)}
    else:
        blobs = {role: blob(paths, path) for role, path in files.items()}
    values: dict[str, object] = {
        "name": "machine", "uid": "machine-1", "kind": "vm", "cpus": 1.0,
        "memory_bytes": 128 << 20, "nics": [nic(11)],
        "image": ImageRef(format="kernel", blobs=blobs, append="console=ttyS0 quiet panic=-1"),
        "ports": [PortMap(port=8080, host_port=FIRST_PORT + 1)],
    }  # fmt: skip
    return EnvironmentSpec(**{**values, **changes})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def booted(
    directory: Path, *, memory_mib: int = 1024, cpu: str = EMULATED_CPU
) -> AsyncIterator[Platform]:
    """A platform of an image with the code as it is now, its agent connected; takes the VM lock."""
    images, machine_directory = directory / "images", directory / "machine"
    machine_directory.mkdir()
    await asyncio.to_thread(build, images, product="l1", quiet=True)
    link = Link(directory)
    with vm_slots():
        async with link.listening():
            platform = Platform(machine_directory, link, images, memory_mib, cpu)
            platform.examples = examples(directory / "examples")
            async with platform.running():
                await platform.session()
                yield platform
