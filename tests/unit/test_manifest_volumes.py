"""What a manifest may say of volumes, and how it is told what it may not."""

from pathlib import Path

import pytest

from supercloud.control.manifest import dump, parse
from supercloud.model.errors import Invalid
from supercloud.model.resources import GIB, MIB, Volume, VolumeUse
from support import oci

HEAD = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: u
providers: [{name: f, kind: fake}]
volumes:
  - {name: data, size: 1GiB}
  - {name: other, size: 64MiB, format: raw, iops: 100, bandwidth: 10MiB}
environments:
"""


@pytest.fixture
def images(tmp_path):
    oci.Layout(tmp_path / "web").write()
    (tmp_path / "disk.raw").write_bytes(b"\0")
    return tmp_path


def container(uses, name="web", more=""):
    return (
        f"  - {{name: {name}, kind: container, image: 'oci:web', volumes: [{uses}]"
        f"{', ' + more if more else ''}}}\n"
    )


def vm(uses, name="db"):
    return f"  - {{name: {name}, kind: vm, image: disk.raw, volumes: [{uses}]}}\n"


def parsed(directory: Path, body: str):
    return parse(HEAD + body, file="m.yaml", directory=directory)


def problems(directory: Path, body: str) -> list[dict[str, str]]:
    with pytest.raises(Invalid) as caught:
        parsed(directory, body)
    return caught.value.details["errors"]


def test_volumes_and_their_users(images):
    ucloud = parsed(images, container("{name: data, path: /var/lib/x}") + vm("{name: other}"))
    assert ucloud.volumes == [
        Volume(name="data", size_bytes=GIB),
        Volume(name="other", size_bytes=64 * MIB, format="raw", iops=100, bytes_per_s=10 * MIB),
    ]
    web, db = ucloud.environments
    assert web.volumes == [VolumeUse(name="data", path="/var/lib/x")]
    assert db.volumes == [VolumeUse(name="other")]
    assert parse(dump(ucloud), file="m", directory=images) == ucloud


def test_several_may_read_one_volume(images):
    reading = "{name: data, path: /d, read_only: true}"
    assert parsed(images, container(reading) + container(reading, "web2"))


@pytest.mark.parametrize(
    ("body", "where", "message", "hint"),
    [
        (container("{name: dta, path: /d}"), "volumes[0].name", "one of data, other", "'data'"),
        (container("{name: data}"), "volumes[0].path", "required and missing", ""),
        (container("{name: data, path: d}"), "volumes[0].path", "an absolute path", ""),
        (container("{name: data, path: /}"), "volumes[0].path", "a path below /", ""),
        (container("{name: data, path: /a/../b}"), "volumes[0].path", "a path below /", ""),
        (container("{name: data, path: //a}"), "volumes[0].path", "a path below /", ""),
        (container("{name: data, path: /proc/x}"), "volumes[0].path", "the kernel's", ""),
        (
            container("{name: data, path: /a}, {name: other, path: /a}"),
            "volumes[1].path", "'/a' twice", "",
        ),
        (
            container("{name: data, path: /a}, {name: data, path: /b}"),
            "volumes[1].name", "'data' twice", "",
        ),
        (container("{name: data, path: /a}", more="replicas: 2"), "replicas", "one user", "each"),
        (vm("{name: data, path: /a}"), "volumes[0].path", "containers only", "serial is data"),
    ],
)  # fmt: skip
def test_a_wrong_use_is_located_and_explained(images, body, where, message, hint):
    (error,) = problems(images, body)
    assert error["where"].startswith("m.yaml:9:")
    assert error["where"].endswith(f" environments[0].{where}")
    assert message in error["message"]
    assert hint in error.get("hint", "")


@pytest.mark.parametrize("reader", [0, 1])
def test_one_writer_and_one_reader_are_two_users_too(images, reader):
    uses = ["{name: data, path: /d}", "{name: data, path: /d}"]
    uses[reader] = "{name: data, path: /d, read_only: true}"
    (error,) = problems(images, container(uses[0]) + container(uses[1], "web2"))
    assert error["where"].endswith("environments[1].volumes[0].name")
    assert "which 'web' uses already" in error["message"]


def test_a_virtual_machines_volume_has_a_name_that_fits_a_serial(images):
    body = vm("{name: averyveryverylongname}")
    text = HEAD.replace("name: other", "name: averyveryverylongname") + body
    with pytest.raises(Invalid, match="at most 20 characters"):
        parse(text, file="m.yaml", directory=images)


def test_more_volumes_than_a_platform_takes_are_refused(images):
    many = "".join(f"  - {{name: v{n}, size: 1MiB}}\n" for n in range(9))
    uses = ", ".join(f"{{name: v{n}, path: /v{n}}}" for n in range(9))
    text = HEAD.replace("environments:", many + "environments:") + container(uses)
    with pytest.raises(Invalid, match="a list of 0 to 8"):
        parse(text, file="m.yaml", directory=images)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: 1GiB", "size: 1KiB", "1MiB to 16TiB"),
        ("size: 1GiB", "format: raw", "is required and missing"),
        ("format: raw", "format: vmdk", "one of qcow2, raw"),
        ("name: other", "name: data", "twice"),
        ("iops: 100", "iops: -1", "a whole number from 0"),
        ("iops: 100", "iops: 5", "0 (no limit), or 10 to"),
        ("bandwidth: 10MiB", "bandwidth: 1KiB", "0 (no limit), or 65536 to"),
        ("bandwidth: 10MiB", "bandwidth: 2TiB", "0 (no limit), or 65536 to"),
        ("size: 64MiB", "size: 67108865", "a multiple of 4096"),
    ],
)
def test_a_wrong_volume_is_refused(images, old, new, message):
    with pytest.raises(Invalid) as caught:
        parse(HEAD.replace(old, new) + "  []\n", file="m.yaml", directory=images)
    assert message in caught.value.message
