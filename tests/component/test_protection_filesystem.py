"""A real file system under load on a protected device: a guest's ext4, as a platform has volumes.

Four processes write, write over, move and delete files. All that is left is compared by checksum,
and the file system checked: in the guest with cold caches, and out of the device as it is found
after its process was killed.
"""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from supercloud.services.protection.engine import Device, backing_bytes, format_device
from supercloud.wire.volumes import Seal
from support import guest
from support.protected_nbd import listening
from support.protection import KEY, NAME
from support.victim import Victim

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

DISK_BYTES = 96 << 20
WRITERS, ROUNDS = 4, 40
LOAD = """
import hashlib, os, random, sys
number, rounds = int(sys.argv[1]), int(sys.argv[2])
chance, place, kept = random.Random(number), f"/mnt/w{number}", {}
os.mkdir(place)

def write(name, whole):
    data = chance.randbytes(chance.choice((0, 1, 4095, 4096, 70_000, 300_000)))
    with open(f"{place}/{name}", "wb" if whole else "r+b") as file:
        file.write(data)
        file.flush()
        if chance.random() < 0.5:
            os.fsync(file.fileno())
    with open(f"{place}/{name}", "rb") as file:
        kept[name] = hashlib.file_digest(file, "sha256").hexdigest()

for turn in range(rounds):
    write(f"new{turn}", True)
    write(chance.choice(list(kept)), False)
    if turn % 4 == 1:
        old = chance.choice(list(kept))
        os.rename(f"{place}/{old}", f"{place}/moved{turn}")
        kept[f"moved{turn}"] = kept.pop(old)
    if turn % 4 == 3:
        gone = chance.choice(list(kept))
        os.unlink(f"{place}/{gone}")
        del kept[gone]
for name, digest in kept.items():
    print(f"{digest}  w{number}/{name}")
"""
SCRIPT = f"""
set -e
disk=$(disk data)
/usr/sbin/mke2fs -q -F -t ext4 -m 0 -E nodiscard $disk
mount -t ext4 -o discard $disk /mnt
for n in 1 2 3 4; do python3 /guest/load.py $n {ROUNDS} > /tmp/sums$n & all="$all $!"; done
for one in $all; do wait $one; done
busybox cat /tmp/sums? > /tmp/sums
sync
echo 3 > /proc/sys/vm/drop_caches
cd /mnt
busybox sha256sum -c /tmp/sums > /tmp/said || busybox grep -v ': OK' /tmp/said
cd /
umount /mnt
echo 3 > /proc/sys/vm/drop_caches
/usr/sbin/e2fsck -fn $disk
cat /tmp/sums
"""


def files_of(backing: int, seal: Seal, place: Path) -> dict[str, str]:
    """Checksums of all files of the file system on a device, which is checked."""
    image, files = place / "image", place / "files"
    device = Device(backing, KEY, NAME, seal)
    device.serve(device.next_epoch)
    try:
        with listening(device, place) as uri:
            run("nbdcopy", uri, str(image))
        assert not device.evidence()
    finally:
        device.close(commit=False)
    run("/usr/sbin/e2fsck", "-fn", str(image))
    files.mkdir()
    run("/usr/sbin/debugfs", "-R", f"rdump / {files}", str(image))
    return {
        str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files.rglob("*")
        if path.is_file()
    }


def run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)


def test_a_file_system_under_load_is_whole_and_so_is_every_file(
    tmp_path: Path, vm_lock: None
) -> None:
    backing = os.open(tmp_path / "backing", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(backing, backing_bytes(DISK_BYTES))
    seal = format_device(backing, KEY, NAME, DISK_BYTES)
    with Victim(backing, seal, tmp_path / "sock") as victim:
        path = f"server.type=unix,server.path={victim.path}"
        drive = f"driver=nbd,node-name=data,discard=unmap,{path}"
        disk = ("-blockdev", drive, "-device", "virtio-blk-pci,drive=data,serial=data")
        wish = guest.Guest(script=SCRIPT, files={"load.py": LOAD.encode()}, extra=disk)
        status, printed = guest.run(wish, timeout_s=500)
        assert status == 0, printed
        seal = victim.now()
    kept = re.findall(r"^([0-9a-f]{64})  (w\d/\w+)$", printed, re.MULTILINE)
    assert len(kept) > WRITERS * ROUNDS // 2, printed
    assert files_of(backing, seal, tmp_path) == {name: digest for digest, name in kept}
    os.close(backing)
