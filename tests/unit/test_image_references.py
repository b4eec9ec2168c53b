"""Image references and image configs: what is read, and what is refused."""

import pytest

from supercloud.model.errors import Invalid
from supercloud.upper.environments.config import parse_config
from supercloud.upper.environments.references import parse_reference


@pytest.mark.parametrize(
    ("text", "transport", "place", "tag"),
    [
        ("oci:build/web", "oci", "build/web", ""),
        ("oci:build/web:v1.2", "oci", "build/web", "v1.2"),
        ("oci:/with:colon/web", "oci", "/with:colon/web", ""),
        ("docker-archive:x.tar", "docker-archive", "x.tar", ""),
        ("nginx", "docker", "docker.io/library/nginx", "latest"),
        ("team/app:1", "docker", "docker.io/team/app", "1"),
        ("docker://localhost:5000/a/b", "docker", "localhost:5000/a/b", "latest"),
        ("127.0.0.1:5000/a:t", "docker", "127.0.0.1:5000/a", "t"),
        ("[::1]:5000/a:t", "docker", "[::1]:5000/a", "t"),
        ("ghcr.io/x/y_z:1", "docker", "ghcr.io/x/y_z", "1"),
    ],
)
def test_references_are_read(text: str, transport: str, place: str, tag: str) -> None:
    reference = parse_reference(text)
    assert (reference.transport, reference.place, reference.tag) == (transport, place, tag)


def test_a_digest_stands_for_the_tag() -> None:
    digest = "sha256:" + "a" * 64
    reference = parse_reference(f"docker://h.example/x@{digest}")
    assert (reference.tag, reference.digest) == ("", digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "oci:",
        "docker-archive:",
        "docker://",
        "UPPER/case",
        "--help",
        "docker://-x/y",
        "docker://h/../x",
        "docker://h/x y",
        "a\nb",
        "x" * 5000,
        "docker://h/x@sha256:12",
        "docker://user@h/x",
    ],
)
def test_bad_references_are_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse_reference(text)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("localhost/x", True),
        ("127.0.0.1:5000/x", True),
        ("[::1]:5000/x", True),
        ("localhost.evil.example/x", False),
        ("127.0.0.1.evil.example/x", False),
        ("10.0.0.1:5000/x", False),
        ("nginx", False),
    ],
)
def test_plain_http_is_for_this_machine_only(text: str, *, loopback: bool) -> None:
    assert parse_reference(text).is_loopback is loopback


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"Env": ["no-equals"]},
        {"Env": ["=x"]},
        {"Env": "A=1"},
        {"Cmd": [1]},
        {"Cmd": ["a\0b"]},
        {"Cmd": ["x"] * 5000},
        {"User": 5},
        {"WorkingDir": "x" * (1 << 20)},
        {"ExposedPorts": {"0/tcp": {}}},
        {"ExposedPorts": {"65536": {}}},
        {"ExposedPorts": {"80/http": {}}},
        {"ExposedPorts": {"²/tcp": {}}},
    ],
)
def test_bad_configs_are_refused(config: object) -> None:
    with pytest.raises(Invalid):
        parse_config(config, where="x")
