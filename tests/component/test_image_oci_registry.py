"""Pulling from a real registry: Debian's docker-registry on loopback."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from supercloud.model.errors import Denied, NoResources, NotFound, Temporary
from supercloud.upper.environments.limits import Limits
from supercloud.upper.environments.oci import convert, look
from support.oci import extract, file, layer, listing
from support.registry import TOOLS, free_port, push, serving


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its ``host:port``."""
    with serving(tmp_path_factory.mktemp("registry")) as there:
        yield there


def test_an_image_is_pulled_once_and_found_by_digest_afterwards(
    registry: str, tmp_path: Path
) -> None:
    ref = push(registry, tmp_path, "team/web:v1", layer(file("a"), file("b")), layer(file(".wh.a")))
    image = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    assert listing(extract(image.path, tmp_path / "t", TOOLS)) == {"b"}
    made = image.path.stat()
    assert convert(ref.removeprefix("docker://"), cache=tmp_path / "cache", tools=TOOLS) == image
    again = image.path.stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert len(list((tmp_path / "cache/erofs").iterdir())) == 1


def test_a_moved_tag_is_noticed(registry: str, tmp_path: Path) -> None:
    ref = push(registry, tmp_path, "moving:latest", layer(file("old")))
    old = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    push(registry, tmp_path, "moving:latest", layer(file("new")))
    new = convert(ref, cache=tmp_path / "cache", tools=TOOLS)
    assert old.digest != new.digest
    assert listing(extract(new.path, tmp_path / "t", TOOLS)) == {"new"}


def test_what_the_registry_does_not_have_is_said(registry: str, tmp_path: Path) -> None:
    there = push(registry, tmp_path, "there:v1", layer(file("x")))
    look(there, cache=tmp_path / "cache", tools=TOOLS, timeout_s=10)
    for name in ("there:v2", "never/pushed:latest", f"there@sha256:{'0' * 64}"):
        ref = f"docker://{registry}/{name}"
        with pytest.raises(NotFound, match=r"no such image: .*unknown") as caught:
            convert(ref, cache=tmp_path / "cache", tools=TOOLS)
        assert "Error parsing" not in caught.value.message
        assert registry in caught.value.hint
        with pytest.raises(NotFound, match="no such image"):
            look(ref, cache=tmp_path / "cache", tools=TOOLS, timeout_s=10)


def test_a_registry_that_wants_a_password_is_told_from_one_that_has_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, closed=True) as closed, pytest.raises(Denied, match="refuses") as caught:
        look(f"docker://{closed}/x", cache=tmp_path / "cache", tools=TOOLS, timeout_s=10)
    assert f"docker login {closed}" in caught.value.hint


def test_an_image_named_by_its_digest_is_converted_without_its_registry(tmp_path: Path) -> None:
    with serving(tmp_path) as registry:
        ref = push(registry, tmp_path, "kept:v1", layer(file("x")))
        by_digest = f"docker://{registry}/kept@{digest_of(ref)}"
        made = convert(by_digest, cache=tmp_path / "cache", tools=TOOLS)
    look(by_digest, cache=tmp_path / "cache", tools=TOOLS, timeout_s=10)
    assert convert(by_digest, cache=tmp_path / "cache", tools=TOOLS) == made
    with pytest.raises(Temporary):
        look(ref, cache=tmp_path / "cache", tools=TOOLS, timeout_s=10)


def digest_of(ref: str) -> str:
    argv = ("inspect", "--tls-verify=false", "--format={{.Digest}}", ref)
    return TOOLS.run("skopeo", *argv).decode().strip()


def test_an_image_over_the_limits_is_refused_before_it_is_fetched(
    registry: str, tmp_path: Path
) -> None:
    ref = push(registry, tmp_path, "big:v1", layer(file("x", os.urandom(2 << 20))))
    with pytest.raises(NoResources, match="limits"):
        convert(ref, cache=tmp_path / "cache", tools=TOOLS, limits=Limits(total_bytes=1 << 20))


def test_a_registry_that_does_not_answer_is_a_temporary_trouble(tmp_path: Path) -> None:
    ref = f"docker://127.0.0.1:{free_port()}/x"
    with pytest.raises(Temporary):
        convert(ref, cache=tmp_path / "cache", tools=TOOLS)
