"""Parts of the Lower Layer by themselves: names, quotas, ports, registry, users, the machine."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.isolation.kinds import PEERS, Site, kinds
from supercloud.lower import quota as quotas
from supercloud.lower.host import registry
from supercloud.lower.names import MAX_DOMAIN_NAME, domain_name
from supercloud.lower.provider.ports import PortRanges, is_free
from supercloud.lower.provider.users import User, UserStore, check_ca, check_user_name
from supercloud.lower.user_domain.assembly import mac
from supercloud.lower.vmm.machine import Descriptors, Machine, command_line
from supercloud.model.errors import Invalid, NoResources
from supercloud.wire.codec import decode
from supercloud.wire.frames import DOMAIN_NAME, NAME
from supercloud.wire.quota import Quota

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
USER = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?", fullmatch=True)


@given(st.sampled_from(["vmm", "link", "uplink-net", "control"]), USER, LABEL)
def test_names_are_the_cores_whatever_their_length(kind: str, user: str, platform: str) -> None:
    name = domain_name(kind, user, platform)
    assert DOMAIN_NAME.match(name)
    assert NAME.match(f"sched:{name}")
    assert len(name) <= MAX_DOMAIN_NAME
    assert name == domain_name(kind, user, platform)


@given(st.lists(st.tuples(USER, LABEL), min_size=2, max_size=40, unique=True))
def test_different_platforms_have_different_names_and_macs(pairs: list[tuple[str, str]]) -> None:
    assert len({domain_name("vmm", *pair) for pair in pairs}) == len(pairs)
    assert len({mac("02:5c:00", *pair) for pair in pairs}) == len(pairs)


@given(
    st.builds(
        Quota,
        cpu_permille=st.integers(10, 1_000_000),
        memory_bytes=st.integers(0, 1 << 40),
        disk_bytes=st.integers(0, 1 << 45),
        vms=st.integers(0, 1000),
    )
)
def test_a_quota_survives_being_limits_and_an_unused_one_is_unused(quota: Quota) -> None:
    limits = quotas.to_limits(quota)
    assert quotas.from_limits(limits) == quota
    own = quotas.to_limits(Quota(memory_bytes=0, vms=0))
    assert quotas.used(own.memory_bytes, own.domains, 0) == {
        "memory_bytes": 0,
        "disk_bytes": 0,
        "vms": 0,
    }


@given(st.integers(0, 4), st.integers(64 << 20, 1 << 33))
def test_machines_that_fit_the_quota_fit_the_limits(vms: int, memory_bytes: int) -> None:
    quota = Quota(memory_bytes=vms * memory_bytes, vms=vms)
    limits = quotas.to_limits(quota)
    vmm, link = quotas.vmm_limits(memory_bytes, 1), quotas.link_limits()
    own = quotas.to_limits(Quota(memory_bytes=0, vms=0))
    booked = own.memory_bytes + vms * (vmm.memory_bytes + link.memory_bytes)
    assert booked == limits.memory_bytes
    assert own.pids + vms * (vmm.pids + link.pids) == limits.pids
    used = quotas.used(booked, own.domains + 2 * vms, 0)
    assert (used["memory_bytes"], used["vms"]) == (quota.memory_bytes, vms)


def ranges(path: Path, *, busy: frozenset[int] = frozenset()) -> PortRanges:
    return PortRanges(str(path / "ranges.json"), 100, 119, lambda port: port not in busy)


def test_port_ranges_are_disjoint_kept_and_given_back(tmp_path: Path) -> None:
    ports = ranges(tmp_path)
    assert ports.allot("a", 8) == (100, 8)
    assert ports.allot("b", 8) == (108, 8)
    assert ports.allot("a", 8) == (100, 8)
    with pytest.raises(NoResources, match="100-119"):
        ports.allot("c", 8)
    again = ranges(tmp_path)  # as after a restart of the driver
    assert again.held == {"a": (100, 8), "b": (108, 8)}
    again.release("a")
    assert again.allot("c", 4) == (100, 4)
    assert again.allot("none", 0) == (0, 0)


def test_ports_that_others_use_are_left_out(tmp_path: Path) -> None:
    assert ranges(tmp_path, busy=frozenset({103})).allot("a", 8) == (104, 8)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not is_free("127.0.0.1", taken.getsockname()[1])


@settings(deadline=None)  # each step is on disk when it returns
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=30))
def test_ranges_never_overlap(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]) -> None:  # fmt: skip
    ports = ranges(tmp_path_factory.mktemp("ports"))
    for holder, count in steps:
        try:
            ports.allot(holder, count) if count else ports.release(holder)
        except NoResources:
            continue
        taken = [p for first, size in ports.held.values() for p in range(first, first + size)]
        assert len(taken) == len(set(taken))


def test_instances_have_disjoint_shares_and_get_them_back(tmp_path: Path) -> None:
    path = str(tmp_path / "instances.json")
    states = [tmp_path / name for name in ("a", "b", "c")]
    for state in states:
        state.mkdir()
    shares = {s.name: registry.claim(s.name, str(s), path) for s in states}
    uids = [range(s.first_uid, s.first_uid + 2 * registry.UIDS_EACH) for s in shares.values()]
    assert len({uid for one in uids for uid in one}) == sum(map(len, uids))
    assert registry.claim("b", str(states[1]), path) == shares["b"]
    states[0].rmdir()  # gone: its share is free again
    (tmp_path / "d").mkdir()
    assert registry.claim("d", str(tmp_path / "d"), path).number == shares["a"].number


def test_users_are_kept_and_bad_ones_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "users.json")
    store = UserStore(path)
    store.put(User("a", "pem", Quota(vms=1)))
    store.put(User("b", "pem", Quota(vms=2)))
    store.remove("a")
    assert list(UserStore(path).users.values()) == [User("b", "pem", Quota(vms=2))]
    assert UserStore(path).leaving == {"a"}  # until the drivers have forgotten it
    store.gone("a")
    assert UserStore(path).leaving == set()
    for name in ("", "A", "a/b", "-a", "a" * 49, "a b", "ä"):
        with pytest.raises(Invalid):
            check_user_name(name)
    for pem in ("", "x" * 100_000, "-----BEGIN CERTIFICATE-----\n####\n-----END CERTIFICATE-----"):
        with pytest.raises(Invalid):
            check_ca(pem)


MACHINE = {
    "name": "demo/p1,evil=on",
    "cpus": 2,
    "memory_bytes": 256 << 20,
    "accelerator": "tcg",
    "uplink_mac": "02:5c:00:00:00:01",
    "link_mac": "02:5c:77:00:00:01",
}


def given_descriptors() -> Descriptors:
    return Descriptors(**dict(zip(Descriptors.__slots__, range(10, 22), strict=True)))


def test_qemu_gets_descriptors_and_no_file_but_its_firmware() -> None:
    argv = command_line(decode(Machine, MACHINE), given_descriptors())
    for word in argv[1:]:
        for part in word.replace('"', ",").replace("=", ",").split(","):
            if part.startswith("/"):
                assert part.startswith(
                    ("/proc/self/fd/", "/dev/fdset/", "/usr/share/seabios", "/usr/share/qemu")
                )
    assert "demo/p1,,evil=on" in argv  # a comma in a name starts no option
    assert argv[argv.index("-sandbox") + 1].startswith("on,")


@pytest.mark.parametrize(
    ("accelerator", "cpu"), [("kvm", "host"), ("tcg", "max,erms=off,fsrm=off,la57=off")]
)
def test_nested_virtualization_is_shown_to_the_guest(accelerator: str, cpu: str) -> None:
    argv = command_line(
        decode(Machine, {**MACHINE, "accelerator": accelerator}), given_descriptors()
    )
    assert argv[argv.index("-cpu") + 1] == cpu
    assert argv[argv.index("-accel") + 1].startswith(accelerator)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpus": 0},
        {"memory_bytes": 1},
        {"accelerator": "xen"},
        {"uplink_mac": "02:5c:00:00:00:01,script=/bin/sh"},
    ],
)
def test_a_machine_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        decode(Machine, {**MACHINE, **wrong})


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_the_table_of_kinds_is_a_manifest_that_the_core_takes(accelerator: str) -> None:
    from supercloud.lower.core import manifest

    site = Site("{}", "{}", "127.0.0.1", "192.0.2.53", accelerator)
    table = kinds(site)
    for kind in table.values():
        kind["filter"] = "00" * 8
    document = {
        "version": 1,
        "instance": "x",
        "first_uid": 2_000_000,
        "uids": 64,
        "runtime": "/x",
        "runtime_sha256": "0" * 64,
        "groups": [{"root": "/g", "controllers": ["cpu", "memory", "pids"], "unified": True}],
        "limits": {"memory_bytes": 1 << 34, "pids": 1000, "domains": 100},
        "kinds": table,
    }
    parsed = manifest.parse(json.dumps(document).encode())
    assert parsed.kinds.keys() == table.keys()
    assert [k.name for k in parsed.kinds.values() if k.devices] == (
        ["vmm"] if accelerator == "kvm" else []
    )
    joined = {frozenset(pair[:2]) for pair in PEERS}
    # nothing of the provider's reaches a machine, and the admin console no user
    for provider in ("admin", "front_door", "multiplexing", "disk", "uplink"):
        assert frozenset((provider, "vmm")) not in joined
    assert frozenset(("admin", "user")) not in joined
