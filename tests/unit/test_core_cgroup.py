"""Hierarchies of control groups are found in every layout, by what is mounted."""

import pytest

from supercloud.lower.core.cgroup import Hierarchy
from supercloud.lower.host.hierarchies import hierarchies
from supercloud.model.capability import Limits
from supercloud.model.errors import Unsupported

V1 = """\
32 31 0:29 / {root}/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / {root}/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / {root}/memory rw,relatime shared:7 - cgroup cgroup rw,memory
39 31 0:36 / {root}/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / {root}/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""
V2 = "41 31 0:38 / {root}/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
OTHERS = "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw - ext4 /dev/vda rw,cpu\n"


@pytest.fixture
def layout(tmp_path):
    def make(text: str, controllers: str = "") -> list[Hierarchy]:
        (tmp_path / "unified").mkdir(exist_ok=True)
        (tmp_path / "unified/cgroup.controllers").write_text(f"{controllers}\n")
        return hierarchies(OTHERS + text.format(root=tmp_path))

    return make


def test_v1_alone(layout):
    found = layout(V1)
    assert [sorted(tree.controllers) for tree in found] == [
        ["cpu", "cpuacct"],
        ["memory"],
        ["pids"],
    ]
    assert not any(tree.unified for tree in found)


def test_v2_alone(layout):
    (tree,) = layout(V2, "cpuset cpu io memory hugetlb pids")
    assert tree.unified
    assert tree.controllers == {"cpu", "memory", "pids"}


def test_a_hybrid_uses_each_controller_where_it_is(layout):
    found = layout(V1.replace("rw,pids", "rw,blkio") + V2, "pids hugetlb")
    assert {name for tree in found if tree.unified for name in tree.controllers} == {"pids"}
    assert {n for t in found if not t.unified for n in t.controllers} == {
        "cpu",
        "cpuacct",
        "memory",
    }


def test_a_unified_tree_without_controllers_of_ours_is_left_alone(layout):
    assert not any(tree.unified for tree in layout(V1 + V2, "hugetlb"))


def test_a_missing_controller_is_said(layout):
    with pytest.raises(Unsupported, match="memory"):
        layout(V2, "cpu pids")


@pytest.mark.parametrize(
    ("unified", "expected"),
    [
        (True, {"cpu.weight": 200, "cpu.max": "25000 100000", "memory.max": 4096, "pids.max": 5}),
        (
            False,
            {
                "cpu.shares": 2048,
                "cpu.cfs_quota_us": 25000,
                "memory.limit_in_bytes": 4096,
                "pids.max": 5,
            },
        ),
    ],
)
def test_limits_as_the_files_want_them(unified, expected):
    tree = Hierarchy("/x", frozenset({"cpu", "memory", "pids"}), unified)
    assert tree.settings(Limits(200, 250, 4096, 5)) == expected


def test_no_limit_is_said_as_such():
    tree = Hierarchy("/x", frozenset({"cpu", "memory", "pids"}), unified=True)
    assert tree.settings(Limits()) == {
        "cpu.weight": 100,
        "cpu.max": "max 100000",
        "memory.max": "max",
        "pids.max": "max",
    }
