"""The object service in a domain as a host makes it: own user, network, filter, no privilege."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from core_host import MIB, PYTHON, SRC, Host, driver, host, status, wait_for
from supercloud.isolation.kinds import Site, kinds
from supercloud.wire.portal import Portal
from support.object_store import WEED, ObjectStore, make_identity

pytestmark = pytest.mark.root
SITE = Site(facts="{}", uplink="{}", publish="127.0.0.1", dns_server="", accelerator="tcg")
PROGRAM = """
import sys; sys.path.insert(0, "/run/src")
from supercloud.lower.client import Core
from supercloud.lower.service import Launcher
from supercloud.services.objects.service import ObjectService, Place
Launcher(Core(), lambda reactor, tell: ObjectService(reactor, tell, Place("/run/weed"))).run()
"""


@pytest.fixture(scope="module")
def made() -> Iterator[Host]:
    objects = kinds(SITE)["objects"]
    objects |= {
        "argv": [PYTHON, "-I", "-S", "-B", "-c", PROGRAM],
        "filter": "objects",
        "binds": [
            {"source": str(SRC), "target": "/run/src"},
            {"source": WEED, "target": "/run/weed"},
        ],
        "peers": {"driver": True},
    }
    with host({"driver": driver(creates=["child"]), "child": objects}) as running:
        yield running


class InDomain(ObjectStore):
    """The same calls, over a channel of the core."""

    def launch_in(self, made: Host) -> None:
        _, (end,) = made.consoles["one"].with_descriptors(
            "made = core.create_domain('child', 'store', Limits(memory_bytes=448 << 20, pids=96))\n"
            "core.create_channel(SELF, made.selector, 'c/store', 'control')\n"
            "core.start(made.selector)\n"
            "send = [core.take(core.lookup('c/store').selector)]"
        )
        self.portal = Portal(socket.socket(fileno=end), "objects")


def in_network_of(pid: int, port: int, path: str) -> str:
    """An HTTP answer from inside a domain's network: for this only root of the host can ask."""
    code = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}{path}').read())"
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", PYTHON, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_store_in_a_domain_serves_and_has_no_privilege(made: Host, tmp_path: Path) -> None:
    data = made.directory / "state/domains/store"
    store = InDomain(Path("/run/state"), tmp_path / "run", make_identity(tmp_path))
    store.launch_in(made)
    assert store.start(directory="/run/state")["pid"] < 100, "of its own process namespace"
    store.call("bucket.apply", {"name": "inside", "quota_bytes": 64 * MIB, "versioning": False})
    s3 = store.client(store.credentials("app", {"inside": "write"}))
    bodies = {f"k{number}": os.urandom(300_000) for number in range(40)}
    for key, body in bodies.items():
        s3.put_object(Bucket="inside", Key=key, Body=body)
    assert list(data.rglob("*.dat")), "it is the domain's own directory"
    (weed,) = [pid for pid in made.processes() if status(pid)["Name"] == "weed"]
    said = status(weed)
    assert int(said["Uid"].split()[0]) >= 1000
    assert int(said["CapEff"], 16) == int(said["CapBnd"], 16) == 0
    assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")

    for key in [*bodies][::2]:  # what is deleted is taken off the disk, under the same filter
        s3.delete_object(Bucket="inside", Key=key)
        del bodies[key]
    before = sum(path.stat().st_size for path in data.rglob("*.dat"))

    def vacuumed() -> bool:
        in_network_of(weed, 9333, "/vol/vacuum?garbageThreshold=0.1")
        return sum(path.stat().st_size for path in data.rglob("*.dat")) < before * 3 // 4

    wait_for(vacuumed, 60)
    for key, body in bodies.items():
        assert s3.get_object(Bucket="inside", Key=key)["Body"].read() == body
    store.portal.close()
