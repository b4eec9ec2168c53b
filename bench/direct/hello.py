"""What examples/hello.yaml asks for, started the direct way: QEMU and passt by hand, a script inside.

The same image, machine, mounts, namespaces and limits as ours; run as root. ``Direct.once`` gives the
seconds from nothing to both environments answering HTTP.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from supercloud.upper.environments.config import ImageConfig
from supercloud.upper.environments.oci import convert
from supercloud.upper.platform.agent import oci
from supercloud.upper.platform.agent.users import User
from supercloud.upper.platform.image.tools import ToolTree
from supercloud.wire.messages import EnvironmentSpec, ImageRef, Process
from support import guest

HERE = Path(__file__).parent
EXAMPLES = guest.BUILD / "examples"
PORTS = (21_900, 21_901)
MIB = 1 << 20


def answers(url: str) -> bool:
    """Whether a GET of the URL is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until_served(urls: list[str], timeout_s: float = 40.0) -> None:
    """Return when every URL has answered once; TimeoutError."""
    end = time.monotonic() + timeout_s
    for url in urls:
        while not answers(url):
            if time.monotonic() > end:
                raise TimeoutError(f"{url} does not answer")
            time.sleep(0.02)


class Direct:
    """Prepared once (images converted, as ours has them cached); ``once`` per run."""

    def __init__(self, work: Path, root: Path) -> None:
        self.work, self.root, self.tools = work, root, ToolTree()
        self._make_images()

    def _make_images(self) -> None:
        image = convert(f"oci:{EXAMPLES}/web", cache=self.work / "cache", tools=self.tools)
        tree = self.work / "images"
        tree.mkdir()
        os.link(image.path, tree / "web.erofs")
        for name in ("kernel", "initrd"):
            (tree / name).write_bytes((EXAMPLES / "vm" / name).read_bytes())
        self.images = self.work / "images.erofs"
        self.tools.run("mkfs.erofs", "--quiet", self.images, tree)
        script = (
            guest.PRELUDE
            + f"PORT_WEB={PORTS[0]} PORT_VM={PORTS[1]}\n"
            + (HERE / "hello.sh").read_text()
        )
        files = {name: (HERE / name).read_bytes() for name in ("udhcpc.sh", "dnsmasq.conf")}
        files["config.json"] = self._bundle(image.config)
        self.initrd = self.work / "initrd"
        self.initrd.write_bytes(guest.initrd(guest.Guest(script=script, files=files)))

    @staticmethod
    def _bundle(image: ImageConfig) -> bytes:
        """Our agent's own configuration, its namespaces made by crun instead of beforehand."""
        env = dict(line.split("=", 1) for line in image.env)
        process = Process(argv=[*image.entrypoint, *image.cmd], env=env)
        spec = EnvironmentSpec(
            name="web", uid="web", kind="container", cpus=0.5, memory_bytes=64 * MIB,
            image=ImageRef(format="erofs", blobs={}, process=process),
        )  # fmt: skip
        first = oci.first_process(spec, User(uid=0, gid=0, groups=[], home="/"))
        config = json.loads(oci.config(spec, first, root="rootfs", place="/guest", cgroup="/web"))
        config["linux"]["namespaces"] = [
            *({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "user")),
            {"type": "network", "path": "/run/netns/web"},
        ]
        mapping = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
        config["linux"] |= {"uidMappings": mapping, "gidMappings": mapping}
        del config["linux"]["sysctl"]  # the network namespace made by "ip netns" is not its own
        config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "bind"]
        return json.dumps(config).encode()

    def once(self) -> float:
        """Seconds from nothing to both serving; everything is gone afterwards."""
        scratch = self.work / "scratch"
        scratch.unlink(missing_ok=True)
        with scratch.open("wb") as file:
            file.truncate(4 << 30)
        started = time.monotonic()
        with self._running(scratch):
            wait_until_served([f"http://127.0.0.1:{port}/" for port in PORTS])
            return time.monotonic() - started

    @contextlib.contextmanager
    def _running(self, scratch: Path) -> Iterator[None]:
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            log = undo.enter_context((self.work / "direct.log").open("wb"))
            ports = f"127.0.0.1/{PORTS[0]}-{PORTS[1]}"
            passt = [*self._program("passt"), "--foreground", "--quiet", "--fd", str(ours.fileno()), "-t", ports,
                     "-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2", "--no-map-gw", "-4"]  # fmt: skip
            for command, end in ((passt, ours), (self._qemu(theirs.fileno(), scratch), theirs)):
                child = subprocess.Popen(
                    command, pass_fds=[end.fileno()],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
                end.close()
                undo.callback(child.wait)
                undo.callback(child.send_signal, signal.SIGKILL)
            yield

    def _program(self, name: str) -> list[str]:
        """A program of the runtime image, by the image's own loader."""
        libraries = f"{self.root}/usr/lib/x86_64-linux-gnu"
        loader = f"{self.root}/usr/lib64/ld-linux-x86-64.so.2"
        return [
            loader,
            "--inhibit-cache",
            "--library-path",
            libraries,
            f"{self.root}/usr/bin/{name}",
        ]

    def _qemu(self, netdev: int, scratch: Path) -> list[str]:
        command = [*self._program("qemu-system-x86_64"), *guest.MACHINE, "-m", "1024M", "-smp", "1",
                   "-L", f"{self.root}/usr/share/seabios", "-L", f"{self.root}/usr/share/qemu",
                   "-serial", f"file:{self.work}/console",
                   "-kernel", f"{self.work}/vmlinux", "-initrd", str(self.initrd),
                   "-append", "console=ttyS0 rdinit=/init panic=-1 quiet",
                   "-netdev", f"stream,id=up,server=off,addr.type=fd,addr.str={netdev}",
                   "-device", "virtio-net-pci,netdev=up,mac=02:5c:00:00:00:01,romfile=",
                   "-device", "virtio-rng-pci"]  # fmt: skip
        for serial, path, writable in (
            ("l1root", f"{self.work}/root.erofs", False), ("images", self.images, False), ("scratch", scratch, True),
        ):  # fmt: skip
            read_only = "off" if writable else "on"
            drive = f"driver=raw,node-name={serial},read-only={read_only},file.driver=file,file.filename={path}"
            command += [
                "-blockdev",
                drive,
                "-device",
                f"virtio-blk-pci,drive={serial},serial={serial}",
            ]
        return command


@contextlib.contextmanager
def prepared() -> Iterator[Direct]:
    """A ``Direct`` in a directory of its own. To be called in a private mount namespace."""
    with tempfile.TemporaryDirectory(prefix="direct-") as work, ExitStack() as undo:
        # Mounted elsewhere than in the directory that is removed with all that is in it.
        root = Path(tempfile.mkdtemp(prefix="direct-root-"))
        undo.callback(root.rmdir)
        undo.callback(_run, "umount", str(root))
        _run("mount", "-t", "erofs", "-o", "ro", str(guest.IMAGES / "runtime.erofs"), str(root))
        for name in ("vmlinux", "root.erofs"):
            shutil.copyfile(guest.IMAGES / name, Path(work) / name)
        yield Direct(Path(work), root)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    with prepared() as direct:
        for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1):
            try:
                print(f"{direct.once():.2f} s", flush=True)
            except TimeoutError as error:
                print(error, (direct.work / "console").read_text(errors="replace")[-3000:])
                print((direct.work / "direct.log").read_text()[-2000:])
