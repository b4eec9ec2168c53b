"""The block service inside a protection domain, with nothing but the filter and limits of its kind."""

import json
import os
import socket
from pathlib import Path

import pytest

from core_host import MIB, SRC, Console, driver, host, kind
from supercloud.isolation.kinds import SERVICES, filters
from supercloud.upper.platform.image.tools import ToolTree
from support.nbd import Client, Device

pytestmark = pytest.mark.root

SERVE = """
from supercloud.services.block.daemon import Programs
from supercloud.services.block.service import BlockService
from supercloud.wire.portal import Reply, Request
from supercloud.wire.reactor import Reactor
def tool(name):
    places = ["/run/tools/usr/lib64/ld-linux-x86-64.so.2", "--inhibit-cache", "--library-path",
              "/run/tools/usr/lib/x86_64-linux-gnu", f"/run/tools/usr/bin/{name}"]
    return tuple(places)
programs = Programs(tool("qemu-storage-daemon"), tool("qemu-img"))
service = BlockService(Reactor(), lambda *told: None, programs)
def call(method, descriptors=(), **parameters):
    done = service.handlers()[method](Request("test", method, parameters, list(descriptors)))
    for descriptor in descriptors:
        os.close(descriptor)
    return done
"""


@pytest.fixture
def domain(tmp_path: Path) -> object:
    tools = ToolTree()
    binds = [{"source": str(SRC), "target": "/run/src"}]
    binds.append({"source": str(tools.root), "target": "/run/tools"})
    kinds = {
        "driver": driver(creates=["block"], peers={"block": True}),
        "block": kind(filter=filters()["block"], binds=binds),
    }
    with host(kinds) as made:
        child = made.consoles["one"].child("block", "b", **SERVICES["block"])
        device = Device(tools, tmp_path / "device.img", 64 * MIB)
        try:
            child(SERVE)
            yield child, device
        finally:
            device.close()


def attached(child: Console, **more: object) -> socket.socket:
    wish = {"volume": "v", "machine": "m", "mode": "nbd", "ram_shared": True, **more}
    code = f"send = call('volume.attach', **json.loads({json.dumps(json.dumps(wish))})).descriptors"
    _, (end,) = child.with_descriptors(code)
    return socket.socket(fileno=end)


def test_a_volume_lives_its_whole_life_inside_the_domain(
    domain: tuple[Console, Device],
) -> None:
    child, device = domain
    wish = f"volume='v', format='qcow2', size_bytes={16 * MIB}, export='device'"
    given = device.descriptor()
    try:
        child(f"call('volume.create', fds, {wish})", given)
    finally:
        os.close(given)
    client = Client(attached(child), "v")
    client.write(0, b"first")
    child("call('volume.snapshot', volume='v', snapshot='s')")
    client.write(0, b"other")
    client.close()
    child("call('volume.detach', volume='v'); call('volume.revert', volume='v', snapshot='s')")
    client = Client(attached(child), "v")
    assert client.read(0, 5) == b"first"
    client.close()
    child("call('volume.detach', volume='v')")
    attached(child, mode="vhost-user-blk").close()
    child("call('volume.detach', volume='v'); call('volume.close', volume='v')")


def test_the_domain_has_no_network_not_even_its_loopback(domain: tuple[Console, Device]) -> None:
    child, _ = domain
    with pytest.raises(Exception, match="Address family not supported"):
        child("socket.socket(socket.AF_INET)")
