"""``supercloud buckets`` and ``services``, and what else of the command line tells of buckets."""

import re

import pytest

from supercloud.model.errors import STATUS
from support import oci
from support.commandline import CommandLine, control_plane

MANIFEST = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: {name}
providers: [{{name: cloud, kind: fake, options: {{hosts: 2}}}}]
buckets:
  - {{name: photos, quota: {quota}, versioning: true, expire_days: 30}}
environments:
  - {{name: web, kind: container, image: 'oci:web', buckets: [{{name: photos}}]}}
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    layer = oci.layer(oci.file("serve", b"serve"))
    oci.Layout(line.directory / "web", [layer], {"Cmd": ["/serve"]}).write()
    with control_plane(line):
        line.run("up", manifest(line))
        yield line


def manifest(line, name="stored", quota="1GiB"):
    (line.directory / f"{name}.yaml").write_text(MANIFEST.format(name=name, quota=quota))
    return f"{name}.yaml"


def test_plan_and_up_tell_of_the_bucket(line):
    file = manifest(line, "told", "2GiB")
    planned = line.run("plan", file).stdout
    assert re.search(r"^\+ bucket/photos  \(2GiB, at cloud/cloud-\d\)$", planned, re.MULTILINE)
    done = line.run("up", file).stdout
    assert re.search(r"^ok objects: start the object store \([0-9.]+ s\)$", done, re.MULTILINE)
    smaller = line.run("plan", manifest(line, "told", "1GiB")).stdout
    assert "~ bucket/photos  (quota 2GiB -> 1GiB)" in smaller
    error = line.run("plan", manifest(line, "told", "4TiB"), status=STATUS["no_resources"][1])
    assert re.match(r"error: told.yaml:6:\d+ buckets\[0\].quota: the store of all", error.stderr)
    assert "kept" not in line.run("down", "told", "--volumes").stdout


def test_the_list_says_where_each_is_and_who_uses_it(line):
    header, row = line.run("buckets").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "QUOTA", "USED", "OBJECTS"]
    assert re.match(r"photos +1GiB +0B +0 +ready +cloud/cloud-\d +web:write +versioning, exp", row)
    (shown,) = line.json("buckets", "list")
    assert (shown["ucloud"], shown["used_by"]) == ("stored", {"web": "write"})
    assert [row["name"] for row in line.json("buckets", "--ucloud", "stored")] == ["photos"]


def test_inspect_shows_the_store_and_no_secret(line):
    text = line.run("buckets", "inspect", "photos").stdout
    assert "store_capacity_bytes: 1GiB" in text
    assert "undetected_rollback: at most 5 s" in text
    assert re.search(r"wrapping_key: [0-9a-f]{16}$", text, re.MULTILINE)
    assert "photos: write" in line.run("inspect", "stored/web").stdout
    shown = text + line.run("inspect", "stored", "--json").stdout
    assert "secret" not in shown
    assert "access_key" not in shown


def test_services_are_listed(line):
    header, row = line.run("services").stdout.splitlines()
    assert header.split()[:3] == ["SERVICE", "PROVIDER/HOST", "STATE"]
    assert re.match(r"objects +cloud/cloud-\d +running +100.0MiB", row)
    assert line.json("services", "--ucloud", "stored")[0]["kind"] == "objects"


def test_down_says_what_it_keeps_and_delete_deletes(line):
    line.run("up", manifest(line, "brief"))
    refused = line.run("buckets", "delete", "brief/photos", status=STATUS["bad_state"][1]).stderr
    assert "supercloud down brief" in refused
    ambiguous = line.run("buckets", "inspect", "photos", status=STATUS["not_found"][1]).stderr
    assert "brief/photos, stored/photos" in ambiguous
    assert "kept, with their data: photos (supercloud buckets)" in line.run("down", "brief").stdout
    assert re.search(r"^brief/photos .* kept ", line.run("buckets").stdout, re.MULTILINE)
    done = line.run("buckets", "delete", "brief/photos").stdout
    assert "is gone, with all that was in it" in done
    assert [row["ucloud"] for row in line.json("buckets")] == ["stored"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["buckets", "what"], 2, "invalid choice"),
        (["buckets", "inspect"], 2, "a bucket is missing"),
        (["buckets", "inspect", "nothing"], 3, "no bucket 'nothing'"),
        (["buckets", "inspect", "stored/nothing"], 3, "has no bucket nothing"),
    ],
)
def test_wrong_words_are_told(line, words, status, message):
    error = line.run(*words, status=status).stderr
    assert message in error
    assert error.startswith("error: ")


def test_completion_offers_actions_and_buckets(line):
    def offered(*words):
        return line.run("_complete", "--", *words).stdout.split()

    assert offered("buckets", "") == ["list", "inspect", "delete"]
    assert offered("buckets", "inspect", "") == ["photos", "stored/photos"]
    assert "services" in offered("")
