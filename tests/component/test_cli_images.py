"""Images that are not there are refused by ``plan`` and ``up`` before anything is stored."""

import pytest

from supercloud.model.errors import STATUS
from support import oci
from support.commandline import CommandLine, control_plane, wait_for
from support.registry import free_port, push, serving

MANIFEST = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: {name}
providers: [{{name: cloud, kind: fake}}]
environments:
"""
LAYER = oci.layer(oci.file("serve", b"x", mode=0o755))


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("images"))
    with control_plane(line):
        yield line


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    place = tmp_path_factory.mktemp("registry")
    with serving(place) as there:
        push(there, place, "team/web:v1", LAYER)
        yield there


def manifest(line, name, *images):
    """Write one of containers of these images: each in a line of its own, from line 6 on."""
    rows = [f"  - {{name: e{n}, kind: container, image: '{i}'}}\n" for n, i in enumerate(images)]
    (line.directory / f"{name}.yaml").write_text(MANIFEST.format(name=name) + "".join(rows))
    return f"{name}.yaml"


def refused(line, file, status):
    """What ``plan`` and ``up`` say alike; nothing is there afterwards."""
    said = [line.run(command, file, status=STATUS[status][1]).stderr for command in ("plan", "up")]
    assert said[0] == said[1]
    name = file.removesuffix(".yaml")
    assert name not in line.run("ls", "-q").stdout.split()
    line.run("inspect", name, status=STATUS["not_found"][1])
    assert [event for event in line.run("events").stdout.splitlines() if name in event] == []
    return said[0]


def test_what_a_registry_does_not_have(line, registry):
    images = [f"docker://{registry}/{name}" for name in ("team/web:v1", "team/web:v2", "none:v1")]
    said = refused(line, manifest(line, "absent", *images), "not_found")
    assert f"error: absent.yaml:7:40 environments[1].image: found '{images[1]}': " in said
    assert f"error: absent.yaml:8:40 environments[2].image: found '{images[2]}': " in said
    assert "environments[0]" not in said
    assert said.count("the registry has no such image: ") == 2
    assert said.count("  what to do: check name and tag, or push the image to ") == 2


def test_what_a_registry_does_not_give(line, registry, tmp_path):
    with serving(tmp_path, closed=True) as closed:
        one, other = f"docker://{closed}/web:v1", f"docker://{registry}/team/web:v2"
        said = refused(line, manifest(line, "closed", one), "denied")
        assert (
            f"closed.yaml:6:40 environments[0].image: found '{one}': the registry refuses" in said
        )
        assert f"what to do: check the name; for a private image docker login {closed}" in said
        both = refused(line, manifest(line, "both", one, other), "invalid")
        assert both.count("error: both.yaml:") == 2


@pytest.mark.parametrize("tag", ["v2", "latest"])
def test_what_a_layout_does_not_have(line, tag):
    oci.Layout(line.directory / "layout", [LAYER], tag="v1").write()
    said = refused(line, manifest(line, "layout", f"oci:layout:{tag}"), "invalid")
    assert "layout.yaml:6:40 environments[0].image: found 'oci:layout:" in said
    assert f"the layout has no image {tag}; its tags: v1" in said
    assert "what to do: name one of its tags" in said


def test_a_registry_that_cannot_be_reached_refuses_nothing(line):
    """The pull is tried again, and says why meanwhile."""
    file = manifest(line, "later", f"docker://127.0.0.1:{free_port()}/x")
    assert "+ environment/e0" in line.run("plan", file).stdout
    line.run("up", "--no-wait", file)

    def said():
        return "connection refused" in str(line.json("inspect", "later"))

    wait_for(said, 60)
    line.run("down", "later")


def test_what_was_pulled_is_gone_on_with_although_its_registry_is_gone(line, tmp_path):
    with serving(tmp_path) as registry:
        image = push(registry, tmp_path, "web:v1", LAYER)
        file = manifest(line, "pulled", image)
        line.run("up", file)
    assert "pulled: nothing to change" in line.run("up", file).stdout
    manifest(line, "pulled", image.replace(":v1", ":v2"))
    assert "~ environment/e0" in line.run("plan", file).stdout


def test_a_manifest_whose_image_is_gone_can_be_taken_down(line):
    oci.Layout(line.directory / "brief", [LAYER], tag="v1").write()
    file = manifest(line, "short", "oci:brief:v1")
    line.run("up", file)
    (line.directory / "brief").rename(line.directory / "elsewhere")
    line.run("plan", file, status=STATUS["invalid"][1])
    assert "short is gone" in line.run("down", file).stdout
