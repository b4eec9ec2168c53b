"""The images run: the L1 image boots with all that an agent needs, the examples serve."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from supercloud.upper.environments.oci import convert
from supercloud.upper.platform.image import recipe
from supercloud.upper.platform.image.build import build
from supercloud.upper.platform.image.tools import ToolTree
from support import guest
from support.guest import Guest
from support.ports import free_port

ROOT = Path(__file__).parents[2]
TOOLS = ToolTree()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    build(out, product="l1", quiet=True)
    return out


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("examples")
    command = [sys.executable, ROOT / "examples/images/build.py", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


WHAT_AN_AGENT_NEEDS = """
check() { "$@" < /dev/null > /tmp/said 2>&1 || { echo "FAILED: $*"; cat /tmp/said; status=1; }; }
status=0
echo "KERNEL $(uname -r)"
for module in $(cat /guest/modules); do check modprobe $module; done
modprobe -a $(cat /guest/foreign)  # they load only where their hardware is
check test -c /dev/kvm
check test -c /dev/net/tun
check ip link add ee0 type bridge
check ip link add v0 type veth peer name v1
check ip link add wg0 type wireguard
check ip link add vx0 type vxlan id 7 dev lo dstport 4789
check nft add table inet t
check nft 'add chain inet t c { type nat hook postrouting priority 100; }'
check nft 'add rule inet t c masquerade'
check nft delete table inet t
check iptables-restore --version
check truncate -s 64M /tmp/disk
check losetup /dev/loop0 /tmp/disk
head -c 32 /dev/urandom > /tmp/key
check cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 256 --key-file /tmp/key \
    /dev/loop0 scratch
check /usr/sbin/mke2fs -q -t ext4 /dev/mapper/scratch
check mount /dev/mapper/scratch /mnt
check /usr/sbin/resize2fs /dev/mapper/scratch
for program in crun runc criu qemu-system-x86_64 qemu-img qemu-storage-daemon dnsmasq tar; do
    check $program --version
done
check criu check
check openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout /tmp/k \
    -subj /CN=x -out /tmp/csr
check python3 -I -S -B -c 'import asyncio, ssl, json'
mkdir -p /tmp/lower /tmp/data /tmp/work /tmp/bundle/rootfs
check mount -t erofs $(disk web) /tmp/lower
check mount -t tmpfs tmpfs /tmp/data
mkdir /tmp/data/up /tmp/data/work
check mount -t overlay -o lowerdir=/tmp/lower,upperdir=/tmp/data/up,workdir=/tmp/data/work \
    overlay /tmp/bundle/rootfs
cd /tmp/bundle
check crun spec
check python3 -I -S /guest/edit
crun --cgroup-manager=cgroupfs run -d web < /dev/null > /tmp/out 2>&1 || { cat /tmp/out; status=1; }
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    wget -q -O - http://127.0.0.1:8080/ && break
    sleep 0.3
done
cat /sys/fs/cgroup/web/memory.max
exit $status
"""

FOREIGN = (
    "kvm_intel",
    "ptp_kvm",
    "hv_netvsc",
    "hv_storvsc",
    "xen_blkfront",
    "xen_netfront",
)

EDIT_SPEC = b"""
import json
spec = json.load(open("/tmp/bundle/config.json"))
spec["process"] |= {"terminal": False, "args": ["/bin/serve"], "user": {"uid": 65534, "gid": 65534}}
spec["process"]["env"] = ["PATH=/usr/bin", "PORT=8080"]
spec["hostname"] = "in-a-container"
spec["root"]["readonly"] = False
spec["linux"]["cgroupsPath"] = "/web"
spec["linux"]["resources"]["memory"] = {"limit": 67108864}
spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "network"]
json.dump(spec, open("/tmp/bundle/config.json", "w"))
"""


@pytest.mark.vm
def test_the_l1_image_boots_with_all_that_an_agent_needs_and_runs_the_example_container(
    images: Path, examples: Path, tmp_path: Path, vm_lock: None
) -> None:
    web = convert(f"oci:{examples}/web", cache=tmp_path / "cache", tools=TOOLS)
    modules = [name for name in recipe.l1_modules() if name not in FOREIGN]
    files = {
        "modules": " ".join(modules).encode(),
        "foreign": " ".join(FOREIGN).encode(),
        "edit": EDIT_SPEC,
    }
    status, printed = guest.run(
        Guest(
            script=WHAT_AN_AGENT_NEEDS,
            disks={"web": web.path},
            files=files,
            images=images,
        ),
        timeout_s=200,
    )
    assert "FAILED" not in printed, printed
    assert status == 0, printed
    kernel = json.loads((images / "manifest.json").read_text())["kernel"]
    assert f"KERNEL {kernel}" in printed
    assert "hello from container in-a-container" in printed
    assert "67108864" in printed


@pytest.mark.vm
@pytest.mark.parametrize(
    ("machine", "device"), [("q35", "virtio-blk-pci,drive=d"), ("pc", "ide-hd,drive=d,bus=ide.0")]
)
def test_the_disk_boots_by_bios_to_the_agent(
    images: Path, tmp_path: Path, vm_lock: None, machine: str, device: str
) -> None:
    log, overlay = tmp_path / "serial", tmp_path / "disk.qcow2"
    backing = images / "l1.qcow2"
    TOOLS.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, overlay)
    blockdev = f"driver=qcow2,node-name=d,file.driver=file,file.filename={overlay}"
    command = [
        *TOOLS.argv("qemu-system-x86_64"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max", "-m", "1024M", "-M", machine),
        *("-serial", f"file:{log}", "-blockdev", blockdev, "-device", device),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            end_s = time.monotonic() + 90
            while not log.exists() or "l1init: up after" not in log.read_text(errors="replace"):
                assert process.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < end_s, log.read_text(errors="replace")
                time.sleep(0.2)
        finally:
            process.kill()


@pytest.mark.vm
def test_the_example_vm_takes_an_address_serves_and_powers_off_when_asked(
    examples: Path, tmp_path: Path, vm_lock: None
) -> None:
    vm, port = examples / "vm", free_port()
    image = json.loads((vm / "image.json").read_text())
    log, monitor = tmp_path / "serial", tmp_path / "monitor"
    command = [
        *TOOLS.argv("qemu-system-x86_64"),
        *guest.MACHINE,
        *("-m", "128M", "-kernel", vm / image["kernel"], "-initrd", vm / image["initrd"]),
        *("-append", image["append"], "-serial", f"file:{log}"),
        *("-monitor", f"unix:{monitor},server=on,wait=off"),
        *("-netdev", f"user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:8080"),
        *("-device", "virtio-net-pci,netdev=n"),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            assert page(port, process) == b"hello from vm vm\n", log.read_text()
            assert re.search(r"serving on 10\.0\.2\.15:8080 as vm after \d", log.read_text())
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(monitor))
                control.recv(4096)
                control.sendall(b"system_powerdown\n")
                process.wait(timeout=120)
        finally:
            process.kill()
    assert "Power down" in log.read_text()


def page(port: int, process: subprocess.Popen[bytes]) -> bytes:
    end_s = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
                return bytes(answer.read())
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.1)
