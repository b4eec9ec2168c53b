"""A bad manifest says file, line, field, what was found and what is allowed; all at once."""

from pathlib import Path

import pytest

from supercloud.control.manifest import MAX_BYTES, parse, where
from supercloud.model.errors import Invalid, Unsupported
from supercloud.model.resources import GIB, MIB, Placement, Port, replica_names, split_image
from supercloud.model.sizes import format_size, parse_size
from supercloud.upper.environments import layouts
from support import oci

HEAD = "apiVersion: supercloud.dev/v1\nkind: UCloud\nname: hello\n"
PROVIDERS = "providers: [{name: here, kind: fake}]\n"


def one(text: str, directory: Path = Path("/")) -> Invalid:
    with pytest.raises(Invalid) as caught:
        parse(text, file="m.yaml", directory=directory)
    return caught.value


def environment(**fields: object) -> str:
    lines = {"name": "web", "kind": "container", "image": "docker://r/web", **fields}
    return (
        HEAD
        + PROVIDERS
        + "environments:\n  - "
        + "\n    ".join(f"{k}: {v}" for k, v in lines.items())
    )


def test_the_smallest_manifest_is_completed():
    ucloud = parse(HEAD + PROVIDERS, file="m", directory=Path("/"))
    assert ucloud.providers[0].user == "hello"
    assert [network.name for network in ucloud.networks] == ["default"]
    assert ucloud.platform.memory_bytes == GIB


def test_fields_of_an_environment_are_read():
    text = environment(
        cpus=0.5,
        memory="64MiB",
        ports="[8080, {port: 53, protocol: udp, publish: false}]",
        env="{PORT: 8080, NORWAY: no}",
        command="[run, --now]",
        placement="{region: eu, anti_affinity: [other]}",
    )
    other = "\n  - {name: other, kind: container, image: 'docker://r/x'}"
    web = parse(text + other, file="m", directory=Path("/")).environments[0]
    assert (web.cpus, web.memory_bytes) == (0.5, 64 * MIB)
    assert web.ports == [Port(port=8080), Port(port=53, protocol="udp", publish=False)]
    assert web.env == {"PORT": "8080", "NORWAY": "no"}
    assert web.placement == Placement(region="eu", anti_affinity=["other"])
    assert web.network == "default"


@pytest.mark.parametrize(
    ("fields", "place", "message", "hint"),
    [
        ({"imgae": "x"}, "9:5 environments[0].imgae", "unknown field 'imgae'", "'image'"),
        ({"kind": "contaner"}, "7:11 environments[0].kind", "container, vm", "'container'"),
        ({"memory": "512M"}, "9:13 environments[0].memory", "found '512M'", "'512MiB'"),
        ({"memory": "1KiB"}, "9:13 environments[0].memory", "4MiB to 4TiB", ""),
        ({"cpus": '"2"'}, "9:11 environments[0].cpus", "found '2'", "without quotes"),
        ({"cpus": ".inf"}, "9:11 environments[0].cpus", "a number from 0.01 to 64", ""),
        ({"replicas": "1.5"}, "9:15 environments[0].replicas", "found 1.5", ""),
        ({"replicas": "9" * 400}, "9:15 environments[0].replicas", "whole number", ""),
        ({"ports": "[70000]"}, "9:13 environments[0].ports[0]", "from 1 to 65535", ""),
        ({"ports": "[80, {port: 80}]"}, "9:17 environments[0].ports[1]", "port 80 twice", ""),
        ({"restart": "yes"}, "9:14 environments[0].restart", "always, on-failure, never", ""),
        ({"name": "Web"}, "6:11 environments[0].name", "found 'Web'", ""),
        ({"name": ""}, "6:10 environments[0].name", "found nothing", ""),
        ({"env": "{A-B: 1}"}, "9:11 environments[0].env.A-B", "found the name 'A-B'", ""),
        ({"env": "[1]"}, "9:10 environments[0].env", "found a list of 1", ""),
        ({"network": "back"}, "9:14 environments[0].network", "has no networks", ""),
        ({"image": "web"}, "8:12 environments[0].image", "oci:PATH", "oci:web"),
        ({"image": "oci:nope"}, "8:12 environments[0].image", "there is no /nope", ""),
        ({"memory": "2GiB"}, "9:13 environments[0].memory", "at most 1GiB", "platform.memory"),
        ({"cpus": "4"}, "9:11 environments[0].cpus", "at most 1", "platform.cpus"),
        (
            {"placement": "{provider: her}"},
            "9:27 environments[0].placement.provider",
            "found 'her', allowed is one of here",
            "'here'",
        ),
        (
            {"placement": "{anti_affinity: [web]}"},
            "9:33 environments[0].placement.anti_affinity[0]",
            "kept apart from itself",
            "spread",
        ),
    ],
)
def test_a_wrong_field_is_located_and_explained(fields, place, message, hint):
    error = one(environment(**fields))
    assert len(error.details["errors"]) == 1, error.details
    assert error.where == f"m.yaml:{place}"
    assert message in error.message
    assert hint in error.hint


@pytest.mark.parametrize("word", ["isolation", "mobility", "survive"])
@pytest.mark.parametrize("place", ["top", "environment"])
def test_reserved_words_are_said_to_be_unsupported(word, place):
    text = environment(**{word: 1}) if place == "environment" else f"{HEAD}{PROVIDERS}{word}: []"
    with pytest.raises(Unsupported, match="reserved for a later version"):
        parse(text, file="m", directory=Path("/"))


def test_all_errors_are_told_together_in_the_order_of_the_file():
    error = one(
        HEAD + "services: 1\nproviders:\n  - {name: a, kind: fak}\n  - {name: a, kind: fake}\n"
        "networks: [{name: x, range: 10.0.0.0/16}, {name: y, range: 10.0.5.0/24}]\n"
    )
    places = [item["where"] for item in error.details["errors"]]
    assert places == [
        "m.yaml:4:11 services",
        "m.yaml:6:21 providers[0].kind",
        "m.yaml:7:12 providers[1].name",
        "m.yaml:8:60 networks[1].range",
    ]
    assert error.where == places[0]


def test_the_number_of_errors_that_are_told_is_bounded():
    error = one(HEAD + PROVIDERS + "\n".join(f"x{number}: 1" for number in range(5000)))
    assert len(error.details["errors"]) == 100
    assert error.details["count"] == 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("# nothing\n", "an empty file"),
        ("- 1\n", "found a list of 1, allowed is a mapping"),
        ("a: [", "not YAML"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("a: &x [*x]\n", "inside itself"),
        ("a: *x\n", "without its anchor|undefined alias"),
        ("a: 1\na: 2\n", "'a' twice, first in line 1"),
        ("a: !!python/object/apply:os.system [id]\n", "the tag"),
        ("? [1]\n: 2\n", "as a key"),
        (b"\xff\xfe\xfd", "not UTF-8"),
        ("a: \x07", "character that is not allowed"),
        ("a: " + "[" * 100, "deeper than 32"),
        ("a: " + "{a: " * 100, "deeper than 32"),
        ("[" * 500_000, "deeper than 32"),
        ("a: [" + "1," * 200_000, "more than 100000 values"),
        ("x" * (MAX_BYTES + 1), "at most 1048576"),
    ],
)
def test_what_is_no_manifest_is_refused(text, message):
    with pytest.raises(Invalid, match=message):
        parse(text, file="m", directory=Path("/"))


def test_a_bomb_of_aliases_is_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
    )
    with pytest.raises(Invalid, match="aliases counted in full"):  # to unfold it would never end
        parse(bomb, file="m", directory=Path("/"))


def test_an_alias_stands_for_its_anchor():
    text = (
        HEAD
        + PROVIDERS
        + (
            "environments:\n"
            "  - {name: a, kind: container, image: 'docker://r/x', ports: &p [80]}\n"
            "  - {name: b, kind: container, image: 'docker://r/x', ports: *p}\n"
        )
    )
    assert parse(text, file="m", directory=Path("/")).environments[1].ports == [Port(port=80)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10.0.0.0/7", "prefix length from 8 to 24"),
        ("10.0.0.0/25", "prefix length from 8 to 24"),
        ("10.0.0.1/16", "the network's own address: 10.0.0.0/16"),
        ("8.8.0.0/16", "a private range"),
        ("10.0.0.300/16", "an IPv4 network"),
        ("fd00::/64", "an IPv4 network"),
    ],
)
def test_a_network_is_private_and_holds_a_platform(text, message):
    assert message in one(f"{HEAD}{PROVIDERS}networks: [{{name: x, range: '{text}'}}]").message


def test_a_replica_must_not_take_the_name_of_an_environment():
    text = environment(replicas=3) + "\n  - {name: web-3, kind: container, image: 'docker://r/x'}"
    assert "replica 'web-3'" in one(text).message


def test_a_machine_has_no_command_of_its_own(tmp_path):
    (tmp_path / "disk.qcow2").touch()
    error = one(environment(kind="vm", image="disk.qcow2", command="[sh]", env="{A: 1}"), tmp_path)
    assert [item["where"].split()[1] for item in error.details["errors"]] == [
        "environments[0].command",
        "environments[0].env",
    ]


def test_images_are_looked_for_beside_the_manifest(tmp_path):
    layout = tmp_path / "images" / "web"
    oci.Layout(layout, tag="v1").write()
    base = tmp_path / "manifests"
    base.mkdir()
    ucloud = parse(environment(image="oci:../images/web:v1"), file="m", directory=base)
    assert ucloud.environments[0].image == f"oci:{layout}:v1"
    (layout / "index.json").unlink()
    assert "not an OCI layout" in one(environment(image="oci:../images/web"), base).message
    with_nul = one(environment(image='"oci:a\\0b"'), base)
    assert "NUL" in with_nul.message
    assert "cannot be read" in one(environment(image="oci:" + "a" * 300), base).message


def test_a_layout_that_has_no_such_tag_or_no_content_is_refused(tmp_path):
    layout = tmp_path / "web"
    oci.Layout(layout, [oci.layer(oci.file("a"))], tag="v1").write()
    error = one(environment(image="oci:web:v2"), tmp_path)
    assert (error.where, error.message) == (
        "m.yaml:8:12 environments[0].image",
        "found 'oci:web:v2': the layout has no image v2; its tags: v1",
    )
    for blob in (layout / "blobs" / "sha256").iterdir():
        blob.unlink()
    assert "lacks the blob sha256:" in one(environment(image="oci:web:v1"), tmp_path).message


def test_a_layout_that_is_malformed_or_cannot_be_read_is_refused(tmp_path, monkeypatch):
    layout = oci.Layout(tmp_path / "web")
    layout.write()
    layout.index([{"annotations": [1]}])
    assert "not a digest" in one(environment(image="oci:web"), tmp_path).message

    def refuse(path, _flags):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(layouts.os, "open", refuse)
    message = one(environment(image="oci:web"), tmp_path).message
    assert (
        message == f"found 'oci:web': {tmp_path}/web/index.json cannot be read: Permission denied"
    )


def test_an_archive_is_looked_into_and_takes_no_tag(tmp_path):
    image = oci.docker_archive(tmp_path / "web.tar", [oci.layer(oci.file("a"))])
    assert parse(environment(image=image), file="m", directory=tmp_path)
    error = one(environment(image="docker-archive:web.tar:v1"), tmp_path)
    assert "there is no " in error.message
    assert "leave :v1 out" in error.hint
    (tmp_path / "web.tar").write_bytes(oci.layer(oci.file("a")))
    assert "'manifest.json'" in one(environment(image="docker-archive:web.tar"), tmp_path).message


@pytest.mark.parametrize("image", ["docker://Bad Name", "docker://r/UPPER", "docker:nginx"])
def test_what_names_nothing_in_any_registry_is_refused(image):
    assert "docker://host[:port]/name[:tag]" in one(environment(image=f"'{image}'")).hint


def test_without_looking_for_images_a_manifest_is_read_without_them():
    text = environment(image="oci:nowhere")
    ucloud = parse(text, file="m", directory=Path("/"), images=False)
    assert ucloud.environments[0].image == "oci:nowhere"


def test_a_region_that_no_provider_has_is_refused():
    text = environment(placement="{region: eu-wset}").replace(
        "kind: fake}", "kind: fake, region: eu-west}"
    )
    assert "'eu-west'" in one(text).hint


def test_where_locates_a_field_of_a_manifest():
    text = environment(placement="{region: eu}")
    assert where(text, file="m", path="environments[0].placement.region") == (
        "m:9:25 environments[0].placement.region"
    )
    by_name = "environments.web.placement.region"
    assert where(text, file="m", path=by_name).endswith(":9:25 environments[0].placement.region")
    assert where(text, file="m", path="environments.none") == "m:6:3 environments.none"
    assert where(text, file="m", path="environments[0].cpus") == "m:6:5 environments[0].cpus"


def test_a_machine_of_a_directory_has_kernel_and_initrd(tmp_path):
    (tmp_path / "vm").mkdir()
    text = environment(kind="vm", image="vm")
    assert "has no kernel and no initrd" in one(text, tmp_path).message
    for name in ("kernel", "initrd"):
        (tmp_path / "vm" / name).touch()
    assert parse(text, file="m", directory=tmp_path).environments[0].image == str(tmp_path / "vm")


def test_replicas_are_named_so_that_the_first_keeps_its_name():
    web = parse(environment(replicas=3), file="m", directory=Path("/")).environments[0]
    assert replica_names(web) == ["web", "web-2", "web-3"]


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("oci:a/b", ("oci", "a/b", "")),
        ("oci:/a:b/c", ("oci", "/a:b/c", "")),
        ("oci:a/b:v1", ("oci", "a/b", "v1")),
        ("docker://r:5000/a:v1", ("docker", "r:5000/a:v1", "")),
        ("docker-archive:/x.tar", ("docker-archive", "/x.tar", "")),
        ("disk.qcow2", ("", "disk.qcow2", "")),
        ("odd:name", ("", "odd:name", "")),
    ],
)
def test_the_forms_of_images(image, parts):
    assert split_image(image) == parts


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("0", 0), ("1536", 1536), ("1.5KiB", 1536), ("4TiB", 1 << 42)]
)
def test_sizes(text, size_bytes):
    assert parse_size(text) == size_bytes
    assert parse_size(format_size(size_bytes)) == size_bytes


@pytest.mark.parametrize("text", ["", "1 MiB", "1mib", "-1", "1.MiB", ".5GiB", "1e3", "٣MiB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="128MiB"):
        parse_size(text)
