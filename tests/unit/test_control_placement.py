"""Placement: wishes and capacity are conditions; what stands stays; refusals explain themselves."""

from dataclasses import replace

import pytest

from supercloud.model.errors import NoResources
from supercloud.model.resources import (
    GIB,
    MIB,
    Checkpointing,
    Environment,
    Placement,
    PlatformSize,
    Port,
    VolumeUse,
)
from supercloud.upper.federation.placement import (
    PLATFORM_RESERVE_BYTES,
    VM_OVERHEAD_BYTES,
    Host,
    place,
)

SIZE = PlatformSize(cpus=2, memory_bytes=1 * GIB, ports=4)


def host(name, **fields):
    values = {"provider": "p", "region": "r1", "jurisdiction": "CH", "size": SIZE, **fields}
    return Host(name=name, **values)


def ee(name, memory=64 * MIB, kind="container", replicas=1, ports=0, cpus=1.0, **placement):
    return Environment(
        name=name, kind=kind, image="x", memory_bytes=memory, replicas=replicas, cpus=cpus,
        ports=[Port(port=1000 + n) for n in range(ports)], placement=Placement(**placement),
    )  # fmt: skip


def stored(name, *volumes, **more):
    return replace(ee(name, **more), volumes=[VolumeUse(name=v, path=f"/{v}") for v in volumes])


def where(placed):
    return {name: key[1] for name, key in placed.items()}


def refused(environments, hosts):
    with pytest.raises(NoResources) as caught:
        place(environments, hosts)
    return caught.value


def test_all_go_to_one_host_while_they_fit():
    placed = place([ee("a"), ee("b"), ee("c", replicas=3)], [host("h1"), host("h2")])
    assert len(set(placed.values())) == 1
    assert list(placed) == ["a", "b", "c", "c-2", "c-3"]


def test_a_standing_platform_is_preferred_to_a_new_one():
    assert where(place([ee("a")], [host("h1"), host("h2", standing=True)])) == {"a": "h2"}


def test_what_stands_stays_even_where_taste_would_have_it_elsewhere():
    hosts = [host("h1", standing=True), host("h2", standing=True)]
    standing = {"a": ("p", "h2"), "b": ("p", "h1")}
    assert where(place([ee("a"), ee("b")], hosts, standing)) == {"a": "h2", "b": "h1"}


def test_what_may_not_stay_moves():
    hosts = [host("h1", region="r1"), host("h2", region="r2")]
    placed = place([ee("a", region="r2")], hosts, {"a": ("p", "h1")})
    assert where(placed) == {"a": "h2"}


def test_a_host_that_is_gone_is_no_place_to_stay():
    assert where(place([ee("a")], [host("h2")], {"a": ("p", "gone")})) == {"a": "h2"}


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [({"provider": "q"}, "h2"), ({"region": "r3"}, "h3"), ({"jurisdiction": "DE"}, "h4")],
)
def test_wishes_are_conditions(wish, chosen):
    hosts = [
        host("h1"),
        host("h2", provider="q"),
        host("h3", region="r3"),
        host("h4", jurisdiction="DE"),
    ]
    assert where(place([ee("a", **wish)], hosts)) == {"a": chosen}


def test_a_wish_that_nobody_meets_is_explained_per_host():
    error = refused([ee("a", region="mars")], [host("h1"), host("h2", region="")])
    assert error.details["candidates"] == [
        "p/h1: in region r1, not mars",
        "p/h2: in region (none said), not mars",
    ]
    assert error.where == "environments.a"


def test_more_memory_than_any_platform_has_says_how_much_there_is():
    error = refused([ee("a", memory=2 * GIB)], [host("h1")])
    usable_mib = (GIB - PLATFORM_RESERVE_BYTES) // MIB
    assert f"at most {usable_mib} MiB, 2048 are wanted" in str(error)


def test_memory_is_counted_together_with_what_a_vm_costs():
    fits = (GIB - PLATFORM_RESERVE_BYTES) // 2 - VM_OVERHEAD_BYTES
    hosts = [host("h1"), host("h2")]
    same = place([ee("a", fits, "vm"), ee("b", fits, "vm")], [host("h1")])
    assert set(same.values()) == {("p", "h1")}
    apart = place([ee("a", fits + MIB, "vm"), ee("b", fits, "vm")], hosts)
    assert len(set(apart.values())) == 2


def test_ports_of_a_platform_are_counted():
    hosts = [host("h1"), host("h2")]
    assert len(set(place([ee("a", ports=3), ee("b", ports=2)], hosts).values())) == 2
    assert "ports are left" in str(refused([ee("a", ports=3), ee("b", ports=2)], hosts[:1]))


def test_processors_of_a_platform_are_a_bound_and_not_summed():
    assert len(place([ee("a", cpus=2), ee("b", cpus=2)], [host("h1")])) == 2
    assert "has 2 processors, 3 are wanted" in str(refused([ee("a", cpus=3)], [host("h1")]))


def test_a_host_that_takes_no_new_platform_says_why_unless_one_stands_there():
    full = "its quota of platforms is used up"
    assert full in str(refused([ee("a")], [host("h1", refusal=full)]))
    assert place([ee("a")], [host("h1", refusal=full, standing=True)])


def test_a_kind_that_a_host_does_not_run_is_refused_with_its_reason():
    hosts = [host("h1", features={"vm": "no nested virtualization here"})]
    assert place([ee("a")], hosts)
    assert "no nested virtualization" in str(refused([ee("a", kind="vm")], hosts))


@pytest.mark.parametrize(("spread", "apart"), [("host", 4), ("provider", 2), ("region", 3)])
def test_spread_keeps_replicas_apart(spread, apart):
    hosts = [
        host("h1", provider="p", region="r1"),
        host("h2", provider="p", region="r2"),
        host("h3", provider="q", region="r2"),
        host("h4", provider="q", region="r3"),
    ]
    placed = place([ee("a", replicas=apart, spread=spread)], hosts)
    assert len(placed) == apart
    error = refused([ee("a", replicas=apart + 1, spread=spread)], hosts)
    assert f"on the same {spread} (spread)" in str(error)


def test_anti_affinity_works_both_ways():
    hosts = [host("h1"), host("h2")]
    placed = place([ee("a", anti_affinity=["b"]), ee("b"), ee("c")], hosts)
    assert placed["a"] != placed["b"]
    error = refused([ee("a", anti_affinity=["b"]), ee("b")], hosts[:1])
    assert "anti-affinity" in str(error)


def test_a_choice_is_taken_back_when_a_later_one_finds_no_room():
    """Largest first would put the free one where only the bound one may go."""
    usable = GIB - PLATFORM_RESERVE_BYTES
    hosts = [host("h1", region="r1", standing=True), host("h2", region="r2")]
    free = ee("free", memory=usable)
    bound = [ee(f"bound{n}", memory=usable // 2, region="r1") for n in range(2)]
    placed = where(place([free, *bound], hosts))
    assert placed == {"free": "h2", "bound0": "h1", "bound1": "h1"}


def test_a_search_needs_to_take_back_more_than_one_choice():
    """a and b must be apart from c each, yet only one host takes c's size."""
    small = PlatformSize(cpus=2, memory_bytes=512 * MIB, ports=4)
    hosts = [host("h1", standing=True), host("h2", size=small), host("h3", size=small)]
    big = ee("zz", memory=600 * MIB)
    others = [ee(name, memory=100 * MIB, anti_affinity=["zz"]) for name in ("a", "b", "c")]
    placed = where(place([*others, big], hosts))
    assert placed["zz"] == "h1"
    assert "h1" not in {placed[name] for name in "abc"}


def test_hopeless_searches_end():
    hosts = [host(f"h{n}") for n in range(12)]
    wish = [ee(f"e{n:02}", anti_affinity=[f"e{m:02}" for m in range(13)]) for n in range(13)]
    assert refused(wish, hosts)


def test_a_thousand_replicas_on_a_hundred_hosts_are_placed_in_no_time():
    import time

    hosts = [host(f"h{n}", size=PlatformSize(memory_bytes=4 * GIB, ports=64)) for n in range(100)]
    begin_s = time.process_time()
    placed = place([ee("a", replicas=1000, memory=16 * MIB)], hosts)
    assert len(placed) == 1000
    assert time.process_time() - begin_s < 20


def test_no_environments_need_no_hosts():
    assert place([], []) == {}


def test_no_hosts_at_all():
    assert "no hosts" in str(refused([ee("a")], []))


# -- volumes


def test_what_uses_a_volume_goes_where_it_is_whatever_else_is_nicer():
    hosts = [host("h1", standing=True), host("h2")]
    placed = place([stored("a", "data")], hosts, {"a": ("p", "h1")}, {"data": ("p", "h2")})
    assert where(placed) == {"a": "h2"}


def test_a_volume_that_is_elsewhere_is_the_reason_of_a_refusal():
    with pytest.raises(NoResources) as caught:
        place([stored("a", "data")], [host("h1")], {}, {"data": ("q", "h9")})
    assert "p/h1: its volume data is at q/h9" in str(caught.value)
    assert "supercloud volumes" in caught.value.hint


def test_those_that_share_one_are_together_also_when_the_first_choice_does_not_allow_it():
    big = (GIB - PLATFORM_RESERVE_BYTES) - 100 * MIB
    hosts = [host("h1"), host("h2")]
    environments = [ee("big", memory=big), stored("a", "s", memory=80 * MIB), stored("b", "s")]
    placed = place(environments, hosts, {"big": ("p", "h1")})
    assert placed["a"] == placed["b"] == ("p", "h2")


def test_a_platform_takes_eight_volumes_and_a_shared_one_counts_once():
    hosts = [host("h1"), host("h2")]
    environments = [stored("a", *"abcde"), stored("b", *"fgh"), stored("c", "a", "h")]
    assert len(set(place(environments, hosts).values())) == 1
    apart = place([*environments[:2], stored("d", "i")], hosts)
    assert apart["d"] != apart["a"]
    with pytest.raises(NoResources, match="a platform takes 8 volumes, 8 are in use there"):
        place([*environments[:2], stored("d", "i")], hosts[:1])


def test_a_provider_without_volumes_takes_only_what_has_none():
    hosts = [host("h1", standing=True, volumes="its disks are of paper"), host("h2")]
    assert where(place([stored("a", "data"), ee("b")], hosts))["a"] == "h2"
    with pytest.raises(NoResources, match="no volumes: its disks are of paper"):
        place([stored("a", "data")], hosts[:1])


def checkpointed(name, **more):
    return replace(ee(name, **more), checkpoint=Checkpointing())


def test_what_is_checkpointed_goes_where_the_store_is_unless_a_tunnel_leads_there():
    apart = [host("h1"), host("h2")]
    placed = place([checkpointed("a")], apart, store=("p", "h2"))
    assert placed == {"a": ("p", "h2")}
    only = {"a": "q"}
    hosts = [host("h1"), replace(host("h2"), provider="q")]
    with pytest.raises(NoResources, match="its checkpoints are kept at p/h1: nothing joins it"):
        place([checkpointed("a")], hosts, store=("p", "h1"), only=only)
    joined = [replace(item, tunnel="") for item in hosts]
    assert place([checkpointed("a")], joined, store=("p", "h1"), only=only) == {"a": ("q", "h2")}
    half = [joined[0], hosts[1]]
    with pytest.raises(NoResources):
        place([checkpointed("a")], half, store=("p", "h1"), only=only)


def test_a_kind_that_cannot_be_checkpointed_there_goes_elsewhere_or_is_refused():
    unable = replace(host("h1"), checkpoints={"vm": "no CRIU for that"})
    assert place([checkpointed("a")], [unable]) == {"a": ("p", "h1")}
    machine = checkpointed("db", kind="vm")
    with pytest.raises(NoResources, match="no checkpoints can be taken there: no CRIU for that"):
        place([machine], [unable])
    assert place([machine], [unable, host("h2")]) == {"db": ("p", "h2")}
    assert place([ee("db", kind="vm")], [unable]) == {"db": ("p", "h1")}


def test_whole_platforms_that_are_checkpointed_are_where_the_store_is():
    hosts = [host("h1"), host("h2")]
    assert place([ee("a")], hosts, store=("p", "h2"), platforms=True) == {"a": ("p", "h2")}
    spread = ee("a", replicas=2, spread="host")
    with pytest.raises(NoResources, match="its checkpoints are kept at"):
        place([spread], hosts, store=("p", "h2"), platforms=True)


def test_what_must_go_to_a_provider_leaves_the_place_where_it_stands():
    hosts = [host("h1"), replace(host("h2"), provider="q")]
    standing = {"a": ("p", "h1"), "b": ("p", "h1")}
    wish = [ee("a"), ee("b")]
    assert place(wish, hosts, standing, only={"a": "q"}) == {"a": ("q", "h2"), "b": ("p", "h1")}
