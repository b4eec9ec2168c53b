"""What each kind of domain of a host may do: one table, compiled to the core's grant manifest.

The rows are the manifest's fields (see ``lower.core.manifest``); peers are a table of their own,
since both sides must say the same. Everything that is not named here is not allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from supercloud.wire.lease import Lease

MIB: Final = 1 << 20
PYTHON: Final = ("/usr/bin/python3.13", "-I", "-S", "-B", "/opt/supercloud/main.py")
PASST: Final = "/usr/bin/passt"
COMPONENT_LIMITS: Final = {"memory_bytes": 64 * MIB, "pids": 8}
UPLINK_NET_LIMITS: Final = {"memory_bytes": 40 * MIB, "pids": 8}
USER_OWN: Final = {"memory_bytes": 160 * MIB, "pids": 48}
UPLINK_GUEST: Final = "10.0.2.15"
UPLINK_GATEWAY: Final = "10.0.2.2"
UPLINK_DNS: Final = "10.0.2.3"
MANY_OBJECTS: Final = 4096

# The user's, below the machines: kind, and what each is allowed.
SERVICES: Final[Mapping[str, Mapping[str, int]]] = {
    # our process, the caches of some eight devices, four threads for each connection
    "protection": {"memory_bytes": 192 * MIB, "pids": 96},
    # our process, a daemon of 12 MB and three threads for each of some eight volumes, their caches
    "block": {"memory_bytes": 320 * MIB, "pids": 64},
    # our process, a connection's requests under way, maps of what replicas lack
    "replication": {"memory_bytes": 128 * MIB, "pids": 8},
    # our gate and metadata store, the S3 server
    "objects": {"memory_bytes": 448 * MIB, "pids": 96},
    # our process with packs of 8 MiB in a few threads; it lives as long as one job of it
    "checkpoint": {"memory_bytes": 192 * MIB, "pids": 32},
}
# What a service needs beyond what every component has. Objects: files, and its own loopback.
_SERVICE_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "objects": {"state": True, "tcp": True, "tmp_bytes": 64 * MIB, "nofile": 4096},
}

# (kind, kind, whether descriptors and so capabilities may pass): who may be joined by a channel
PEERS: Final = (
    ("admin", "multiplexing", False),
    ("admin", "disk", False),
    ("admin", "uplink", False),
    ("front_door", "user", True),  # accepted sockets
    ("multiplexing", "disk", True),  # the right to charge a user's scheduling context
    ("multiplexing", "uplink", True),  # the right to connect a user's domain
    ("multiplexing", "user", True),  # its identity, the images
    ("disk", "user", True),  # backing files
    ("uplink", "user", True),  # the right to connect a machine's uplink
    ("user", "vmm", True),  # RAM, disks, images, console
    ("user", "link", True),  # connections of the agent
    ("user", "protection", True),  # backing files, data keys, streams of protected devices
    ("user", "block", True),  # those streams, and what a machine takes a volume by
    ("user", "replication", True),  # streams of replicas, and what the block service has of them
    ("user", "objects", True),  # keys, connections to the S3 port
    ("user", "checkpoint", True),  # keys, memory and disks to be stored, such connections
    ("uplink-net", "vmm", False),
    ("uplink-net-closed", "vmm", False),
    ("link", "vmm", False),
)


@dataclass(frozen=True, slots=True)
class Site:
    """What differs from host to host. ``facts`` are what a host says of itself to its users."""

    facts: str  # JSON
    uplink: str  # JSON, for the uplink driver
    publish: str  # address that published ports listen on
    dns_server: str  # of the host, "" when it has none
    accelerator: str  # kvm | tcg


def kinds(site: Site) -> dict[str, dict[str, Any]]:
    """All kinds but for the filters' places; ``peers`` filled in from the table."""
    table = {**_provider_kinds(site), **_user_kinds(site)}
    for name, kind in table.items():
        kind["peers"] = _peers_of(name)
    return table


def uplink_lease(*, resolves: bool) -> Lease:
    """What passt tells a machine that asks it."""
    resolvers = [UPLINK_DNS] if resolves else []
    return Lease(address=f"{UPLINK_GUEST}/24", gateway=UPLINK_GATEWAY, resolvers=resolvers)


def filters() -> dict[str, str]:
    """The seccomp filter of each kind that has not the one of components (``base``)."""
    passt = dict.fromkeys(("uplink-net", "uplink-net-closed", "link"), "passt")
    own = {name: name for name in ("vmm", "block", "objects", "user")}
    return {**own, **passt}


def _provider_kinds(site: Site) -> dict[str, dict[str, Any]]:
    facts = {"SUPERCLOUD_HOST": site.facts}
    return {
        "front_door": _component("provider.front_door", nofile=512),
        "multiplexing": _component(
            "provider.multiplexing",
            state=True,
            creates=["user"],
            own=COMPONENT_LIMITS,
            objects=MANY_OBJECTS,
        ),
        "disk": _component("provider.disk", state=True),
        "uplink": _component(
            "provider.uplink",
            environment={"SUPERCLOUD_UPLINK": site.uplink},
            state=True,
            network="host",
            tcp=True,  # it finds out which ports are free by binding them
            creates=["uplink-net", "uplink-net-closed"],
            own=COMPONENT_LIMITS,
        ),
        "admin": _component("provider.admin", environment=facts),
        "uplink-net": _uplink_net(site, "{0}-{1}", [[1, 65535], [1, 65535]]),
        "uplink-net-closed": _uplink_net(site, "", []),
    }


def _user_kinds(site: Site) -> dict[str, dict[str, Any]]:
    return {
        "user": _component(
            "user_domain",
            environment={"SUPERCLOUD_HOST": site.facts},
            state=True,
            proc=True,
            creates=["vmm", "link", *SERVICES],
            own=USER_OWN,
            objects=MANY_OBJECTS,
            nofile=4096,
        ),
        "vmm": _component(
            "vmm.monitor",
            restart=False,
            proc=True,
            devices=["/dev/kvm"] if site.accelerator == "kvm" else [],
            # QEMU asks for huge pages for the code that it translates to. Who emulates is mostly a
            # VM itself, and the memory below a free huge page of a VM has often been given back
            huge_pages=site.accelerator == "kvm",
        ),
        "link": _component("vmm.link", restart=False, proc=True, nests=True, tcp=True),
        **{name: _service(name, limits) for name, limits in SERVICES.items()},
    }


def _component(module: str, **more: Any) -> dict[str, Any]:
    argv = [*PYTHON, f"supercloud.lower.{module}"]
    return {"argv": argv, "restart": True, "limits": COMPONENT_LIMITS, **more}


def _service(name: str, limits: Mapping[str, int]) -> dict[str, Any]:
    """One of the user's services; what it had open is opened anew when it died."""
    more = {"nofile": 1024, **_SERVICE_FIELDS.get(name, {})}
    kind = _component("service", proc=True, limits=dict(limits), **more)
    return {**kind, "restart": False, "argv": [*kind["argv"], name]}


def _uplink_net(site: Site, ports: str, numbers: Sequence[Sequence[int]]) -> dict[str, Any]:
    forward = f"{site.publish}/{ports}" if ports else "none"
    dns = ["--dns", "none"]
    if site.dns_server:
        dns = ["--dns", UPLINK_DNS, "--dns-forward", UPLINK_DNS, "--dns-host", site.dns_server]
    argv = [
        *(PASST, "--foreground", "--quiet", "--ipv4-only", "--fd", "4"),
        *("--address", UPLINK_GUEST, "--netmask", "24", "--gateway", UPLINK_GATEWAY),
        *("--no-map-gw", *dns, "--search", "none"),
        *("--tcp-ports", forward, "--udp-ports", forward),
    ]
    return {
        "argv": argv,
        "numbers": numbers,
        "speaks": False,
        "descriptors": ["guest"],
        "network": "host",
        "tcp": True,
        "nests": True,
        "proc": True,
        "nofile": 8192,  # a TCP and a UDP socket for each published port, and the connections
        "limits": UPLINK_NET_LIMITS,
    }


def _peers_of(kind: str) -> Mapping[str, bool]:
    pairs = [(b, d) for a, b, d in PEERS if a == kind] + [(a, d) for a, b, d in PEERS if b == kind]
    return dict(pairs)
