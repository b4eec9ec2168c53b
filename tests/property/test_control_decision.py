"""Decisions over any series of manifests: nothing is given twice, what stays keeps what it has."""

import ipaddress
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.control.desire import Offer, decide
from supercloud.control.documents import UCloudDocument, dump, load
from supercloud.control.plan import plan
from supercloud.model.errors import Invalid, NoResources
from supercloud.model.resources import (
    GIB,
    MIB,
    Environment,
    Network,
    Placement,
    Platform,
    Port,
    Provider,
    UCloud,
    Volume,
    VolumeUse,
    replica_names,
)
from supercloud.providers.base import HostCapacity

IMAGE = "sha256:" + "a" * 64


def capacity(name):
    return HostCapacity(
        name=name, region="r", jurisdiction="CH", cpus_total=64, cpus_free=64,
        memory_total_bytes=64 * GIB, memory_free_bytes=64 * GIB, disk_total_bytes=1 << 40,
        disk_free_bytes=1 << 40, platforms_free=8, images=(IMAGE,),
    )  # fmt: skip


environments = st.lists(
    st.builds(
        Environment,
        name=st.sampled_from(["a", "b", "c", "d"]),
        kind=st.sampled_from(["container", "vm"]),
        image=st.sampled_from(["oci:/x", "oci:/y"]),
        memory_bytes=st.sampled_from([16 * MIB, 200 * MIB]),
        replicas=st.integers(0, 4),
        ports=st.lists(
            st.builds(
                Port,
                port=st.integers(1, 4),
                protocol=st.sampled_from(["tcp", "udp"]),
                publish=st.booleans(),
            ),
            max_size=3,
            unique_by=lambda port: (port.port, port.protocol),
        ),
        placement=st.builds(Placement, spread=st.sampled_from(["none", "host"])),
        network=st.sampled_from(["default", "other"]),
        volumes=st.lists(
            st.builds(VolumeUse, name=st.sampled_from(["v", "w"]), read_only=st.just(True)),
            max_size=2,
            unique_by=lambda use: use.name,
        ),
    ),
    max_size=4,
    unique_by=lambda item: item.name,
)
wishes = st.builds(
    UCloud,
    name=st.just("u"),
    providers=st.just([Provider(name="p", kind="fake"), Provider(name="q", kind="fake")]),
    environments=environments,
    volumes=st.builds(
        lambda v, w: [Volume(name="v", size_bytes=v), Volume(name="w", size_bytes=w)],
        st.sampled_from([MIB, GIB]),
        st.sampled_from([MIB, GIB]),
    ),
    networks=st.sampled_from(
        [
            [Network(name="default"), Network(name="other")],
            [Network(name="default", range="10.64.0.0/14"), Network(name="other")],
        ]
    ),
    platform=st.sampled_from([Platform(), Platform(memory_bytes=2 * GIB, ports=8)]),
)


def offers(spec, hosts):
    return [
        Offer(provider, [capacity(f"{provider.name}-{n}") for n in range(hosts)])
        for provider in spec.providers
    ]


def document_of(decision):
    return UCloudDocument(
        name=decision.spec.name, spec=decision.spec, networks=decision.networks,
        platforms=decision.platforms, assignments=decision.assignments, marks=decision.marks,
        volumes=decision.volumes,
    )  # fmt: skip


def check(decision):
    addresses, slots = set(), set()
    names = [n for item in decision.spec.environments for n in range(item.replicas)]
    assert len(decision.assignments) == len(names)
    assert {item.platform for item in decision.assignments.values()} == set(decision.platforms)
    for item in decision.assignments.values():
        network = ipaddress.IPv4Network(decision.networks[item.network])
        subnet = ipaddress.IPv4Network(f"{item.address}/{item.prefix_length}", strict=False)
        assert subnet.subnet_of(network)
        assert item.gateway == str(subnet[1]) != item.address
        assert item.address not in (str(subnet[0]), str(subnet[255]))
        addresses.add((item.network, item.address))
        for port, slot in item.slots.items():
            one = (item.platform, port.partition("/")[2], slot)
            assert 0 <= slot < decision.platforms[item.platform].size.ports
            assert one not in slots
            slots.add(one)
    assert len(addresses) == len(decision.assignments)
    indexes = [item.index for item in decision.platforms.values()]
    assert len(set(indexes)) == len(indexes)
    ranges = [ipaddress.IPv4Network(item) for item in decision.networks.values()]
    assert not any(a.overlaps(b) for n, a in enumerate(ranges) for b in ranges[n + 1 :])
    for name, item in decision.assignments.items():
        platform = decision.platforms[item.platform]
        for use in spec_of(decision, name).volumes:
            home = decision.volumes[use.name]
            assert (home.provider.name, home.host) == (platform.provider.name, platform.host)


def spec_of(decision, name):
    for item in decision.spec.environments:
        if name in replica_names(item):
            return item
    raise AssertionError(name)


@settings(max_examples=150, deadline=None)
@given(st.lists(wishes, min_size=1, max_size=4), st.integers(2, 4))
def test_any_series_of_manifests_is_decided_soundly_and_stably(series, hosts):
    before, kept = None, {}
    for spec in series:
        try:
            decision = decide(spec, offers(spec, hosts), before, ["10.65.0.0/16"], {}, kept)
        except (NoResources, Invalid) as error:
            assert error.message
            continue
        check(decision)
        for name, wish in decision.volumes.items():
            was = kept.get(name, wish)
            assert (was.provider.name, was.host) == (wish.provider.name, wish.host)
            assert was.spec.size_bytes <= wish.spec.size_bytes
        kept |= decision.volumes
        if before is not None:
            for name, old in before.assignments.items():
                new = decision.assignments.get(name)
                if new is None or (new.platform, new.network) != (old.platform, old.network):
                    continue
                if before.networks[old.network] == decision.networks[old.network]:
                    assert new.address == old.address
                for port in new.slots.keys() & old.slots.keys():
                    assert new.slots[port] == old.slots[port]
        old = document_of(decision)
        again = decide(spec, offers(spec, hosts), old, ["10.65.0.0/16"], {}, kept)
        assert again == decision
        assert plan(again, old, [], kept).changes == []
        before = document_of(decision)


@settings(max_examples=60, deadline=None)
@given(wishes)
def test_documents_come_back_from_the_store_as_they_went_in(spec):
    try:
        decision = decide(spec, offers(spec, 3), None, [], {"oci:/x": "mark"})
    except NoResources:
        return
    document = document_of(decision)
    assert load(UCloudDocument, "ucloud/u", dump(document)) == document


def test_ranges_of_other_uclouds_are_never_taken_and_run_out_with_an_error():
    spec = UCloud(
        name="u", providers=[Provider(name="p", kind="fake")], networks=[Network(name="default")]
    )
    taken = []
    for _ in range(64):
        decision = decide(spec, offers(spec, 1), None, taken, {})
        assert decision.networks["default"] not in taken
        taken.append(decision.networks["default"])
    try:
        decide(spec, offers(spec, 1), None, taken, {})
    except NoResources as error:
        assert "10.64.0.0/10" in str(error)
        assert "range" in error.hint
    else:
        raise AssertionError("a 65th range was given out")
    own = replace(spec, networks=[Network(name="default", range="10.64.0.0/16")])
    assert decide(own, offers(own, 1), None, taken, {}).networks == {"default": "10.64.0.0/16"}


def test_a_range_of_one_24_has_room_for_one_platform():
    env = Environment(
        name="a", kind="vm", image="x", replicas=2, network="n",
        placement=Placement(spread="host"),
    )  # fmt: skip
    spec = UCloud(
        name="u", providers=[Provider(name="p", kind="fake")], environments=[env],
        networks=[Network(name="n", range="192.168.7.0/24")],
    )  # fmt: skip
    try:
        decide(spec, offers(spec, 2), None, [], {})
    except NoResources as error:
        assert "room for 1 platforms" in str(error)
    else:
        raise AssertionError("two platforms share a /24")
