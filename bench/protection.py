"""The protection service against QEMU's LUKS driver, which authenticates nothing.

The same client (fio over NBD, one connection, a unix socket) against both in turns; both backing
files preallocated on the same file system and opened with O_DIRECT (``--cached``: through the page
cache), flushes from the client at the stated distance, and one at the end. LUKS is that of the
images' qemu-storage-daemon. Time for the same work: 1 MiB sequential at most 1/1.2 of LUKS's, 4 KiB
random at most 1/0.8.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ab

from supercloud.services.protection import engine
from supercloud.upper.platform.image.tools import ToolTree

SIZE = 512 << 20
SECRET = "0123456789abcdef"
# title, fio's arguments, how much of LUKS's time it may take
WORK = (
    ("write 1 MiB sequential, 4 deep, flush each 32 MiB", "write 1m 4 512m 32", 1 / 1.2),
    ("read 1 MiB sequential, 4 deep", "read 1m 4 512m 0", 1 / 1.2),
    ("write 4 KiB random, 32 deep, flush each 1 MiB", "randwrite 4k 32 64m 256", 1 / 0.8),
    ("read 4 KiB random, 32 deep", "randread 4k 32 64m 0", 1 / 0.8),
    ("write 4 KiB random, 1 deep, flush each 256 KiB", "randwrite 4k 1 16m 64", 1 / 0.8),
    ("read 4 KiB random, 1 deep", "randread 4k 1 16m 0", 1 / 0.8),
)


def serve(path: str, place: str, direct: bool) -> None:
    """Our side: a process that serves one device on a unix socket."""
    flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
    backing, key = os.open(path, flags, 0o600), os.urandom(32)
    os.posix_fallocate(backing, 0, engine.backing_bytes(SIZE))
    seal = engine.format_device(backing, key, "bench", SIZE)
    device = engine.Device(backing, key, "bench", seal)
    device.serve(device.next_epoch)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(8)
        while True:
            device.connect(listener.accept()[0].detach())


@contextlib.contextmanager
def running(command: list[str], place: Path) -> Iterator[str]:
    """The URI of a server that is up; it is ended afterwards."""
    server = subprocess.Popen(command)
    try:
        for _ in range(600):
            if place.exists():
                break
            time.sleep(0.1)
        yield f"nbd+unix:///?socket={place}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def luks(directory: Path, direct: bool) -> list[str]:
    """LUKS's side: the command that serves it."""
    tools, image = ToolTree(), str(directory / "luks")
    secret = f"secret,id=key,data={SECRET}"  # of no use after the run
    create = ["create", "-q", "--object", secret, "-f", "luks", "-o", "key-secret=key,iter-time=10"]
    command = [*tools.argv("qemu-img"), *create, "-o", "preallocation=falloc", image, str(SIZE)]
    for _ in range(5):  # it fails now and then on a busy machine: no CPU usage to be had
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            break
        Path(image).unlink(missing_ok=True)
    cache = "cache.direct=on" if direct else "cache.direct=off"
    return [
        *tools.argv("qemu-storage-daemon"), "--object", secret,
        "--blockdev", f"driver=file,node-name=file,filename={image},{cache}",
        "--blockdev", "driver=luks,node-name=plain,file=file,key-secret=key",
        "--nbd-server", f"addr.type=unix,addr.path={directory / 'luks.sock'}",
        "--export", "type=nbd,id=e,node-name=plain,name=,writable=on",
    ]  # fmt: skip


def fio(uri: str, work: str) -> float:
    """Seconds that the work took, by fio's own clock, the flush at the end included."""
    kind, block, depth, amount, distance = work.split()
    arguments = [
        "--name=work", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", f"--bs={block}",
        f"--iodepth={depth}", f"--size={SIZE}", f"--io_size={amount}", "--end_fsync=1",
        f"--fsync={distance}", "--randrepeat=0", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(["fio", *arguments], capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert not job["error"]
    return float(job["job_runtime"]) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--serve", nargs=2)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--directory", type=Path)
    own, rest = parser.parse_known_args()
    if own.serve:
        serve(*own.serve, direct=not own.cached)
    sys.argv[1:] = rest
    options = ab.arguments(rounds=7)
    with tempfile.TemporaryDirectory(dir=own.directory, prefix="protection-bench-") as name:
        place = Path(name)
        ours = [sys.executable, __file__, "--serve", str(place / "ours"), str(place / "ours.sock")]
        ours += ["--cached"] if own.cached else []
        with (
            running(luks(place, not own.cached), place / "luks.sock") as theirs,
            running(ours, place / "ours.sock") as mine,
        ):
            for uri in (theirs, mine):
                fio(uri, "write 1m 4 512m 0")
            worst = 0
            for title, work, at_most in WORK:
                sides = [
                    ab.Side("QEMU's LUKS", lambda work=work: fio(theirs, work)),
                    ab.Side("protection", lambda work=work: fio(mine, work), at_most),
                ]
                how = "page cache" if own.cached else "O_DIRECT"
                worst = max(worst, ab.run(f"{title}, {how}", "s", sides, options, warm_up=1))
    return worst


if __name__ == "__main__":
    sys.exit(main())
