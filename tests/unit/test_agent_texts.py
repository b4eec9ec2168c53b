"""What the agent writes for nft, dnsmasq and crun, and what it reads from strangers."""

import ipaddress
import json
import os
import struct
from pathlib import Path

import pytest

from supercloud.model.errors import Invalid
from supercloud.upper.platform.agent import (
    bootdata,
    firewall,
    logs,
    names,
    networks,
    oci,
    uplink,
    users,
)
from supercloud.upper.platform.agent.networks import Network
from supercloud.upper.platform.agent.qcow2 import check_qcow2
from supercloud.wire.messages import (
    Blob,
    EnvironmentSpec,
    ImageRef,
    Nic,
    ObjectAccess,
    Process,
)

BOOT = {
    "version": 1, "ucloud": "demo", "platform": "p1", "token": "t" * 64, "ca_pem": "pem",
    "server_name": "control.control.demo.supercloud.internal", "endpoints": ["169.254.77.1:7444"],
    "uplink": "dhcp", "later": "is ignored",
}  # fmt: skip


def nic(
    address: str = "10.64.0.10/24", network: str = "default", gateway: str = "10.64.0.1"
) -> Nic:
    return Nic(network=network, address=address, gateway=gateway, mac="02:00:00:00:00:0a")


def spec(**changes: object) -> EnvironmentSpec:
    root = Blob(digest="sha256:" + "a" * 64, size_bytes=1)
    values: dict[str, object] = {
        "name": "web", "uid": "web-1", "kind": "container", "nics": [nic()],
        "image": ImageRef(format="erofs", blobs={"root": root}, process=Process(argv=["/serve"])),
    }  # fmt: skip
    return EnvironmentSpec(**{**values, **changes})  # type: ignore[arg-type]


def network(number: int = 0) -> Network:
    gateway = ipaddress.IPv4Interface(f"10.64.{number}.1/24")
    return Network(f"net{number}", f"ee{number}", (gateway,))


# -- boot data


def test_boot_data_of_a_newer_control_plane_is_read() -> None:
    boot = bootdata.parse(json.dumps(BOOT).encode())
    assert (boot.ucloud, boot.endpoints) == ("demo", ["169.254.77.1:7444"])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"token": "short"}, {"endpoints": []}, {"endpoints": ["no port"]},
        {"server_name": "a b"}, {"ucloud": "../x"}, {"uplink": "static"}, {"platform": None},
    ],
)  # fmt: skip
def test_boot_data_that_is_wrong_is_refused_with_its_place(change: dict[str, object]) -> None:
    with pytest.raises(Invalid) as caught:
        bootdata.parse(json.dumps({**BOOT, **change}).encode())
    assert caught.value.where.startswith("boot data")


@pytest.mark.parametrize("junk", [b"", b"[]", b"[" * 100_000, b"x" * (2 << 20)])
def test_boot_data_that_is_no_json_object_is_refused(junk: bytes) -> None:
    with pytest.raises(Invalid):
        bootdata.parse(junk)


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        (b'{"hostname": "p1-x"}', "p1-x"),
        (b"junk", "d"),
        (b'{"hostname": "a b"}', "d"),
        (b"[]", "d"),
    ],
)
def test_host_name_is_taken_only_when_it_is_one(meta: bytes, name: str) -> None:
    assert bootdata.hostname(meta, "d") == name


# -- the firewall


def test_ruleset_publishes_ports_and_separates_networks() -> None:
    published = [
        firewall.Publication("tcp", 30001, "10.64.0.10", 80),
        firewall.Publication("udp", 30001, "10.64.1.10", 53),
    ]
    text, ports = firewall.ruleset("eth0", [network(1), network(0)], published)
    assert ports.splitlines() == [
        "flush map inet supercloud to_tcp",
        "flush map inet supercloud to_udp",
        "add element inet supercloud to_tcp { 30001 : 10.64.0.10 . 80 }",
        "add element inet supercloud to_udp { 30001 : 10.64.1.10 . 53 }",
    ]
    assert text == firewall.ruleset("eth0", [network(0), network(1)], []).frame
    assert 'iifname "ee0" oifname "ee0" accept' in text
    assert 'iifname "ee0" oifname "ee1"' not in text
    assert text.count("policy drop") == 2
    assert "ip saddr { 10.64.0.0/24, 10.64.1.0/24 }" in text
    assert 'iifname "ee0" ip daddr { 10.64.0.1 } ' in text


def test_ruleset_lets_those_who_use_buckets_to_their_store_only() -> None:
    store = firewall.StoreWay("eth1", ["10.64.0.10"])
    text = firewall.ruleset("eth0", [network(0), network(1)], [], store).frame
    who = 'iifname "ee*" ip saddr { 10.64.0.10 }'
    assert f"{who} ip daddr {{ 10.64.0.1, 10.64.1.1 }} tcp dport 9000 dnat ip to" in text
    through = f'{who} oifname "eth1" ip daddr 169.254.77.1 tcp dport 7445 ct status dnat accept'
    assert through in text
    assert text.count('oifname "eth1"') == 2
    for nobody in (None, firewall.StoreWay("eth1", [])):
        text = firewall.ruleset("eth0", [network(0)], [], nobody).frame
        assert "7445" not in text
        assert "eth1" not in text


def test_ruleset_without_networks_is_complete() -> None:
    text = firewall.ruleset("eth0", [], []).frame
    assert "masquerade" not in text
    assert text.count("{") == text.count("}")


# -- networks


def test_overlapping_networks_and_two_gateways_are_refused() -> None:
    with pytest.raises(Invalid, match="overlap"):
        networks.gateways([
            spec(nics=[nic()]), spec(nics=[nic("10.64.0.20/25", "other", "10.64.0.2")]),
        ])  # fmt: skip
    with pytest.raises(Invalid, match="two gateways"):
        networks.gateways([spec(nics=[nic()]), spec(nics=[nic(gateway="10.64.0.2")])])


def test_an_ee_from_another_platform_keeps_its_gateway() -> None:
    """It was restored here: the bridge has both addresses, and answers DHCP and DNS at both."""
    moved = spec(uid="moved", nics=[nic("10.64.7.9/24", gateway="10.64.7.1")])
    found = networks.gateways([spec(nics=[nic()]), moved])["default"]
    assert [str(gateway) for gateway in found] == ["10.64.0.1/24", "10.64.7.1/24"]
    both = Network("default", "ee0", found)
    text = firewall.ruleset("eth0", [both], []).frame
    assert 'iifname "ee0" ip daddr { 10.64.0.1, 10.64.7.1 } ' in text
    assert "ip saddr { 10.64.0.0/24, 10.64.7.0/24 }" in text
    assert "option:router,10.64.7.1\n" in names.configuration([both])


def test_device_names_fit_and_differ() -> None:
    made = {networks.device_name("ve", uid, n) for uid in ("a" * 63, "a" * 62) for n in range(3)}
    assert len(made) == 6
    assert all(len(name) <= 15 for name in made)


# -- DNS and DHCP


def test_hosts_leave_out_what_is_no_name_or_address() -> None:
    text = names.hosts({"web": ["10.64.0.10", "x\n1.2.3.4 bank"], "a b": ["10.64.0.1"]}, "demo")
    assert text == "10.64.0.10 web web.demo.supercloud.internal\n"


def test_stores_are_at_the_gateways_of_the_networks() -> None:
    objects = ObjectAccess(server_name="objects.service.demo.supercloud.internal", ca_pem="pem")
    text = names.stores([network(1), network(0)], [spec(), spec(kind="vm", objects=objects)])
    assert text.splitlines() == [
        "10.64.0.1 objects.service.demo.supercloud.internal",
        "10.64.1.1 objects.service.demo.supercloud.internal",
    ]
    assert "\nlocalise-queries\n" in names.configuration([network(0)])
    assert names.stores([network(0)], [spec()]) == ""


def test_leases_are_for_vms() -> None:
    assert (
        names.leases([spec(), spec(kind="vm", name="m")])
        == "02:00:00:00:00:0a,10.64.0.10,m,infinite\n"
    )


def test_dnsmasq_offers_each_network_its_own_gateway() -> None:
    text = names.configuration([network(0), network(1)])
    assert "dhcp-range=set:ee1-0,10.64.1.0,static,255.255.255.0,infinite\n" in text
    assert "dhcp-option=tag:ee1-0,option:router,10.64.1.1\n" in text
    assert "\ninterface=" not in names.configuration([])


def test_lease_is_parsed_and_junk_refused() -> None:
    text = "address 10.0.2.15/24\nrouter 10.0.2.2\nrouter 10.0.2.9\ndns 10.0.2.3\nlease 86400\n"
    assert uplink.parse_lease(text) == ("10.0.2.15/24", "10.0.2.2", ["10.0.2.3"], 86400)
    for junk in ("", "address x/24\n", "address 10.0.2.15/99", "address 10.0.2.15/24\ndns evil\n"):
        with pytest.raises(ValueError, match=r"."):
            uplink.parse_lease(junk)


# -- the container's configuration


def config(one: EnvironmentSpec, user: users.User = users.User()) -> dict[str, object]:  # noqa: B008
    first = oci.first_process(one, user)
    text = oci.config(one, first, root="/r", place="/p", cgroup="/ee/web-1")
    return dict(json.loads(text))


def test_wishes_of_the_ee_go_over_the_images() -> None:
    image = Process(argv=["/image"], env={"A": "image", "B": "image"}, workdir="/image", user="1")
    own = Process(argv=["/own", "x"], env={"B": "own"})
    made = oci.first_process(
        spec(image=ImageRef(format="erofs", blobs={}, process=image), process=own), users.User(7, 8)
    )
    assert made["args"] == ["/own", "x"]
    assert {"A=image", "B=own", f"PATH={oci.PATH}"} <= set(made["env"])
    assert (made["cwd"], made["user"]["uid"], made["user"]["gid"]) == ("/image", 7, 8)


def test_no_text_of_the_user_can_change_the_structure() -> None:
    evil = ['"}}', "@seccomp@", '"seccomp":null', "\\", "{}"]
    made = config(spec(process=Process(argv=evil, env={"X": '"}}'})))
    assert made["process"]["args"] == evil  # type: ignore[index]
    assert made["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"  # type: ignore[index]


@pytest.mark.parametrize(
    "process",
    [
        Process(argv=["a\0b"]), Process(env={"A=B": "x"}), Process(env={"": "x"}),
        Process(env={"A": "x\0y"}), Process(workdir="relative"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_process_is_refused(process: Process) -> None:
    with pytest.raises(Invalid):
        oci.first_process(spec(process=process), users.User())


def test_no_command_anywhere_is_refused() -> None:
    with pytest.raises(Invalid, match="no program"):
        oci.first_process(spec(image=ImageRef(format="erofs", blobs={})), users.User())


def test_limits_are_in_the_units_of_the_kernel() -> None:
    made = oci.resources(spec(cpus=0.5, memory_bytes=64 << 20))
    assert made["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert made["cpu"] == {"quota": 50_000, "period": 100_000}


def test_the_seccomp_profile_allows_what_programs_need_and_no_more() -> None:
    profile = json.loads(oci.seccomp_text())
    allowed = {
        name
        for group in profile["syscalls"]
        if group["action"] == "SCMP_ACT_ALLOW" and not group.get("args")
        for name in group["names"]
    }
    assert {"read", "execve", "futex", "epoll_pwait", "sendmsg", "rseq", "faccessat2"} <= allowed
    dangerous = (
        "mount umount2 unshare setns bpf keyctl add_key request_key perf_event_open kexec_load "
        "init_module finit_module delete_module reboot swapon open_by_handle_at userfaultfd "
        "io_uring_setup clock_settime settimeofday syslog pivot_root chroot fsopen move_mount "
        "open_tree mount_setattr process_vm_readv process_vm_writev kcmp acct quotactl iopl ioperm "
        "clone3 clone socket personality fanotify_init lookup_dcookie vhangup"
    )
    assert not allowed & set(dangerous.split())
    assert all(group["comment"] for group in profile["syscalls"]), "each group says why"
    named = [
        name for group in profile["syscalls"] if not group.get("args") for name in group["names"]
    ]
    assert len(named) == len(set(named)), "each call is in one group"


# -- users of an image


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\nbad:x:y:1::/:/\nshort:line\n"
        "huge:x:99999999:0::/:/\n"
    )
    (tmp_path / "etc/group").write_text("root:x:0:\nwww:x:44:web,other\nadm:x:45:web\n")
    return str(tmp_path)


def test_users_are_resolved_in_the_image(root: str) -> None:
    assert users.resolve("", root) == users.User(0, 0, [], "/root")
    assert users.resolve("web", root) == users.User(33, 34, [44, 45], "/srv")
    assert users.resolve("33", root) == users.User(33, 34, [44, 45], "/srv")
    assert users.resolve("web:www", root) == users.User(33, 44, [], "/srv")
    assert users.resolve("1000:2000", root) == users.User(1000, 2000, [], "/")


@pytest.mark.parametrize("user", ["nobody-here", "-1", "65536", "huge", "bad", "0:nogroup", "½"])
def test_unknown_users_are_refused(root: str, user: str) -> None:
    with pytest.raises(Invalid, match="no such user"):
        users.resolve(user, root)


def test_an_image_cannot_point_to_the_platforms_passwd(root: str) -> None:
    os.unlink(f"{root}/etc/passwd")
    os.symlink("/etc/passwd", f"{root}/etc/passwd")  # within the root this is itself: a loop
    with pytest.raises(OSError, match="symbolic"):
        users.resolve("root", root)
    os.unlink(f"{root}/etc/passwd")
    os.symlink("../../../../../../etc/passwd", f"{root}/etc/passwd")
    with pytest.raises(OSError, match="symbolic"):
        users.resolve("root", root)


def test_a_fifo_in_place_of_passwd_does_not_stop_us(root: str) -> None:
    os.unlink(f"{root}/etc/passwd")
    os.mkfifo(f"{root}/etc/passwd")
    assert users.resolve("5", root).uid == 5


# -- disks


def qcow2(version: int = 3, backing: int = 0, size: int = 1 << 30, features: int = 0) -> bytes:
    head = bytearray(104)
    struct.pack_into(">4sIQI", head, 0, b"QFI\xfb", version, backing, 0)
    struct.pack_into(">Q", head, 24, size)
    struct.pack_into(">Q", head, 72, features)
    return bytes(head)


def test_qcow2_images_that_stand_alone_are_taken() -> None:
    assert check_qcow2(qcow2()) == 1 << 30
    assert check_qcow2(qcow2(version=2, features=4)) == 1 << 30  # no such field in version 2


@pytest.mark.parametrize(
    "head",
    [
        qcow2(backing=4096), qcow2(features=4), qcow2(size=0), qcow2(size=1 << 60),
        qcow2(version=9), b"QFI\xfb", b"", bytes(512),
    ],
)  # fmt: skip
def test_qcow2_images_that_name_other_files_are_refused(head: bytes) -> None:
    with pytest.raises(Invalid):
        check_qcow2(head)


# -- logs


def test_last_lines() -> None:
    data = b"a\nb\nc"
    assert logs.last_lines(data, -1) == data
    assert logs.last_lines(data, 0) == b""
    assert logs.last_lines(data, 1) == b"c"
    assert logs.last_lines(data + b"\n", 2) == b"b\nc\n"
    assert logs.last_lines(data, 99) == data


def test_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    log = logs.Log(str(tmp_path / "log/output"), max_bytes=1000)
    for number in range(1000):
        log.append(b"line %04d\n" % number)
    kept = b"".join(log.tail(-1))
    assert 1000 <= len(kept) <= 2020
    assert kept.endswith(b"line 0999\n")
    assert b"".join(log.tail(2)) == b"line 0998\nline 0999\n"
    log.close()
    again = logs.Log(str(tmp_path / "log/output"), max_bytes=1000)
    assert b"".join(again.tail(-1)) == kept, "an agent's restart loses nothing"
    again.close()


async def test_a_slow_follower_is_cut_off_and_does_not_hold_up_the_log(tmp_path: Path) -> None:
    log = logs.Log(str(tmp_path / "log/output"))
    following = log.follow(0)
    assert await anext(following) == b""
    for _ in range(2 * logs.FOLLOW_QUEUE):
        log.append(b"x\n")
    seen = [data async for data in following]
    assert len(seen) < logs.FOLLOW_QUEUE
    log.close()


async def test_a_fifo_loses_nothing_while_nobody_reads(tmp_path: Path) -> None:
    first = logs.Log(str(tmp_path / "log/output"))
    fifo = logs.Fifo(str(tmp_path / "fifo"), first, os.getuid())
    writer = fifo.writer()
    os.write(writer, b"before\n")
    fifo.close()
    first.close()
    os.write(writer, b"between\n")  # no agent: neither SIGPIPE nor an error
    second = logs.Log(str(tmp_path / "log/output"))
    fifo = logs.Fifo(str(tmp_path / "fifo"), second, os.getuid())
    os.write(writer, b"after\n")
    fifo.close()
    assert b"".join(second.tail(-1)) == b"before\nbetween\nafter\n"
    second.close()
    os.close(writer)
