"""Attacks from inside the EEs of a booted platform, and what the engines around them may do."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from supercloud.model.errors import Invalid
from supercloud.wire.messages import Apply, EnvironmentSpec, Nic, PortMap
from support.platform import FIRST_PORT, Platform, booted, machine, nic, web

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(90, func_only=True),
    pytest.mark.asyncio(loop_scope="module"),
]

# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, NET_BIND_SERVICE (capability.h)
CAPABILITIES = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 10))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with booted(tmp_path_factory.mktemp("platform")) as made:
        await made.apply(
            web(made),
            web(made, name="near", uid="near-1", nics=[nic(20)], ports=[PortMap(port=8080)]),
            web(
                made,
                name="far",
                uid="far-1",
                nics=[nic(20, "other", 7)],
                ports=[PortMap(port=8080)],
            ),
            machine(made),
        )
        for name in ("web", "near", "far", "machine"):
            await made.until(name, "serving")
        yield made


async def inside(platform: Platform, text: str, user: str = "0") -> tuple[int, str]:
    """A shell script as the container's root: what a taken-over program can do."""
    status, out = await platform.execute("web", "sh", "-c", f"exec 2>&1; {text}", user=user)
    return status, out.decode(errors="replace")


async def field(platform: Platform, pid: int | str, name: str) -> list[str]:
    out = await platform.shell(f"grep ^{name}: /proc/{pid}/status")
    return out.split()[1:]


async def test_root_inside_is_nobody_outside(platform: Platform) -> None:
    bases = set()
    for name in ("web", "near"):
        pid = (await platform.status(name)).pid
        start = int((await platform.shell(f"cat /proc/{pid}/uid_map")).split()[1])
        bases.add(start)
        assert start >= 65536
        assert int((await field(platform, pid, "Uid"))[0]) == start + 65534, "the image's user"
    assert len(bases) == 2, "no two EEs share ids"
    status, out = await inside(platform, "cat /proc/self/uid_map; id -u")
    assert status == 0
    assert out.split()[0] == "0"
    assert out.split()[-1] == "0"


async def test_powers_of_a_container_are_few(platform: Platform) -> None:
    _, out = await inside(platform, "cat /proc/self/status")
    found = dict(line.split(":\t", 1) for line in out.splitlines() if ":\t" in line)
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert int(found[name], 16) == CAPABILITIES, name
    assert int(found["CapAmb"], 16) == 0
    assert found["NoNewPrivs"].strip() == "1"
    assert found["Seccomp"].strip() == "2"
    pid = (await platform.status("web")).pid
    assert int((await field(platform, pid, "CapEff"))[0], 16) == 0, "the image's user has none"


@pytest.mark.parametrize(
    "attack",
    [
        "busybox mount -t tmpfs none /tmp",
        "busybox mount -o remount,rw /proc/sys",
        "busybox umount /proc/kcore",
        "busybox unshare -U true",
        "busybox unshare -m true",
        "busybox nsenter -t 1 -m true",
        "busybox chroot / true",
        "busybox mknod /tmp/disk b 252 0",
        "busybox mknod /dev/kmsg2 c 1 11",
        "busybox dmesg",
        "busybox hostname attacker",
        "busybox date -s 2001-01-01; busybox date +%Y | grep -qx 2001",
        "busybox insmod /tmp/x.ko",
        "busybox swapoff -a && busybox swapon /tmp/x",
        "busybox reboot -f",
        "busybox pivot_root / /tmp",
        "busybox ip link set eth0 down",
        "busybox ip addr add 10.64.0.99/24 dev eth0",
        "busybox ping -c 1 -W 1 10.64.0.1 -I eth0",
        "echo b > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/kernel/core_pattern",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
        "echo 0 > /sys/fs/cgroup/cgroup.procs",
        "echo max > /sys/fs/cgroup/memory.max",
        "mkdir /sys/fs/cgroup/mine",
        "cat /proc/kcore | busybox head -c 1 | grep -q .",
        "cat /proc/1/environ /proc/keys | busybox grep -q keyring",
        "ls -A /sys/firmware | busybox grep -q .",
        "busybox hexdump -n 16 /dev/vda",
        "echo x > /etc/resolv.conf",
        "echo x > /etc/hosts",
    ],
)
async def test_attack_fails(platform: Platform, attack: str) -> None:
    status, out = await inside(platform, attack)
    assert status != 0, f"{attack}: {out}"


async def test_the_attacked_container_still_serves(platform: Platform) -> None:
    assert b"hello from container web" in await platform.http(FIRST_PORT)


async def test_a_container_sees_its_own_processes_and_cgroup_only(platform: Platform) -> None:
    _, out = await inside(
        platform, "ps; cat /proc/self/cgroup; ls /sys/fs/cgroup; cat /proc/mounts"
    )
    assert "python" not in out
    assert "qemu" not in out
    assert "0::/\n" in out
    assert "/run/supercloud" not in out.replace("/run/supercloud/ee/web-1", "")


@pytest.mark.parametrize(
    "target",
    [
        "169.254.77.1 {link}",  # the rendezvous
        "169.254.77.2 {link}",
        "169.254.169.254 80",  # where clouds keep their metadata
        "10.64.7.20 8080",  # an EE of another network
        "10.64.7.1 53",
        "127.0.0.1 {link}",
        "10.0.2.15 22",
    ],
)
async def test_no_way_to_the_link_the_metadata_or_another_network(
    platform: Platform, target: str
) -> None:
    where = target.format(link=platform.link.port)
    status, _ = await inside(platform, f"nc -w 2 {where} < /dev/null")
    assert status != 0, where


async def test_the_gateway_offers_dns_and_nothing_else(platform: Platform) -> None:
    status, _ = await inside(platform, "nc -w 2 10.64.0.1 53 < /dev/null")
    assert status == 0
    for port in (22, 80, 111, platform.link.port):
        status, _ = await inside(platform, f"nc -w 1 10.64.0.1 {port} < /dev/null")
        assert status != 0, port
    status, out = await inside(platform, "wget -q -O - http://near:8080/")
    assert (status, out) == (0, "hello from container near\n")


async def test_qemu_runs_without_any_power(platform: Platform) -> None:
    pid = (await platform.status("machine")).pid
    uid = int((await field(platform, pid, "Uid"))[0])
    assert uid >= 0x7000_0000
    assert set(await field(platform, pid, "Uid")) == {str(uid)}
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int((await field(platform, pid, name))[0], 16) == 0
    assert await field(platform, pid, "Seccomp") == ["2"]
    assert await field(platform, pid, "NoNewPrivs") == ["1"]
    out = await platform.shell(f"ls -l /proc/{pid}/fd; cat /proc/{pid}/cgroup")
    assert "/ee/machine-1" in out
    for private in ("identity", "desired", "web-1", "dm-0"):
        assert private not in out


async def test_qemus_uid_reaches_no_file_and_no_network(platform: Platform) -> None:
    program = f"""
import os, socket, json
os.setgroups([]); os.setgid(0x70000001); os.setuid(0x70000001)
said = {{}}
def attempt(name, what):
    try: what(); said[name] = "done"
    except OSError as error: said[name] = type(error).__name__
for path in ("/run/supercloud/desired.json", "/run/supercloud/identity/key.pem", "/dev/dm-0",
             "/var/lib/supercloud/blobs", "/run/supercloud/ee/web-1/state.json", "/dev/vda",
             "/var/lib/supercloud/ee/web-1/log/output", "/run/supercloud/ee/web-1/rootfs/etc/passwd"):
    attempt(path, lambda: os.listdir(path) if path.endswith("blobs") else open(path).read(1))
for to in (("169.254.77.1", {platform.link.port}), ("10.64.0.10", 8080), ("10.64.0.1", 53)):
    attempt(to[0], lambda: socket.create_connection(to, 2).close())
print(json.dumps(said))
"""
    lines = "\n".join(program.strip().splitlines())
    out = await platform.shell(f"python3.13 -I -S - <<'END'\n{lines}\nEND\n")
    said = json.loads(out.splitlines()[-1])
    assert len(said) == 11
    assert "done" not in said.values(), said


async def test_secrets_are_for_root_only(platform: Platform) -> None:
    out = await platform.shell(
        "stat -c '%a %u %n' /run/supercloud/identity/key.pem /run/supercloud/desired.json "
        "/run/supercloud/ee/*/state.json /run/supercloud/ee/*/config.json "
        "/run/supercloud/identity /var/lib/supercloud/blobs"
    )
    for line in out.splitlines():
        mode, owner, path = line.split()
        assert owner == "0", path
        assert int(mode, 8) & 0o077 == 0, path


async def test_scratch_holds_ciphertext(platform: Platform) -> None:
    await inside(platform, "echo PLAINTEXT-MARK-$((111*3)) > /tmp/secret; busybox sync")
    await platform.shell("sync")
    found = await asyncio.to_thread(
        search, platform.directory / "scratch", (b"PLAINTEXT-MARK-333", b"hello from container")
    )
    assert found > 1 << 20, "the disk is in use"


def search(path: Path, marks: tuple[bytes, ...]) -> int:
    """How many bytes of a sparse file are data; fails when a mark is in them."""
    size, at, tail = 0, 0, b""
    with path.open("rb") as file:
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return size
            data = os.pread(file.fileno(), 1 << 20, at)
            assert not any(mark in tail + data for mark in marks)
            at, size, tail = at + len(data), size + len(data), data[-64:]


def spec_with(platform: Platform, **changes: object) -> EnvironmentSpec:
    return web(
        platform, **{"name": "extra", "uid": "extra-1", "ports": [], "nics": [nic(77)], **changes}
    )


async def test_a_set_that_cannot_be_is_refused_before_any_effect(platform: Platform) -> None:
    session = await platform.session()
    before = await session.list()
    ok = web(platform)
    bad_sets = [
        [ok, spec_with(platform, name="web")],
        [ok, spec_with(platform, uid="web-1")],
        [ok, spec_with(platform, nics=[nic(10)])],
        [ok, spec_with(platform, ports=[PortMap(port=1, host_port=FIRST_PORT)])],
        [
            spec_with(
                platform,
                nics=[
                    Nic(
                        network="x",
                        address="10.64.0.9/24",
                        gateway="10.65.0.1",
                        mac="02:00:00:00:00:01",
                    )
                ],
            )
        ],
        [
            spec_with(
                platform,
                nics=[
                    Nic(
                        network="x",
                        address="10.64.0.1/24",
                        gateway="10.64.0.1",
                        mac="02:00:00:00:00:01",
                    )
                ],
            )
        ],
        [
            spec_with(
                platform,
                nics=[
                    Nic(
                        network="x",
                        address="nonsense",
                        gateway="10.64.0.1",
                        mac="02:00:00:00:00:01",
                    )
                ],
            )
        ],
        [
            spec_with(
                platform,
                nics=[
                    Nic(
                        network="x",
                        address="10.64.0.9/24",
                        gateway="10.64.0.1",
                        mac="x\ndhcp-script=/x",
                    )
                ],
            )
        ],
    ]
    for bad in bad_sets:
        with pytest.raises(Invalid):
            await session.apply(Apply(generation=99, environments=bad))
    after = await session.list()
    assert [e.uid for e in after.environments] == [e.uid for e in before.environments]
    assert after.generation == before.generation
