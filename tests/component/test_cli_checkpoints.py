"""``supercloud checkpoint``, ``restore`` and ``checkpoints``, and what else tells of checkpoints."""

import re

import pytest

from supercloud.model.errors import STATUS
from support import oci
from support.commandline import CommandLine, control_plane

MANIFEST = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: {name}
providers: [{{name: cloud, kind: fake, options: {{hosts: 2}}}}, {{name: far, kind: fake}}]
platform: {{checkpoint: {{keep: 2}}}}
environments:
  - {{name: web, kind: container, image: 'oci:web', checkpoint: {{every: {every}, keep: 3}}}}
"""


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    line = CommandLine(tmp_path_factory.mktemp("cli"))
    layer = oci.layer(oci.file("serve", b"serve"))
    oci.Layout(line.directory / "web", [layer], {"Cmd": ["/serve"]}).write()
    with control_plane(line):
        line.run("up", manifest(line))
        yield line


def manifest(line, name="kept", every="1h"):
    (line.directory / f"{name}.yaml").write_text(MANIFEST.format(name=name, every=every))
    return f"{name}.yaml"


def platform_of(line, ucloud="kept"):
    return line.json("inspect", ucloud)["platforms"][0]["name"]


def test_plan_tells_of_checkpoints_and_their_bucket(line):
    planned = line.run("plan", manifest(line, "told")).stdout
    assert "checkpoints every 1h, 3 kept)" in planned
    assert re.search(r"^\+ bucket/supercloud-checkpoints  \(4GiB, at \w+/\w", planned, re.MULTILINE)
    assert re.search(
        r"^\+ checkpoints/\S+  \(.* -> .* when asked for, 2 kept", planned, re.MULTILINE
    )
    often = line.run("plan", manifest(line, "told", "3s"), status=STATUS["invalid"][1])
    assert re.match(
        r"error: told.yaml:7:\d+ environments\[0\].checkpoint.every: found '3s'", often.stderr
    )
    assert "10s to 30d" in often.stderr


def test_one_is_taken_shown_and_restored(line):
    assert "CHECKPOINT" not in line.run("ps", "--ucloud", "kept").stdout
    assert "supercloud checkpoint kept/web takes one" in line.run("checkpoints", "web").stdout
    done = line.run("checkpoint", "web").stdout
    assert re.search(r"^ok environment/web: take a checkpoint \([0-9.]+ s\)$", done, re.MULTILINE)
    assert "kept/web: checkpoint 1, stood still for 1 ms (all of its memory)" in done
    (view,) = line.json("checkpoint", "kept/web")
    assert (view["last"], view["task"]["done"]) == (2, True)
    header, row = line.run("ps").stdout.splitlines()
    assert header.split()[-1] == "CHECKPOINT"
    assert re.search(r" 2, \d+s ago$", row)
    (shown,) = line.json("ps")
    assert shown["checkpoint"] == 2
    header, *rows = line.run("checkpoints", "web").stdout.splitlines()
    assert header.split()[:3] == ["NUMBER", "AGE", "ENGINE"]
    assert [row.split()[0] for row in rows] == ["2", "1"]
    restored = line.run("restore", "web", "--checkpoint", "1").stdout
    assert "kept/web is back at checkpoint 1, on " in restored
    assert "checkpoints" in line.json("inspect", "web")
    newest = line.json("restore", "web")
    assert newest["number"] == 2


def test_a_platform_is_checkpointed_and_restored(line):
    name = platform_of(line)
    done = line.run("checkpoint", "--platform", name).stdout
    assert f"kept/{name}: checkpoint 1" in done
    assert f"kept/{name} is back at checkpoint 1" in line.run("restore", "--platform", name).stdout


def test_the_list_says_when_the_next_one_comes(line):
    header, *rows = line.run("checkpoints").stdout.splitlines()
    assert header.split()[:4] == ["NAME", "OF", "STATE", "EVERY"]
    (row,) = [row for row in rows if row.startswith("web ")]
    assert re.match(r"web +environment +waiting +1h +\d/3 ", row)
    listed = line.json("checkpoints", "--ucloud", "kept")
    assert {item["of"] for item in listed} == {"environment", "platform"}
    assert line.json("checkpoints", "kept") == listed, "a U-Cloud's, by its name"


def test_their_bucket_is_not_deleted_by_name(line):
    shown = line.run("buckets").stdout
    assert "supercloud-checkpoints" in shown
    refused = line.run(
        "buckets", "delete", "kept/supercloud-checkpoints", status=STATUS["bad_state"][1]
    )
    assert "supercloud checkpoints delete" in refused.stderr


def test_down_keeps_them_or_takes_them(line):
    line.run("up", manifest(line, "brief"))
    line.run("checkpoint", "brief/web")
    refused = line.run("checkpoints", "delete", "brief/web", status=STATUS["bad_state"][1])
    assert "by the manifest of brief" in refused.stderr
    down = line.run("down", "brief").stdout
    assert "kept, with their data: web (supercloud checkpoints)" in down
    assert re.search(r"^brief/web .* kept ", line.run("checkpoints").stdout, re.MULTILINE)
    assert "are gone" in line.run("checkpoints", "delete", "brief/web").stdout
    line.run("up", manifest(line, "brief"))
    line.run("checkpoint", "brief/web")
    down = line.run("down", "brief", "--checkpoints").stdout
    assert "kept" not in down
    assert [row for row in line.json("checkpoints") if row["ucloud"] == "brief"] == []
    line.run("down", "brief", "--checkpoints", status=STATUS["not_found"][1])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["checkpoint"], 2, "a name is missing"),
        (["checkpoint", "nothing"], 3, "no checkpoints of 'nothing'"),
        (["restore"], 2, "one name is needed"),
        (["restore", "web", "--platform", "x"], 2, "one name is needed"),
        (["restore", "web", "--checkpoint", "99"], 3, "no checkpoint 99 of web"),
        (["restore", "web", "--to", "nowhere"], 3, "no provider nowhere"),
        (["checkpoints", "delete"], 2, "a name is missing"),
        (["checkpoints", "kept/nothing"], 3, "no checkpoints of nothing"),
        (["checkpoints", "what", "web"], 2, "allowed is delete"),
    ],
)
def test_wrong_words_are_told(line, words, status, message):
    error = line.run(*words, status=status).stderr
    assert message in error
    assert error.startswith("error: ")


def test_completion_offers_what_can_be_checkpointed(line):
    def offered(*words):
        return line.run("_complete", "--", *words).stdout.split()

    assert "kept/web" in offered("checkpoint", "")
    assert "kept/web" in offered("checkpoint", "web", "kept/w")
    assert "web" in offered("restore", "")
    assert offered("checkpoints", "delete", "kept/w") == ["kept/web"]
    assert {"checkpoint", "checkpoints"} <= set(offered("check"))
