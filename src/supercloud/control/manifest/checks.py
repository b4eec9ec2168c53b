"""What is wrong with a manifest although each field by itself is right."""

import ipaddress
from collections.abc import Callable
from typing import Any

from supercloud.control.manifest import buckets, checkpoints, volumes
from supercloud.control.manifest.decode import BAD
from supercloud.control.manifest.problems import Problems, did_you_mean, listed
from supercloud.model.resources import (
    DEFAULT_NETWORK,
    Environment,
    Network,
    PlatformSize,
    Provider,
    replica_names,
)
from supercloud.model.sizes import format_size

# Ranges whose addresses nobody else can mean: RFC 1918, and RFC 6598's shared space.
PRIVATE = tuple(
    map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)
PREFIX_MIN, PREFIX_MAX = 8, 24  # a platform takes a /24


def check(values: dict[str, Any], problems: Problems) -> None:
    """Note every problem between fields of a UCloud; ``values`` are BAD where one is wrong."""
    kinds = ("providers", "networks", "environments", "volumes", "buckets")
    names = {kind: _names(kind, problems) for kind in kinds}
    for kind, there in names.items():
        _unique(kind, there, problems)
    _ranges(_good(values, "networks"), problems)
    for index, provider in _good(values, "providers"):
        _provider(f"providers[{index}]", provider, problems)
    environments = _good(values, "environments")
    _replicas(environments, problems)
    platform = values.get("platform", BAD)
    for index, environment in environments:
        path = f"environments[{index}]"
        _environment(path, environment, problems)
        _references(path, environment, names, problems)
        _wishes(path, environment, values, problems)
        for number, use in enumerate(environment.volumes):
            _known(f"{path}.volumes[{number}].name", use.name, names["volumes"], problems)
        for number, used in enumerate(environment.buckets):
            _known(f"{path}.buckets[{number}].name", used.name, names["buckets"], problems)
        if platform is not BAD:
            _fits(path, environment, platform, problems)
    volumes.check(environments, problems)
    whole = platform is not BAD and platform.checkpoint is not None
    checkpoints.check(environments, _good(values, "volumes"), problems, platforms=whole)
    buckets.check(_good(values, "buckets"), environments, problems)
    services = values.get("services", BAD)
    if services is not BAD:
        _known("services.objects.provider", services.objects.provider, names["providers"], problems)
        for wish in ("region", "jurisdiction"):
            wanted = getattr(services.objects, wish)
            _somewhere(f"services.objects.{wish}", wish, wanted, values, problems)
    volumes.check_copies(_good(values, "volumes"), environments, problems)
    for index, volume in _good(values, "volumes"):
        volumes.check_volume(f"volumes[{index}]", volume, problems)


def _good(values: dict[str, Any], name: str) -> list[tuple[int, Any]]:
    items = values.get(name, BAD)
    return [] if items is BAD else [(i, item) for i, item in enumerate(items) if item is not BAD]


def _unique(kind: str, names: list[str], problems: Problems) -> None:
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name and first.setdefault(name, index) != index:
            line = problems.marks[f"{kind}[{first[name]}]"].line
            message = f"found the name {name!r:.80} twice, first in line {line}"
            problems.at_path(f"{kind}[{index}].name", message)


def _replicas(environments: list[tuple[int, Environment]], problems: Problems) -> None:
    """``web-2`` may not be both an environment and the second replica of ``web``."""
    owner = {environment.name: environment.name for _, environment in environments}
    for index, environment in environments:
        for name in replica_names(environment)[1:]:
            if owner.setdefault(name, environment.name) != environment.name:
                message = f"its replica {name!r} has the name of another environment"
                problems.at_path(f"environments[{index}].replicas", message)


def _ranges(networks: list[tuple[int, Network]], problems: Problems) -> None:
    taken: list[tuple[str, ipaddress.IPv4Network]] = []
    for index, network in networks:
        path = f"networks[{index}].range"
        parsed = _range(path, network.range, problems) if network.range else None
        if parsed is None:
            continue
        for name, other in taken:
            if parsed.overlaps(other):
                message = f"found {network.range}, which overlaps {other} of network {name!r}"
                problems.at_path(path, message, hint="leave range out, and one is allotted")
        taken.append((network.name, parsed))


def _range(path: str, text: str, problems: Problems) -> ipaddress.IPv4Network | None:
    try:
        parsed = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        problems.at_path(path, f"found {text!r}, allowed is an IPv4 network such as 10.70.0.0/16")
        return None
    if str(parsed) != text:
        problems.at_path(path, f"found {text!r}, allowed is the network's own address: {parsed}")
    elif not PREFIX_MIN <= parsed.prefixlen <= PREFIX_MAX:
        wanted = f"a prefix length from {PREFIX_MIN} to {PREFIX_MAX}"
        problems.at_path(path, f"found {text!r}, allowed is {wanted}")
    elif not any(parsed.subnet_of(private) for private in PRIVATE):
        wanted = "a private range: one within " + listed(map(str, PRIVATE))
        problems.at_path(path, f"found {text!r}, allowed is {wanted}")
    return parsed


def _provider(path: str, provider: Provider, problems: Problems) -> None:
    port = int(provider.endpoint.rpartition(":")[2])
    if not 1 <= port <= 65535:
        problems.at_path(f"{path}.endpoint", f"found the port {port}, allowed is 1 to 65535")
    if provider.options and provider.kind != "fake":
        problems.at_path(f"{path}.options", "is of the provider kind 'fake' only", hint="remove it")


def _environment(path: str, environment: Environment, problems: Problems) -> None:
    if environment.kind == "vm":
        for field in ("command", "env"):
            if getattr(environment, field):
                message = "is for containers only: a virtual machine starts what its image says"
                problems.at_path(f"{path}.{field}", message, hint="remove it")
    seen = set()
    for index, port in enumerate(environment.ports):
        if (port.port, port.protocol) in seen:
            message = f"found {port.protocol} port {port.port} twice"
            problems.at_path(f"{path}.ports[{index}]", message)
        seen.add((port.port, port.protocol))


def _references(
    path: str, environment: Environment, names: dict[str, list[str]], problems: Problems
) -> None:
    placement = environment.placement
    _known(f"{path}.placement.provider", placement.provider, names["providers"], problems)
    if names["networks"]:
        _known(f"{path}.network", environment.network, names["networks"], problems)
    elif environment.network not in ("", DEFAULT_NETWORK):
        message = f"found {environment.network!r}, but the manifest has no networks"
        problems.at_path(f"{path}.network", message, hint="add it under networks")
    known = set(names["environments"])
    for index, name in enumerate(placement.anti_affinity):
        below = f"{path}.placement.anti_affinity[{index}]"
        if name not in known:
            _known(below, name, names["environments"], problems)
        if name == environment.name:
            hint = "placement.spread keeps replicas of one environment apart"
            problems.at_path(below, "an environment cannot be kept apart from itself", hint=hint)


def _names(kind: str, problems: Problems) -> list[str]:
    """All names that the file gives, in order, also of items that are wrong; "" without one."""
    node = problems.marks.get(kind)
    entries = [(item.entries or {}).get("name") for item in (node.items or [] if node else [])]
    return [entry[1].text or "" if entry else "" for entry in entries]


def _known(path: str, name: str, names: list[str], problems: Problems) -> None:
    if name and name not in names:
        message = f"found {name!r}, allowed is one of {listed(dict.fromkeys(filter(None, names)))}"
        problems.at_path(path, message, hint=did_you_mean(name, names[:1000]))


def _wishes(
    path: str, environment: Environment, values: dict[str, Any], problems: Problems
) -> None:
    for wish in ("region", "jurisdiction"):
        wanted = getattr(environment.placement, wish)
        _somewhere(f"{path}.placement.{wish}", wish, wanted, values, problems)


def _somewhere(
    path: str, wish: str, wanted: str, values: dict[str, Any], problems: Problems
) -> None:
    """A wish that no provider meets; one that does not say where it is may meet any."""
    items = values.get("providers", BAD)
    if not wanted or items is BAD or BAD in items:
        return
    # A fake provider may have several regions, in its options.
    offered = ["" if p.options.get(f"{wish}s") else getattr(p, wish) for p in items]
    if all(offered):
        _known(path, wanted, sorted(set(offered)), problems)


def _fits(path: str, environment: Environment, platform: PlatformSize, problems: Problems) -> None:
    shown: tuple[tuple[str, str, float, float, Callable[[Any], str]], ...] = (
        ("memory", "memory", environment.memory_bytes, platform.memory_bytes, format_size),
        ("cpus", "cpus", environment.cpus, platform.cpus, "{:g}".format),
        ("ports", "ports", _published(environment), platform.ports, str),
    )
    for field, of_platform, wanted, there, text in shown:
        if wanted > there:
            message = f"found {text(wanted)}, allowed is at most {text(there)}, a platform's size"
            problems.at_path(f"{path}.{field}", message, hint=f"raise platform.{of_platform}")


def _published(environment: Environment) -> int:
    return sum(port.publish for port in environment.ports)
