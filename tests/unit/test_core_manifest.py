"""The grant manifest is refused, with the place, unless all of it makes sense."""

import copy
import json

import pytest

from supercloud.lower.core.manifest import MAX_MANIFEST_BYTES, parse
from supercloud.lower.host import soundness
from supercloud.model.capability import Limits, Rights
from supercloud.model.errors import Invalid

GOOD = {
    "version": 1,
    "instance": "one",
    "first_uid": 200000,
    "uids": 100,
    "runtime": "/images/runtime.erofs",
    "runtime_sha256": "ab" * 32,
    "groups": [
        {"root": "/sys/fs/cgroup", "controllers": ["cpu", "memory", "pids"], "unified": True}
    ],
    "limits": {"memory_bytes": 1 << 30, "pids": 100},
    "kinds": {
        "user": {
            "argv": ["/usr/bin/python3", "-c", "x"],
            "filter": "06000000" * 2,
            "numbers": [[1, 65535]],
            "binds": [{"source": "/srv", "target": "/run/srv"}],
            "creates": ["vmm"],
            "own": {"memory_bytes": 1 << 20, "pids": 2},
            "peers": {"vmm": True},
            "creator_rights": ["CONTROL", "CONNECT"],
        },
        "vmm": {
            "argv": ["/usr/bin/qemu"],
            "filter": "06000000" * 2,
            "devices": ["/dev/kvm"],
            "peers": {"user": True},
        },
    },
    "domains": [["a", "user"], ["b", "vmm"]],
    "grants": [{"to": "a", "object": "domain:b", "rights": ["CONNECT"], "name": "b"}],
}


def test_a_good_manifest_is_read():
    manifest = parse(json.dumps(GOOD).encode())
    user, vmm = manifest.kinds["user"], manifest.kinds["vmm"]
    assert (user.name, user.numbers, user.restart) == ("user", ((1, 65535),), False)
    assert user.creator_rights == Rights.CONTROL | Rights.CONNECT
    assert vmm.creator_rights == Rights.CONTROL | Rights.CONNECT | Rights.GRANT
    assert manifest.limits == Limits(memory_bytes=1 << 30, pids=100)
    assert manifest.domains == (("a", "user"), ("b", "vmm"))
    assert user.peers["vmm"] is True
    assert len(manifest.sha256) == 64


BAD = {
    "version": (["version"], 2),
    "too low a uid": (["first_uid"], 0),
    "first_uid": (["first_uid"], -1),
    "uids": (["uids"], True),
    "limits.pids": (["limits", "pids"], 1.5),
    "limits.memory_bytes": (["limits", "memory_bytes"], "1G"),
    "limits.disk_bytes": (["limits", "disk_bytes"], 1 << 70),
    "runtime": (["runtime"], {"path": "/images"}),
    "runtime_sha256": (["runtime_sha256"], None),
    "kinds.user.argv": (["kinds", "user", "argv"], "/usr/bin/python3"),
    "kinds.user.argv[1]": (["kinds", "user", "argv", 1], 7),
    "kinds.user.numbers[0]": (["kinds", "user", "numbers", 0], [1]),
    "kinds.user.creator_rights": (["kinds", "user", "creator_rights"], ["ALL"]),
    "kinds.vmm.restart": (["kinds", "vmm", "restart"], "yes"),
    "domains[0]": (["domains", 0], ["a", "user", "red"]),
    "grants[0]": (["grants", 0, "colour"], "red"),
    "grants[0].to": (["grants", 0, "to"], None),
    "kinds.user.peers.vmm": (["kinds", "user", "peers", "vmm"], {"descriptors": True}),
    "kinds.vmm": (["kinds", "vmm", "filter"], "06"),
    "kinds.vmm.filter": (["kinds", "vmm", "filter"], None),
}


def changed(path, value):
    bad = copy.deepcopy(GOOD)
    target = bad
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return bad


@pytest.mark.parametrize("where", BAD)
def test_the_place_of_a_fault_is_said(where):
    bad = changed(*BAD[where])
    with pytest.raises(Invalid) as caught:
        parse(json.dumps(bad).encode())
    assert caught.value.where.startswith("manifest")
    assert caught.value.where == f"manifest.{where}" or where in ("version", "too low a uid")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kinds", "user", "creates"], ["ghost"]),
        (["kinds", "user", "own"], {}),
        (["kinds", "user", "peers"], {"vmm": False}),
        (["kinds", "user", "network"], "bridge"),
        (["kinds", "user", "filter"], "zz" * 8),
        (["kinds", "user", "filter"], "00" * 7),
        (["kinds", "user", "filter"], ""),
        (["kinds", "user", "network"], "parent"),
        (["instance"], "a/b"),
        (["groups"], []),
        (["groups", 0, "controllers"], ["cpu", "memory"]),
    ],
)
def test_what_does_not_fit_together_is_refused(path, value):
    bad = changed(path, value)
    with pytest.raises(Invalid):
        parse(json.dumps(bad).encode())
    with pytest.raises(Invalid):
        soundness.check(bad)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kinds", "user", "argv", 0], "python3"),
        (["kinds", "vmm", "devices", 0], "/dev/../etc/shadow"),
        (["kinds", "vmm", "devices", 0], "/etc/shadow"),
        (["kinds", "user", "binds", 0, "target"], "/etc"),
        (["kinds", "user", "binds", 0, "target"], "/run/../etc"),
        (["kinds", "user", "binds", 0, "source"], "srv"),
        (["kinds", "user", "binds", 0, "source"], "/srv\0"),
        (["kinds", "user", "descriptors"], ["sp ace"]),
        (["domains", 0, 1], "ghost"),
        (["domains", 0, 0], "b"),
        (["domains", 0, 0], "../b"),
        (["grants", 0, "to"], "ghost"),
        (["grants", 0, "object"], "domain:ghost"),
        (["grants", 0, "object"], "b"),
        (["grants", 0, "name"], "sp ace"),
    ],
)
def test_the_compiler_vouches_for_paths_and_names(path, value):
    soundness.check(GOOD)
    with pytest.raises(Invalid):
        soundness.check(changed(path, value))


@pytest.mark.parametrize(
    "field", ["version", "instance", "first_uid", "uids", "runtime", "groups", "limits", "kinds"]
)
def test_a_missing_field_is_named(field):
    bad = {key: value for key, value in GOOD.items() if key != field}
    with pytest.raises(Invalid, match=field):
        parse(json.dumps(bad).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1), b"\xff"]
)
def test_what_is_no_manifest_at_all_is_refused(raw):
    with pytest.raises(Invalid):
        parse(raw)
