"""Checkpoints in a manifest: durations, what is kept, and where none can be taken."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supercloud.control.manifest import dump, parse
from supercloud.model.durations import format_duration, parse_duration
from supercloud.model.errors import Invalid, Unsupported, UserError
from supercloud.model.resources import Checkpointing

HEAD = """\
apiVersion: supercloud.dev/v1
kind: UCloud
name: demo
providers: [{name: here, kind: fake}]
volumes: [{name: data, size: 1MiB}]
"""


def web(more="", volumes=""):
    return (
        f"environments:\n  - {{name: web, kind: container, image: 'docker://x/web'{more}"
        f"{volumes}}}\n"
    )


def read(text):
    return parse(HEAD + text, file="m.yaml", directory=Path("/"))


def problem(text):
    with pytest.raises(UserError) as refused:
        read(text)
    return refused.value


def test_how_often_and_how_many_are_read():
    (environment,) = read(web(", checkpoint: {every: 10m, keep: 7}")).environments
    assert environment.checkpoint == Checkpointing(every_s=600, keep=7)


def test_an_empty_one_means_when_asked_for():
    (environment,) = read(web(", checkpoint: {}")).environments
    assert environment.checkpoint == Checkpointing(every_s=0, keep=5)


def test_left_out_there_are_none():
    ucloud = read(web())
    assert ucloud.environments[0].checkpoint is None
    assert ucloud.platform.checkpoint is None
    assert ucloud.checkpoint.capacity_bytes == 0


def test_platforms_and_the_store_have_theirs():
    ucloud = read("checkpoint: {capacity: 2GiB}\nplatform: {checkpoint: {every: 1h}}\n")
    assert ucloud.platform.checkpoint == Checkpointing(every_s=3600)
    assert ucloud.checkpoint.capacity_bytes == 2 << 30
    assert parse(dump(ucloud), file="m", directory=Path("/")) == ucloud


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{every: 9s}", "10s to 30d"),
        ("{every: 31d}", "10s to 30d"),
        ("{every: 0s}", "10s to 30d"),
        ("{every: 600}", "a duration such as"),
        ("{every: ten minutes}", "a duration such as"),
        ("{every: [10m]}", "a duration such as"),
        ("{every: -5m}", "a duration such as"),
        ("{every: 99999999999999999999s}", "a duration such as"),
        ("{keep: 0}", "1 to 100"),
        ("{keep: 101}", "1 to 100"),
        ("{often: 10m}", "unknown field"),
        ("yes", "a mapping"),
        ("", "a mapping"),
    ],
)
def test_what_is_wrong_is_told_at_its_place(text, message):
    error = problem(web(f", checkpoint: {text}"))
    assert isinstance(error, Invalid)
    assert message in error.message
    assert error.where.startswith("m.yaml:7:")
    assert "environments[0].checkpoint" in error.where


def test_a_bare_number_gets_a_hint():
    assert problem(web(", checkpoint: {every: 600}")).hint == "did you mean '600s'?"


def test_an_environment_that_writes_to_a_raw_volume_is_refused_with_the_reason(monkeypatch):
    writes = web(", checkpoint: {}", ", volumes: [{name: data, path: /data}]")
    reads = web(", checkpoint: {}", ", volumes: [{name: data, path: /data, read_only: true}]")
    read(writes)
    monkeypatch.setitem(globals(), "HEAD", HEAD.replace("1MiB}", "1MiB, format: raw}"))
    error = problem(writes)
    assert isinstance(error, Unsupported)
    assert "environments[0].checkpoint" in error.where
    assert "'data', which it may write to and which is raw" in error.message
    read(reads)


@pytest.mark.parametrize("how", ["", ", read_only: true"])
def test_platforms_are_not_checkpointed_where_raw_volumes_are_used(monkeypatch, how):
    uses = web("", f", volumes: [{{name: data, path: /d{how}}}]")
    text = "platform: {checkpoint: {}}\n" + uses
    read(text)
    monkeypatch.setitem(globals(), "HEAD", HEAD.replace("1MiB}", "1MiB, format: raw}"))
    read(uses)
    error = problem(text)
    assert isinstance(error, Unsupported)
    assert "platform.checkpoint" in error.where
    assert "'data', which 'web' uses and which is raw" in error.message


def test_the_bucket_of_checkpoints_is_nobodys():
    error = problem("buckets: [{name: supercloud-checkpoints, quota: 1GiB}]\n")
    assert "store's own" in error.message


@given(st.integers(1, 10**8))
def test_a_duration_survives_being_written(seconds):
    assert parse_duration(format_duration(seconds)) == seconds
