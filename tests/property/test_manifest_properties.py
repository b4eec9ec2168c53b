"""Whatever is given as a manifest, only a UserError comes of it; what is right survives a dump."""

import string
from dataclasses import replace
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supercloud.control.manifest import dump, parse
from supercloud.model.errors import UserError
from supercloud.model.resources import (
    Checkpointing,
    Environment,
    Network,
    Placement,
    Platform,
    Port,
    Provider,
    UCloud,
)
from supercloud.model.sizes import format_size, parse_size

KEYS = st.sampled_from(
    [
        *("apiVersion", "kind", "name", "providers", "environments", "networks", "platform"),
        *("image", "command", "cpus", "memory", "env", "ports", "replicas", "restart"),
        *("placement", "provider", "region", "spread", "anti_affinity", "range", "volumes"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["supercloud.dev/v1", "UCloud", "fake", "vm", "container", "128MiB", "web"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(KEYS, st.text(max_size=8)), inner)
    ),
    max_leaves=30,
)
PIECES = st.sampled_from(
    [*"[]{}:,-?&*!|>'\"%@`#\n \t~", "a", "&a", "*a", "<<: ", "---\n", "...\n", "!!str", '"\\UFFFFFFFF"',
     "name: x\n", "- ", "\x00", "\u2028", "\ud800", "%YAML 9.9\n", "9" * 30]
)  # fmt: skip


def only_user_errors(untrusted: str | bytes) -> None:
    error = None
    try:
        parse(untrusted, file="m", directory=Path("/"))
    except UserError as caught:
        error = caught
    assert error is None or (error.message and error.where.startswith("m:"))
    assert error is None or error.details["errors"]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes(untrusted):
    only_user_errors(untrusted)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_yaml_like_text(untrusted):
    only_user_errors(untrusted)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(KEYS, TREES))
def test_any_tree_under_the_right_keys(tree):
    only_user_errors(yaml.safe_dump(tree))


LETTERS = string.ascii_lowercase
NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,10}[a-z])?", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
SIZES = st.integers(4 << 20, 1 << 30)


def listed(item, max_size=4):
    """Items with names that differ."""
    return st.lists(item, max_size=max_size, unique_by=lambda one: one.name)


PROVIDERS = st.builds(
    Provider,
    name=NAMES,
    kind=st.just("fake"),
    user=NAMES,
    jurisdiction=TEXTS,
    options=st.dictionaries(NAMES.map(lambda name: name.replace("-", "_")), TEXTS, max_size=2),
)
PORTS = st.lists(
    st.builds(Port, port=st.integers(1, 65535), protocol=st.sampled_from(["tcp", "udp"]), publish=st.booleans()),
    max_size=3,
    unique_by=lambda port: (port.port, port.protocol),
)  # fmt: skip
CHECKPOINTS = st.builds(
    Checkpointing, every_s=st.just(0) | st.integers(10, 30 * 86400), keep=st.integers(1, 100)
)
ENVIRONMENTS = st.builds(
    Environment,
    name=NAMES,
    kind=st.just("container"),
    image=NAMES.map("docker://registry/{}".format),
    command=st.lists(TEXTS, max_size=3),
    cpus=st.floats(0.01, 1.0),
    memory_bytes=SIZES,
    env=st.dictionaries(st.from_regex("[A-Z_]{1,8}", fullmatch=True), TEXTS, max_size=3),
    ports=PORTS,
    replicas=st.integers(0, 1),
    restart=st.sampled_from(["always", "on-failure", "never"]),
    checkpoint=st.none() | CHECKPOINTS,
    placement=st.builds(Placement, spread=st.sampled_from(["none", "host", "provider", "region"])),
)
UCLOUDS = st.builds(
    UCloud,
    name=NAMES,
    providers=listed(PROVIDERS).filter(bool),
    environments=listed(ENVIRONMENTS),
    networks=st.builds(Network, name=NAMES, range=st.sampled_from(["", "10.70.0.0/16"])).map(lambda n: [n]),
    platform=st.builds(
        Platform,
        scratch_bytes=st.integers(64 << 20, 1 << 40),
        checkpoint=st.none() | CHECKPOINTS,
    ),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(UCLOUDS)
def test_a_manifest_survives_a_dump(ucloud):
    network = ucloud.networks[0].name
    complete = replace(
        ucloud, environments=[replace(item, network=network) for item in ucloud.environments]
    )
    assert parse(dump(complete), file="m", directory=Path("/")) == complete


@given(st.integers(0, 10**17))
def test_a_size_survives_being_written(size_bytes):
    assert parse_size(format_size(size_bytes)) == size_bytes
