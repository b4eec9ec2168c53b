"""``supercloud volumes`` and what else of the command line tells of volumes."""

import re
import time

import pytest

from supercloud.model.errors import STATUS
from support.commandline import CommandLine, control_plane

MANIFEST = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: {name}
providers: [{{name: cloud, kind: fake, options: {{hosts: 2}}}}]
volumes:
  - {{name: data, size: {size}}}
environments:
  - {{name: db, kind: vm, image: disk.raw, volumes: [{{name: data}}]}}
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    (line.directory / "disk.raw").write_bytes(b"\0" * 4096)
    with control_plane(line):
        line.run("up", manifest(line))
        yield line


def manifest(line, name="stored", size="1GiB"):
    (line.directory / f"{name}.yaml").write_text(MANIFEST.format(name=name, size=size))
    return f"{name}.yaml"


def test_plan_and_up_tell_of_the_volume(line):
    file = manifest(line, "told", "2GiB")
    planned = line.run("plan", file).stdout
    assert re.search(r"^\+ volume/data  \(2GiB, qcow2, at cloud/cloud-\d\)$", planned, re.MULTILINE)
    done = line.run("up", file).stdout
    assert re.search(r"^ok volume/data: open it \([0-9.]+ s\)$", done, re.MULTILINE)
    assert re.search(r"^ok volume/data: attach it to its platform", done, re.MULTILINE)
    larger = line.run("plan", manifest(line, "told", "3GiB")).stdout
    assert "~ volume/data  (size 2GiB -> 3GiB)" in larger
    error = line.run("plan", manifest(line, "told", "1GiB"), status=2).stderr
    assert re.match(r"error: told.yaml:6:\d+ volumes\[0\].size: found 1GiB, allowed is at", error)
    gone = line.run("down", "told", "--volumes").stdout
    assert "kept" not in gone


def test_the_list_says_where_each_is_and_who_uses_it(line):
    header, row = line.run("volumes").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "SIZE", "FORMAT", "STATE"]
    assert re.match(r"data +1GiB +qcow2 +attached +cloud/cloud-\d +db", row)
    (shown,) = line.json("volumes", "list")
    assert (shown["ucloud"], shown["used_by"]) == ("stored", ["db"])
    assert [row["name"] for row in line.json("volumes", "--ucloud", "stored")] == ["data"]


def test_inspect_of_an_environment_and_of_a_volume_say_how_far_a_rollback_may_go(line):
    shown = line.run("inspect", "stored/db").stdout
    assert "undetected_rollback: at most 5 s" in shown
    assert "mode: vhost-user-blk" in shown
    text = line.run("volumes", "inspect", "data").stdout
    assert "undetected_rollback: at most 5 s" in text
    assert "epoch: 1" in text
    assert line.json("volumes", "inspect", "stored/data")["seal"]["epoch"] >= 1


def test_what_goes_through_is_shown_once_it_is_known(line):
    for _ in range(200):
        (row,) = line.json("volumes")
        if row["rates"]:
            break
        time.sleep(0.1)
    assert row["rates"]["interval_s"] >= 1
    header, shown = line.run("volumes").stdout.splitlines()
    assert header.split()[-2:] == ["READ", "WRITTEN"]
    assert shown.split()[-4:] == ["0B/s", "0/s", "0B/s", "0/s"]
    for words in (("inspect", "stored/db"), ("volumes", "inspect", "data")):
        assert "write_bytes_per_s: 0" in line.run(*words).stdout


def test_snapshots(line):
    done = line.run("volumes", "snapshot", "data", "first").stdout
    assert done == "stored/data has the snapshot first\n"
    assert "first" in line.run("volumes").stdout
    error = line.run("volumes", "revert", "data", "first", status=STATUS["bad_state"][1]).stderr
    assert "in use" in error
    assert "supercloud down stored" in error
    line.run("volumes", "forget-snapshot", "data", "first")
    assert line.json("volumes")[0]["snapshots"] == []


def test_the_key_is_rotated(line):
    done = line.run("volumes", "rotate-key", "stored").stdout
    assert re.fullmatch(r"the keys of 1 volumes are wrapped under [0-9a-f]{16}\n", done)
    line.run("volumes", "rotate-key", "nobody", status=STATUS["not_found"][1])


def test_down_says_what_it_keeps_and_delete_deletes(line):
    line.run("up", manifest(line, "brief"))
    refused = line.run("volumes", "delete", "brief/data", status=STATUS["bad_state"][1]).stderr
    assert "supercloud down brief" in refused
    ambiguous = line.run("volumes", "inspect", "data", status=STATUS["not_found"][1]).stderr
    assert "brief/data, stored/data" in ambiguous
    assert "kept, with their data: data" in line.run("down", "brief").stdout
    assert re.search(r"^brief/data .* kept ", line.run("volumes").stdout, re.MULTILINE)
    assert "is gone, with all that was in it" in line.run("volumes", "delete", "brief/data").stdout
    assert [row["ucloud"] for row in line.json("volumes")] == ["stored"]
    line.run("down", "--volumes", "brief", status=STATUS["not_found"][1])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["volumes", "what"], 2, "invalid choice"),
        (["volumes", "inspect"], 2, "a volume is missing"),
        (["volumes", "snapshot", "data"], 2, "a snapshot's name is missing"),
        (["volumes", "rotate-key"], 2, "a U-Cloud is missing"),
        (["volumes", "inspect", "nothing"], 3, "no volume 'nothing'"),
        (["volumes", "inspect", "stored/nothing"], 3, "has no volume nothing"),
        (["volumes", "snapshot", "data", "No Name"], 2, "snapshot"),
        (["volumes", "accept", "data"], 6, "nothing to accept"),
    ],
)
def test_wrong_words_are_told(line, words, status, message):
    error = line.run(*words, status=status).stderr
    assert message in error
    assert error.startswith("error: ")


def test_completion_offers_actions_and_volumes(line):
    def offered(*words):
        return line.run("_complete", "--", *words).stdout.split()

    assert "forget-snapshot" in offered("volumes", "")
    assert offered("volumes", "inspect", "") == ["data", "stored/data"]
    assert "--root" in offered("volumes", "accept", "--")
